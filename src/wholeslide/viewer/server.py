"""Serves a gallery until it is interrupted."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from wholeslide.errors import ConfigError
from wholeslide.viewer.app import make_app
from wholeslide.viewer.gallery import Gallery

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    run_dir: Path,
    *,
    slides: Path | None = None,
    pixels: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[str], None],
) -> None:
    """Serve a run's slides over HTTP until the process is interrupted.

    Args:
        run_dir: The run.
        slides: Folder of its slides; left out: where they were in training.
        pixels: Folder of the slides that features were made of, where the run was trained on such.
        host: Address of this machine that is listened on. On any but a loopback address, whoever asks needs a token.
        port: 0 takes one that is free.
        on_ready: Is given the address to open.

    Raises:
        RunError: no such run, or one without weights.
        CohortError: the folder has none of its slides.
        ConfigError: it cannot be listened on.
    """
    gallery = Gallery(run_dir, slides=slides, pixels=pixels)
    listening = _listen(host, port)
    bound_host, bound_port = listening.getsockname()[:2]
    local = ipaddress.ip_address(bound_host).is_loopback
    token = None if local else secrets.token_urlsafe(24)
    app = make_app(gallery, hosts={*LOOPBACK, host} if local else None, token=token)
    name = f"[{bound_host}]" if ":" in bound_host else bound_host
    if ipaddress.ip_address(bound_host).is_unspecified:
        name = socket.gethostname()
    on_ready(f"http://{name}:{bound_port}/" + (f"?token={token}" if token else ""))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens before anything is promised.

    Raises:
        ConfigError: no such address, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError.single(
            f"no address of this machine: {host}", where="--host", remedy="give 127.0.0.1, or this machine's own"
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # whoever asks from here on waits until he is served
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError.single(
            f"{host} port {port} cannot be listened on: {getattr(error, 'strerror', None) or error}",
            where="--port",
            remedy="give another one, or 0 for any that is free",
        ) from error
    return listening
