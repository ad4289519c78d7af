"""What a program of `warm.offer` does. Few imports: it is started for every recipe."""

import json
import os
import signal
import socket
import sys

COLD = (1 << 16).to_bytes(4, "big")  # the answer that is no status of a process


def ask(address: str, python: str) -> None:
    """Be the process that `python <sys.argv[1:]>` would be."""
    message = json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, _: server.send(bytes([number])))
        socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(message)
        answer = server.recv(4)
    if answer == COLD:
        os.execv(python, [python, *sys.argv[1:]])
    if not answer:
        sys.exit(f"{address}: the server is gone, see its log")
    code = os.waitstatus_to_exitcode(int.from_bytes(answer, "big"))
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
