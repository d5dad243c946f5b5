"""Founder recovery on a disk: what is asked for, what is refused, what is kept."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_peer.recovering import founder_keys, plan, recover_site
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_protocols.core import Persist
from swarmtrain_protocols.errors import CheckpointError, ConfigError, NotAuthorised, UsageError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.manifest import RunKeys, make_genesis
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A founder's site whose log has two entries."""
    made = found_site(tmp_path / "home", RunKeys(), PeerConfig())
    founder, me = made.founder(), made.identity()
    manifest = made.manifest()
    assert founder is not None and manifest is not None
    log = LogCore(
        run=made.run_id,
        founder=founder.peer_id,
        keyring=me,
        rng=random.Random(1),
        now=0.0,
        records=(),
        genesis=make_genesis(founder, made.run_id, me.peer_id),
        snapshot_of=lambda: b"",
    )
    records: list[bytes] = []
    for now in (0.0, 5.0, 10.0):  # the newest certificate is written by the clock
        log.tick(now)
        records += [x.record for x in log.drain() if isinstance(x, Persist)]
    file = RecordFile(made.log_path)
    file.write([(record, False) for record in records])
    file.close()
    return made


def test_nothing_is_written_before_it_is_done(site: Site) -> None:
    before = site.log_path.read_bytes()
    _, told = plan(site, founder_keys(site, None))
    assert site.log_path.read_bytes() == before
    assert (told.kept_entries, told.unproven_entries, told.stewards_lost) == (2, 0, [])
    assert told.steward == site.identity().peer_id.hex() and told.run == site.run_id.hex()


def test_the_old_log_is_kept_and_the_new_one_leads_at_once(site: Site) -> None:
    before = site.log_path.read_bytes()
    told = recover_site(site, founder_keys(site, None))
    assert Path(told.old_log).read_bytes() == before
    manifest = site.manifest()
    assert manifest is not None
    log = LogCore(
        run=site.run_id,
        founder=manifest.founder,
        keyring=site.identity(),
        rng=random.Random(1),
        now=0.0,
        records=RecordFile(site.log_path).load(),
        genesis=None,
        snapshot_of=lambda: b"",
    )
    assert log.is_leader and log.generation == told.generation
    assert recover_site(site, founder_keys(site, None)).generation // 1000 == 2


def test_a_running_site_is_left_alone(site: Site) -> None:
    before = site.log_path.read_bytes()
    with site.lock(), pytest.raises(UsageError, match="in use"):
        recover_site(site, founder_keys(site, None))
    assert site.log_path.read_bytes() == before


def test_whose_key_it_must_be(site: Site, tmp_path: Path) -> None:
    capability = sign_capability(
        founder_keys(site, None)[0], Capability(b"ticket-1", site.run_id, vote=True)
    )
    ticket = Ticket(("127.0.0.1:1",), site.run_id, capability)
    other = enter_site(tmp_path / "other", ticket, PeerConfig())
    assert [key.peer_id for key in founder_keys(other, None)] == [other.identity().peer_id]
    with pytest.raises(NotAuthorised, match="no key in"):
        founder_keys(other, tmp_path / "nothing")
    brought = founder_keys(other, site.founder_path)
    assert [key.peer_id for key in brought] == [founder_keys(site, None)[0].peer_id]
    with pytest.raises(ConfigError, match="manifest"):
        plan(other, brought)
    with pytest.raises(NotAuthorised, match="its founder is"):
        plan(site, [Ed25519Keyring(bytes(range(32)))])


def test_a_disk_without_a_log_or_with_a_damaged_one(site: Site) -> None:
    key = founder_keys(site, None)
    data = bytearray(site.log_path.read_bytes())
    data[20] ^= 1
    site.log_path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        recover_site(site, key)
    site.log_path.unlink()
    with pytest.raises(CheckpointError, match="no log"):
        recover_site(site, key)
