"""Real sites with trainers that serve the stages of a pipeline; sites are lost and come back."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

from swarmtrain_peer.spawn import start_process, stop_process
from swarmtrain_protocols.pipeline.book import stage_channel
from tests.swarm.harness import WAIT_S, Document, Seat, Swarm, poll_until

LONG_S = 240.0
"""For steps, and for recoveries: members that might come back are waited for."""


def tiny(stages: int, batches: int, steps: int, **more: Any) -> Document:
    """Run keys of a pipeline that one processor can carry: a layer a stage, so many micro-batches a
    step, over after so many steps."""
    return {
        "seed": 7,
        "stages": stages,
        "model": {"layers": stages, "d_model": 32, "heads": 2, "context": 32},
        "micro_batches": batches,
        "max_rounds": steps,
        **more,
    }


class Crew(Swarm):
    """A swarm of sites, each a peer process and a trainer process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.trainers: dict[str, subprocess.Popen[bytes]] = {}
        self.gone: list[Seat] = []
        self.stages = 0

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process in self.trainers.values():
            stop_process(process)
        super().__exit__(kind, error, trace)

    @property
    def witness(self) -> Seat:
        """Whose log counts: the founder, and once it is destroyed, the next site."""
        return next(seat for seat in self.seats if seat not in self.gone)

    def open(self, sites: int, **keys: Any) -> None:
        """Found a run of so many sites; the founder comes on top, votes and computes nothing."""
        self.stages = keys["stages"]
        self.found(start_peers=sites, config={"trains": False, "holds_state": False}, **keys)
        for _ in range(sites):
            self.join({"votes": False})

    def open_equal(self, sites: int, **keys: Any) -> None:
        """Found a run of so many sites that all vote, drive and compute, the founder as well."""
        self.stages = keys["stages"]
        self.train(self.found(start_peers=sites, **keys))
        for _ in range(sites - 1):
            self.join()

    def join(self, config: Document | None = None) -> Seat:
        """One more site, with a trainer."""
        seat = self.enter(f"site-{len(self.seats)}", self.witness.ticket(), config=config)
        self.train(seat)
        return seat

    def train(self, seat: Seat) -> None:
        """Start the trainer of a site."""
        command = [sys.executable, "-m", "swarmtrain.training.trainer", str(seat.site.folder)]
        command += ["--device", "cpu", "--wait-s", "60"]
        self.trainers[seat.name] = start_process(command, seat.site.folder / "trainer.log", nice=5)

    def destroy(self, *seats: Seat) -> None:
        """SIGKILL to both processes of each site, the peer processes in one go."""
        for seat in seats:
            assert seat.process is not None
            seat.process.kill()
        for seat in seats:
            if seat.name in self.trainers:
                trainer = self.trainers.pop(seat.name)
                trainer.kill()
                trainer.wait(WAIT_S)
            seat.kill()
            self.gone.append(seat)

    def revive(self, *seats: Seat) -> None:
        """Start both processes of each site again."""
        for seat in seats:
            seat.start()
            self.train(seat)
            self.gone.remove(seat)

    # What the log says

    def assigned(self, stage: int) -> list[Seat]:
        """The sites that serve a stage by the last word of the log, and are not destroyed."""
        stages: dict[str, list[int]] = {}
        for record in self.witness.events("stage_assigned"):
            stages[record["peer"]] = record["stages"]
        there = [seat for seat in self.seats if seat not in self.gone]
        return [seat for seat in there if stage in stages.get(seat.id, ())]

    def only_stage(self, *stages: int) -> tuple[int, list[Seat]]:
        """The first of these whose sites can all go without the loss of another stage."""
        serving = {stage: self.assigned(stage) for stage in range(self.stages + 1)}

        def alone(stage: int) -> bool:
            return all(
                any(seat not in serving[stage] for seat in others)
                for number, others in serving.items()
                if number != stage
            )

        found = [stage for stage in stages if serving[stage] and alone(stage)]
        assert found, {stage: [seat.name for seat in seats] for stage, seats in serving.items()}
        return found[0], serving[found[0]]

    def wait_step(self, step: int) -> None:
        """Until this step or a later one is committed."""
        self.witness.wait_event("step_committed", lambda r: r["step"] >= step, timeout_s=LONG_S)

    def last_step(self) -> int:
        """The last step that was committed, -1: none."""
        done = self.witness.events("step_committed")
        return int(done[-1]["step"]) if done else -1

    def copied(self, channel: str) -> list[int]:
        """Rounds of the copies of a stage that sites which live have kept for others."""

        def look() -> list[int]:
            kept = [r for seat in self.alive() for r in seat.events("copy_saved")]
            return [record["round"] for record in kept if record["channel"] == channel]

        found: list[int] = poll_until(look, f"no copy of {channel}")
        return found

    def check_steps(self, steps: int, micro_batches: int) -> None:
        """Every step was committed once, in order, with all its micro-batches."""
        done = self.witness.events("step_committed")
        assert [record["step"] for record in done] == list(range(steps)), self.witness.tail()
        assert all(record["micro_batches"] == micro_batches for record in done)

    def check_replicas(self, since: dict[int, int] | None = None) -> dict[int, int]:
        """States of one step of one stage are equal at all sites that have had them.

        Args:
            since: by stage the step it was rebuilt before: states up to there may have two values.

        Returns:
            By stage, for how many states there was a second site to compare with.
        """
        compared = dict.fromkeys(range(self.stages + 1), 0)
        for stage in range(self.stages + 1):
            begun, found = (since or {}).get(stage, -1), dict[int, list[str]]()
            for seat in self.seats:
                for step, hashes in seat.hashes(stage_channel(stage)).items():
                    if step > begun:
                        found.setdefault(step, []).extend(hashes)
            torn = {step: hashes for step, hashes in found.items() if len(set(hashes)) > 1}
            assert not torn, f"stage {stage}: {torn}"
            compared[stage] = sum(len(hashes) > 1 for hashes in found.values())
        return compared

    def pauses_s(self) -> list[float]:
        """Wall time between two committed steps, as the witness saw them."""
        at = [record["wall_s"] for record in self.witness.events("step_committed")]
        return [later - earlier for earlier, later in itertools.pairwise(at)]
