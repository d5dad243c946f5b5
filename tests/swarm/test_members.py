"""Members that sleep, move, come twice, go at once or are turned out, as real processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import swarmtrain as st
from swarmtrain_peer import host
from swarmtrain_peer.spawn import child_environment, spawn_peer
from swarmtrain_protocols.errors import NotAuthorised, UsageError
from tests.swarm.harness import (
    CHANNEL,
    WAIT_S,
    Seat,
    Swarm,
    closing_all,
    poll_until,
    wait_same_stand,
)
from tests.swarm.synthetic import Plan, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NAP_S = 58.0
"""Twenty seconds until its links count as dead, thirty more until it counts as lost."""
ACCUSATIONS = ("peer_fault", "member_suspended", "quorum_lost", "conflicting_certificates")


def train(seat: Seat, key: int) -> Trainer:
    return Trainer(seat.site, Plan(key=key, phase_s=0.1)).start()


def rounds(seat: Seat) -> int:
    found = seat.status()["channels"].get(CHANNEL)
    return int(found["round"]) if found is not None else -1


def nap(seat: Seat, seconds: float) -> None:
    """As a laptop that is closed: the process stands still, and its links die meanwhile."""
    assert seat.process is not None
    seat.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)  # tidy: allowed because the nap itself is under test
    seat.process.send_signal(signal.SIGCONT)


def contributed(seat: Seat, member: str, since: int) -> None:
    seat.wait_event("round_opened", lambda r: member in r["contributors"], since, timeout_s=60.0)


def test_a_member_and_a_sole_steward_wake_up_and_blame_nobody(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found()
        plain = {"votes": False}
        ada, bob = (swarm.enter(n, founder.ticket(), config=plain) for n in ("ada", "bob"))
        with closing_all(*(train(s, k) for k, s in enumerate((founder, ada, bob), 1))):
            poll_until(lambda: rounds(ada) >= 2, "training")
            nap(ada, NAP_S)
            woken = founder.last_seq
            assert ada.wait_event("stood_still")["slept_s"] == pytest.approx(NAP_S, abs=5.0)
            contributed(founder, ada.id, woken)
            assert founder.events("member_left"), "it was let go meanwhile, and is back"
            before = {seat: seat.last_seq for seat in (founder, ada, bob)}
            aborted = founder.status()["rounds_aborted"]
            nap(founder, 15.0)  # the only steward: nothing can be agreed on meanwhile
            founder.wait_event("stood_still", since_seq=before[founder])
            for seat in (ada, bob):
                contributed(founder, seat.id, before[founder])
            after = founder.status()
            assert after["rounds_aborted"] <= aborted + 1
        told = [r for r in founder.events(since_seq=before[founder]) if r["name"] in ACCUSATIONS]
        told += [r for r in ada.events() if r["name"] in ("peer_fault", "member_suspended")]
        assert not told, told
        wait_same_stand([founder, ada, bob])
        swarm.check_hashes()


def test_two_processes_with_one_identity(tmp_path: Path) -> None:
    """On one machine the lock tells them apart, on two the others do."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(config={"trains": False})
        ada = swarm.enter("ada", founder.ticket(), config={"trains": False})
        bob = swarm.enter("bob", founder.ticket(), config={"trains": False})
        founder.wait_event("stewards_changed", lambda r: len(r["voters"]) == 3)
        again = subprocess.run(
            [sys.executable, "-m", "swarmtrain_peer", str(ada.site.folder)],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert again.returncode == UsageError.exit_code and "in use" in again.stderr
        # Another machine with a copy of the whole folder.
        copy = tmp_path / "copy"
        shutil.copytree(
            ada.site.home, copy, ignore=shutil.ignore_patterns("*.sock", "lock", "port", "peer.log")
        )
        twin = Seat(type(ada.site)(copy / "runs" / ada.site.folder.name), "twin")
        swarm.seats.append(twin)
        with pytest.raises(NotAuthorised, match="identity"):
            twin.process = spawn_peer(twin.site, timeout_s=30.0)
            twin.follow()
            assert twin.process.wait(60.0) == NotAuthorised.exit_code
            raise NotAuthorised(twin.site.output_path.read_text())
        assert ada.process is not None and ada.process.poll() is None
        assert ada.status()["members"] == 3
        assert not [r for s in (founder, bob) for r in s.events("conflicting_certificates")]


def test_a_member_that_moves_is_found_again_and_one_that_goes_at_once_says_so(
    tmp_path: Path,
) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(config={"trains": False})
        ada = swarm.enter("ada", founder.ticket(), config={"votes": False})
        bob = swarm.enter("bob", founder.ticket(), config={"votes": False})
        with closing_all(train(ada, 1), train(bob, 2)):
            poll_until(lambda: rounds(ada) >= 2, "training")
            old = ada.address
            ada.kill()
            ada.site.port_path.unlink()  # another port: as a machine with another address
            seen = founder.last_seq
            ada.start()
            assert ada.address != old
            contributed(founder, ada.id, seen)

            def known() -> bool:
                peers = {p["id"]: p for p in bob.call("peers")["peers"]}
                return peers[ada.id]["addresses"] == [ada.address] and peers[ada.id]["connected"]

            poll_until(known, "bob has found ada again")
            seen = founder.last_seq
            began = time.monotonic()
            assert bob.process is not None
            bob.call("leave", {"now": True})
            founder.wait_event("member_left", lambda r: r["peer"] == bob.id, seen, timeout_s=10.0)
            assert time.monotonic() - began < 10.0, "others did not have to find out"


def test_a_wall_clock_that_is_hours_off_matters_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records would have expired for the others, and theirs for it."""
    with st.Peer.start(name="founder") as founder:
        ticket = founder.ticket
        with st.Peer.start(ticket=ticket, name="ada") as ada, st.Peer.start(ticket=ticket) as bob:
            time_of = bob._runtime.time
            monkeypatch.setattr(time_of, "_wall_s", lambda: host.wall_s() + 3 * 3600.0)
            poll_until(lambda: abs(time_of.wall.off_s + 3 * 3600.0) < 5.0, "it goes by the others")
            bob.dht.store("from bob", 7, 60.0)
            ada.dht.store("from ada", 8, 60.0)
            assert (ada.dht.get("from bob"), bob.dht.get("from ada")) == (7, 8)
            assert founder.all_reduce(np.ones(4, np.float32), expect=1).weight == 1.0
