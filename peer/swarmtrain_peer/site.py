"""A site's folder: ``$SWARMTRAIN_HOME/runs/RUN16/``, one site per home and run.

====================  =========================================================================
``HOME/identity.key``  the site's Ed25519 seed, 0600; one identity per home
``lock``              held by the one peer process that serves the site
``manifest``          canonical bytes of the run's manifest; absent until it was fetched
``ticket``            how to find and enter the run, 0600; absent on the founder's site
``founder.key``       only where the run was founded, 0600
``peer.json``         ``config.PeerConfig``
``tickets.json``      which tickets were made here, without their secrets
``port``              the port it listened on, to be found there again after a restart
``corpus``            the run's corpus, as one file that the trainer reads and others fetch
``log`` ``state``     durable records of the log; checkpoints and result bytes
``events.jsonl``      ``events.EventLog``
``control.sock``      ``controlserver.ControlServer``, 0600
``peer.log``          what the peer process printed
====================  =========================================================================
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import platformdirs

from swarmtrain_peer import host
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import ControlClient, ControlClosed
from swarmtrain_peer.files import FileSystem, disk_errors, write_synced
from swarmtrain_peer.keys import create_key_file, load_or_create_identity, read_key_file
from swarmtrain_protocols.errors import ConfigError, UsageError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import Manifest, RunKeys, Ticket, make_manifest, parse_manifest

RUN_DIGITS = 16


def default_home(environ: Mapping[str, str]) -> Path:
    """``SWARMTRAIN_HOME``, else the platform's folder for user data."""
    named = environ.get("SWARMTRAIN_HOME")
    return Path(named) if named else Path(platformdirs.user_data_dir("swarmtrain"))


def write_private(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step, mode 0600, durable.

    Raises:
        DiskFull, CheckpointError: it cannot be written; what was there still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors("write", path):
        write_synced(FileSystem(), temporary, [data])
        os.replace(temporary, path)


class SiteLock:
    """Held while a peer process serves a site; the system drops it when the process dies."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._handle, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(self._handle)
            raise UsageError(
                f"site {path.parent} is in use",
                f"process {owner} serves it",
                "use `swarmtrain status` to look at it, or `swarmtrain leave` to end it",
            ) from None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go. Safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> SiteLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Site:
    """Paths and files of one site. Nothing is cached: the files are the truth."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder.parent.parent

    @property
    def identity_path(self) -> Path:
        return self.home / "identity.key"

    @property
    def lock_path(self) -> Path:
        return self.folder / "lock"

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest"

    @property
    def ticket_path(self) -> Path:
        return self.folder / "ticket"

    @property
    def founder_path(self) -> Path:
        return self.folder / "founder.key"

    @property
    def tickets_path(self) -> Path:
        return self.folder / "tickets.json"

    @property
    def config_path(self) -> Path:
        return self.folder / "peer.json"

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def state_path(self) -> Path:
        return self.folder / "state"

    @property
    def corpus_path(self) -> Path:
        return self.folder / "corpus"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def port_path(self) -> Path:
        return self.folder / "port"

    @property
    def contacts_path(self) -> Path:
        return self.folder / "contacts"

    @property
    def traffic_path(self) -> Path:
        """What has been used of a data cap."""
        return self.folder / "traffic.json"

    @property
    def stages_path(self) -> Path:
        """The line to the trainer of a pipeline run."""
        return self.folder / "stages.sock"

    @property
    def control_path(self) -> Path:
        return self.folder / "control.sock"

    @property
    def output_path(self) -> Path:
        return self.folder / "peer.log"

    @property
    def run_id(self) -> bytes:
        """The run's 32-byte id, from the ``run`` file.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.folder / "run"
        try:
            run = bytes.fromhex(path.read_text("ascii").strip())
        except ValueError:
            run = b""
        if len(run) != 32:
            raise ConfigError(f"{path}", "not the 64 hex digits of a run id", "enter the run again")
        return run

    @property
    def is_founder(self) -> bool:
        return self.founder_path.exists()

    def identity(self) -> Ed25519Keyring:
        """The site's keyring; made on first use.

        Raises:
            ConfigError: the key file is damaged or others may read it.
        """
        return load_or_create_identity(self.identity_path)

    def founder(self) -> Ed25519Keyring | None:
        """The founder's keyring where this site founded the run, else None.

        Raises:
            ConfigError: the key file is damaged or others may read it.
        """
        try:
            return Ed25519Keyring(read_key_file(self.founder_path).reveal())
        except FileNotFoundError:
            return None

    def manifest(self) -> Manifest | None:
        """The run's manifest, checked against the run id; None if it was not fetched yet.

        Raises:
            RunMismatch: the file is damaged.
        """
        try:
            data = self.manifest_path.read_bytes()
        except FileNotFoundError:
            return None
        return parse_manifest(data, self.run_id)

    def save_manifest(self, data: bytes) -> Manifest:
        """Check and keep manifest bytes that came from a peer.

        Raises:
            RunMismatch: they are not this run's.
        """
        manifest = parse_manifest(data, self.run_id)
        write_private(self.manifest_path, data)
        return manifest

    def ticket(self) -> Ticket | None:
        """The ticket this site entered with; None on the founder's site.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            return Ticket.parse(self.ticket_path.read_text("ascii", "replace"))
        except FileNotFoundError:
            return None

    def config(self) -> PeerConfig:
        """Peer keys of this site.

        Raises:
            ConfigError: ``peer.json`` is damaged.
        """
        try:
            return msgspec.json.decode(self.config_path.read_bytes(), type=PeerConfig)
        except FileNotFoundError:
            return PeerConfig()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{self.config_path}", str(error), "remove it") from None

    def save_config(self, config: PeerConfig) -> None:
        write_private(self.config_path, msgspec.json.format(msgspec.json.encode(config)))

    def lock(self) -> SiteLock:
        """Become the one process that serves this site.

        Raises:
            UsageError: another process does.
        """
        return SiteLock(self.lock_path)

    def connect(self) -> ControlClient:
        """A client of the peer process that serves this site.

        Raises:
            ControlClosed: none does.
        """
        return ControlClient(self.control_path)

    def is_live(self) -> bool:
        """True if a peer process answers on the control socket."""
        try:
            self.connect().close()
        except ControlClosed:
            return False
        return True


def _make(home: Path, run: bytes) -> Site:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = home / "runs" / run.hex()[:RUN_DIGITS]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    site = Site(folder)
    marker = folder / "run"
    if marker.exists() and site.run_id != run:
        raise ConfigError(
            f"site {folder}",
            "it belongs to another run whose id begins alike",
            "use another SWARMTRAIN_HOME",
        )
    write_private(marker, run.hex().encode())
    site.state_path.mkdir(mode=0o700, exist_ok=True)
    return site


def found_site(
    home: Path,
    keys: RunKeys,
    config: PeerConfig,
    *,
    entropy: Callable[[int], bytes] = host.entropy,
) -> Site:
    """Found a run: a new founder key, a manifest, and the first site.

    Raises:
        ConfigError: the keys do not fit into a manifest, or the folder cannot be used.
    """
    seed = entropy(32)
    manifest = make_manifest(keys, Ed25519Keyring(seed).peer_id, entropy(16))
    site = _make(home, manifest.run_id)
    create_key_file(site.founder_path, seed)
    write_private(site.manifest_path, manifest.to_bytes())
    site.save_config(config)
    return site


def enter_site(home: Path, ticket: Ticket, config: PeerConfig) -> Site:
    """The site of ``ticket``'s run in ``home``, new or from before; the ticket is the newest."""
    site = _make(home, ticket.run)
    write_private(site.ticket_path, str(ticket).encode())
    site.save_config(config)
    return site


def list_sites(home: Path) -> list[Site]:
    """All sites of ``home``, by name of folder."""
    runs = home / "runs"
    if not runs.is_dir():
        return []
    return [Site(folder) for folder in sorted(runs.iterdir()) if (folder / "run").is_file()]


def site_at(home: Path, explicit: str) -> Site:
    """The site named by its folder or by the first digits of its run id.

    Raises:
        UsageError: no such site, or several.
    """
    folder = Path(explicit)
    if (folder / "run").is_file():
        return Site(folder.resolve())
    sites = [site for site in list_sites(home) if site.folder.name.startswith(explicit.lower())]
    if len(sites) == 1:
        return sites[0]
    raise UsageError(
        f"site {explicit}",
        "several runs begin like that" if sites else "no such folder, and no run begins so",
        "use --site FOLDER",
    )


def find_site(home: Path, explicit: str | None = None, *, stopped: bool = False) -> Site:
    """The site that a command means: ``explicit`` (a folder or the first digits of a run id, from
    a flag or ``SWARMTRAIN_SITE``), else the only live site of ``home``; with ``stopped`` (commands
    that only read the disk) else the only one there is.

    Raises:
        UsageError: no such site, none is live, or several are (it lists them).
    """
    if explicit:
        return site_at(home, explicit)
    sites = list_sites(home)
    live = [site for site in sites if site.is_live()]
    if len(live) == 1:
        return live[0]
    if stopped and not live and len(sites) == 1:
        return sites[0]
    if not live:
        raise UsageError(
            "no peer process is running",
            f"{len(sites)} stopped site(s) in {home}",
            "start one with `swarmtrain join TICKET` or `swarmtrain up`",
        )
    names = ", ".join(site.folder.name for site in live)
    raise UsageError(
        "several peer processes are running", names, "choose one with --site or SWARMTRAIN_SITE"
    )
