"""Buffers, blobs and states behind the handles; sums against NumPy, bytes against the codecs."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.keptresults import RESULTS_KEPT_MAX, RESULTS_KEPT_PER_CHANNEL
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import Blob, leaf_hash
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.stageopt import StageOptimizer, StepTerms
from swarmtrain_protocols.state import CanonicalState
from tests.protocols import reference_numbers as reference
from tests.protocols.rounds_kit import (
    CHUNK,
    GROUP,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    Log,
    hash_of,
    opening,
)

STAGE = "train/1/0"


def plane(**changes: object) -> DataPlane:
    return DataPlane(**{"chunk_values": CHUNK, **changes})  # type: ignore[arg-type]


def numbers(seed: int, n: int = VALUES) -> F32:
    return np.random.default_rng(seed).normal(0.0, 1.0, n).astype(np.float32)


class Round:
    """An attempt of three contributors whose two parts are owned by A and B; seen by A."""

    def __init__(self, codec: str = "fp32") -> None:
        self.here = plane()
        self.values = {A: numbers(1), B: numbers(2), C: numbers(3)}
        self.given = {m: plane().encode(v, codec) for m, v in self.values.items()}
        self.here.register(self.given[A])
        log = Log(A, B, C)
        roots = {member: blob.root for member, blob in self.given.items()}
        body = opening(log.ledger, self.values, roots=roots)
        self.opened = e.RoundOpened(
            body.key, body.contributors, body.parts, body.holders, VALUES, codec, codec, bytes(32)
        )
        self.key = self.opened.key
        self.here.begin(self.opened)
        self.members = [c.member for c in self.opened.contributors]

    def fetch(self, part: int, index: int, chunks: list[bytes] | None = None) -> None:
        purpose = fx.ContributionPart(self.key, part, index)
        item = self.opened.parts[part]
        source = chunks or self.given[self.members[index]].chunks[item.first :]
        places = self.here.destinations(purpose, item.first, item.count)
        assert [p.nbytes for p in places] == [c.nbytes for c in map(memoryview, source)][
            : len(places)
        ]
        for place, chunk in zip(places, source, strict=False):
            place[:] = chunk
        self.here.accept(purpose)

    def fetch_all(self, part: int) -> None:
        for index, member in enumerate(self.members):
            if member != A:
                self.fetch(part, index)

    def reference(
        self, part: int, coefficients: dict[int, float], codec: str = "fp32"
    ) -> list[bytes]:
        """Encoded chunks of the sum in member order, by NumPy alone."""
        coder, chunks = get_codec(codec), []
        item = self.opened.parts[part]
        for number in range(item.first, item.first + item.count):
            first, last = number * CHUNK, min(VALUES, (number + 1) * CHUNK)
            total = np.zeros(last - first, np.float32)
            for index in sorted(coefficients):
                decoded = np.empty(last - first, np.float32)
                coder.decode(self.given[self.members[index]].chunks[number], decoded)
                total = total + np.float32(coefficients[index]) * decoded
            out = bytearray(coder.encoded_nbytes(last - first))
            coder.encode(total, out)
            chunks.append(bytes(out))
        return chunks

    def chosen(self, coefficients: dict[int, float]) -> e.RoundSet:
        weights = (e.Coefficient(i, c) for i, c in sorted(coefficients.items()))
        return e.RoundSet(self.key, tuple(weights))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", [{0: 0.5, 1: 0.25, 2: 0.25}, {0: 0.75, 2: 0.25}, {1: 1.0}])
def test_a_part_is_the_sum_in_member_order(codec: str, weights: dict[int, float]) -> None:
    round_ = Round(codec)
    round_.fetch_all(0)
    root = round_.here.reduce(round_.key, 0, round_.chosen(weights))
    blob = round_.here.provide(root)
    assert blob is not None
    assert [bytes(c) for c in blob.chunks] == round_.reference(0, weights, codec)
    assert root == Blob.of(round_.reference(0, weights, codec)).root


def test_the_order_of_arrival_changes_no_bit() -> None:
    weights = {0: 0.3, 1: 0.3, 2: 0.4}
    roots = set()
    for order in ((0, 1, 2), (2, 1, 0)):
        round_ = Round()
        for index in order:
            if round_.members[index] != A:
                round_.fetch(0, index)
        roots.add(round_.here.reduce(round_.key, 0, round_.chosen(weights)))
    assert len(roots) == 1


def test_parts_become_one_result_that_moves_the_state() -> None:
    round_ = Round()
    here, weights = round_.here, {0: 0.5, 1: 0.25, 2: 0.25}
    state = CanonicalState.first(TRAIN, numbers(9), chunk_values=CHUNK)
    theta, momentum = state.theta.copy(), np.zeros(VALUES, np.float32)
    here.states[TRAIN] = state
    round_.fetch_all(0)
    here.reduce(round_.key, 0, round_.chosen(weights))
    wanted = fx.ResultPart(round_.key, 1)
    item = round_.opened.parts[1]
    assert here.total_chunks(wanted) == item.count
    for place, chunk in zip(
        here.destinations(wanted, 0, item.count), round_.reference(1, weights), strict=True
    ):
        place[:] = chunk
    here.accept(wanted, [leaf_hash(c) for c in round_.reference(1, weights)])
    blob = here.assemble(round_.key)
    chunks = round_.reference(0, weights) + round_.reference(1, weights)
    assert blob.root == Blob.of(chunks).root
    mean = np.frombuffer(b"".join(chunks), np.float32)
    assert here.decoded(blob.root).tobytes() == mean.tobytes()
    moved = here.apply(fx.ApplyResult(TRAIN, 0, blob.root, lr=1.0, momentum=0.5))
    assert moved == (1, here.states[TRAIN].root())
    momentum = np.float32(0.5) * momentum + mean
    theta = theta - (mean + np.float32(0.5) * momentum)
    assert state.theta.tobytes() == theta.tobytes()
    assert state.slots["momentum"].tobytes() == momentum.tobytes()


def test_parts_are_served_as_long_as_their_result() -> None:
    """Somebody who missed a part asks those who settled long ago (a dead owner's part)."""
    here = plane()
    kept: list[list[bytes]] = []
    for number in range(RESULTS_KEPT_PER_CHANNEL + 1):
        round_ = Round()
        round_.here, key = here, round_.key
        here.register(round_.given[A])
        opened = e.RoundOpened(
            type(key)(0, TRAIN, number, 0),
            *(getattr(round_.opened, f) for f in round_.opened.__struct_fields__[1:]),
        )
        round_.opened, round_.key = opened, opened.key
        here.begin(opened)
        # Other weights each time, so that every result has bytes of its own.
        weights = {0: 1.0 / (number + 2)}
        roots = [here.reduce(round_.key, part, round_.chosen(weights)) for part in (0, 1)]
        roots.append(here.assemble(round_.key).root)
        here.release_attempt(round_.key)
        kept.append(roots)
        assert all(here.provide(root) is not None for root in roots)
    assert all(here.provide(root) is None for root in kept[0])
    assert all(here.provide(root) is not None for roots in kept[1:] for root in roots)
    here.drop(round_.given[A].root)


def test_a_part_that_is_fetched_and_computed_leaves_nothing_behind() -> None:
    round_ = Round()
    here, weights = round_.here, {0: 1.0}
    wanted = fx.ResultPart(round_.key, 0)
    item = round_.opened.parts[0]
    for place, chunk in zip(
        here.destinations(wanted, 0, item.count), round_.reference(0, weights), strict=True
    ):
        place[:] = chunk
    here.accept(wanted)
    root = here.reduce(round_.key, 0, round_.chosen(weights))
    assert here.provide(root) is not None
    here.release_attempt(round_.key)
    assert here.provide(root) is None


def test_work_that_outlives_its_attempt_is_not_kept() -> None:
    """A thread still sums while the attempt is aborted."""
    round_ = Round()
    here = round_.here
    round_.fetch_all(0)

    def interrupted(work: object, items: range) -> list[None]:
        here.release_attempt(round_.key)
        return [work(item) for item in items]  # type: ignore[operator]

    here._run = interrupted  # type: ignore[assignment]
    with pytest.raises(LocalProtocolError, match="over"):
        here.reduce(round_.key, 0, round_.chosen({0: 1.0}))
    assert list(here._blobs) == [round_.given[A].root]


def test_released_attempts_take_no_bytes() -> None:
    round_ = Round()
    round_.here.release_attempt(round_.key)
    round_.here.release_attempt(round_.key)
    for purpose in (fx.ContributionPart(round_.key, 0, 1), fx.ResultPart(round_.key, 1)):
        with pytest.raises(LocalProtocolError, match="no such attempt"):
            round_.here.destinations(purpose, 0, 1)
    with pytest.raises(LocalProtocolError, match="unknown purpose"):
        round_.here.destinations("something", 0, 1)


def test_a_contribution_of_the_set_that_is_not_here_is_said() -> None:
    round_ = Round()
    with pytest.raises(LocalProtocolError, match="not here"):
        round_.here.reduce(round_.key, 0, round_.chosen({1: 1.0}))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_values_that_are_not_finite_are_refused_wherever_they_come_from(value: float) -> None:
    bad = np.full(CHUNK, value, np.float32)
    with pytest.raises(LocalProtocolError):
        plane().encode(bad, "fp32")
    round_ = Round()
    index = round_.members.index(B)
    chunks = [bad.tobytes() for _ in range(round_.opened.parts[0].count)]
    with pytest.raises(PeerFault, match="non_finite"):
        round_.fetch(0, index, chunks)


def test_a_signed_result_that_is_not_finite_is_refused_before_anybody_applies_it() -> None:
    """A lying owner: the bytes match their root, everybody would store and commit them."""
    round_ = Round()
    wanted = fx.ResultPart(round_.key, 0)
    item = round_.opened.parts[0]
    for place in round_.here.destinations(wanted, 0, item.count):
        place[:] = np.full(place.nbytes // 4, np.nan, np.float32).tobytes()
    with pytest.raises(PeerFault, match="non_finite"):
        round_.here.accept(wanted)


STAGES = RunKeys(stages=2, inner_lr=0.01, inner_warmup_steps=0)


def test_a_step_of_a_stage_takes_the_runs_optimizer() -> None:
    """What the effect says of scale, recovery and decay reaches the arithmetic."""
    here, gradient = plane(keys=STAGES), numbers(2)
    state = here.new_state(STAGE, 40, VALUES)
    assert state.slot_names == ("m", "v")
    state.theta[:] = numbers(1)
    here.states[STAGE] = state
    expected = state.copy()
    blob = plane().encode(gradient, "int8")
    here.adopt_result(blob, VALUES, "int8")
    decoded = here.decoded(blob.root)
    assert here.square_norm(blob.root) == sum(
        reference.square_norm(decoded[here.layout(VALUES).part(i)].tolist())
        for i in range(here.layout(VALUES).chunks)
    )
    applied = fx.ApplyResult(STAGE, 40, blob.root, 0.5, 39, ((3, 9), (VALUES - 2, VALUES)))
    assert here.apply(applied) == (41, state.root())
    terms = StepTerms(40, 0.5, 39, applied.plain)
    slots = list(expected.slots.values())
    StageOptimizer.of(STAGES).step(terms, expected.theta, slots, decoded, 0)
    assert state.theta.tobytes() == expected.theta.tobytes()
    assert [a.tobytes() for a in state.slots.values()] == [a.tobytes() for a in slots]
    for other in (StepTerms(40, 0.25, 39), StepTerms(40, 0.5), StepTerms(40, 0.5, 39)):
        again = np.zeros(VALUES, np.float32) + numbers(1)
        fresh = [np.zeros(VALUES, np.float32) for _ in slots]
        StageOptimizer.of(STAGES).step(other, again, fresh, decoded, 0)
        assert again.tobytes() != state.theta.tobytes(), other


def test_the_state_of_a_stage_is_fetched_with_its_slots() -> None:
    donor = plane(keys=STAGES).new_state(STAGE, 3, VALUES)
    for seed, array in enumerate(donor.arrays):
        array[:] = numbers(seed)
    blob, here = donor.blob(), plane(keys=STAGES)
    purpose = fx.Snapshot(STAGE, 3, blob.root, VALUES)
    places = here.destinations(purpose, 0, here.total_chunks(purpose))
    for place, chunk in zip(places, blob.chunks, strict=True):
        place[:] = chunk
    assert here.install(purpose) == (3, donor.root())
    diloco = plane(keys=RunKeys(stages=2, pipeline_mode="diloco"))
    assert diloco.new_state(STAGE, 0, VALUES).slot_names == ("momentum",)


def test_a_snapshot_of_another_state_is_refused_and_changes_nothing() -> None:
    donor = CanonicalState(TRAIN, 3, numbers(1), {"momentum": numbers(2)}, chunk_values=CHUNK)
    blob, here = donor.blob(), plane()
    mine = CanonicalState.first(TRAIN, numbers(5), chunk_values=CHUNK)
    here.states[TRAIN] = mine

    def load(purpose: fx.Snapshot) -> None:
        assert here.total_chunks(purpose) == len(blob.chunks)
        for first, chunk in enumerate(blob.chunks):
            (place,) = here.destinations(purpose, first, 1)
            place[:] = chunk[: place.nbytes]

    wrong_round = fx.Snapshot(TRAIN, 4, blob.root, VALUES)
    load(wrong_round)
    with pytest.raises(PeerFault, match="malformed"):
        here.install(wrong_round)
    wrong_root = fx.Snapshot(TRAIN, 3, hash_of("x"), VALUES)
    load(wrong_root)
    with pytest.raises(PeerFault, match="corrupt"):
        here.install(wrong_root)
    assert here.states[TRAIN] is mine
    right = fx.Snapshot(TRAIN, 3, blob.root, VALUES)
    load(right)
    assert here.install(right) == (3, donor.root())
    assert here.states[TRAIN].root() == donor.root()


def test_a_whole_result_is_checked_against_the_committed_root() -> None:
    blob = plane().encode(numbers(4), "fp32")
    here = plane()
    for root in (hash_of("other"), blob.root):
        purpose = fx.WholeResult(TRAIN, 2, root, VALUES, "fp32")
        places = here.destinations(purpose, 0, here.total_chunks(purpose))
        for place, chunk in zip(places, blob.chunks, strict=True):
            place[:] = chunk
        if root != blob.root:
            with pytest.raises(PeerFault, match="corrupt"):
                here.complete(purpose)
    assert here.complete(purpose).root == blob.root
    assert here.decoded(blob.root).tobytes() == numbers(4).tobytes()
    assert here.result_codec(blob.root) == "fp32"


def test_a_download_given_up_leaves_no_memory_behind() -> None:
    here = plane()
    for number in range(20):
        purpose = fx.Snapshot(TRAIN, number, hash_of(f"state {number}"), VALUES)
        here.destinations(purpose, 0, 2)
        assert len(here._incoming) == 1
    here.destinations(fx.Snapshot("train/0/1", 0, hash_of("x"), VALUES), 0, 1)
    assert len(here._incoming) == 2  # one per channel


# --- blobs ---------------------------------------------------------------------------------------


def test_a_blob_registered_twice_is_dropped_twice() -> None:
    here = plane()
    blob = here.encode(numbers(1), "int8")
    here.register(blob)
    here.drop(blob.root)
    assert here.provide(blob.root) is blob
    here.drop(blob.root)
    here.drop(blob.root)
    assert here.provide(blob.root) is None


def test_borrowed_bytes_are_those_of_the_caller() -> None:
    values = numbers(7)
    blob = plane().encode(values, "fp32", borrow=True)
    assert blob.root == plane().encode(values, "fp32").root
    values[0] += 1
    assert bytes(blob.chunks[0][:4]) == values[:1].tobytes()


def test_results_of_groups_do_not_evict_those_of_training() -> None:
    here = plane()
    for number in range(RESULTS_KEPT_PER_CHANNEL + 2):
        for channel in (TRAIN, GROUP):
            purpose = fx.WholeResult(channel, number, bytes(32), VALUES, "fp32")
            blob = Blob.of([bytes([number]) * 32, channel.ljust(32).encode(), bytes(16)])
            purpose = fx.WholeResult(channel, number, blob.root, VALUES, "fp32")
            for place, chunk in zip(here.destinations(purpose, 0, 3), blob.chunks, strict=True):
                place[:] = chunk
            here.complete(purpose)
    assert len(here._blobs) == 2 * RESULTS_KEPT_PER_CHANNEL


def test_a_result_of_an_earlier_life_is_kept_until_it_is_applied() -> None:
    here = plane()
    here.states[TRAIN] = CanonicalState.first(TRAIN, numbers(1), chunk_values=CHUNK)
    blob = plane().encode(numbers(2), "fp32")
    here.adopt_result(blob, VALUES, "fp32")
    assert here.provide(blob.root) is blob
    here.apply(fx.ApplyResult(TRAIN, 0, blob.root, lr=1.0, momentum=0.5))
    assert here.provide(blob.root) is None


def completed(here: DataPlane, number: int) -> Blob:
    """The result of a round, fetched as a whole."""
    blob = plane().encode(numbers(number + 2), "fp32")
    purpose = fx.WholeResult(TRAIN, number, blob.root, VALUES, "fp32")
    places = here.destinations(purpose, 0, len(blob.chunks))
    for place, chunk in zip(places, blob.chunks, strict=True):
        place[:] = chunk
    here.complete(purpose)
    return blob


@pytest.mark.parametrize("adopted", [False, True], ids=["completed", "adopted"])
def test_results_that_are_caught_up_do_not_push_out_one_that_is_still_to_be_applied(
    adopted: bool,
) -> None:
    """A soak: the attempt that was open when a site died ended while it fetched older results."""
    here, last = plane(), RESULTS_KEPT_PER_CHANNEL + 3
    here.states[TRAIN] = CanonicalState.first(TRAIN, numbers(1), chunk_values=CHUNK)
    newest = completed(here, last)
    if adopted:
        here.adopt_result(newest, VALUES, "fp32")
        completed(here, last + 1)
    for number in range(last):
        root = completed(here, number).root
        here.apply(fx.ApplyResult(TRAIN, number, root, lr=1.0, momentum=0.5))
    assert here.apply(fx.ApplyResult(TRAIN, last, newest.root, lr=1.0, momentum=0.5))[0] == last + 1
    assert len(here._blobs) <= RESULTS_KEPT_PER_CHANNEL + 1


def test_results_of_attempts_that_come_to_nothing_are_bounded() -> None:
    here = plane()
    here.states[TRAIN] = CanonicalState.first(TRAIN, numbers(1), chunk_values=CHUNK)
    for number in range(3 * RESULTS_KEPT_MAX):
        completed(here, number + 5)
    assert len(here._blobs) == len(here._results._forms) == RESULTS_KEPT_MAX


def test_a_foreign_state_has_memory_of_its_own_and_is_never_installed() -> None:
    donor, here = plane(), plane()
    blob = donor.new_state(TRAIN, 3, VALUES).blob()
    own = fx.Snapshot(TRAIN, 3, blob.root, VALUES)
    foreign = fx.Snapshot(TRAIN, 3, blob.root, VALUES, "copy")
    for purpose in (own, foreign):
        assert here.total_chunks(purpose) == len(blob.chunks)
        places = here.destinations(purpose, 0, len(blob.chunks))
        for place, chunk in zip(places, blob.chunks, strict=True):
            place[:] = chunk
    here.install(own)
    installed = here.states[TRAIN]
    found = here.fetched_state(foreign)
    assert found.root() == blob.root and here.states[TRAIN] is installed
    with pytest.raises(LocalProtocolError, match="no such state"):
        here.fetched_state(foreign)
    here.destinations(foreign, 0, 1)
    with pytest.raises(LocalProtocolError, match="no such state"):
        here.fetched_state(fx.Snapshot(TRAIN, 2, hash_of("other"), VALUES, "copy"))


def test_foreign_states_for_different_uses_do_not_share_memory() -> None:
    donor, here = plane(), plane()
    blob = donor.new_state(TRAIN, 3, VALUES).blob()
    uses = ("copy", "rebuild/2", "rebuild/4")
    purposes = [fx.Snapshot(TRAIN, 3, blob.root, VALUES, use) for use in uses]
    for purpose in purposes:
        for place, chunk in zip(
            here.destinations(purpose, 0, len(blob.chunks)), blob.chunks, strict=True
        ):
            place[:] = chunk
    here.drop_foreign("rebuild/4")
    for purpose in purposes[:2]:
        assert here.fetched_state(purpose).root() == blob.root
    with pytest.raises(LocalProtocolError, match="no such state"):
        here.fetched_state(purposes[2])
