"""Which site a training script belongs to, and its peer process.

Order: the ticket (argument, then ``SWARMTRAIN_TICKET``), ``SWARMTRAIN_SITE``, a run to found (the
``run`` argument or ``run.toml`` in the working folder), the only live site. None of them: offline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarmtrain_peer import host
from swarmtrain_peer.config import PeerConfig, load_settings
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.founding import found_run
from swarmtrain_peer.site import Site, default_home, enter_site, find_site, found_site, list_sites
from swarmtrain_peer.spawn import Supervisor, spawn_peer, stop_process
from swarmtrain_protocols.errors import ConfigError, QuorumLost
from swarmtrain_protocols.manifest import RunKeys, check_run_keys, run_keys_from_mapping
from swarmtrain_protocols.tickets import Ticket

RUN_FILE = Path("run.toml")
WATCH_INTERVAL_S = 0.5
TICKET_TIMEOUT_S = 30.0
RunArgument = str | os.PathLike[str] | Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class Place:
    """A site, and the run keys that the script asked for (to be checked against the run's)."""

    site: Site
    given: dict[str, object]
    founded: bool = False


def is_offline(environ: Mapping[str, str]) -> bool:
    """``SWARMTRAIN_OFFLINE`` set to anything but 0."""
    return environ.get("SWARMTRAIN_OFFLINE", "0") not in ("", "0")


def resolve(
    ticket: str | None,
    run: RunArgument,
    given: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    pinned: bool = False,
) -> Place | None:
    """The site to train at; ``None`` means offline.

    Args:
        run: run keys, or the path of a TOML file, of a run to found (or to check against).
        given: run keys from arguments of ``st.join``; they win over ``run``.
        pinned: a run that is founded pins the corpus that it names.

    Raises:
        ConfigError: a bad ticket, key or file.
        UsageError: several live sites and nothing to choose by.
    """
    if is_offline(environ):
        return None
    home = default_home(environ)
    file = None if isinstance(run, Mapping) or run is None else Path(run)
    if file is None and run is None and RUN_FILE.is_file():
        file = RUN_FILE
    settings = load_settings(file, environ)
    keys = {**settings.given_run, **(run if isinstance(run, Mapping) else {}), **given}
    text = ticket or environ.get("SWARMTRAIN_TICKET")
    if text:
        parsed = Ticket.parse(text)
        wanted = _with_vote(settings.peer, parsed)
        return Place(enter_site(home, parsed, wanted), keys)
    explicit = environ.get("SWARMTRAIN_SITE")
    if explicit:
        return Place(find_site(home, explicit), keys)
    live = [site for site in list_sites(home) if site.is_live()]
    if len(live) == 1:
        return Place(live[0], keys)
    if live:
        find_site(home)  # raises and lists them
    if run is None and file is None:
        return None
    found = found_run if pinned else found_site
    site = found(home, run_keys_from_mapping(keys), settings.peer)
    return Place(site, keys, founded=True)


def _with_vote(peer: PeerConfig, ticket: Ticket) -> PeerConfig:
    if not ticket.unverified.vote or peer.votes:
        return peer
    fields = {name: getattr(peer, name) for name in PeerConfig.__struct_fields__}
    return PeerConfig(**{**fields, "votes": True})


class OwnedPeer:
    """A peer process that this script started: restarted when it dies, ended with the script."""

    def __init__(self, site: Site) -> None:
        """Start it and wait until it answers.

        Raises:
            SwarmError: it did not start, with its own reason.
        """
        self._supervisor = Supervisor(self._report)
        self._one = self._supervisor.add("peer", lambda: spawn_peer(site))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="swarm-owner", daemon=True)
        self._thread.start()

    def _report(self, name: str, fields: dict[str, object]) -> None:
        said = " ".join(f"{key}={value}" for key, value in fields.items())
        sys.stderr.write(f"swarmtrain: {name} {said}\n")

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_INTERVAL_S):
            self._supervisor.poll()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of now."""
        return self._one.process

    def close(self) -> None:
        """Let it leave politely."""
        self._supervisor.expect_end()
        self._ended.set()
        self._thread.join()
        stop_process(self._one.process)


def ensure_peer(site: Site) -> OwnedPeer | None:
    """Start a peer process for ``site`` if none serves it, and say so on standard error."""
    if site.is_live():
        return None
    sys.stderr.write(f"swarmtrain: starting a peer process for {site.folder}\n")
    return OwnedPeer(site)


def show_ticket(site: Site) -> None:
    """Print a ticket for others to a run that was just founded."""
    args = {"role": "trainer", "vote": False, "expires_s": 0, "uses": 0}
    with site.connect() as client:
        ticket = client.call("ticket", args, TICKET_TIMEOUT_S)["ticket"]
    sys.stderr.write(f"swarmtrain: founded run {site.folder.name}; others join with\n  {ticket}\n")


def await_run_keys(site: Site, timeout_s: float, stop: threading.Event | None = None) -> RunKeys:
    """The run's keys, once the peer process has fetched the manifest.

    Raises:
        QuorumLost: it did not in time.
        RunMismatch: the manifest on disk is damaged.
    """
    deadline_s = host.mono_s() + timeout_s
    pause = stop or threading.Event()
    while (manifest := site.manifest()) is None:
        if host.mono_s() > deadline_s or pause.wait(0.05):
            raise QuorumLost(
                "the run's manifest did not arrive",
                f"waited {timeout_s:g} s for {site.manifest_path}",
                "is a member of the run in reach? See `swarmtrain doctor`",
            )
    return manifest.keys


def await_peer(site: Site, timeout_s: float, stop: threading.Event | None = None) -> None:
    """Wait until a peer process serves ``site``: it may be starting beside the trainer.

    Raises:
        ControlClosed: none does in time, or ``stop`` is set.
    """
    deadline_s = host.mono_s() + timeout_s
    pause = stop or threading.Event()
    while True:
        try:
            site.connect().close()
            return
        except ControlClosed:
            if host.mono_s() > deadline_s or pause.wait(0.05):
                raise


def check_given(keys: RunKeys, given: Mapping[str, object]) -> None:
    """Run keys that a script asks for must be the run's.

    Raises:
        ConfigError: one differs, or a key does not exist.
    """
    try:
        check_run_keys(keys, given)
    except ConfigError as error:
        raise ConfigError(f"st.join: {error.what}", error.why, error.todo) from None
