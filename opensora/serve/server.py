"""A socket, uvicorn on it, and an orderly end.

SIGTERM and SIGINT stop it: no new connections, the running job ends before its next step, and what
is not finished waits in the output folder for the next start.
"""

from __future__ import annotations

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
        http="h11",
        ws="none",
        lifespan="on",
        limit_concurrency=service.config.connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    # uvicorn raises the signal that stopped it once more when it is done.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[opened])
    service.store.close()
    left = sum(job.is_open for job in service.store.jobs())
    if left:
        log.warning("%d jobs wait; the same command goes on with them", left)
    return Preempted.exit_code if left else 0
