"""The page's server: receives webhooks and sends server-sent events; both require a token."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .board import Board, Event
from .payload import InvalidPayload, read

HERE = Path(__file__).parent
MOST_BODY = 32 * 2**20  # maximum bytes of a message
STILL_HERE = 15.0  # seconds between keep-alive messages to a browser
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}  # only our own files can run or load; plotly adds styles to the page


class Guard:
    """Requires the token: runs send it as "Bearer", browsers as "Basic" with any name. Credentials that browsers send
    automatically (Basic) allow only reading, so that other sites can't misuse them."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        authorization = dict(scope["headers"]).get(b"authorization", b"")
        if self._knows(authorization, scope["method"]):
            return await self.app(scope, receive, with_headers)
        challenge = {"WWW-Authenticate": 'Basic realm="dreambooth-lab", charset="UTF-8"'}
        await PlainTextResponse("the token is missing or wrong", 401, challenge)(scope, receive, with_headers)

    def _knows(self, authorization: bytes, method: str) -> bool:
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"basic" and method in ("GET", "HEAD"):
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != b"bearer":
            return False
        return secrets.compare_digest(given, self.token)


def build(token: str) -> Starlette:
    """The application, with an empty board.

    Args:
        token: required from runs and browsers.
    """
    board = Board()

    async def hook(request: Request) -> Response:
        body = bytearray()
        if int(request.headers.get("content-length") or 0) > MOST_BODY:
            return PlainTextResponse(f"more than {MOST_BODY} bytes", 413)
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                return PlainTextResponse(f"more than {MOST_BODY} bytes", 413)
        try:
            board.receive(read(bytes(body)))
        except InvalidPayload as error:
            return PlainTextResponse(str(error), 422)
        return Response(status_code=204)

    async def picture(request: Request) -> Response:
        png = board.png(request.path_params["number"])
        return Response(png, media_type="image/png") if png else PlainTextResponse("gone", 404)

    async def events(request: Request) -> Response:
        queue, first = board.join(), board.snapshot()

        async def stream() -> AsyncIterator[str]:
            try:
                for event in first:
                    yield _sent(event)
                while True:
                    try:
                        coming = await asyncio.wait_for(queue.get(), STILL_HERE)
                    except TimeoutError:
                        yield ": still here\n\n"
                        continue
                    if coming is None:
                        return
                    yield _sent(coming)
            finally:
                board.leave(queue)

        return StreamingResponse(stream(), media_type="text/event-stream")

    def page(name: str) -> Route:
        return Route("/" if name == "page.html" else f"/{name}", lambda request: FileResponse(HERE / name))

    async def plotly(request: Request) -> Response:
        return Response(get_plotlyjs(), media_type="text/javascript")

    routes = [
        page("page.html"), page("page.css"), page("page.js"), Route("/plotly.js", plotly), Route("/hook", hook, methods=["POST"]),
        Route("/events", events), Route("/picture/{number:int}", picture),
    ]  # fmt: skip
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)])


def _sent(event: Event) -> str:
    return f"data: {json.dumps(event)}\n\n"
