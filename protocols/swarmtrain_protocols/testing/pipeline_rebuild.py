"""What a simulated site does when stages are lost: copies, candidates, trials, adoption.

The arithmetic is that of ``pipeline.candidates``; the state of a candidate is made as the peer
process makes it. Every candidate is told to the truth, so that the checkers can judge the choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.candidates import from_neighbours
from swarmtrain_protocols.pipeline.rebuild import use_of
from swarmtrain_protocols.state import CanonicalState

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Completion
    from swarmtrain_protocols.testing.pipeline_site import PipelineSite

BUILD_S, TRY_S = 0.05, 0.02


class Rebuilds:
    """The candidates of one site."""

    def __init__(self, site: PipelineSite) -> None:
        self._site = site
        self._found: dict[int, dict[str, F32]] = {}
        self._trials: dict[int, CanonicalState] = {}
        self._copies: dict[str, bytes] = {}

    def on_trial(self, stage: int) -> F32 | None:
        """Weights to evaluate ``stage`` with, if they are not the canonical ones."""
        state = self._trials.get(stage)
        return None if state is None else state.theta

    def execute(self, now: float, effect: Effect) -> list[Completion] | None:
        """Completions of an effect of recovery; None: it is none."""
        core = self._site.core.pipeline
        if isinstance(effect, px.KeepCopy):
            self._keep(effect)
        elif isinstance(effect, px.DropCopy):
            self._drop_copy(effect.channel)
        elif isinstance(effect, px.NeedCalibration):
            toy = self._site.spec.toy
            batches = [toy.calibration(k) for k in range(effect.count)]
            return [(0.001, lambda at: core.calibration(at, effect.stage, batches))]
        elif isinstance(effect, px.BuildCandidates):
            self._build(effect)
            names = list(self._found[effect.stage])
            return [(BUILD_S, lambda at: core.candidates_built(at, effect.stage, names))]
        elif isinstance(effect, px.TryCandidate):
            return self._try(effect)
        elif isinstance(effect, px.AdoptCandidate):
            self._site.adopt_candidate(now, self._trial(effect.stage, effect.name, effect.round))
        elif isinstance(effect, px.DropCandidates):
            self._found.pop(effect.stage, None)
            self._trials.pop(effect.stage, None)
            self._site.plane.drop_foreign(use_of(effect.stage))
        else:
            return None
        return []

    def _keep(self, effect: px.KeepCopy) -> None:
        plane, channel = self._site.plane, effect.snapshot.channel
        state = plane.fetched_state(effect.snapshot)
        plane.register(state.blob())
        self._drop_copy(channel)
        self._copies[channel] = effect.snapshot.root
        offers = self._site.core.catchup.snapshots.setdefault(channel, [])
        offers.append((effect.snapshot.round, effect.snapshot.root))
        self._site.truth.seen["pipeline:copy"] += 1

    def _drop_copy(self, channel: str) -> None:
        root = self._copies.pop(channel, None)
        offers = self._site.core.catchup.snapshots.get(channel, [])
        offers[:] = [item for item in offers if item[1] != root]
        if root is not None:
            self._site.plane.drop(root)

    def _build(self, effect: px.BuildCandidates) -> None:
        plane, toy = self._site.plane, self._site.spec.toy
        states: dict[str, F32] = {}
        for item in effect.inputs:
            here = plane.states.get(item.snapshot.channel) if item.here else None
            state = here if here is not None else plane.fetched_state(item.snapshot)
            states[item.what] = state.theta.copy()
        found: dict[str, F32] = {}
        if "snapshot" in states:
            found["snapshot"] = states["snapshot"]
        found |= from_neighbours(
            states.get("left"),
            states.get("right"),
            effect.norms,
            toy.layout,
            seed=toy.seed,
            stage=effect.stage,
            depth=toy.stages,
        )
        self._found[effect.stage] = found

    def _trial(self, stage: int, name: str, round_number: int) -> CanonicalState:
        theta = self._found[stage][name]
        state = self._site.plane.new_state(stage_channel(stage), round_number, theta.size)
        state.theta[:] = theta
        return state

    def _try(self, effect: px.TryCandidate) -> list[Completion]:
        state = self._trial(effect.stage, effect.name, effect.round)
        root = state.root()
        self._trials[effect.stage] = state
        self._site.truth.candidates[state.channel, root] = state.theta.copy()

        def done(at: float) -> None:
            self._site.core.pipeline.candidate_ready(at, effect.stage, effect.name, root)

        return [(TRY_S, done)]
