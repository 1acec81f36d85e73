"""Refuse requests that do not use the app's host name or come from another site's page."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from stimage_sd.app._slides import SLIDES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Served = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")
#: paths of the files of Streamlit's download buttons, and of the slides' pieces
FILES = ("/media/", SLIDES)


class Guard:
    """Refuse requests from pages of other sites, and requests for files without the page's cookie.

    A site can point its own name at the app's server (DNS rebinding). Its page can then send requests to the app. The
    browser still sends the name of the site as ``Host``, so these requests can be recognized.

    Parameters
    ----------
    app
        The app behind the guard (ASGI).
    address
        Address where the server listens.
    port
        Port of the server. The cookie's name contains the port, because browsers send cookies to all ports of a host.
    names
        Further host names of the app, such as that of a proxy.
    """

    def __init__(self, app: Served, *, address: str, port: int, names: tuple[str, ...] = ()) -> None:
        self.app = app
        self.by_any_address = address in EVERYWHERE
        own_names = (socket.gethostname(),) if self.by_any_address else (address,)
        self.hosts = {host.lower().strip("[]") for host in (*LOCAL, *own_names, *names)}
        self.cookie, self.token = f"stimage-sd-{port}", secrets.token_urlsafe(32)
        self.visitor = visitor_cookie(port)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it with a reason."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # HTTP headers are latin-1
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._refusal(headers, scope["path"])
        if refusal is not None:
            await _refuse(scope, send, *refusal)
        elif scope["type"] == "http":
            await self.app(scope, receive, self._with_cookies(send, is_new=_cookie(headers, self.visitor) is None))
        else:
            await self.app(scope, receive, send)

    def allows_host(self, host: str) -> bool:
        """Return whether a ``Host`` header names the app."""
        name = _hostname(host)
        return name is not None and (name in self.hosts or (self.by_any_address and _is_address(name)))

    def _refusal(self, headers: list[tuple[str, str]], path: str) -> tuple[int, str] | None:
        """Return status and reason of a refusal, or `None` if the request is allowed."""
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1 or not self.allows_host(hosts[0]):
            return 400, (
                f"Expected a request to {' or '.join(sorted(self.hosts))}, found another host. Start the app with "
                "`--allow-host NAME` to serve it under another name."
            )
        origins = [value for name, value in headers if name == "origin"]
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return 403, "Expected a request from the app's page, found one from another site."
        if path.startswith(FILES) and not self._knows_token(headers):
            return 403, "Expected the cookie of the app's page, found none. Open the page first."
        return None

    def _knows_token(self, headers: list[tuple[str, str]]) -> bool:
        sent = _cookie(headers, self.cookie)
        return sent is not None and secrets.compare_digest(sent.encode(), self.token.encode())

    def _with_cookies(self, send: Send, *, is_new: bool) -> Send:
        """Add the cookie to every HTML response, and a random mark for a new visitor's browser."""
        cookies = {self.cookie: self.token, **({self.visitor: secrets.token_urlsafe(16)} if is_new else {})}
        values = [f"{name}={value}; HttpOnly; Path=/; SameSite=Strict".encode() for name, value in cookies.items()]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if any(name.lower() == b"content-type" and kind.startswith(b"text/html") for name, kind in headers):
                    message = {**message, "headers": [*headers, *((b"set-cookie", value) for value in values)]}
            await send(message)

        return sending


def visitor_cookie(port: int) -> str:
    """Return the name of the cookie that marks a visitor's browser."""
    return f"stimage-sd-{port}-visitor"


def _cookie(headers: list[tuple[str, str]], name: str) -> str | None:
    """Return the value of a cookie, or `None` if it was not sent."""
    for value in (value for header, value in headers if header == "cookie"):
        try:
            sent = SimpleCookie(value).get(name)
        except CookieError:
            continue
        if sent is not None:
            return sent.value
    return None


async def _refuse(scope: Message, send: Send, status: int, words: str) -> None:
    if scope["type"] == "websocket":
        # closing before the handshake makes the server answer 403
        await send({"type": "websocket.close", "code": 1008, "reason": words[:120]})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


def _hostname(host: str) -> str | None:
    """Return the name in a ``Host`` header in lower case, or `None` if the header is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises `ValueError` if the port is not a number
    except ValueError:
        return None
    if parts.netloc != host or "@" in host or parts.hostname is None:
        return None
    return parts.hostname.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
