"""``swarmtrain dashboard``: the page of the local peer, or of any run that a ticket opens.

With a ticket this machine becomes a member that only looks: it holds no state, does not vote, makes
outgoing links only, and leaves when the dashboard ends. Its home is a temporary folder, so that a
site that trains on the same machine is never touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from swarmtrain.cli.options import Home, SiteOption, home_of, read_ticket_text, site_of
from swarmtrain.cli.output import EXIT_SIGINT, EXIT_SIGTERM, Output
from swarmtrain.dashboard.bind import check_bind, split_bind
from swarmtrain_peer import host
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, enter_site, list_sites
from swarmtrain_peer.spawn import error_for_exit, output_tail, spawn_peer, stop_process
from swarmtrain_protocols.errors import NoPeerReachable, SwarmError, UsageError
from swarmtrain_protocols.tickets import Ticket

LEAVE_S = 5.0
MEMBER_S = 60.0


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not an ``Exception``: nothing on the way may take it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Stopped``."""
    before = {one: signal.signal(one, _stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)


def find_ticket(text: str | None, ticket_file: Path | None, site: str | None) -> Ticket | None:
    """The ticket that was given in any way; None if a site was named, or nothing was given.

    Raises:
        ConfigError: malformed. UsageError: the file cannot be read, or both were given.
    """
    given = text is not None or ticket_file is not None
    if site is not None:
        if given:
            raise UsageError(
                "--site and a ticket", "only one of them says what to show", "drop one"
            )
        return None
    if not given and not os.environ.get("SWARMTRAIN_TICKET"):
        return None
    return Ticket.parse(read_ticket_text(text, ticket_file))


@contextlib.contextmanager
def observing(ticket: Ticket, output: Output) -> Iterator[Site]:
    """A site in a temporary home, whose peer process is a member that only looks.

    Raises:
        SwarmError: nobody answers, or the run refuses the ticket.
    """
    home = Path(tempfile.mkdtemp(prefix="swarmtrain-dashboard-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        name = f"dashboard on {PeerConfig().display_name}"[:32]
        config = PeerConfig(
            name=name, listen="", trains=False, holds_state=False, votes=False, dashboard=""
        )
        site = enter_site(home, ticket, config)
        process = spawn_peer(site)
        await_member(site, process)
        output.note(f"looking at run {site.folder.name} as {name!r}")
        yield site
    finally:
        if process is not None:
            _leave(site, process)
        shutil.rmtree(home, ignore_errors=True)


def await_member(site: Site, process: subprocess.Popen[bytes]) -> None:
    """Wait until the log lists the site.

    Raises:
        NoPeerReachable: it does not in time. SwarmError: the peer process ended, as its exit says.
    """
    deadline_s = host.mono_s() + MEMBER_S
    while host.mono_s() < deadline_s:
        with contextlib.suppress(SwarmError), site.connect() as client:
            peers = client.call("peers", timeout_s=LEAVE_S)["peers"]
            if any(peer["is_self"] for peer in peers):
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(0.05)
            why = " | ".join(output_tail(site.output_path).splitlines()[-3:])
            raise error_for_exit("the run cannot be looked at", exit_code, why, "get a new ticket")
    raise NoPeerReachable(
        "the run did not let this machine in",
        f"waited {MEMBER_S:g} s for its log",
        "is a majority of its stewards up?",
    )


def _leave(site: Site, process: subprocess.Popen[bytes]) -> None:
    """Politely if the run still answers, and soon in any case."""
    with contextlib.suppress(SwarmError), site.connect() as client:
        client.call("leave", {"now": False}, timeout_s=LEAVE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_S)
    stop_process(process)


def dashboard(
    bind: Annotated[str, typer.Option("--bind", help="host:port; port 0: any.")] = "127.0.0.1:8470",
    ticket: Annotated[
        str | None, typer.Option("--ticket", help="Look at this run; - for standard input.")
    ] = None,
    ticket_file: Annotated[
        Path | None, typer.Option("--ticket-file", help="Read the ticket there.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Needed beyond loopback.")
    ] = None,
    site: SiteOption = None,
    home: Home = None,
) -> None:
    """Serve the web dashboard of the local peer, or with a ticket that of any run.

    Example: ``swarmtrain dashboard --ticket-file run.ticket`` on any machine that reaches a member.
    """
    from swarmtrain.dashboard.server import serve

    output = Output()
    token = None if token_file is None else token_file.read_text().strip()
    check_bind(split_bind(bind)[0], token)
    parsed = find_ticket(ticket, ticket_file, site)
    try:
        with signals_stop(), contextlib.ExitStack() as stack:
            local = _local(home_of(home), parsed)
            if parsed is None:
                place = site_of(home, site)
            elif local is not None:
                place = local
            else:
                place = stack.enter_context(observing(parsed, output))
            serve(place, bind, token=token, note=output.note)
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_code) from None


def _local(home: Path, ticket: Ticket | None) -> Site | None:
    """A live site of the ticket's run on this machine: nobody needs to join for that."""
    if ticket is None:
        return None
    sites = [one for one in list_sites(home) if one.run_id == ticket.run]
    return next((one for one in sites if one.is_live()), None)
