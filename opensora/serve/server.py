"""A socket, uvicorn on it, and an orderly end.

SIGTERM and SIGINT stop it: no new connections, the running job ends before its next step, and what
is not finished waits in the output folder for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from typing import Any

from opensora.errors import Preempted, UsageError, require
from opensora.serve.api import Service, build
from opensora.serve.config import ServeConfig

log = logging.getLogger("opensora.serve")
_GRACE_SECONDS = 5
_KEEP_ALIVE_SECONDS = 10


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens where the config says.

    Raises:
        UsageError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        return socket.create_server((config.host, config.port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error}): "
            "choose another --host or --port"
        ) from None


def address(opened: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, opened: socket.socket, *, token: str | None) -> int:
    """Serve until a signal comes.

    Returns:
        The exit code: 0, or 75 where jobs wait for the next start.

    Raises:
        UsageError: others can reach the host and there is no token.
    """
    server = prepare(service, token=token)
    # uvicorn raises the signal that stopped it once more when it is done.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[opened])
    service.store.close()
    left = sum(job.is_open for job in service.store.jobs())
    if left:
        log.warning("%d jobs wait; the same command goes on with them", left)
    return Preempted.exit_code if left else 0


def prepare(service: Service, *, token: str | None) -> Any:
    """The `uvicorn.Server` of a service.

    Raises:
        UsageError: others can reach the host and there is no token.
    """
    require("uvicorn", extra="serve", purpose="the HTTP service")
    import uvicorn

    service.config.check_exposure(token)
    app: Any = build(service, token=token)
    settings = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        http=_protocol(service.config.head_seconds),
        ws="none",
        lifespan="on",
        limit_concurrency=service.config.connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return uvicorn.Server(settings)


def _protocol(head_seconds: float) -> Any:
    """uvicorn's HTTP/1.1 with a bound that it lacks: how long the head of a request may take.

    Else connections that say nothing, or never end a head, would hold every place for ever.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_a_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect_a_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect_a_head(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._watch is None:
                self._watch = self.loop.call_later(head_seconds, self.transport.close)

        def _forget(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

    return Bounded
