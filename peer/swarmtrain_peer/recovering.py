"""Founder recovery on the disk of one surviving site: its log begins again (spec 04 §2.8).

The site must not be running. What was on its disk is kept beside the new log, and the site is the
only steward until others, who find it by the addresses that they know, are promoted.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from swarmtrain_peer.files import disk_errors
from swarmtrain_peer.keys import read_key_file
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, NotAuthorised
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.recovery import Plan, plan_recovery

_REFUSED = "only the founder begins a log again"
_TODO = (
    "bring founder.key of the site where the run was founded, or identity.key of the one that it "
    "was handed over to: --founder-key FILE"
)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery keeps and gives up. Ids are hex; ``rounds`` are the next ones by channel."""

    run: str
    steward: str
    generation: int
    kept_entries: int
    unproven_entries: int
    rounds: dict[str, int]
    members: list[str]
    stewards_lost: list[str]
    old_log: str


def founder_keys(site: Site, path: Path | None) -> list[Ed25519Keyring]:
    """Keys that may be the founder's: the one in ``path``, else those of this site.

    A run that was handed over obeys the identity of a member.

    Raises:
        NotAuthorised: there is none in ``path``.
        ConfigError: a file is damaged, or others may read it.
    """
    if path is None:
        return [key for key in (site.founder(), site.identity()) if key is not None]
    try:
        return [Ed25519Keyring(read_key_file(path).reveal())]
    except FileNotFoundError:
        raise NotAuthorised(_REFUSED, f"no key in {path}", _TODO) from None


def plan(site: Site, keys: list[Ed25519Keyring]) -> tuple[Plan, Recovered]:
    """What a recovery at ``site`` would do; nothing is written.

    Raises:
        NotAuthorised: the run obeys none of ``keys``.
        ConfigError: the site has no manifest, the run has ended, or the site was turned out.
        CheckpointError: the log on this disk is damaged, or empty.
    """
    manifest = site.manifest()
    if manifest is None:
        raise ConfigError(f"site {site.folder}", "it never got the run's manifest", "")
    keyring = site.identity()
    try:
        found = plan_recovery(manifest, RecordFile(site.log_path).load(), keyring, keys)
    except LocalProtocolError as error:
        raise NotAuthorised(_REFUSED, error.why, _TODO) from None
    recovery, ledger = found.log.recovery, found.ledger
    kept = site.log_path.with_name(f"log.before-{recovery.generation}")
    told = Recovered(
        run=manifest.run_id.hex(),
        steward=keyring.peer_id.hex(),
        generation=recovery.generation,
        kept_entries=found.log.cut + 1,
        unproven_entries=found.log.dropped,
        rounds={name: channel.round for name, channel in sorted(ledger.channels.items())},
        members=[member.id.hex() for member in ledger.ordered_members()],
        stewards_lost=[key.hex() for key in found.lost],
        old_log=str(kept),
    )
    return found, told


def recover_site(site: Site, keys: list[Ed25519Keyring]) -> Recovered:
    """Begin the log of a stopped site again; the old one is kept beside it.

    Raises:
        UsageError: a peer process serves the site.
        NotAuthorised, ConfigError, CheckpointError: see ``plan``.
        DiskFull: nothing was changed.
    """
    with site.lock():
        found, told = plan(site, keys)
        with disk_errors("keep", site.log_path):
            shutil.copy2(site.log_path, told.old_log)
        records = RecordFile(site.log_path)
        records.write([(found.log.record, True)])
        records.close()
    return told
