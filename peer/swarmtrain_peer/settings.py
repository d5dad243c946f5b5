"""What one peer is started with: everything that its runtime does not find out for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain_peer import host
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import Manifest
from swarmtrain_protocols.tickets import Ticket


@dataclass(kw_only=True)
class PeerSettings:
    """What one peer needs to start. ``records`` and ``state`` None: nothing is kept on disk."""

    keyring: Ed25519Keyring
    run: bytes
    name: str
    listen: str = "127.0.0.1:0"
    announce: tuple[str, ...] = ()
    trains: bool = False
    holds_state: bool = False
    votes: bool = True
    manifest: Manifest | None = None
    founder: Ed25519Keyring | None = None
    ticket: Ticket | None = None
    records: Path | None = None
    state: Path | None = None
    events: Path | None = None
    tickets: Path | None = None
    """Which tickets were made here; no secrets."""
    save_manifest: Callable[[bytes], object] | None = None
    port: Path | None = None
    """Remembers which port was free: others find a restarted site where the log says it is."""
    contacts: Path | None = None
    """Remembers peers of the DHT, so that a restarted site finds them without its seeds."""
    checkpoints_kept: int = 2
    fast_kernels: bool = False
    """Compile (or load) numba kernels in the background; the same bits, and more memory."""
    caps_bytes_per_s: tuple[int, int] = (0, 0)
    """Up and down over all connections; 0: none."""
    donor_share: float = 0.2
    """Of the measured uplink, for members that fetch state."""
    relay: str = "auto"
    """See ``PeerConfig.relay``."""
    port_mapping: bool = True
    threads: int = field(default_factory=lambda: max(2, min(4, host.cpu_count())))
