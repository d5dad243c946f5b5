"""Texts on the control socket: pushes in order, typed refusals, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from swarmtrain_peer.control import error_from_dict
from swarmtrain_peer.writer import TRIES, Writer, wanted_of
from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.boundary import decode_tokens, pack_header
from swarmtrain_protocols.errors import (
    LocalProtocolError,
    NoWorker,
    PromptTooLong,
    RunOver,
    ShareUsedUp,
    SwarmError,
    UsageError,
)
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.pipeline import Tensor
from swarmtrain_protocols.pipeline.errands import ErrandDone, ErrandFailed
from swarmtrain_protocols.pipeline.generation import TextModel
from swarmtrain_protocols.pipeline.requests import inline_tensor

Document = dict[str, Any]


class Connection:
    def __init__(self) -> None:
        self.pushes: list[Document] = []
        self.closing: list[Callable[[], None]] = []

    def push(self, document: Document) -> None:
        self.pushes.append(msgspec.json.decode(msgspec.json.encode(document)))

    def on_close(self, callback: Callable[[], None]) -> None:
        self.closing.append(callback)


class Tensors:
    def data_of(self, tensor: Tensor) -> bytes:
        return tensor.data


def logits(token: int, vocabulary: int = 256) -> bytes:
    row = np.zeros(vocabulary, np.float32)
    row[token] = 1.0
    return pack_header(1, (1, 1, vocabulary)) + row.tobytes()


class World:
    """A peer process whose swarm answers the byte after the last one, or as ``answers`` say."""

    def __init__(self, **keys: Any) -> None:
        self.version = 5
        self.asked: list[bytes] = []
        self.cancelled: list[int] = []
        self.answers: Callable[[bytes], ErrandDone | ErrandFailed | None] = self._next
        self.events: list[tuple[str, Document]] = []
        self.ledger = SimpleNamespace(ended="", model=object())
        pipeline = SimpleNamespace(
            errand=self._errand, cancel_errand=self.cancelled.append, enabled=keys.get("stages", 0)
        )
        self.runtime: Any = SimpleNamespace(
            driver=SimpleNamespace(run=lambda call, *args: call(0.0, *args)),
            node=SimpleNamespace(pipeline=pipeline, ledger=self.ledger),
            listeners=[],
            events=SimpleNamespace(emit=lambda name, **fields: self.events.append((name, fields))),
            manifest=SimpleNamespace(keys=RunKeys(**keys)),
            settings=SimpleNamespace(run=b"\x01" * 16),
            pool=None,
        )
        self.own: TextModel | None = None
        self.writer = Writer(self.runtime, Tensors(), lambda: self.own)  # type: ignore[arg-type]
        self.connection = Connection()

    def _errand(self, now: float, kind: str, tokens: bytes, *, timeout_s: float) -> int:
        assert kind == "generate"
        ids = bytes(decode_tokens(tokens, 1, 1000, 256)[0].tolist())
        self.asked.append(ids)
        handle = len(self.asked)
        answer = self.answers(ids)
        if answer is not None:
            self.tell(handle, answer)
        return handle

    def tell(self, handle: int, answer: ErrandDone | ErrandFailed) -> None:
        fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
        event = type(answer)(**{**fields, "handle": handle})
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: [listener(event) for listener in self.runtime.listeners])

    def _next(self, ids: bytes) -> ErrandDone:
        return self.done(logits((ids[-1] + 1) % 256))

    def done(self, data: bytes) -> ErrandDone:
        return ErrandDone(0, inline_tensor(data), 0.0, self.version)

    async def begin(self, **args: Any) -> Document:
        return await self.writer.generate({"id": 9, **args}, self.connection)  # type: ignore[arg-type]

    async def text(self, **args: Any) -> Document:
        """All of a text; its last push."""
        await self.begin(**args)
        await asyncio.wait_for(asyncio.gather(*self.writer._tasks), 5)
        return self.connection.pushes[-1]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_a_text_comes_token_by_token_and_then_as_a_whole() -> None:
    async def body() -> None:
        world = World()
        begun = await world.begin(prompt="ab", max_tokens=3)
        assert begun == {
            "id": 9,
            "run": "01" * 16,
            "name": "tiny-lm",
            "prompt_tokens": 2,
            "context": 64,
            "counts": "rounds",
        }
        await asyncio.gather(*world.writer._tasks)
        assert world.asked == [b"ab", b"abc", b"abcd"]
        *pieces, last = world.connection.pushes
        assert [(p["token"], p["text"], p["version"]) for p in pieces] == [
            (99, "c", 5), (100, "d", 5), (101, "e", 5),
        ]  # fmt: skip
        assert all(p["event"] == "generated" and p["id"] == 9 for p in world.connection.pushes)
        assert (last["text"], last["tokens"]) == ("cde", [99, 100, 101])
        assert (last["finish"], last["versions"]) == ("length", [[5, 3]])
        ((name, fields),) = world.events
        assert name == "generated" and (fields["tokens"], fields["versions"]) == (3, [5])

    run(body)


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        ({}, "rounds"),
        ({"stages": 2, "model": {"layers": 2}}, "steps"),
        ({"stages": 2, "model": {"layers": 2}, "pipeline_mode": "diloco"}, "rounds"),
    ],
)
def test_the_answer_says_what_versions_count(keys: Document, counts: str) -> None:
    async def body() -> None:
        assert (await World(**keys).begin(prompt="a"))["counts"] == counts

    run(body)


def test_weights_may_move_on_between_two_tokens() -> None:
    async def body() -> None:
        world = World()

        def answers(ids: bytes) -> ErrandDone:
            world.version += len(ids) % 2
            return world._next(ids)

        world.answers = answers
        last = await world.text(prompt="ab", max_tokens=4)
        assert last["versions"] == [[5, 1], [6, 2], [7, 1]]

    run(body)


def test_stop_strings_and_settings_are_taken_as_they_are_given() -> None:
    async def body() -> None:
        world = World()
        last = await world.text(prompt="ab", max_tokens=50, stop=["fg", "zz"])
        assert (last["text"], last["finish"]) == ("cde", "stop")
        wanted = wanted_of(
            {"tokens": [1], "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4},
            TextModel(8, 256),
        )
        sampling = wanted.sampling
        assert (sampling.temperature, sampling.top_k) == (0.5, 3)
        assert (sampling.top_p, sampling.seed, wanted.max_tokens) == (0.9, 4, 16)

    run(body)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"prompt": "x" * 65}, PromptTooLong),
        ({"prompt": ""}, UsageError),
        ({}, UsageError),
        ({"prompt": "a", "tokens": [1]}, UsageError),
        ({"tokens": ["a"]}, UsageError),
        ({"tokens": [256]}, UsageError),
        ({"prompt": "a", "max_tokens": 0}, UsageError),
        ({"prompt": "a", "temperature": -1}, UsageError),
        ({"prompt": "a", "top_p": 0}, UsageError),
        ({"prompt": "a", "stop": [""]}, UsageError),
        ({"prompt": "a", "timeout_s": 1e6}, UsageError),
        ({"prompt": "\ud800"}, UsageError),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(args: Document, error: type[SwarmError]) -> None:
    async def body() -> None:
        world = World()
        with pytest.raises(error) as caught:
            await world.begin(**args)
        assert caught.value.exit_code == 2 and world.asked == []

    run(body)


def test_refusals_that_depend_on_the_run() -> None:
    async def body() -> None:
        world = World()
        world.ledger.ended = "max_rounds"
        with pytest.raises(RunOver) as over:
            await world.begin(prompt="a")
        assert over.value.exit_code == 22
        world.ledger.ended, world.ledger.model = "", None
        with pytest.raises(NoWorker, match="no model") as none:
            await world.begin(prompt="a")
        assert none.value.exit_code == 75
        with pytest.raises(ShareUsedUp, match="generate_share is 0"):
            await World(generate_share=0.0).begin(prompt="a")
        with pytest.raises(UsageError, match="tokenizer"):
            other = World()
            other.own = TextModel(8, 1000)
            await other.begin(prompt="a")

    run(body)


def test_so_many_texts_at_once_and_no_more() -> None:
    async def body() -> None:
        world = World()
        world.answers = lambda ids: None
        for _ in range(limits.GENERATIONS_MAX):
            await world.begin(prompt="a")
        with pytest.raises(ShareUsedUp, match="too many"):
            await world.begin(prompt="a")
        world.writer.close()

    run(body)


@pytest.mark.parametrize(
    ("stages", "failed", "error", "what"),
    [
        (3, ErrandFailed(0, "x", "no_worker", 2), NoWorker, "nobody serves stage 2"),
        (3, ErrandFailed(0, "x", "no_worker", 4), NoWorker, "nobody serves the ends"),
        (3, ErrandFailed(0, "x", "timeout", 1), NoWorker, "no answer from a worker of stage 1"),
        (0, ErrandFailed(0, "x", "no_worker", 0), NoWorker, "no trainer is in reach"),
        (0, ErrandFailed(0, "x", "share", 0), ShareUsedUp, "used up its share"),
        (0, ErrandFailed(0, "x", "malformed", 0), UsageError, "refused"),
    ],
)
def test_a_failed_errand_is_a_typed_error_after_what_was_said(
    stages: int, failed: ErrandFailed, error: type[SwarmError], what: str
) -> None:
    async def body() -> None:
        world = World(**({"stages": stages, "model": {"layers": stages}} if stages else {}))
        world.answers = lambda ids: failed if len(ids) == 3 else world._next(ids)
        last = await world.text(prompt="a", max_tokens=9)
        assert [push.get("text") for push in world.connection.pushes[:-1]] == ["b", "c"]
        caught = error_from_dict(last["error"])
        assert type(caught) is error and what in caught.what
        assert world.events[-1][1]["finish"] == "failed"

    run(body)


def test_a_run_that_ends_meanwhile_ends_the_text() -> None:
    async def body() -> None:
        world = World()

        def answers(ids: bytes) -> ErrandDone:
            world.ledger.ended = "max_rounds"
            return world._next(ids)

        world.answers = answers
        last = await world.text(prompt="a", max_tokens=9)
        assert last["error"]["code"] == "RunOver"
        assert len(world.connection.pushes) == 2

    run(body)


def test_answers_that_are_no_logits_are_asked_for_again_a_few_times() -> None:
    async def body() -> None:
        world = World()
        bad = [b"nonsense" * 4, logits(3)[:-4] + b"\xff\xff\xff\xff"]
        world.answers = lambda ids: world.done(bad.pop()) if bad else world._next(ids)
        last = await world.text(prompt="a", max_tokens=1)
        assert last["text"] == "b" and len(world.asked) == 3
        world.answers = lambda ids: world.done(b"")
        last = await world.text(prompt="a", max_tokens=1)
        assert last["error"]["code"] == "NoWorker" and len(world.asked) == 3 + TRIES

    run(body)


def test_a_client_that_goes_away_ends_its_text_and_the_errand() -> None:
    async def body() -> None:
        world = World()
        third = asyncio.Event()

        def answers(ids: bytes) -> ErrandDone | None:
            if len(ids) < 3:
                return world._next(ids)
            third.set()
            return None

        world.answers = answers
        await world.begin(prompt="a", max_tokens=9)
        await asyncio.wait_for(third.wait(), 5)
        (task,) = world.writer._tasks
        for callback in world.connection.closing:
            callback()
        await asyncio.wait([task])
        assert world.cancelled == [3] and world.writer._tasks == []
        assert world.events[-1][1]["reason"] == "nobody listens any more"

    run(body)


def test_too_many_errands_are_somebody_elses_turn() -> None:
    async def body() -> None:
        world = World()

        def full(ids: bytes) -> ErrandDone:
            raise LocalProtocolError("too many errands", "64 are under way")

        world.answers = full
        last = await world.text(prompt="a")
        assert last["error"]["code"] == "ShareUsedUp"

    run(body)
