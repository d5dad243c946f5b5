"""Answers that are kept: a leader of hundreds is asked far oftener than anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class Memo(Generic[T]):
    """The last answer to one question, and what it was worked out from.

    What is handed over as ``asked`` must not change any more; what does change, like the ledger or
    a ``Noted`` table, stands there together with its index or its number of changes.
    """

    def __init__(self) -> None:
        self._asked: tuple[object, ...] = ()
        self._answer: list[T] = []

    def of(self, asked: tuple[object, ...], work: Callable[[], T]) -> T:
        """The answer; ``work()`` finds it if anything in ``asked`` is new."""
        if not self._answer or self._asked != asked:
            self._answer = [work()]
            self._asked = asked
        return self._answer[0]


class Noted(dict[K, V]):
    """A table that counts how often it was changed."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.changes = 0

    def __setitem__(self, key: K, value: V) -> None:
        self.changes += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        self.changes += 1
        super().__delitem__(key)

    def pop(self, key: K, *default: Any) -> Any:
        self.changes += 1
        return super().pop(key, *default)

    def clear(self) -> None:
        self.changes += 1
        super().clear()

    def setdefault(self, key: K, default: Any = None) -> Any:
        raise NotImplementedError("a change that is not counted")

    def update(self, *others: Any, **more: Any) -> None:
        raise NotImplementedError("changes that are not counted")
