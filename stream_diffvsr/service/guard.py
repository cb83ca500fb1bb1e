"""Checks on every request's sender and origin, and headers that restrict what browsers may do."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import problems
from .settings import LOOPBACK, Settings

COOKIE = "stream_diffvsr"
API, OPEN = "/api/", ("/api/v1/session", "/api/v1/openapi.json")
"""Paths under API require the token, except those in OPEN; the page itself contains nothing secret."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def cookie_of(token: str) -> str:
    """Return the value of the page's cookie, which proves knowledge of the token without containing it."""
    return hmac.new(token.encode(), b"stream-diffvsr page", hashlib.sha256).hexdigest()


def equal_in_constant_time(given: str, wanted: str) -> bool:
    """Whether two strings are equal; the time taken does not reveal how similar they are."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


class Guard:
    """ASGI middleware that answers bad requests with problem responses and adds HEADERS to every response."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, text in HEADERS.items():
                    headers[name] = text
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, guarded)
            return
        headers = {"WWW-Authenticate": "Bearer"} if refusal[0] == 401 else None
        await problems.problem_response(*refusal, headers)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and message with which to refuse a request, or None to accept it."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        # Without a token, only this machine is served: any other name may be a DNS rebinding attack.
        if not self.settings.token and _hostname(host) not in LOOPBACK:
            return (
                421,
                "This server accepts only the host names localhost and 127.0.0.1 unless --token is set.",
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _foreign(headers, host):
            return 403, "Requests from pages of other sites are refused."
        if self.settings.token and path.startswith(API) and path not in OPEN and not self._known(headers):
            return 401, "This server requires a token: send the header 'Authorization: Bearer TOKEN'."
        return None

    def _known(self, headers: Mapping[str, str]) -> bool:
        token = self.settings.token
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return equal_in_constant_time(given.strip(), token)
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and equal_in_constant_time(cookie.value, cookie_of(token))


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _foreign(headers: Mapping[str, str], host: str) -> bool:
    """Whether the browser's headers show that another site's page sent the request."""
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2] != host
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
