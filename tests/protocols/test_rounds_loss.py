"""A committed round whose bytes nobody has any more: rewound in the open, and only then."""

from __future__ import annotations

import math

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import ZERO_HASH
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds.loss import DATA_LOSS_S, LossWatch
from tests.protocols.rounds_kit import TRAIN, A, Log, hash_of


def committed(rounds: int) -> Log:
    log = Log(A)
    for number in range(rounds):
        opened = log.open([A])
        log.choose(opened)
        log.commit(opened, hash_of(f"result {number}"))
    return log


def at(round_number: int, state_hash: bytes | None = None) -> StateReport:
    known = hash_of(f"state {round_number}") if state_hash is None else state_hash
    return StateReport(0, TRAIN, round_number, known, False, True)


def test_nobody_at_the_front_for_long_rewinds_to_the_newest_state_that_is_held() -> None:
    log, watch = committed(3), LossWatch()
    reports = {TRAIN: [at(0), at(2), at(1)]}
    assert watch.check(10.0, log.ledger, reports) is None
    assert watch.deadline() == 10.0 + DATA_LOSS_S
    assert watch.check(10.0 + DATA_LOSS_S - 0.1, log.ledger, reports) is None
    assert watch.check(10.0 + DATA_LOSS_S, log.ledger, reports) == e.Rewound(
        1,
        "data loss: no member holds the result of a committed round",
        (TRAIN,),
        (2,),
        (hash_of("state 2"),),
    )
    assert watch.deadline() == math.inf


def test_somebody_at_the_front_stops_the_clock() -> None:
    log, watch = committed(3), LossWatch()
    behind = {TRAIN: [at(2)]}
    watch.check(0.0, log.ledger, behind)
    assert watch.check(30.0, log.ledger, {TRAIN: [at(2), at(3)]}) is None
    assert watch.deadline() == math.inf
    assert watch.check(DATA_LOSS_S + 1, log.ledger, behind) is None
    assert watch.check(DATA_LOSS_S + 1 + DATA_LOSS_S, log.ledger, behind) is not None


def test_a_round_in_progress_or_nobody_there_is_no_loss() -> None:
    log, watch = committed(1), LossWatch()
    assert watch.check(0.0, log.ledger, {TRAIN: []}) is None
    assert watch.check(1e6, log.ledger, {}) is None
    log.open([A])
    watch.check(0.0, log.ledger, {TRAIN: [at(0)]})
    assert watch.check(1e6, log.ledger, {TRAIN: [at(0)]}) is None


def test_only_states_that_the_log_pins_are_gone_back_to() -> None:
    """Bad input: a report that lies about its hash, or about a round of the future."""
    log = committed(3)
    for lie in (at(2, hash_of("lie")), at(2, ZERO_HASH), at(7)):
        watch = LossWatch()
        watch.check(0.0, log.ledger, {TRAIN: [lie]})
        assert watch.check(1e6, log.ledger, {TRAIN: [lie]}) is None
        found = watch.check(1e6, log.ledger, {TRAIN: [lie, at(1)]})
        assert found is not None and found.rounds == (1,)


def test_all_channels_go_back_together_or_none() -> None:
    log = Log(A, model=False)
    layout = (e.ChannelLayout(TRAIN, 20), e.ChannelLayout("train/0/1", 20))
    roots = (hash_of("state 0"), hash_of("other 0"))
    assert log.add(e.ModelDefined(bytes(32), layout, roots, A))
    opened = log.open([A])
    log.choose(opened)
    log.commit(opened, hash_of("result"))
    watch = LossWatch()
    alone = {TRAIN: [at(0)]}
    watch.check(0.0, log.ledger, alone)
    assert watch.check(1e6, log.ledger, alone) is None
    both = {**alone, "train/0/1": [StateReport(0, "train/0/1", 0, roots[1], True, True)]}
    found = watch.check(1e6, log.ledger, both)
    assert found is not None
    assert found.channels == (TRAIN, "train/0/1") and found.roots == roots
    assert log.add(found)
