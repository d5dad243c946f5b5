"""A site's folder: founding, entering, locking, finding."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_peer import site as sites
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import socket_address
from swarmtrain_peer.site import Site, enter_site, find_site, found_site, list_sites
from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import ConfigError, RunMismatch, UsageError
from swarmtrain_protocols.manifest import (
    Capability,
    RunKeys,
    Ticket,
    parse_capability,
    sign_capability,
)


def founded(home: Path, name: str = "a") -> Site:
    return found_site(home, RunKeys(name=name), PeerConfig(name="first", listen="127.0.0.1:0"))


def ticket_of(site: Site) -> Ticket:
    founder = site.founder()
    assert founder is not None
    capability = Capability(id=b"12345678", run=site.run_id, vote=True)
    return Ticket(("127.0.0.1:4000",), site.run_id, sign_capability(founder, capability))


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_founding_makes_a_run_whose_founder_can_sign(tmp_path: Path) -> None:
    site = founded(tmp_path)
    manifest = site.manifest()
    assert manifest is not None
    assert manifest.keys.name == "a"
    assert manifest.run_id == site.run_id
    assert site.folder == tmp_path / "runs" / site.run_id.hex()[:16]
    assert site.is_founder
    assert site.ticket() is None
    assert site.config().name == "first"
    founder = site.founder()
    assert founder is not None
    assert founder.peer_id == manifest.founder
    assert founder.peer_id != site.identity().peer_id
    assert mode(site.founder_path) == mode(site.identity_path) == 0o600
    assert mode(site.folder) & 0o077 == 0


def test_two_runs_of_equal_keys_are_two_runs(tmp_path: Path) -> None:
    assert founded(tmp_path).run_id != founded(tmp_path).run_id
    assert len(list_sites(tmp_path)) == 2


def test_entering_keeps_the_ticket_secret_and_the_identity_of_the_home(tmp_path: Path) -> None:
    first = founded(tmp_path / "one")
    ticket = ticket_of(first)
    site = enter_site(tmp_path / "two", ticket, PeerConfig(name="second"))
    assert site.run_id == first.run_id
    assert site.folder.name == first.folder.name
    assert not site.is_founder
    assert site.founder() is None
    assert site.manifest() is None
    assert site.ticket() == ticket
    assert mode(site.ticket_path) == 0o600
    assert site.identity().peer_id != first.identity().peer_id
    again = enter_site(tmp_path / "two", ticket, PeerConfig(name="renamed"))
    assert again == site
    assert again.config().name == "renamed"
    assert again.identity().peer_id == site.identity().peer_id
    manifest = first.manifest()
    assert manifest is not None
    site.save_manifest(first.manifest_path.read_bytes())
    capability = parse_capability(
        ticket.capability, founder=manifest.founder, run=site.run_id, wall_s=0.0
    )
    assert capability.vote


def test_a_manifest_of_another_run_is_refused(tmp_path: Path) -> None:
    first, other = founded(tmp_path / "one"), founded(tmp_path / "two")
    with pytest.raises(RunMismatch):
        first.save_manifest(other.manifest_path.read_bytes())
    damaged = bytearray(first.manifest_path.read_bytes())
    damaged[40] ^= 1
    first.manifest_path.write_bytes(damaged)
    with pytest.raises(RunMismatch):
        first.manifest()


def test_a_damaged_peer_file_names_itself(tmp_path: Path) -> None:
    site = founded(tmp_path)
    site.config_path.write_text('{"nmae": "x"}')
    with pytest.raises(ConfigError, match=r"peer\.json"):
        site.config()


@pytest.mark.parametrize("damage", [b"", b"zz", b"\xff\xfe", b"ab" * 31])
def test_damaged_files_are_config_errors(tmp_path: Path, damage: bytes) -> None:
    site = founded(tmp_path)
    site.ticket_path.write_bytes(damage)
    site.config_path.write_bytes(damage)
    for read in (site.ticket, site.config):
        with pytest.raises(ConfigError):
            read()
    (site.folder / "run").write_bytes(damage)
    with pytest.raises(ConfigError, match="run id"):
        _ = site.run_id


def test_one_process_serves_a_site(tmp_path: Path) -> None:
    site = founded(tmp_path)
    with site.lock():
        code = (
            "import sys; from pathlib import Path; from swarmtrain_peer.site import Site\n"
            "Site(Path(sys.argv[1])).lock()"
        )
        process = subprocess.run(
            [sys.executable, "-c", code, str(site.folder)],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode != 0
        assert "UsageError" in process.stderr
        assert f"process {os.getpid()} serves it" in process.stderr
    site.lock().release()


class _Listener:
    """Looks alive: something accepts on the control socket."""

    def __init__(self, site: Site) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        with socket_address(site.control_path) as address:
            self.socket.bind(address)
        self.socket.listen()

    def close(self) -> None:
        self.socket.close()


def test_the_only_live_site_is_found(tmp_path: Path) -> None:
    one, two = founded(tmp_path, "one"), founded(tmp_path, "two")
    with pytest.raises(UsageError, match="no peer process is running") as caught:
        find_site(tmp_path)
    assert caught.value.exit_code == 2
    first = _Listener(one)
    assert find_site(tmp_path) == one
    second = _Listener(two)
    with pytest.raises(UsageError) as caught:
        find_site(tmp_path)
    assert one.folder.name in caught.value.why
    assert two.folder.name in caught.value.why
    first.close()
    assert find_site(tmp_path) == two
    second.close()


def test_what_only_reads_the_disk_finds_the_only_site_though_it_is_stopped(tmp_path: Path) -> None:
    one = founded(tmp_path, "one")
    assert find_site(tmp_path, stopped=True) == one
    two = founded(tmp_path, "two")
    with pytest.raises(UsageError, match="no peer process is running"):
        find_site(tmp_path, stopped=True)
    live = _Listener(two)
    assert find_site(tmp_path, stopped=True) == two
    live.close()


def test_a_site_can_be_named_by_folder_or_first_digits(tmp_path: Path) -> None:
    one = founded(tmp_path)
    assert find_site(tmp_path, str(one.folder)) == one
    assert find_site(tmp_path, one.folder.name[:6]) == one
    with pytest.raises(UsageError):
        find_site(tmp_path, "zz")


def test_the_home_is_named_or_the_platforms(tmp_path: Path) -> None:
    assert sites.default_home({"SWARMTRAIN_HOME": str(tmp_path)}) == tmp_path
    assert "swarmtrain" in str(sites.default_home({}))
