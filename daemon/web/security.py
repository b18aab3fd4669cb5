"""
Access control: checks Host, Origin and token of every request, and sets the headers of every response.

A foreign page can make a browser send requests to us (CSRF), and a foreign name can be made to resolve to our address
(DNS rebinding). So a request with an unknown Host or a foreign Origin is refused. A change needs POST and the token:
either in a cookie that only our own page sends, together with our own Origin, or in the Authorization header, which no
foreign page can set.
"""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.settings.sections import WebSettings
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.words import shell_path

TOKEN_NAME = "web-token"  # noqa: S105 - a file's name
_TOKEN_BYTES = 32
READING = frozenset({"GET", "HEAD"})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FORBIDDEN, _MISDIRECTED, _SEE_OTHER = 403, 421, 303
#: Headers of our own pages; a route may set stricter ones.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    # Not "no-referrer", with which browsers send no Origin with a form.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def load_token(state_folder: Path) -> str:
    """
    Return the token in `web-token` in `state_folder`; the first call creates that file, readable by its owner only.

    Raises `DropforgeError` if the file holds no token, `OSError` if it cannot be read or created.
    """
    path = state_folder / TOKEN_NAME
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            file.write(secrets.token_urlsafe(_TOKEN_BYTES))
    token = durable.read_regular(path).decode("ascii", "ignore").strip()
    if len(token) < _TOKEN_BYTES:
        raise DropforgeError(f"there is no token in {path}", f"remove it, and a new one is made: rm {shell_path(path)}")
    return token


def cookie_name(token: str) -> str:
    """Return the name of the token's cookie, unique per token, as browsers share cookies between ports."""
    return f"dropforge_{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def holds_token(request: Request, token: str) -> bool:
    """Return whether a request has the token, in a cookie or in the Authorization header."""
    return _same(request.cookies.get(cookie_name(token), ""), token) or _in_header(request, token)


class Guard:
    """ASGI middleware that refuses forbidden requests before any route."""

    def __init__(self, app: ASGIApp, settings: WebSettings, token: str) -> None:
        """Guard `app`: requests need a loopback host or one of `settings`; changes (all, if `closed`) need `token`."""
        self._app = app
        self._token = token
        self._all = settings.closed
        self._hosts = {*_LOOPBACK, *(name.lower() for name in settings.hosts), settings.address.host} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it to the application; add the security headers that the response lacks."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there is no web socket here
        request = Request(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._visit(request) or self._refusal(request)
        await (answer or self._app)(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """Return 421 to a foreign request, 403 to one without the token, else `None`; static files need no token."""
        if self._is_foreign(request):
            return PlainTextResponse("asked for by a name, or from a page, that is not ours\n", _MISDIRECTED)
        reads = request.method in READING
        if reads and not self._all:
            return None
        if request.url.path.startswith("/static/") and reads:
            return None
        by_cookie = holds_token(request, self._token) and not _in_header(request, self._token)
        if not holds_token(request, self._token):
            return PlainTextResponse("the token is missing: open the address that `dropforge web` prints\n", _FORBIDDEN)
        if not reads and by_cookie and "origin" not in request.headers:
            return PlainTextResponse("a change from a browser must say its Origin\n", _FORBIDDEN)
        return None

    def _is_foreign(self, request: Request) -> bool:
        host = _host(request.headers.get("host", ""))
        if host not in self._hosts:
            return True
        origin = request.headers.get("origin")
        # Either scheme: a proxy in front of us may use https.
        ours = {f"{scheme}://{request.headers['host']}".lower() for scheme in ("http", "https")}
        return origin is not None and origin.lower() not in ours

    def _visit(self, request: Request) -> Response | None:
        """Answer GET /?token=TOKEN of our own: set the cookie and redirect to /, or 403; else return `None`."""
        given = parse_qs(request.url.query).get("token")
        if request.url.path != "/" or request.method != "GET" or not given or self._is_foreign(request):
            return None
        if not _same(given[0], self._token):
            return PlainTextResponse("not the token: open the address that `dropforge web` prints\n", _FORBIDDEN)
        answer = RedirectResponse("/", _SEE_OTHER)
        answer.set_cookie(cookie_name(self._token), self._token, httponly=True, samesite="strict")
        return answer


def _host(header: str) -> str:
    """Return the host of a Host header in lower case, without its port; empty if there is none or it is malformed."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _in_header(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and _same(given.strip(), token)


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
