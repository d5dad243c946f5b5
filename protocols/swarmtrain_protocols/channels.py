"""A channel as the log tells it: what is open, what was committed, what is pinned (spec 08).

Plain state of ``ledger.Ledger``, apart from it because rounds and pipelines both move it.
"""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import clip

ZERO_HASH = bytes(32)


def are_ranges(ranges: tuple[tuple[int, int], ...], values: int) -> bool:
    """Whether half-open ranges are ascending, disjoint, not empty and within ``values``."""
    position = 0
    for first, last in ranges:
        if not position <= first < last <= values:
            return False
        position = last
    return True


class Outcome(msgspec.Struct):
    """A committed round: enough to fetch its result from anybody and to verify it."""

    round: int
    attempt: int
    generation: int
    root: bytes
    values: int
    gather_codec: str
    state_hash: bytes
    contributors: tuple[tuple[bytes, float, float], ...]
    """(member, samples, coefficient) of those in the set."""
    held_by: tuple[bytes, ...]
    index: int
    scale: float = 1.0
    """Factor for the whole gradient of a step (fp32), 1 for rounds."""
    progress: float = 0.0
    """Samples of all sets before this one."""


class ChannelState(msgspec.Struct):
    """One channel: ``round`` is the next round to commit, ``attempt`` the next attempt at it."""

    name: str
    values: int
    round: int = 0
    attempt: int = 0
    open: e.RoundOpened | None = None
    chosen: e.RoundSet | None = None
    start_round: int = 0
    start_hash: bytes = ZERO_HASH
    aborted: int = 0
    last_abort: str = ""
    listed: dict[bytes, tuple[int, bytes]] = {}
    """By member: index of the newest ROUND_OPENED that listed it, and the root it had there."""
    history: list[Outcome] = []
    samples: float = 0.0
    """Samples of all committed sets: the progress of the run, each sample once."""
    phase_s: float = 0.0
    """What the newest attempt said of the pace (08 §2.8)."""
    norms: tuple[float, ...] = ()
    """By which the last committed sets are to be measured (15), oldest first."""

    @property
    def holds_state(self) -> bool:
        return self.name.startswith("train/")

    @property
    def last_index(self) -> int:
        """Log index of the latest commit, -1 without one."""
        return self.history[-1].index if self.history else -1

    def outcome(self, round_number: int) -> Outcome | None:
        """The commit of a round, if it is recent enough to be remembered."""
        for item in reversed(self.history):  # rounds ascend: most that are asked for are newer
            if item.round <= round_number:
                return item if item.round == round_number else None
        return None

    def pinned_hash(self, round_number: int) -> bytes | None:
        """State hash before ``round_number`` as the log pins it, or None if it does not."""
        if self.open is not None and self.open.key.round == round_number:
            return self.open.state_hash
        done = self.outcome(round_number)
        if done is not None:
            return done.state_hash
        if round_number == self.start_round and self.start_hash != ZERO_HASH:
            return self.start_hash
        return None

    def is_open(self, key: RoundKey) -> bool:
        """Whether exactly this attempt is under way."""
        return self.open is not None and self.open.key == key

    def begin(self, index: int, body: e.RoundOpened, listed_max: int) -> None:
        """An attempt was opened by entry ``index``; nothing was open.

        At most ``listed_max`` members are remembered as listed, besides those of this attempt.
        """
        assert self.open is None
        self.values = body.values
        self.open, self.chosen = body, None
        self.phase_s = body.phase_s
        for item in body.contributors:
            self.listed.pop(item.member, None)
            self.listed[item.member] = (index, item.root)
        while len(self.listed) > max(listed_max, len(body.contributors)):
            del self.listed[next(iter(self.listed))]

    def commit(
        self, index: int, root: bytes, held_by: tuple[bytes, ...], channels: int, scale: float = 1.0
    ) -> None:
        """The open attempt, whose set is chosen, is the round's outcome.

        ``channels`` share the memory of the ledger: fewer outcomes are kept where they are long.
        """
        opened, chosen = self.open, self.chosen
        assert opened is not None
        assert chosen is not None
        self.history.append(
            Outcome(
                round=opened.key.round,
                attempt=opened.key.attempt,
                generation=opened.key.generation,
                root=root,
                values=opened.values,
                gather_codec=opened.gather_codec,
                state_hash=opened.state_hash,
                contributors=tuple(
                    (
                        opened.contributors[c.index].member,
                        opened.contributors[c.index].samples,
                        c.value,
                    )
                    for c in chosen.coefficients
                ),
                held_by=held_by,
                index=index,
                scale=scale,
                progress=self.samples,
            )
        )
        for _, samples, _ in self.history[-1].contributors:
            self.samples += samples
        self.norms = clip.kept_after(opened, chosen, self.norms)
        del self.history[: -self._history_rounds(channels)]
        self.round += 1
        self.attempt = 0
        self.open = self.chosen = None

    def _history_rounds(self, channels: int) -> int:
        """Outcomes to remember: fewer where they are long, so that the ledger stays small."""
        latest = self.history[-1]
        records = 1 + len(latest.contributors) + len(latest.held_by)
        fitting = limits.HISTORY_RECORDS_MAX // (records * channels)
        return max(limits.HISTORY_ROUNDS_MIN, min(limits.HISTORY_ROUNDS, fitting))

    def abort(self, reason: str) -> None:
        """The open attempt has failed; the round stays the next one."""
        self.attempt += 1
        self.aborted += 1
        self.last_abort = reason
        self.open = self.chosen = None

    def restart(self, round_number: int, root: bytes) -> None:
        """Begin anew from the state ``root`` before ``round_number``; later rounds are void.

        So are their samples; where the round is forgotten, its share of all rounds is taken.
        """
        done = self.outcome(round_number)
        if done is not None:
            self.samples = done.progress
        elif 0 <= round_number < self.round:
            self.samples *= round_number / self.round
        self.round, self.attempt = round_number, 0
        self.open = self.chosen = None
        self.norms = ()
        self.start_round, self.start_hash = round_number, root
        self.history = [item for item in self.history if item.round < round_number]
