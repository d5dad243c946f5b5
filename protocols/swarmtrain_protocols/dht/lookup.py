"""One iterative lookup (Kademlia §2.3) over disjoint paths (Baumgart and Mies, S/Kademlia, 2007).

The contacts known at the start are dealt to three views. Each node is asked once, by one path, and
what it answers goes into that path's view alone: who answers with accomplices only has misled one
path, the others go on without its word. A view's short list are its k nearest contacts, at most two
of a public subnet; where there are no others, more of the same fill it up.

At most α requests are awaited at a time. A request that is slow stops counting against α and
against convergence, so a dead peer costs a fraction of its timeout; a late answer still counts.
The lookup is over when the short list of every view has answered, as far as it neither failed nor
is slow (or, where a list is shorter than k, when nobody is left to wait for).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from enum import Enum
from itertools import islice

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import Contact, subnets


class _State(Enum):
    KNOWN = 0
    ASKED = 1
    SLOW = 2
    ANSWERED = 3
    FAILED = 4


class _View:
    """What one path has heard of: nearest first, bounded."""

    def __init__(self) -> None:
        self.order: list[tuple[int, PeerId]] = []
        self.peers: dict[PeerId, None] = {}
        self.awaited = 0
        self.short: list[PeerId] | None = None
        """The short list, if nothing has changed since it was made."""


class Lookup:
    """Finds the k peers nearest to ``target``, starting from ``contacts``; never asks ``own``."""

    def __init__(
        self,
        target: int,
        contacts: Iterable[Contact],
        *,
        own: PeerId,
        k: int = limits.DHT_K,
        alpha: int = limits.DHT_ALPHA,
        paths: int = limits.DHT_PATHS,
    ) -> None:
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._contacts: dict[PeerId, Contact] = {}
        self._states: dict[PeerId, _State] = {}
        self._views = [_View() for _ in range(paths)]
        self._asked_by: dict[PeerId, _View] = {}
        self._wide: _View | None = None
        self._awaited = 0
        self._slow = 0
        self.answers = 0
        self.failures = 0
        self.stopped = False
        self.learn(contacts)

    def knows(self, peer: PeerId) -> bool:
        """True if ``peer`` is a candidate of some path, or this node."""
        return peer in self._states or peer == self._own

    def is_news(self, by: PeerId, peer: PeerId) -> bool:
        """True if the path that asked ``by`` has not heard of ``peer``."""
        return peer not in self._asked_by[by].peers and peer != self._own

    def learn(self, contacts: Iterable[Contact]) -> None:
        """Deal contacts that no path has heard of to the paths in turn, nearest first."""
        fresh = {c.peer: c for c in contacts if not self.knows(c.peer)}
        ordered = sorted(fresh.values(), key=lambda c: c.id ^ self.target)
        for number, contact in enumerate(ordered):
            self._enter(self._views[number % len(self._views)], contact)

    def widen(self, contacts: Iterable[Contact]) -> None:
        """Have ``contacts`` asked whatever lies nearer; what they answer leads to nobody else."""
        if self._wide is None:
            self._wide = _View()
            self._views.append(self._wide)
        for contact in contacts:
            if len(self._wide.order) < limits.DHT_CROWD_ASKED_MAX and contact.peer != self._own:
                self._enter(self._wide, contact)

    def next_queries(self) -> list[Contact]:
        """Contacts to be asked now; each is asked once and must end in answered() or failed()."""
        found: list[Contact] = []
        while not self.stopped and self._awaited < self._alpha:
            # The path that waits for the fewest goes first, so that none of them lags behind.
            for view in sorted(self._views, key=lambda view: view.awaited):
                peer = self._unasked(view)
                if peer is not None:
                    break
            else:
                break
            self._states[peer] = _State.ASKED
            self._asked_by[peer] = view
            view.awaited += 1
            self._awaited += 1
            found.append(self._contacts[peer])
        return found

    def slow(self, peer: PeerId) -> None:
        """The answer of ``peer`` takes longer than answers usually take."""
        if self._states.get(peer) is _State.ASKED:
            self._states[peer] = _State.SLOW
            self._stop_waiting(peer)
            self._slow += 1
            self._changed(peer)

    def answered(self, peer: PeerId, contacts: Iterable[Contact]) -> None:
        """``peer`` has answered; its contacts enter the view of the path that asked it."""
        if self._settle(peer, _State.ANSWERED):
            self.answers += 1
            self.hear(peer, contacts)

    def hear(self, peer: PeerId, contacts: Iterable[Contact]) -> None:
        """``peer``, which was asked, names ``contacts``; more of its answer may follow."""
        view = self._asked_by[peer]
        if view is self._wide:
            return
        new = [c for c in contacts if c.peer != self._own]
        for contact in new:
            self._enter(view, contact)
        # With one contact to start from, paths can only part behind it.
        empty = [v for v in self._views if not v.order]
        for number, contact in enumerate(sorted(new, key=lambda c: c.id ^ self.target)):
            if empty:
                self._enter(empty[number % len(empty)], contact)

    def failed(self, peer: PeerId) -> None:
        if self._settle(peer, _State.FAILED):
            self.failures += 1

    def stop(self) -> None:
        """Ask nobody any more; what has answered so far is the result."""
        self.stopped = True

    @property
    def done(self) -> bool:
        return self.stopped or all(self._view_done(view) for view in self._views)

    def awaits(self, peer: PeerId) -> bool:
        """True if ``peer`` was asked and is not late yet."""
        return self._states.get(peer) is _State.ASKED

    def awaited(self) -> list[Contact]:
        """Who was asked, has not answered and is not late yet."""
        return [self._contacts[peer] for peer in self._asked_by if self.awaits(peer)]

    def nearest(self, count: int) -> list[Contact]:
        """The nearest candidates that have not failed, whether they have answered or not."""
        found: dict[PeerId, None] = {}
        for view in self._views:
            living = (p for _, p in view.order if self._states[p] is not _State.FAILED)
            found.update(dict.fromkeys(islice(living, count)))
        return sorted((self._contacts[p] for p in found), key=lambda c: c.id ^ self.target)[:count]

    def closest(self) -> list[Contact]:
        """The k nearest peers that have answered, nearest first."""
        return self._answered_in([view.order for view in self._views])[: self._k]

    def spread(self) -> list[Contact]:
        """Whoever has answered of the short lists of all paths, nearest first.

        Without trouble all lists are the same k; where somebody misleads a path, both its list and
        the others'.
        """
        lists = [[(0, peer) for peer in self._shortlist(view)] for view in self._views]
        return self._answered_in(lists)

    def _answered_in(self, lists: list[list[tuple[int, PeerId]]]) -> list[Contact]:
        found: dict[PeerId, Contact] = {}
        for order in lists:
            for _, peer in order:
                if self._states[peer] is _State.ANSWERED:
                    found[peer] = self._contacts[peer]
        return sorted(found.values(), key=lambda contact: contact.id ^ self.target)

    # -- inside --------------------------------------------------------------------------------

    def _enter(self, view: _View, contact: Contact) -> None:
        """Add a candidate to one view; only the nearest few hundred are kept."""
        peer = contact.peer
        if peer in view.peers or peer == self._own:
            return
        place = (contact.id ^ self.target, peer)
        if len(view.order) >= limits.DHT_CANDIDATES_MAX:
            last = view.order[-1]
            if place >= last or self._states[last[1]] is not _State.KNOWN:
                return
            view.order.pop()
            del view.peers[last[1]]
            if not any(last[1] in other.peers for other in self._views):
                del self._states[last[1]], self._contacts[last[1]]
        insort(view.order, place)
        view.peers[peer] = None
        view.short = None
        self._contacts.setdefault(peer, contact)
        self._states.setdefault(peer, _State.KNOWN)

    def _shortlist(self, view: _View) -> list[PeerId]:
        """The view's k nearest that neither failed nor are slow, at most two of one subnet."""
        if view.short is None:
            view.short = self._make_shortlist(view)
        return view.short

    def _make_shortlist(self, view: _View) -> list[PeerId]:
        chosen: list[PeerId] = []
        spare: list[PeerId] = []
        counts: dict[str, int] = {}
        room = limits.DHT_CROWD_ASKED_MAX if view is self._wide else self._k
        for _, peer in view.order:
            if self._states[peer] in (_State.FAILED, _State.SLOW):
                continue
            if blocks := subnets(self._contacts[peer].addresses):
                if any(counts.get(b, 0) >= limits.DHT_PER_SUBNET_IN_LOOKUP for b in blocks):
                    spare.append(peer)
                    continue
                for block in blocks:
                    counts[block] = counts.get(block, 0) + 1
            chosen.append(peer)
            if len(chosen) == room:
                break
        return chosen + spare[: room - len(chosen)]

    def _unasked(self, view: _View) -> PeerId | None:
        for peer in self._shortlist(view):
            if self._states[peer] is _State.KNOWN:
                return peer
        return None

    def _view_done(self, view: _View) -> bool:
        short = self._shortlist(view)
        if any(self._states[peer] is not _State.ANSWERED for peer in short):
            return False
        return len(short) >= self._k or self._slow == 0

    def _settle(self, peer: PeerId, state: _State) -> bool:
        before = self._states.get(peer)
        if before is _State.ASKED:
            self._stop_waiting(peer)
        elif before is _State.SLOW:
            self._slow -= 1
            self._changed(peer)
        else:
            return False
        self._states[peer] = state
        if state is _State.FAILED:
            self._changed(peer)
        return True

    def _stop_waiting(self, peer: PeerId) -> None:
        self._awaited -= 1
        self._asked_by[peer].awaited -= 1

    def _changed(self, peer: PeerId) -> None:
        """Somebody has left, or come back into, the short lists that it is near enough for."""
        for view in self._views:
            if peer in view.peers:
                view.short = None
