"""What a program of `warm.offer` does. It is started for every recipe, so it imports what is in Python itself: to
import json, signal and socket takes longer than all else."""

import _signal
import _socket
import marshal
import os
import sys

COLD = (1 << 16).to_bytes(4, "big")  # the answer that is no status of a process


def ask(address: str, python: str) -> None:
    """Be the process that `python <sys.argv[1:]>` would be."""
    message = marshal.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)})
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect(address)
    for each in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(each, lambda number, _: server.send(bytes([number])))
    outputs = b"".join(number.to_bytes(4, sys.byteorder) for number in range(3))
    server.sendmsg([len(message).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, outputs)])
    server.sendall(message)
    answer = server.recv(4)
    if answer == COLD:
        os.execv(python, [python, *sys.argv[1:]])
    if not answer:
        sys.exit(f"{address}: the server is gone, see its log")
    code = os.waitstatus_to_exitcode(int.from_bytes(answer, "big"))
    if code < 0:
        if code != -_signal.SIGKILL:
            _signal.signal(-code, _signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
