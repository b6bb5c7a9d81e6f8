"""A server on a socket of its own, until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from composer_path.serving.connection import TimedConnection

_CONNECTIONS = 256
_GRACE_SECONDS = 3  # for answers that are being sent when the server ends


def listen(host: str, port: int) -> socket.socket:
    """A socket on which nobody else listens; ValueError where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"--host: must be a name or address of this machine, found {host!r}; correct it") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host: must be an address of this machine, found {host!r}; correct it") from None
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"--port {port}: can't be listened on ({why}); choose another, or 0 for any") from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def address_of(listening: socket.socket) -> str:
    """Where it is found, as browsers want it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def server_of(app: ASGIApp) -> uvicorn.Server:
    """A server that writes no log of its own."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=TimedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )


def serve_until_interrupted(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once all is ended
        server_of(app).run(sockets=[listening])
