"""The page's few addresses, and the guard before them. GET alone: nothing here changes a run.

The guard looks at each request before anything else does. A page of another site cannot read what is here (no CORS
header is ever sent, and browsers say where a request is from), cannot show it in a frame, and cannot come by a name of
its own that leads to this machine (DNS rebinding). The page itself runs its own script and no other, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.text import shown
from server.dashboard.access import Access
from server.dashboard.feed import Feed

PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the token may be in the page's address
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

log = logging.getLogger("cloister.server")


def app(feed: Feed, access: Access) -> ASGIApp:
    """The dashboard: `/` is the page, `/events` what it follows."""
    text = PAGE.read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": content_policy(text)}

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers=policy)

    async def events(request: Request) -> Response:
        return Events(feed)

    routes = [Route("/", page), Route("/events", events)]
    return Guard(Starlette(routes=routes, exception_handlers={Exception: _broken}), access)


def content_policy(page: str) -> str:
    """Runs the page's own script and style, known by their hashes, and lets it ask this server alone."""
    script, style = (_hash_of(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def _hash_of(page: str, tag: str) -> str:
    (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


async def _broken(request: Request, error: Exception) -> Response:
    """A bug of ours: told in our log, for the web server's own is off."""
    log.error("the dashboard met an error", exc_info=error)
    return PlainTextResponse("the dashboard met an error; the server's log has it\n", 500)


class Events(StreamingResponse):
    """A page's events, for as long as it is open."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed.frames(), media_type="text/event-stream")
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.page():
            await super().__call__(scope, receive, send)


class Guard:
    """Lets those requests through that `Access` allows, and adds the headers that every answer has.

    | request                                             | answer |
    | --- | --- |
    | any but GET                                         | 405 |
    | a Host that is not ours                             | 421 |
    | events, for a page of another site                  | 403 |
    | no token and no cookie of it, where there is a token | 403 |
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        given = request.query_params.get("token", "") if scope["path"] == "/" else ""
        is_new = bool(self._access.token) and self._access.accepts(given)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if is_new and message["status"] == 200:
                    headers.append("Set-Cookie", self._cookie())
            await send(message)

        refusal = self._refusal(request, is_new)
        await (refusal or self._app)(scope, receive, answer)

    def _refusal(self, request: Request, is_new: bool) -> Response | None:
        if request.method != "GET":
            return PlainTextResponse("only GET is answered here\n", 405, {"Allow": "GET"})
        host = request.headers.get("host", "")
        if not self._access.is_ours(host):
            return PlainTextResponse(f"this server is not called {shown(host)!r}; open it by its own name\n", 421)
        # Older browsers say nothing; they cannot read the answer either.
        site = request.headers.get("sec-fetch-site", "none")
        if request.url.path != "/" and site not in ("same-origin", "none"):
            return PlainTextResponse("this is not for pages of other sites\n", 403)
        if self._access.token and not is_new and not self._access.knows(request.cookies):
            return PlainTextResponse("open this page once as .../?token=TOKEN, with the token of this server\n", 403)
        return None

    def _cookie(self) -> str:
        name, value = self._access.cookie
        # On loopback there is no TLS, where some browsers drop cookies that say Secure.
        secure = "; Secure" if self._access.has_tls else ""
        return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict{secure}"
