"""What the catalogue says of one kind of event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of event: a stable name and code, and what its own fields mean."""

    name: str
    severity: Severity
    code: str
    meaning: str
    fields: tuple[str, ...] = ()
    """The event's own fields; those before the first that ends in ``?`` must be given."""
    limited: bool = False
    """A remote peer can cause it at will: bounded per (name, peer)."""

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in self.fields if not name.endswith("?"))
