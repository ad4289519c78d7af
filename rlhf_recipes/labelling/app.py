"""The page: one pair at a time, a form that keeps a choice, then the next pair."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from rlhf_recipes import drawing
from rlhf_recipes.labelling.choices import Session
from rlhf_recipes.labelling.guard import CLOSED, HEADERS, Guard, policy

TEMPLATE = Path(__file__).with_name("page.html.jinja")
PLACES = ("left", "right", "tie", "skip")
LARGEST, FIELDS = 2**16, 8  # bytes and fields of a form
NOTE = 2000  # characters of a note
MOST_SECONDS = 3600.0  # what lay open for longer was no decision


def build(guard: Guard, sessions: dict[str, Session], port: int, finished: Callable[[str], None]) -> FastAPI:
    """The app.

    Args:
        sessions: annotator -> what they are shown.
        port: in the cookie's name, since a browser sends a cookie to every port of a host.
        finished: is told who has pressed "Finish" with nothing left.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    cookie, shown = f"label_{port}", {}

    @app.middleware("http")
    async def guarded(request: Request, call_next):
        request.state.nonce = secrets.token_urlsafe(16)
        response = await _asked(request, guard, cookie, call_next)
        response.headers.update(HEADERS)
        response.headers["Content-Security-Policy"] = policy(request.state.nonce)
        return response

    @app.get("/")
    async def page(request: Request) -> Response:
        session = sessions[request.state.annotator]
        item = session.current()
        if item:
            shown[session.annotator] = (item.key, time.monotonic())
        response = _page(request, guard, session)
        # Strict: no other site's link or form brings it along.
        token = guard.tokens[session.annotator]
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
        return response

    @app.post("/choose")
    async def choose(request: Request) -> Response:
        session, form = sessions[request.state.annotator], request.state.form
        if form.get("place") not in PLACES:
            return _closed("That is no choice.", 400)
        key, begun = shown.get(session.annotator, (None, 0.0))
        seconds = round(min(time.monotonic() - begun, MOST_SECONDS), 1) if key == form.get("item") else None
        session.choose(form.get("item", ""), form["place"], form.get("note", "").strip()[:NOTE], seconds)
        return RedirectResponse("/", 303)

    @app.post("/undo")
    async def undo(request: Request) -> Response:
        sessions[request.state.annotator].undo()
        return RedirectResponse("/", 303)

    @app.post("/finish")
    async def finish(request: Request) -> Response:
        session = sessions[request.state.annotator]
        if session.left:
            return RedirectResponse("/", 303)
        finished(session.annotator)
        return _page(request, guard, session, thanked=True)

    return app


async def _asked(request: Request, guard: Guard, cookie: str, call_next) -> Response:
    """The answer, or why there is none; `request.state` gets `annotator` and, of a POST, `form`."""
    host = request.headers.get("host")
    if not guard.knows_host(host):
        return _closed("This is not the address of the page. " + CLOSED, 421)
    annotator = guard.annotator(request.query_params.get("token")) if request.method == "GET" else None
    annotator = annotator or guard.annotator(request.cookies.get(cookie))
    if annotator is None:
        return _closed(CLOSED, 403)
    if request.method == "POST":
        form = await _form(request)
        if form is None:
            return _closed("That is too much for a form.", 413)
        if not guard.may_change(annotator, form.get("token"), request.headers.get("origin"), host):
            return _closed(CLOSED, 403)
        request.state.form = form
    request.state.annotator = annotator
    return await call_next(request)


async def _form(request: Request) -> dict[str, str] | None:
    """The fields of a form; None where it is too long, or has too many of them."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            return None
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError:
        return None
    return {key: values[-1] for key, values in fields.items()}


def _page(request: Request, guard: Guard, session: Session, thanked: bool = False) -> HTMLResponse:
    item = session.current()
    left, right = item.in_places() if item else ("", "")
    values = {
        "nonce": request.state.nonce, "token": guard.tokens[session.annotator], "annotator": session.annotator,
        "item": item, "left": left, "right": right, "note": session.note,
        "total": len(session.items), "done": session.done, "remaining": session.left, "thanked": thanked,
    }  # fmt: skip
    return HTMLResponse(drawing.rendered(TEMPLATE, **values))


def _closed(why: str, status: int) -> Response:
    return Response(f"{why}\n", status, media_type="text/plain")
