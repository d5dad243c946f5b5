"""Serving the dashboard of one site in this process, until a signal ends it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from swarmtrain.dashboard.app import build_app
from swarmtrain.dashboard.bind import check_bind, is_loopback, split_bind
from swarmtrain.dashboard.feed import Feed
from swarmtrain_peer.site import Site, write_private
from swarmtrain_peer.spawn import watch_owner
from swarmtrain_protocols.addresses import join_address
from swarmtrain_protocols.errors import ConfigError


def open_socket(bind_host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is in use or not of this machine.
    """
    family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((bind_host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"dashboard address {join_address(bind_host, port)}",
            error.strerror or str(error),
            "choose another with --bind, port 0 takes any free one",
        ) from None
    sock.listen(128)
    return sock


def serve(
    site: Site,
    bind: str,
    *,
    token: str | None = None,
    ready_file: Path | None = None,
    hosts: tuple[str, ...] = (),
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until whoever started this process is gone.

    ``note`` is told what a person should see; ``ready_file`` gets ``{"url": …}`` once the socket
    listens.

    Raises:
        ConfigError: the address cannot be used, or is public and there is no token.
    """
    bind_host, port = split_bind(bind)
    check_bind(bind_host, token)
    sock = open_socket(bind_host, port)
    port = int(sock.getsockname()[1])
    shown = "127.0.0.1" if bind_host in ("0.0.0.0", "::") else bind_host
    url = f"http://{join_address(shown, port)}/"
    if not is_loopback(bind_host):
        note("warning: plain HTTP beyond this machine; put TLS in front of it")
    feed = Feed.of_site(site.connect)
    names = (bind_host, socket.gethostname(), *hosts)
    app = build_app(feed, token=token, hosts=names, connect=site.connect)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=3,
        limit_concurrency=512,
    )
    server = uvicorn.Server(config)

    def end() -> None:
        server.should_exit = True

    watch_owner(end)
    feed.start()
    try:
        if ready_file is not None:
            write_private(ready_file, json.dumps({"url": url}).encode())
        note(f"dashboard: {url}")
        asyncio.run(server.serve(sockets=[sock]))
    finally:
        feed.stop()
        sock.close()
