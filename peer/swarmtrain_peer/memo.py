"""What the trainer's desk remembers across a restart of the peer process."""

from __future__ import annotations

from pathlib import Path

import msgspec

from swarmtrain_protocols.ledger import ChannelState


class Sent(msgspec.Struct):
    """A hand-over that was announced. ``index``: of the newest log entry at that time."""

    seq: int
    root: str
    index: int


class Memo(msgspec.Struct):
    """The next data position, and the last hand-over of each channel."""

    next_position: int = 0
    sent: dict[str, Sent] = {}

    def outcome(
        self, channel: str, seq: int, known: ChannelState | None, me: bytes
    ) -> tuple[str, float] | None:
        """(outcome, coefficient) of hand-over ``seq`` by the log, or None if it is open.

        A site has one undecided contribution in a channel, so an outcome that counts this site and
        was logged after the hand-over counts that hand-over.
        """
        sent = self.sent.get(channel)
        if sent is None or sent.seq != seq or known is None:
            return None
        if known.open is not None and any(
            c.root.hex() == sent.root for c in known.open.contributors
        ):
            return None
        counted = [
            coefficient
            for item in known.history
            if item.index > sent.index
            for member, _, coefficient in item.contributors
            if member == me
        ]
        return ("committed", counted[0]) if counted else ("aborted", 0.0)


def read_memo(path: Path) -> Memo:
    """The memo, or an empty one if there is none or it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Memo)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Memo()
