"""Who may talk to the page: the browser on this machine, or whoever holds the token.

Three attacks are meant. Another site in the same browser sends forms here: `Origin` must be ours. A foreign name is made to
point at this machine (DNS rebinding): `Host` must be one of ours. Somebody else on the network: without the token nothing is
answered. A body may have `LARGEST` bytes, which are counted as they come, since what a header says may be wrong.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "slider_token"
LARGEST = 32 * 2**20
"""Bytes of a request's body."""

SAFE = ("GET", "HEAD", "OPTIONS")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Guard:
    """What is asked of every request."""

    host: str
    """The address that is listened at."""

    token: str | None = field(default=None, repr=False)
    """Asked for where it is set."""

    def knows(self, host_header: str | None) -> bool:
        """Whether this `Host` may be us: a name of the loopback; with a token also an address or this machine's name."""
        name = (urlsplit(f"//{host_header or ''}").hostname or "").lower()
        if is_loopback(name) or name == self.host.lower():
            return True
        if self.token is None:
            return False
        return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def refusal(self, method: str, headers: Headers) -> str | None:
        """Why a request is not answered, before its token is looked at."""
        host = headers.get("host")
        if not self.knows(host):
            return "this name is not the page's own: open it by the address that `slider ui` printed"
        if method in SAFE:
            return None
        origin = headers.get("origin")
        if origin is None or urlsplit(origin).netloc.lower() != (host or "").lower():
            return "the request comes from another site, or from none: changes are made from the page itself"
        return None

    def holds(self, given: str | None) -> bool:
        """Whether a token is the right one, in a time that tells nothing of it."""
        return self.token is None or hmac.compare_digest((given or "").encode(), self.token.encode())


class Gate:
    """The guard as ASGI middleware; also adds the headers that every answer has."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._answer(scope)
        sending = _with_headers(send)
        if answer is not None:
            await answer(scope, receive, sending)
            return
        await self._limited(scope, receive, sending)

    def _answer(self, scope: Scope) -> ASGIApp | None:
        """What is answered instead of the page; None lets the request through."""
        headers, method = Headers(scope=scope), str(scope["method"])
        refusal = self._guard.refusal(method, headers)
        if refusal is not None:
            return PlainTextResponse(refusal + "\n", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST:
            return _too_large()
        if self._guard.holds(_cookie(headers)):
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if self._guard.token is not None and self._guard.holds(given) and method == "GET":
            entered = RedirectResponse(str(scope["path"]), 303)  # the token leaves the address bar and the history
            entered.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
            return entered
        return PlainTextResponse("open the address with the token that `slider ui` printed\n", 401)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and break off one whose body is longer than it said or may be."""
        seen, began = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > LARGEST:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLargeError:
            if not began:
                await _too_large()(scope, receive, send)


class _TooLargeError(Exception):
    """A body has more bytes than are taken."""


def _too_large() -> PlainTextResponse:
    return PlainTextResponse(f"more than {LARGEST // 2**20} MiB are not taken at once\n", 413, headers={"Connection": "close"})


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _cookie(headers: Headers) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
