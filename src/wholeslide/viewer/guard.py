"""Who may ask the viewer: nobody but the browser that it was started for."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "wholeslide_token"
ASKED_BY_PAGE = "X-Wholeslide"
"""A header that pages of other sites cannot send."""

_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses what does not come from the viewer's own page.

    A page of another site may let a browser ask ``127.0.0.1``, or a name that it has pointed there: so the ``Host`` must be one of
    ours, and whatever changes something must carry a header that only our own page can send.

    Args:
        app: what is guarded.
        hosts: names and addresses that ``Host`` may have; ``None``: any, as a token is wanted.
        token: what an address must end with once, ``?token=…``; then a cookie has it. ``None``: nothing is wanted.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str] | None, token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("this is not the viewer's address\n", 400)
        if self._token is not None and not self._is_token(_cookie(headers.get("cookie", ""))):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if not self._is_token(given):
                return PlainTextResponse("open the address, with its token, that `wholeslide view` has printed\n", 401)
            entered = RedirectResponse(scope["path"], 303)
            entered.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return entered
        if scope["method"] not in ("GET", "HEAD") and ASKED_BY_PAGE not in headers:
            return PlainTextResponse("only the viewer's own page may ask for this\n", 403)
        return None

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value
