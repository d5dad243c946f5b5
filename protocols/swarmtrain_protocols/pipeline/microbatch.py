"""One micro-batch at its driver: where it is on its path, and everything it needs to be redone.

With hops p₀ … pₙ the driver asks for the forwards of p₀ … pₙ₋₁, then for the backward of pₙ (the
head does forward and backward in one), then for the backwards of pₙ₋₁ … p₀. The input and the
gradient of every hop are kept as they were sent, so that any hop can be asked again, anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import EMPTY, Tensor

Hop = tuple[int, bool]
"""(hop, backward): one request of a micro-batch."""


@dataclass(slots=True)
class MicroBatch:
    """State of micro-batch ``k``. ``place`` counts the requests of the path that are answered."""

    k: int
    path: tuple[int, ...]
    begun: bool = False
    """Leased micro-batches wait until there is room for them."""
    tokens: bytes | None = None
    place: int = 0
    loss: float = 0.0
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Input of each hop."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """Gradient of each hop's output."""
    makers: dict[Hop, PeerId] = field(default_factory=dict)
    """Whose answer was taken for each request."""
    issues: dict[Hop, int] = field(default_factory=dict)
    """How often each request was sent; numbers the next one."""
    redone: dict[int, None] = field(default_factory=dict)
    """Hops whose backward was asked for again since it was last said to be done."""
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.inputs[self.path[0]] = EMPTY
        self.gradients[self.path[-1]] = EMPTY

    @property
    def requests(self) -> int:
        """Requests from the first forward to the last backward."""
        return 2 * len(self.path) - 1

    @property
    def done(self) -> bool:
        return self.place == self.requests

    def at(self, place: int) -> Hop:
        """The request at a place of the way there and back."""
        last = len(self.path) - 1
        return (self.path[place], False) if place < last else (self.path[2 * last - place], True)

    @property
    def now(self) -> Hop | None:
        """The request whose answer it waits for; None: all are answered."""
        return None if self.done else self.at(self.place)

    def passed(self, hop: int) -> bool:
        """The backward of ``hop`` was answered, so that both its tensors are here."""
        return any(self.at(place) == (hop, True) for place in range(self.place))

    def answered(self, output: Tensor, loss: float, maker: PeerId) -> None:
        """The answer of ``now``: its output belongs to the neighbour on the path."""
        hop, backward = here = self.at(self.place)
        index = self.path.index(hop)
        self.makers[here] = maker
        if not backward:
            self._keep(self.inputs, self.path[index + 1], output)
        else:
            if index == len(self.path) - 1:
                self.loss = loss
            if index > 0:
                self._keep(self.gradients, self.path[index - 1], output)
        self.place += 1

    def _keep(self, where: dict[int, Tensor], hop: int, tensor: Tensor) -> None:
        old = where.get(hop)
        where[hop] = tensor
        self.nbytes += tensor.nbytes - (old.nbytes if old is not None else 0)

    def step_back(self) -> PeerId | None:
        """What the last answer brought is no good: it is asked for again. Who had sent it."""
        if self.place == 0:
            return None
        self.place -= 1
        return self.makers.pop(self.at(self.place), None)
