"""Which results stay in memory: the newest few of a channel, and all that are still to be applied.

Who catches up completes older results after newer ones, which must not push those out. What an
earlier life left on the disk is *adopted*: kept until it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

RESULTS_KEPT_PER_CHANNEL = 4
RESULTS_KEPT_MAX = 8
"""With those that are still to be applied, and those of attempts that came to nothing."""

Form = tuple[int, str]
"""Number of values, and codec."""


class KeptResults:
    """``drop`` undoes one registration of a blob, by its root."""

    def __init__(self, drop: Callable[[bytes], None]) -> None:
        self._drop = drop
        self._kept: dict[str, list[tuple[int, Sequence[bytes]]]] = {}
        self._adopted: dict[bytes, str] = {}
        self._forms: dict[bytes, Form] = {}

    def form(self, root: bytes) -> Form:
        """Of a result that is kept. Raises: KeyError: it is not."""
        return self._forms[root]

    def keep(
        self, channel: str, number: int, roots: Sequence[bytes], form: Form, next_round: int | None
    ) -> None:
        """The result of round ``number``, and its parts, which share its memory: ``roots``.

        ``next_round``: that of the channel's state, to which the result of that round is to be
        applied next; None if nothing is applied here.
        """
        self._forms[roots[0]] = form
        kept = self._kept.setdefault(channel, [])
        kept.append((number, roots))
        while len(kept) > RESULTS_KEPT_PER_CHANNEL:
            # Never the new one, however old its round is: somebody waits for it.
            done = [i for i, (n, _) in enumerate(kept[:-1]) if next_round is None or n < next_round]
            if not done and len(kept) <= RESULTS_KEPT_MAX:
                break
            self._forget(kept.pop(done[0] if done else 0)[1])

    def adopt(self, channel: str, root: bytes, form: Form) -> None:
        """A result from an earlier life; the log may never ask for it."""
        self._forms[root] = form
        self._adopted[root] = channel

    def applied(self, root: bytes) -> None:
        """Its step was taken: an adopted one has served its purpose."""
        if self._adopted.pop(root, None) is not None:
            self._forget([root])

    def forget(self, channel: str) -> None:
        """All of a channel."""
        for _, roots in self._kept.pop(channel, []):
            self._forget(roots)
        for root in [root for root, of in self._adopted.items() if of == channel]:
            self.applied(root)

    def _forget(self, roots: Sequence[bytes]) -> None:
        for root in roots:
            self._drop(root)
        used = (own[0] for kept in self._kept.values() for _, own in kept)
        if roots[0] not in self._adopted and roots[0] not in used:
            self._forms.pop(roots[0], None)
