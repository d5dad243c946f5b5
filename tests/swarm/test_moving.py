"""A run outlives the machines it began on, and every disk but one member's memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swarmtrain_peer.incomingfile import PAGE
from swarmtrain_protocols import limits
from swarmtrain_protocols.merkle import HASH_BYTES, leaf_hash
from tests.swarm.harness import WAIT_S, Seat, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.test_faults import restart_all, round_of, train, wait_round, wait_stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

CHUNKS = 13
"""Of a state that takes six seconds to come, its header counted."""


def leave(seat: Seat) -> None:
    """Politely; the process ends by itself."""
    assert seat.process is not None
    seat.call("leave", {"now": False})
    assert seat.process.wait(2 * WAIT_S) == 0
    seat.stop()


def test_a_run_moves_to_other_machines_and_survives_a_power_cut_there(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2)
        old = [founder, swarm.enter("ada", founder.ticket())]
        trainers = [train(seat, key, phase_s=0.05) for key, seat in enumerate(old, 1)]
        with closing_all(*trainers):
            wait_round(founder, 4)
            ticket = founder.ticket()
            new = [swarm.enter(name, ticket, start=False) for name in ("bob", "cyd", "dan")]
            restart_all(new)
            for seat in new:
                wait_stand(seat, round_of(founder))
            moved = [train(seat, key, phase_s=0.05) for key, seat in enumerate(new, 11)]
            with closing_all(*moved):
                wait_round(new[0], round_of(founder) + 3)
                for trainer in trainers:
                    trainer.close()
                for seat in reversed(old):  # the founder last
                    leave(seat)
                    shutil.rmtree(seat.site.folder)
                poll_until(lambda: new[0].status()["members"] == 3, "both have left")
                voters = {seat.id for seat in new}
                poll_until(
                    lambda: set(new[0].status()["stewards"]) <= voters, "the votes have moved too"
                )
                wait_round(new[0], round_of(new[0]) + 3)
                for trainer in moved:
                    trainer.pause(True)
                before, _ = wait_same_stand(new, 4)
                known = swarm.check_hashes()
                for seat in new:
                    seat.kill()
                restart_all(new)
                stand = wait_same_stand(new, before)
                assert stand == (stand[0], swarm.check_hashes()[stand[0]])
                assert stand[0] > before or stand[1] == known[before]
                assert not any(seat.events("rewound") for seat in new)
                for trainer in moved:
                    trainer.pause(False)
                wait_round(new[0], stand[0] + 3)
        swarm.check_hashes()


def test_a_state_folder_that_is_deleted_comes_back_from_the_others(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2, checkpoint_every_rounds=5)
        ada, bob = (
            swarm.enter(name, founder.ticket(), config={"votes": False}) for name in ("ada", "bob")
        )
        trainers = [train(seat, key, phase_s=0.05) for key, seat in enumerate((founder, ada), 1)]
        with closing_all(*trainers):
            wait_round(founder, 8)
            wait_stand(bob, 8)
            bob.kill()
            shutil.rmtree(bob.site.state_path)
            wait_round(founder, round_of(founder) + 2)
            seq = bob.last_seq
            bob.start()
            came = bob.wait_event("state_fetched", since_seq=seq)
            assert came["chunks_here"] == 0 and came["donors"] >= 1
            wait_stand(bob, round_of(founder))
            for trainer in trainers:
                trainer.pause(True)
            wait_same_stand([founder, ada, bob], 8)
        swarm.check_hashes()
        assert bob.site.state_path.is_dir(), "and is on its disk again"


def test_nothing_is_lost_with_all_disks_while_one_member_lives(tmp_path: Path) -> None:
    """The others lose all but their keys, the one that lives its state under its feet."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2, checkpoint_every_rounds=5)
        others = [
            swarm.enter(name, founder.ticket(), config={"votes": False}) for name in ("ada", "bob")
        ]
        trainers = [train(seat, key, phase_s=0.05) for key, seat in enumerate(swarm.seats, 1)]
        with closing_all(*trainers):
            wait_round(founder, 12)  # between two checkpoints: results lead on from the last
            for trainer in trainers:
                trainer.pause(True)
            before = wait_same_stand(swarm.seats, 12)
            for seat in others:
                seat.kill()
                shutil.rmtree(seat.site.state_path)
                seat.site.log_path.unlink()
            shutil.rmtree(founder.site.state_path)
            assert founder.stand() == before
            restart_all(others)
            assert wait_same_stand(swarm.seats, before[0]) == before
            for trainer in trainers:
                trainer.pause(False)
            seq = founder.last_seq
            founder.wait_event("checkpoint_saved", since_seq=seq)
            wait_round(founder, before[0] + 6)
            for seat in swarm.seats:  # and now all disks are good again
                seat.kill()
            known = max(r["round"] for s in swarm.seats for r in s.events("round_committed"))
            restart_all(swarm.seats)
            wait_same_stand(swarm.seats, known + 1)
        swarm.check_hashes()
        assert not founder.events("rewound")


def chunks_on_disk(seat: Seat) -> int:
    """How many whole chunks of a snapshot a joiner's file has, header left out."""
    for path in (seat.site.state_path / "incoming").glob("*.incoming"):
        data = path.read_bytes()
        table, size = data[PAGE : 2 * PAGE], limits.CHUNK_VALUES * 8
        leaves = [table[at : at + HASH_BYTES] for at in range(0, HASH_BYTES * CHUNKS, HASH_BYTES)]
        first = len(data) - (CHUNKS - 1) * size
        chunks = [data[at : at + size] for at in range(first, len(data), size)]
        return sum(leaf_hash(c) == leaf for c, leaf in zip(chunks, leaves[1:], strict=True))
    return 0


def test_a_joiner_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(checkpoint_every_rounds=3)
        trainer = train(founder, 1, phase_s=0.05, values=(CHUNKS - 1) * limits.CHUNK_VALUES)
        with closing_all(trainer):
            wait_round(founder, 5)
            trainer.pause(True)
            config = {"votes": False, "down_bytes_per_s": 8_000_000}
            joiner = swarm.enter("joiner", founder.ticket(), config=config)
            poll_until(lambda: 3 <= chunks_on_disk(joiner) < CHUNKS, "some chunks have come")
            joiner.kill()
            assert not joiner.events("state_fetched")
            here = chunks_on_disk(joiner)
            joiner.start()
            came = joiner.wait_event("state_fetched")
            assert came["chunks"] == CHUNKS and 3 <= here <= came["chunks_here"] < CHUNKS
            assert wait_same_stand(swarm.seats, 3)
            trainer.pause(False)
            wait_stand(joiner, round_of(founder) + 2)
        swarm.check_hashes()
        assert chunks_on_disk(joiner) == 0, "its file is gone"
