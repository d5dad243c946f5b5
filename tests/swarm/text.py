"""Texts from a swarm of real processes, and what one process says with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from swarmtrain.training.presets import build
from swarmtrain.training.stages.cut import plain_ranges
from swarmtrain.training.stages.reference import Whole
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_peer.store import StateStore
from swarmtrain_peer.talk import Talk
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.sampling import Sampling, next_token
from swarmtrain_protocols.rounds import effects as fx
from tests.swarm.harness import CHANNEL, Seat

Document = dict[str, Any]
Theta = dict[int, np.ndarray[Any, Any]]


@dataclass
class Text:
    """What came: pieces in order, and the whole."""

    prompt: bytes
    sampling: Sampling
    pieces: list[Document] = field(default_factory=list)
    last: Document = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        return [piece["token"] for piece in self.pieces]

    @property
    def versions(self) -> list[int]:
        return [piece["version"] for piece in self.pieces]

    def windows(self, context: int) -> Iterator[tuple[int, list[int], int]]:
        """(version, tokens that a token follows from, position) of every token."""
        ids = list(self.prompt)
        for piece in self.pieces:
            yield piece["version"], ids[-context:], len(ids)
            ids.append(piece["token"])


def hear(seat: Seat, prompt: bytes, max_tokens: int, sampling: Sampling) -> Iterator[Text]:
    """Ask at a site; the growing text after each piece, and at its end."""
    text = Text(prompt, sampling)
    args = {
        "prompt": prompt.decode(),
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "timeout_s": 120.0,
    }
    with seat.site.connect() as client:
        for piece in Talk(client, args).pieces():
            if piece.get("finish"):
                text.last = piece
            else:
                text.pieces.append(piece)
            yield text


def listen(seat: Seat, prompt: bytes, max_tokens: int, sampling: Sampling = Sampling()) -> Text:  # noqa: B008
    """All of a text."""
    *_, text = hear(seat, prompt, max_tokens, sampling)
    assert text.last["finish"] == "length" and len(text.tokens) == max_tokens
    return text


CPU = torch.device("cpu")


def check_rounds(keys: RunKeys, text: Text, seats: list[Seat]) -> None:
    """Each token is what one process draws from the θ of its round, in a run without stages.

    θ of every round is made again from θ⁰ and the results on disks, and compared with the hashes
    that sites have reported.
    """
    preset = build({name: getattr(keys, name) for name in keys.__struct_fields__}, CPU)
    parameters = list(preset.model.parameters())
    theta = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    data = DataPlane(keys=keys)
    state = data.states[CHANNEL] = data.new_state(CHANNEL, 0, theta.size)
    state.theta[:] = theta
    stores = [StateStore(seat.site.state_path) for seat in seats]
    for version, window, position in text.windows(preset.context):
        while state.round < version:
            result = next(r for s in stores if (r := s.result(CHANNEL, state.round)) is not None)
            data.adopt_result(result.blob, theta.size, result.codec, CHANNEL)
            lr, momentum = keys.outer_lr, keys.outer_momentum
            assert lr is not None and momentum is not None
            applied = fx.ApplyResult(CHANNEL, state.round, result.root, lr=lr, momentum=momentum)
            round_, root = data.apply(applied)
            told = [seat.hashes().get(round_, set()) for seat in seats]
            assert {root.hex()} == set().union(*told), round_
        torch.nn.utils.vector_to_parameters(torch.from_numpy(state.theta.copy()), parameters)
        with torch.no_grad():
            row = preset.model(torch.tensor([window]))[0, -1].numpy()
        expected = next_token(row, text.sampling, position)
        assert text.tokens[position - len(text.prompt)] == expected, (version, position)


class Replay:
    """The weights of every step of a run of stages, made again from θ⁰ and the results on disks.

    Every state is compared with the hash that sites have reported for it.
    """

    def __init__(self, keys: RunKeys, witness: Seat, seats: list[Seat]) -> None:
        self._keys = {name: getattr(keys, name) for name in keys.__struct_fields__}
        self._run_keys = keys
        self._seats = seats
        self.runtime = StageRuntime.build(self._keys, range(keys.stages + 1))
        done = witness.events("step_committed")
        assert [record["step"] for record in done] == list(range(len(done)))
        self._scales = [float(record["scale"]) for record in done]

    def weights(self, stage: int, upto: int) -> list[np.ndarray[Any, Any]]:
        """θ f32[n] of a stage after 0 … ``upto`` steps."""
        channel = stage_channel(stage)
        data = DataPlane(keys=self._run_keys)
        theta = self.runtime.theta0(stage)
        state = data.new_state(channel, 0, theta.size)
        state.theta[:] = theta
        data.states[channel] = state
        found, plain = [theta.copy()], plain_ranges(self.runtime.layout(stage))
        stores = [(seat, StateStore(seat.site.state_path)) for seat in self._seats]
        for step in range(upto):
            kept = (store.result(channel, step) for _, store in stores)
            result = next(one for one in kept if one is not None)
            data.adopt_result(result.blob, theta.size, result.codec, channel)
            applied = fx.ApplyResult(channel, step, result.root, self._scales[step], -1, plain)
            round_, root = data.apply(applied)
            told = [seat.hashes(channel).get(round_, set()) for seat in self._seats]
            assert {root.hex()} == set().union(*told), (stage, round_)
            found.append(data.states[channel].theta.copy())
        return found

    def check(self, text: Text) -> None:
        """Each token is what one process draws from the weights of its version."""
        stages = range(self._run_keys.stages + 1)
        upto = max(text.versions)
        thetas = {stage: self.weights(stage, upto) for stage in stages}
        cut = self.runtime.cut
        wholes: dict[int, Whole] = {}
        for version, window, position in text.windows(cut.context):
            if version not in wholes:
                wholes[version] = Whole(cut, {s: thetas[s][version] for s in stages})
            row = wholes[version].logits(torch.tensor([window]))[0, -1].detach().float().numpy()
            expected = next_token(row, text.sampling, position)
            assert text.tokens[position - len(text.prompt)] == expected, (version, position)
