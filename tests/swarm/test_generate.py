"""Texts from real processes that train on, while one of their workers is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.sampling import Sampling
from tests.swarm.harness import WAIT_S, Seat
from tests.swarm.stage_crew import LONG_S, Crew
from tests.swarm.text import Replay, check_rounds, hear, listen

STAGES, SITES = 3, 5
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=11)
KEYS = {
    "seed": 7,
    "stages": STAGES,
    "model": {"layers": STAGES, "d_model": 32, "heads": 2, "context": 32},
    "boundary_codec": "fp32",
    "micro_batches": 4,
    "replicas_min": 1,
    "ends_replicas": 3,
    # No checkpoint replaces the first one, so that all results stay on the disks.
    "checkpoint_every_rounds": 1_000_000,
}
PROMPT = b"def main(arguments):\n    return "
COUNT = 60


def dispensable(crew: Crew) -> Seat:
    """A site beside whom every stage that it serves has another one, a block stage among them."""
    serving = {stage: crew.assigned(stage) for stage in range(STAGES + 1)}
    for seat in crew.seats[1:]:
        mine = [stage for stage, seats in serving.items() if seat in seats]
        if any(mine) and all(len(serving[stage]) > 1 for stage in mine):
            return seat
    raise AssertionError({s: [seat.name for seat in seats] for s, seats in serving.items()})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_text_equals_that_of_one_process_while_a_worker_is_killed(tmp_path: Path) -> None:
    """Token for token, greedy and drawn, each by the weights that the answer names.

    The site that is asked has no trainer and computes nothing. The weights of every step are made
    again from the results on disk and compared with the hashes that all sites agreed on.
    """
    with Crew(tmp_path) as crew:
        crew.open(SITES, **KEYS)
        crew.wait_step(2)
        victim = dispensable(crew)
        for greedy in hear(crew.witness, PROMPT, COUNT, GREEDY):
            if len(greedy.pieces) == COUNT // 3 and victim not in crew.gone:
                crew.destroy(victim)
        assert greedy.last["finish"] == "length" and len(greedy.tokens) == COUNT
        drawn = listen(crew.witness, PROMPT, COUNT, DRAWN)
        crew.wait_step(max(drawn.versions) + 1)
        assert not crew.witness.events("stage_lost")
        assert not crew.witness.events("stage_recovered")
        keys = crew.witness.site.manifest().keys
        assert isinstance(keys, RunKeys)
        replay = Replay(keys, crew.witness, crew.seats[1:])
        replay.check(greedy)
        replay.check(drawn)
        assert len(set(drawn.tokens)) > 10
        assert max(drawn.versions) > min(greedy.versions), "they trained on meanwhile"
        seq = crew.witness.wait_event("generated", timeout_s=LONG_S)["seq"]
        assert len(crew.witness.events("generated", seq - 1)) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_text_goes_on_with_anothers_trainer_when_the_own_one_is_killed(tmp_path: Path) -> None:
    """Without stages: asked at a site that trains, and then at one that only looks."""
    with Crew(tmp_path) as crew:
        founder = crew.found(seed=7, inner_steps=10, checkpoint_every_rounds=1_000_000)
        crew.train(founder)
        other = crew.join()
        looker = crew.enter("looker", founder.ticket(), config={"trains": False})
        founder.wait_event("round_committed", timeout_s=4 * WAIT_S)
        for text in hear(founder, PROMPT, COUNT, DRAWN):
            if len(text.pieces) == COUNT // 3 and founder.name in crew.trainers:
                process = crew.trainers.pop(founder.name)
                process.kill()
                process.wait(WAIT_S)
        assert text.last["finish"] == "length" and len(text.tokens) == COUNT
        founder.wait_event("trainer_lost")
        from_afar = listen(looker, PROMPT, COUNT, DRAWN)
        last = max(from_afar.versions)
        founder.wait_event("state_applied", lambda r: r["round"] >= last, timeout_s=4 * WAIT_S)
        keys = founder.site.manifest().keys
        assert isinstance(keys, RunKeys)
        for each in (text, from_afar):
            check_rounds(keys, each, [founder, other])
            assert len(set(each.tokens)) > 10
