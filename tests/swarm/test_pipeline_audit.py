"""Real processes lose replies, get requests twice and lose trainers: the model does not notice.

5 % of the replies are dropped and 5 % of the requests come twice where messages enter a peer
process, and every ten steps a trainer is killed, at another site and another phase in turn. The
weights must be those of one process that has done the same steps on the same text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from swarmtrain.training.data import Corpus, obtain_corpus
from swarmtrain.training.stages.reference import reference_step
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_peer.spawn import start_process, wait_ready
from swarmtrain_peer.store import StateStore
from tests.swarm.faulty_peer import PHASES
from tests.swarm.harness import Seat, poll_until
from tests.swarm.stage_crew import Crew, tiny

STAGES, BATCHES, SITES = 2, 4, 4
STEPS = 200
LONG_S = 8.0 * STEPS
KEYS = tiny(
    STAGES,
    BATCHES,
    STEPS,
    checkpoint_every_rounds=10,
    replicas_min=2,
    close_fraction=1.0,
    boundary_codec="fp32",
    codec_scatter="fp32",
    codec_gather="fp32",
    inner_optimizer="sgd",
    inner_lr=0.05,
    inner_weight_decay=0.0,
    inner_warmup_steps=0,
    inner_clip=0.0,
)


class Unlucky(Crew):
    """A crew whose peers run ``faulty_peer``, and whose trainers are started again."""

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def spawn(site: Any, **named: Any) -> subprocess.Popen[bytes]:
            place = len(list(self.folder.glob("*/runs/*/faults.json")))
            plan = {
                "seed": 1,
                "lost": 0.05,
                "doubled": 0.05,
                "every": 10,
                "place": place - 1,  # the founder computes nothing
                "sites": SITES,
            }
            (site.folder / "faults.json").write_text(json.dumps(plan))
            script = Path(__file__).with_name("faulty_peer.py")
            process = start_process(
                [sys.executable, str(script), str(site.folder)], site.output_path
            )
            wait_ready(site, process, named.get("timeout_s", 30.0))
            return process

        monkeypatch.setattr("tests.swarm.harness.spawn_peer", spawn)

    def train(self, seat: Seat) -> None:
        super().train(seat)
        (seat.site.folder / "trainer.pid").write_text(str(self.trainers[seat.name].pid))

    def run_to_the_end(self) -> None:
        """Trainers that were killed are started again until the run has ended."""

        def ended() -> bool:
            if self.witness.events("run_ended"):
                return True
            for seat in self.seats[1:]:
                if self.trainers[seat.name].poll() is not None:
                    self.train(seat)
            return False

        poll_until(ended, "the run ends", LONG_S)

    def luck(self) -> Counter[str]:
        lines = [
            line
            for path in self.folder.glob("**/faults.log")
            for line in path.read_text().splitlines()
        ]
        return Counter(line.split(" ", 1)[1] for line in lines)


def final_states(crew: Crew) -> dict[int, tuple[int, np.ndarray[Any, Any]]]:
    """By stage: (round, weights) of the newest checkpoint that any site has."""
    found: dict[int, tuple[int, np.ndarray[Any, Any]]] = {}
    for seat in crew.seats[1:]:
        store = StateStore(seat.site.state_path, writable=False)
        for checkpoint in store.checkpoints()[0]:
            for entry in checkpoint.entries:
                stage = int(entry.channel.split("/")[1])
                if entry.round > found.get(stage, (0, None))[0]:
                    found[stage] = entry.round, store.state(checkpoint, entry).theta.copy()
    return found


def one_process(
    keys: dict[str, Any], corpus: Corpus, rounds: set[int]
) -> tuple[dict[int, dict[int, np.ndarray[Any, Any]]], list[float]]:
    """Weights by round and stage, and the loss of every step, of plain SGD on the same text."""
    runtime = StageRuntime.build(keys, range(STAGES + 1))
    theta = {stage: runtime.theta0(stage).copy() for stage in range(STAGES + 1)}
    context = runtime.cut.context
    kept, losses = {}, []
    for step in range(max(rounds)):
        batches = []
        for k in range(BATCHES):
            position = step * BATCHES + k
            x, y = corpus.batch(keys["seed"], position, keys["batch_size"], context)
            batches.append(np.concatenate([x, y[:, -1:]], 1).astype(np.int32))
        found = reference_step(runtime.cut, theta, batches)
        losses.append(sum(found.losses) / BATCHES)
        for stage, gradient in found.gradients.items():
            mean = gradient / np.float32(BATCHES)
            theta[stage] = theta[stage] - np.float32(keys["inner_lr"]) * mean
        if step + 1 in rounds:
            kept[step + 1] = {stage: values.copy() for stage, values in theta.items()}
    return kept, losses


def check_weights(crew: Crew) -> float:
    """Largest difference from one process, relative to the largest weight of the stage."""
    found = final_states(crew)
    assert sorted(found) == list(range(STAGES + 1))
    site = crew.seats[1].site
    manifest = site.manifest()
    assert manifest is not None
    keys = msgspec.structs.asdict(manifest.keys)
    corpus = obtain_corpus(site, manifest.keys, 10.0)
    kept, losses = one_process(keys, corpus, {round_ for round_, _ in found.values()})
    told = [record["loss"] for record in crew.witness.events("step_committed")]
    assert max(abs(a - b) for a, b in zip(told, losses, strict=False)) <= 1e-5 * max(losses)
    worst = 0.0
    for stage, (round_, theta) in found.items():
        assert round_ >= STEPS - 10
        expected = kept[round_][stage]
        worst = max(worst, float(np.abs(theta - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_nothing_is_counted_twice_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Unlucky(tmp_path) as crew:
        crew.prepare(monkeypatch)
        crew.open(SITES, **KEYS)
        crew.run_to_the_end()
        crew.check_steps(STEPS, BATCHES)
        rounds = crew.witness.call("rounds", {"limit": STEPS})["rounds"]
        pairs = {
            sum(c["samples"] for c in one["contributors"])
            for one in rounds
            if one["outcome"] == "committed"
        }
        assert pairs == {float(BATCHES * (STAGES + 2))}, "every hop of every micro-batch once"
        crew.check_replicas()
        luck = crew.luck()
        lost = sum(len(seat.events("trainer_lost")) for seat in crew.seats[1:])
        for seat in crew.seats:
            seat.stop()
        worst = check_weights(crew)
    figures = {"steps": STEPS, **luck, "trainers_lost": lost, "difference": worst}
    (tmp_path / "audit.json").write_text(json.dumps(figures))
    deaths = {phase: luck[f"killed {phase}"] for phase in PHASES}
    assert luck["lost"] >= STEPS / 10 and luck["doubled"] >= STEPS / 10
    assert sum(deaths.values()) >= STEPS / 20 and lost >= STEPS / 20, deaths
    assert worst <= 1e-5
