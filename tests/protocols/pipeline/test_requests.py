"""Every field of a request is checked: what is malformed, and what is too early or too late."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import merkle
from swarmtrain_protocols.messages.pipeline import EMPTY, HopRequest, Tensor
from swarmtrain_protocols.pipeline.requests import (
    HopSizes,
    inline_tensor,
    is_tensor,
    malformed,
    skipped_hop,
    trouble,
)
from tests.protocols.pipeline.worker_kit import BLOCKS, HEAD, MICRO_BATCHES, TOKENS, Bench
from tests.protocols.rounds_kit import B, hash_of

SIZES = HopSizes(len(TOKENS), 3, 3)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def wrong(request: HopRequest, **changes: Any) -> str:
    identity = {
        name: changes.pop(name) for name in ("hop", "micro_batch", "backward") if name in changes
    }
    fields = {"id": msgspec.structs.replace(request.id, **identity), **changes}
    return malformed(msgspec.structs.replace(request, **fields), BLOCKS, MICRO_BATCHES, SIZES)


@pytest.mark.parametrize("kind", ["forward", "backward", "evaluate", "generate"])
def test_requests_as_drivers_send_them_are_well_formed(bench: Bench, kind: str) -> None:
    for hop in range(BLOCKS + 2):
        if (kind, hop) != ("forward", HEAD):
            assert wrong(bench.request(kind, hop, 3)) == "", hop
    assert wrong(bench.request(kind, 1, 3, skip=2)) == ""


def test_tensors() -> None:
    small = inline_tensor(b"abc")
    assert small == Tensor(merkle.leaf_hash(b"abc"), 3, b"abc") and inline_tensor(b"") == EMPTY
    by_root = Tensor(small.root, 3)
    assert all(map(is_tensor, (small, by_root, EMPTY)))
    for bad in (
        Tensor(small.root, 4, b"abc"),
        Tensor(small.root, 3, b"abd"),
        Tensor(bytes(32), 3),
        Tensor(small.root, 0),
        Tensor(bytes(32), 0, b"abc"),
    ):
        assert not is_tensor(bad)


LONG = inline_tensor(b"four")
MALFORMED: list[tuple[str, int, dict[str, Any]]] = [
    ("forward", 1, {"path": (0, 1, 1, HEAD)}),
    ("forward", 1, {"path": (0, 2, HEAD)}),
    ("forward", 1, {"hop": 9}),
    ("forward", 1, {"backward": True}),
    ("forward", 1, {"micro_batch": MICRO_BATCHES}),
    ("forward", HEAD, {}),
    ("forward", 0, {"path": (0, 1, HEAD), "tokens": b""}),
    ("forward", 0, {"inputs": inline_tensor(b"abc")}),
    ("forward", 1, {"inputs": EMPTY}),
    ("forward", 1, {"inputs": Tensor(hash_of("x"), 3, b"abc")}),
    ("forward", 1, {"inputs": LONG}),
    ("forward", 1, {"tokens": TOKENS}),
    ("forward", 1, {"gradient": inline_tensor(b"abc")}),
    ("forward", 0, {"tokens": TOKENS[1:]}),
    ("backward", 1, {"gradient": EMPTY}),
    ("backward", 1, {"gradient": LONG}),
    ("backward", HEAD, {"gradient": inline_tensor(b"abc")}),
    ("evaluate", HEAD, {"tokens": b""}),
]


@pytest.mark.parametrize(("kind", "hop", "changes"), MALFORMED)
def test_malformed_requests(bench: Bench, kind: str, hop: int, changes: dict[str, Any]) -> None:
    assert wrong(bench.request(kind, hop, 3), **changes)


def test_a_step_leaves_out_one_stage_at_most_and_other_passes_any(bench: Bench) -> None:
    assert wrong(bench.request("forward", 0, 3), path=(0, HEAD))
    short = bench.request("evaluate", 0, 3)
    for path in ((0, 2, HEAD), (0, HEAD)):
        alone = msgspec.structs.replace(short, path=path)
        assert malformed(alone, BLOCKS, MICRO_BATCHES, SIZES) == ""
    forward = msgspec.structs.replace(bench.request("forward", 0, 3), path=(0, 2))
    assert malformed(forward, 1, MICRO_BATCHES, SIZES), "no stage is left"


def test_which_hop_a_path_leaves_out(bench: Bench) -> None:
    assert skipped_hop(bench.request("forward", 0, 0), BLOCKS) == 0
    assert skipped_hop(bench.request("forward", 0, 0, skip=2), BLOCKS) == 2


def verdict(bench: Bench, request: HopRequest, served: tuple[int, ...] = (0, 1, 2)) -> str:
    found = trouble(request, bench.log.ledger, BLOCKS, served, lambda n: n not in bench.away)
    return found[0] if found is not None else ""


def test_what_belongs_to_the_weights_that_are_here(bench: Bench) -> None:
    for _ in range(2):
        bench.log.step(B)
    bench.log.ok(e.StageLost(1, 2, B, "gone"))
    bench.log.ok(e.StageRecovered(1, 2, B, ("copy",), (1.0,), 0, (), hash_of("new")))
    for kind in ("forward", "backward", "evaluate", "generate"):
        good = bench.request(kind, 2, 1)
        assert verdict(bench, good) == ""
        for name, older, newer in (("version", 1, 3), ("stage_generation", 0, 2)):
            assert verdict(bench, msgspec.structs.replace(good, **{name: older})) == "stale"
            assert verdict(bench, msgspec.structs.replace(good, **{name: newer})) == "not_ready"
        later = msgspec.structs.replace(good.id, generation=1)
        assert verdict(bench, msgspec.structs.replace(good, id=later)) == "not_ready"
        other = msgspec.structs.replace(good, id=msgspec.structs.replace(good.id, step=1))
        expected = "stale" if kind in ("forward", "backward") else ""
        assert verdict(bench, other) == expected, "only steps have a step"
        assert verdict(bench, good, served=(0, 1)) == "not_served"
    bench.away.add("train/2/0")
    assert verdict(bench, bench.request("forward", 2, 1)) == "not_ready"
    assert verdict(bench, bench.request("forward", 1, 1)) == ""


def test_a_lost_stage_stops_the_step_and_lets_candidates_be_measured(bench: Bench) -> None:
    bench.log.ok(e.StageLost(1, 0, B, "gone"))
    assert verdict(bench, bench.request("forward", 2, 1)) == "not_ready"
    assert verdict(bench, bench.request("evaluate", 2, 1)) == ""


def test_no_model_and_no_run(bench: Bench) -> None:
    bench.log.ok(e.RunEnded("enough"))
    assert verdict(bench, bench.request("forward", 1, 1)) == "stale"
    assert verdict(bench, bench.request("generate", 1, 1)) == ""
    bench.log.ledger.channels.clear()
    assert verdict(bench, bench.request("generate", 1, 1)) == "not_ready"
