"""The page's address, for as long as somebody labels."""

import socket
import threading
from collections.abc import Callable

from rlhf_recipes.errors import Refusal
from rlhf_recipes.labelling.choices import Session
from rlhf_recipes.labelling.guard import LOCAL, Guard
from rlhf_recipes.text import line

SECONDS = 5  # that answers under way are given at the end


def serve(host: str, port: int, sessions: dict[str, Session], said: Callable[[str], None]) -> None:
    """Show the page until everybody has finished; Ctrl-C ends it as it ends any command.

    Args:
        port: 0: one that is free.
        said: takes a line for each person's address.

    Raises:
        Refusal: host or port cannot be had.
    """
    import uvicorn

    from rlhf_recipes.labelling import app

    guard, over = Guard.of(host, list(sessions)), threading.Event()
    bound = _bind(host, port)

    def finished(_: str) -> None:
        if not any(session.left for session in sessions.values()):
            over.set()

    built = app.build(guard, sessions, bound.getsockname()[1], finished)
    # No access log: the first line of a request holds the token.
    settings = uvicorn.Config(
        built, log_level="error", access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=SECONDS, forwarded_allow_ips=[],
    )  # fmt: skip
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()  # not the main thread, which hears the signals
    if not guard.is_local():
        said(
            f"warning: host={line(host)}: whoever is on this network and has an address below can label, and what is "
            "sent is not encrypted. ssh -L to a page on 127.0.0.1 is safer."
        )
    for name, address in addresses(guard, bound.getsockname()[1]).items():
        said(f"label: {line(name)}: {address}")
    try:
        while not over.wait(1.0):
            if not thread.is_alive():
                raise RuntimeError("the server of the page has ended")
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        bound.close()


def addresses(guard: Guard, port: int) -> dict[str, str]:
    """Each person's."""
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(guard.host, guard.host)
    name = f"[{name}]" if ":" in name else name
    return {person: f"http://{name}:{port}/?token={token}" for person, token in guard.tokens.items()}


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        local = "" if host in LOCAL else f" host={line(host)}"
        raise Refusal(
            f"port={port}{local}: cannot be had ({getattr(error, 'strerror', None) or error}). Choose another, or "
            "port=0 for one that is free."
        ) from error
    return bound
