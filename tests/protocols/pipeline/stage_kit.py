"""Equipment for tests of pipelines: a ledger with stages, made of entries."""

from __future__ import annotations

from typing import Any

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.pipeline.book import pipeline_state, stage_channel
from tests.protocols.rounds_kit import CHUNK, FOUNDER, RUN, VALUES, A, hash_of, joined


def state_hash(stage: int, step: int) -> bytes:
    """A readable stand-in for the hash of a stage's state before a step."""
    return hash_of(f"state {stage}/{step}")


class StageLog:
    """A pipeline's ledger: members, a model of ``blocks`` block stages, and what a test adds."""

    def __init__(self, *members: bytes, blocks: int = 2, mode: str = "sync") -> None:
        self.ledger = Ledger(pipeline=pipeline_state(blocks, mode))
        self.blocks = blocks
        self.ok(e.Genesis(RUN, FOUNDER.peer_id, A, bytes(64)))
        for member in members:
            self.ok(joined(member))
        self.ok(self.model())

    def model(self) -> e.ModelDefined:
        names = [stage_channel(stage) for stage in range(self.blocks + 1)]
        layout = tuple(e.ChannelLayout(name, VALUES) for name in names)
        roots = tuple(state_hash(stage, 0) for stage in range(self.blocks + 1))
        return e.ModelDefined(bytes(32), layout, roots, A)

    def add(self, body: e.EntryBody) -> bool:
        return self.ledger.apply(self.ledger.index + 1, body)

    def ok(self, body: e.EntryBody) -> None:
        assert self.add(body), body

    def assign(self, member: bytes, *stages: int) -> None:
        self.ok(e.StageAssigned(member, stages, "test"))

    def closing(self, *members: bytes, micro_batches: int = 4, **changes: Any) -> e.StepClosed:
        """The step as it stands, with the same contributors at every stage."""
        state = self.ledger.pipeline
        chunks = -(-VALUES // CHUNK)
        sums = tuple(
            e.StageSum(
                stage,
                tuple(
                    e.Contributor(m, hash_of(f"given {stage} {m.hex()[:8]}"), 2.0, state.step)
                    for m in sorted(members)
                ),
                (e.Part(0, chunks, members[0], members[0]),),
                tuple(sorted(members)),
                state_hash(stage, state.step),
            )
            for stage in range(self.blocks + 1)
        )
        fields: dict[str, Any] = {
            "generation": self.ledger.generation,
            "step": state.step,
            "attempt": state.attempt,
            "digest": hash_of("plan"),
            "micro_batches": micro_batches,
            "loss": 2.5,
            "scatter_codec": "fp32",
            "gather_codec": "fp32",
            "stages": sums,
        }
        return e.StepClosed(**{**fields, **changes})

    def outcome(self, *, norm: float = 4.0, scale: float = 1.0, **changes: Any) -> e.StepOutcome:
        """A commit of the step that is closed."""
        state = self.ledger.pipeline
        stages = tuple(
            e.StageOutcome(stage, hash_of(f"result {stage}/{state.step}"), norm, (A,))
            for stage in range(self.blocks + 1)
        )
        fields: dict[str, Any] = {
            "generation": self.ledger.generation,
            "step": state.step,
            "attempt": state.attempt,
            "stages": stages,
            "scale": scale,
            "reason": "",
        }
        return e.StepOutcome(**{**fields, **changes})

    def abort(self, reason: str = "lost") -> e.StepOutcome:
        return self.outcome(stages=(), reason=reason)

    def step(self, *members: bytes, **changes: Any) -> None:
        """One whole step."""
        self.ok(self.closing(*members))
        self.ok(self.outcome(**changes))
