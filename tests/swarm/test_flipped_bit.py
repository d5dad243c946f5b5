"""One flipped bit in the memory of one member of a real swarm: named, and mended at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer.spawn import start_process, wait_ready
from tests.swarm.harness import CHANNEL, WAIT_S, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.synthetic import Plan, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

VALUE = 271_828
"""In the second chunk."""


@pytest.mark.parametrize(
    ("bit", "within", "known_by"), [(0, False, "its hash"), (22, True, "the pinned hash")]
)
def test_a_flipped_bit_is_named_and_re_synced_in_the_next_round(
    bit: int, within: bool, known_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the member that has it and by nobody else; no round takes it in, and none is lost.

    It flips between two steps, or ``within`` one, where only comparison tells.
    """

    def spawn(site: Any, **named: Any) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("flipping_peer.py")
        process = start_process([sys.executable, str(script), str(site.folder)], site.output_path)
        wait_ready(site, process, named.get("timeout_s", WAIT_S))
        return process

    monkeypatch.setattr("tests.swarm.harness.spawn_peer", spawn)
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=3)
        others = [swarm.enter(name, founder.ticket(False)) for name in ("ada", "bob")]
        seats = [founder, *others]
        bob = others[1]
        trainers = [Trainer(s.site, Plan(key=k, phase_s=0.2)).start() for k, s in enumerate(seats)]
        with closing_all(*trainers):
            bob.wait_applied(3)
            (bob.site.folder / "flip").write_text(("-" if within else "") + str(32 * VALUE + bit))
            told = bob.wait_event("resync")
            spoilt = int((bob.site.folder / "flipped").read_text()) + within
            assert told["reason"].startswith("own state differs from " + known_by)
            assert (told["channel"], told["round"]) == (CHANNEL, spoilt)
            again = founder.wait_event(
                "round_opened",
                lambda r: r["round"] > spoilt and bob.id in r["contributors"],
            )
            founder.wait_event("round_committed", lambda r: r["round"] >= again["round"])
            bob.wait_applied(again["round"] + 1)
        wait_same_stand(seats, again["round"] + 1)
        poll_until(lambda: bob.hashes().keys() >= founder.hashes().keys() - {0, 1}, "all rounds")
    torn = {n: h for n, h in bob.hashes().items() if n in founder.hashes()}
    assert [n for n, h in torn.items() if h != founder.hashes()[n]] == [spoilt] * within
    assert founder.hashes()[spoilt] <= torn[spoilt] and len(torn[spoilt]) == 1 + within
    assert {n: h for n, h in others[0].hashes().items() if founder.hashes().get(n) != h} == {}
    assert not founder.events("resync") and not others[0].events("resync")
    assert again["round"] <= spoilt + 2
