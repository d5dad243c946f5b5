"""Steps as a site saw them: times, outcomes, pace; and those of before from the log alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmtrain_peer import host
from swarmtrain_peer.step_book import StepBook
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.node_events import LedgerChanged
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.rounds_kit import A, B


class Site:
    """A ledger, a book, and a clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = StageLog(A, B)
        self.book = StepBook()
        self.now = 1000.0
        monkeypatch.setattr(host, "wall_s", lambda: self.now)

    def hear(self, *bodies: e.EntryBody | Callable[[], e.EntryBody], at: float) -> None:
        """Entries arrive together; a function makes one of the ledger that those before left."""
        self.now, said = at, []
        for given in bodies:
            body = given() if callable(given) else given
            self.log.ok(body)
            said.append((self.log.ledger.index, body, True))
        self.book.watch(LedgerChanged(tuple(said)))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


def test_a_step_has_its_times_contributors_and_roots(site: Site) -> None:
    site.hear(site.log.closing(A, B), at=1010.0)
    (one,) = site.book.documents(site.log.ledger)
    assert (one["channel"], one["round"], one["outcome"]) == ("steps", 0, "open")
    assert one["loss"] == 2.5
    assert one["decided_wall_s"] is None
    # Two pairs at each of three stages.
    assert {c["id"]: c["samples"] for c in one["contributors"]} == {A.hex(): 6.0, B.hex(): 6.0}
    assert all(c["coefficient"] == 0.25 for c in one["contributors"]), "of four micro-batches"
    assert [s["root"] for s in one["stages"]] == [None] * 3
    outcome = site.log.outcome()
    site.hear(outcome, at=1011.5)
    (one,) = site.book.documents(site.log.ledger)
    assert (one["outcome"], one["opened_wall_s"], one["decided_wall_s"]) == (
        "committed",
        1010.0,
        1011.5,
    )
    assert [s["root"] for s in one["stages"]] == [item.root.hex() for item in outcome.stages]
    assert site.book.times(0, 0) == (None, 1010.0)
    site.hear(site.log.closing(A), at=1013.0)
    assert site.book.times(1, 0) == (1011.5, 1013.0), "a step begins when the one before is decided"


def test_an_aborted_attempt_is_listed_beside_the_one_that_committed(site: Site) -> None:
    site.hear(site.log.closing(A, B), at=1010.0)
    site.hear(site.log.abort("results differ"), at=1012.0)
    site.hear(site.log.closing(A, B), at=1013.0)
    site.hear(site.log.outcome(), at=1014.0)
    rows = [
        (d["round"], d["attempt"], d["outcome"], d["reason"])
        for d in site.book.documents(site.log.ledger)
    ]
    assert rows == [(0, 0, "aborted", "results differ"), (0, 1, "committed", "")]


def test_history_has_no_times(site: Site) -> None:
    site.log.step(A, B)  # before this process began
    closing, outcome = lambda: site.log.closing(A), site.log.outcome
    site.hear(closing, outcome, closing, at=1010.0)
    first, second, third = site.book.documents(site.log.ledger)
    assert (first["round"], first["outcome"], first["opened_wall_s"]) == (0, "committed", None)
    assert {c["id"]: c["samples"] for c in first["contributors"]} == {A.hex(): 6.0, B.hex(): 6.0}
    assert len(first["stages"]) == 3
    assert (second["round"], second["opened_wall_s"]) == (1, None), "it came as part of a catch-up"
    assert (third["round"], third["outcome"]) == (2, "open")
    assert site.book.pace() is None


def test_pace_is_that_of_the_newest_commits(site: Site) -> None:
    for at in (1010.0, 1012.0, 1014.0, 1020.0):
        site.hear(site.log.closing(A, B), at=at - 0.5)
        site.hear(site.log.outcome(), at=at)
    seconds, rate = site.book.pace() or (0.0, 0.0)
    assert seconds == pytest.approx(10 / 3)
    assert rate == pytest.approx(12 / 10), "three steps of four micro-batches in ten seconds"


def test_who_has_worked_lately(site: Site) -> None:
    site.hear(site.log.closing(A), at=1010.0)
    site.hear(site.log.outcome(), at=1011.0)
    site.hear(site.log.closing(B), at=1019.0)
    assert site.book.contributors(1000.0) == [A.hex()], "what is not decided says nothing"
    site.hear(site.log.outcome(), at=1020.0)
    assert site.book.contributors(1000.0) == [A.hex(), B.hex()]
    assert site.book.contributors(1015.0) == [B.hex()]
