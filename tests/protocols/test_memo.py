"""Answers that are kept until what they follow from changes."""

from __future__ import annotations

import pytest

from swarmtrain_protocols.memo import Memo, Noted


def test_an_answer_is_worked_out_once_for_what_was_asked() -> None:
    memo: Memo[int] = Memo()
    worked: list[int] = []

    def work() -> int:
        worked.append(len(worked))
        return len(worked)

    asked = [("a", (1, 2)), ("a", (1, 2)), ("a", (1, 3)), ("a", (1, 2)), ("a", (1, 2))]
    assert [memo.of(item, work) for item in asked] == [1, 1, 2, 3, 3]
    assert Memo[int]().of((), lambda: 7) == 7, "nothing asked is a question too"


def test_a_noted_table_counts_every_change_and_allows_no_other() -> None:
    table: Noted[str, int] = Noted({"a": 1, "b": 2, "c": 3})
    counts = [table.changes]
    table["a"] = 5
    counts.append(table.changes)
    del table["b"]
    counts.append(table.changes)
    assert (table.pop("c"), table.pop("d", None)) == (3, None)
    counts.append(table.changes)
    table.clear()
    counts.append(table.changes)
    assert sorted(set(counts)) == counts and table == {}
    assert Noted().changes == 0, "counted by each table for itself"
    with pytest.raises(NotImplementedError):
        table.setdefault("a", 1)
    with pytest.raises(NotImplementedError):
        table.update(a=1)
