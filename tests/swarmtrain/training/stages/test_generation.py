"""A text through three stages, while their workers die one after the other, equals one process's.

The cores of the asking side are the real ones (history, errands), and so is the arithmetic of the
workers; only the network between them is a list. ``tests/swarm/test_generate.py`` does the same
with processes.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from swarmtrain.training.stages.reference import Whole
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest
from swarmtrain_protocols.pipeline.errands import ErrandDone, Errands
from swarmtrain_protocols.pipeline.generation import Generation, TextModel, Wanted
from swarmtrain_protocols.pipeline.hops import plain_path, stage_of
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.pipeline.sampling import Sampling
from tests.swarmtrain.training.stages.models import away_from_start, byte_gpt, keys, whole

STAGES = 3
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=5)
PROMPT, COUNT = (3, 1, 4, 1, 5), 40


class Swarm:
    """Two workers for every stage; each dies for ever at a hop that the test draws.

    ``dying``: the numbers of requests at which the worker that was asked dies, before it computes
    or with its answer on the way. Somebody else takes its place so that a stage never is empty.
    """

    def __init__(self, given: dict[str, Any], dying: dict[int, str]) -> None:
        self.given = given
        self.dying = dying
        self.out: list[Effect] = []
        self.born = self.requests = self.deaths = 0
        self.workers: dict[int, dict[PeerId, StageRuntime]] = {}
        for stage in range(STAGES + 1):
            self.workers[stage] = {}
            for _ in range(2):
                self.join(stage)
        self.errands = Errands(
            ledger=Ledger(),
            out=self.out,
            stages=STAGES,
            workers=lambda hop: list(self.workers[stage_of(hop, STAGES)]),
            version=lambda: 7,
            stage_generation=lambda stage: 0,
            hop_timeout_s=lambda hop: 1.0,
        )

    def join(self, stage: int) -> None:
        self.born += 1
        runtime = StageRuntime.build(self.given, [stage])
        runtime.load(stage, away_from_start(runtime.theta0(stage), stage))
        self.workers[stage][PeerId(bytes([self.born]) * 32)] = runtime

    def kill(self, stage: int, peer: PeerId) -> None:
        self.deaths += 1
        del self.workers[stage][peer]
        self.join(stage)
        self.errands.disconnected(0.0, peer)

    def forward(self, tokens: bytes) -> ErrandDone:
        """One errand, whoever dies on the way."""
        self.errands.start(0.0, "generate", tokens, plain_path(STAGES), timeout_s=9.0)
        while True:
            effect = self.out.pop(0)
            if isinstance(effect, Emit):
                assert isinstance(effect.event, ErrandDone), effect.event
                return effect.event
            assert isinstance(effect, Send) and isinstance(effect.message, HopRequest)
            self.serve(effect.peer, effect.message)

    def serve(self, peer: PeerId, request: HopRequest) -> None:
        self.requests += 1
        how = self.dying.get(self.requests, "")
        stage = stage_of(request.id.hop, STAGES)
        if how == "before":
            self.kill(stage, peer)
            return
        found = self.workers[stage][peer].generate(
            request.id.hop, request.inputs.data, request.tokens
        )
        reply = HopReply(request.id, inline_tensor(found.output), 0.0, 0, 0.001)
        if how == "after":
            self.kill(stage, peer)
        self.errands.receive(0.0, peer, reply)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("family", [keys, byte_gpt])
def test_a_text_is_the_same_whoever_dies_on_the_way(family: Any, sampling: Sampling) -> None:
    given = family(stages=STAGES)
    given["model"] = {**given["model"], "layers": STAGES}
    rng = random.Random(4)
    # Each hop of the path loses its worker before and after, and then any of them now and then.
    dying = {1 + 11 * n: ("before", "after")[n % 2] for n in range(20)}
    dying |= {rng.randrange(1, 200): rng.choice(["before", "after"]) for _ in range(20)}
    swarm = Swarm(given, dying)
    cut = whole(given).cut
    text = Generation(Wanted(PROMPT, COUNT, sampling), TextModel(cut.context, cut.vocabulary))
    while not text.finish:
        done = swarm.forward(text.context())
        text.take(done.output.data, done.version)
    theta = {s: away_from_start(whole(given).theta0(s), s) for s in range(STAGES + 1)}
    assert text.tokens == Whole(cut, theta).generate(PROMPT, COUNT, sampling)
    assert len(set(text.tokens)) > 2, "a text of one token would show little"
    assert len(PROMPT) + COUNT > cut.context, "the window has slid"
    assert swarm.deaths >= 25
