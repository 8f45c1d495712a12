"""What every request passes before a route sees it, and every answer before it leaves.

Pure ASGI: host, origin and token; the size and the pace of the body; security headers; one line in
the log and one count in the metrics. Nothing here knows videos.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from opensora.serve.config import ServeConfig, is_loopback
from opensora.serve.refusals import Refusal, quoted

log = logging.getLogger("opensora.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
BROKEN = "the server failed; its log has the reason"
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}


class Shield:
    """The outermost application.

    Args:
        token: that requests carry as `Authorization: Bearer TOKEN`; None asks for none.
        open_paths: that are answered without one.

    Attributes:
        answers: (method, status) -> how many, for /metrics.
    """

    def __init__(
        self, app: App, config: ServeConfig, *, token: str | None, open_paths: frozenset[str]
    ):
        self._app, self._config, self._open_paths = app, config, open_paths
        self._token = None if token is None else token.encode("ascii")
        self.answers: Counter[tuple[str, int]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # no websocket is spoken here
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, whole = 0, False

        async def answer(message: Message) -> None:
            nonlocal status, whole
            whole = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message.get("headers", ())}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                kept = [pair for pair in extra if pair[0] not in given]
                message = {**message, "headers": [*message.get("headers", ()), *kept]}
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), answer)
        except Refusal as refusal:
            await refuse(refusal, answer)
        except Exception:
            log.exception("a request broke the server")
            if status and not whole:  # half an answer is out: the connection ends here
                raise
            if not status:
                await refuse(Refusal("internal", BROKEN), answer)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.answers[method, status] += 1
            client = (scope.get("client") or ("-",))[0]
            log.info("%s %s %s %d", client, quoted(method), quoted(scope["path"], 100), status)

    def _admit(self, scope: Scope) -> None:
        """Host, origin, token, in this order: a page of another site learns nothing."""
        headers = _headers(scope)
        host = headers.get("host", "")
        if self._token is None and not is_loopback(_name(host)):
            # A name of another site that is pointed at this machine (DNS rebinding).
            raise Refusal(
                "foreign_host", "without a token only this machine's own names are answered, "
                "such as 127.0.0.1 and localhost",
            )  # fmt: skip
        origin = headers.get("origin")
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if (origin is not None and urlsplit(origin).netloc != host) or (
            foreign and scope["method"] not in ("GET", "HEAD")
        ):
            raise Refusal("foreign_origin", "pages of other sites are not answered")
        if self._token is None or scope["path"] in self._open_paths:
            return
        scheme, _, told = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(told.strip().encode("utf-8", "replace"), self._token)
        if scheme.lower() != "bearer" or not right:
            raise Refusal("invalid_token", "send the server's token: `Authorization: Bearer TOKEN`")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body as a whole, within `max_body` and `body_seconds`."""
        headers = _headers(scope)
        limit = self._config.max_body
        too_large = Refusal("body_too_large", f"the body is larger than {limit} bytes")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_large
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal("unsupported_media_type", "send the body without a content encoding")
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):  # a disconnection too
                        return bytes(body)
        except TimeoutError:
            raise Refusal("body_too_slow", "the body did not come in time") from None


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send a refusal as an answer."""
    body = json.dumps(refusal.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **refusal.headers,
    }
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    """Name -> value, the last where one comes twice; but two of what decides are refused."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in headers and key in ("host", "origin", "authorization", "content-length"):
            raise Refusal("foreign_host", f"the header {key} comes twice")
        headers[key] = value.decode("latin-1")
    return headers


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    told = False

    async def again() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
