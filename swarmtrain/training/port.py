"""The trainer's line to its peer process: attach, hand over, and attach again when it comes back.

Calls go over the site's control socket, values through shared memory (``swarmtrain_peer.shm``).
After the first attach everything on the socket happens on one background thread, so that a peer
process that is slow, hung or dead never holds up the training loop.

===========  ================================================  =====================================
call         arguments                                         result
===========  ================================================  =====================================
attach       schema, schema_hash, layout, rank, pid, device,   ``Attached``
             samples_per_step, again (true after a loss),
             in_flight {channel: seq}
define       seqs {channel: seq}                               {}: θ⁰ is read and its slots released
handover     channel, seq, samples (of this phase), carried    {}: repeats of one seq are fine
             (of earlier ones in it, ``age`` of which have
             any), age, base_round, steps, loss, phase_s,
             blocked_s, step_s (mean seconds of a step
             outside the hook), next_position
scalars      values {name: number}, step                       {}
evaluated    round, loss, tokens                               {}
finished     (all planned steps are done; evaluating goes on)  {}
detach       {}                                                {}
===========  ================================================  =====================================

θ is shown in shared memory before the decision that made it. Pushes (``{"event": name, ...}``) only
wake the trainer up or inform it; what is decided stands in shared memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from swarmtrain.training.flat import Flat
from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClosed, ControlTimeout
from swarmtrain_peer.shm import TrainerSide
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import RunMismatch, SwarmError

Document = dict[str, Any]
Notify = Callable[[str, Document], None]

FINAL_CODES = (3, 6, 7, 8)
"""Exit codes of refusals that asking again cannot change."""
_WAIT_FIRST_S = 0.0005
_WAIT_MAX_S = 0.01


class Control(Protocol):
    """What the port needs of ``swarmtrain_peer.control.ControlClient``."""

    @property
    def closed(self) -> bool: ...

    def call(self, name: str, args: Document, timeout_s: float) -> Document: ...

    def subscribe(self, callback: Callable[[Document], None]) -> None: ...

    def on_close(self, callback: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class Outcome(msgspec.Struct, frozen=True):
    """How a hand-over that was in flight at a loss ended, if the peer process knows."""

    seq: int
    outcome: str
    coefficient: float = 0.0
    round: int = 0


class Attached(msgspec.Struct, frozen=True):
    """Answer to ``attach``. Unknown keys are ignored: they are for later versions.

    ``run`` holds all run keys, with ``overlap``, ``outer_lr`` and ``outer_momentum`` as they are
    in this round; later ones come with θ.
    ``rounds`` are the channels' rounds now. ``ordinal`` and ``next_position``: see ``data.py``.
    """

    shm: str
    run: dict[str, Any]
    rounds: dict[str, int] = {}
    need_theta0: bool = False
    site: str = ""
    ordinal: int = 0
    next_position: int = 0
    members: tuple[str, ...] = ()
    outcomes: dict[str, Outcome] = {}
    tempo: dict[str, float] = {}
    """``pace_s``, ``progress`` and ``gain`` as in pushes, see ``tempo.py``."""


class Session:
    """One attachment. A new one after every loss; ``number`` tells them apart."""

    def __init__(
        self, number: int, control: Control, attached: Attached, side: TrainerSide
    ) -> None:
        self.number = number
        self.control = control
        self.attached = attached
        self.side = side
        self.refused: dict[str, int] = {}
        """Hand-overs (channel: seq) that the peer process would not take."""
        self.loss_told = False

    def peer_beats(self) -> bool:
        """Whether the peer process showed life lately; true before its first heartbeat."""
        beat_ns = self.side.beat_ns()
        return beat_ns == 0 or host.mono_s() - beat_ns / 1e9 < limits.PEER_BEAT_STALE_S


class Port:
    """Keeps one session with the peer process alive. Thread-safe."""

    def __init__(
        self,
        connect: Callable[[], Control],
        flat: Flat,
        notify: Notify,
        in_flight: Callable[[], dict[str, int]] = dict,
        *,
        device: str = "cpu",
    ) -> None:
        """Nothing happens yet.

        Args:
            notify: gets pushes and this port's own events (name, fields), on other threads.
            in_flight: what the training thread waits for, told at the next attach.
        """
        self._connect = connect
        self._flat = flat
        self._notify = notify
        self._device = device
        self._session: Session | None = None
        self._sessions = 0
        self._calls: queue.Queue[tuple[Session, str, Document] | None] = queue.Queue(
            limits.PORT_QUEUE_MAX
        )
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._in_flight = in_flight
        self.final: SwarmError | None = None
        """A refusal that ends all attempts."""
        self.dropped_scalars = 0
        self.on_idle: Callable[[], None] | None = None
        """Called on the training thread whenever it waits."""
        self._attaching: Control | None = None

    @property
    def session(self) -> Session | None:
        """The session of now, ``None`` while the peer process is away."""
        found = self._session
        return None if found is None or found.control.closed else found

    def attach(self, timeout_s: float = limits.TRAINER_WAIT_S_MAX) -> Session:
        """Connect and attach, on the calling thread.

        The peer process answers once it is a member and has the state, which may take long.

        Raises:
            SwarmError: nobody answers, or the typed refusal of the peer process.
        """
        control = self._attaching = self._connect()
        try:
            control.subscribe(self._pushed)
            args = {
                "schema": [[name, list(shape), dtype] for name, shape, dtype in self._flat.schema],
                "schema_hash": self._flat.schema_hash.hex(),
                "layout": [[name, n] for name, n in self._flat.layout],
                "rank": 0,
                "pid": os.getpid(),
                "device": self._device,
                "samples_per_step": 0,
                "again": self._sessions > 0,
                "in_flight": self._in_flight(),
            }
            answer = control.call("attach", args, timeout_s)
            session = self._open(control, answer)
        except BaseException:
            control.close()
            raise
        finally:
            self._attaching = None
        control.on_close(self._wake_thread)
        with self._changed:
            self._session = session
            self._changed.notify_all()
        return session

    def _open(self, control: Control, answer: Document) -> Session:
        try:
            attached = msgspec.convert(answer, Attached)
        except msgspec.ValidationError as error:
            raise RunMismatch(
                "attach",
                f"the peer process answered {error}",
                "run trainer and peer process from one installation",
            ) from None
        old = self._session
        if old is not None and str(old.side.path) == attached.shm:
            side = old.side  # the same process, another connection: what is in flight stays there
        else:
            try:
                side = TrainerSide.open(Path(attached.shm), self._flat.schema_hash)
            except FileNotFoundError:
                raise ControlClosed("attach", f"{attached.shm} is gone again") from None
        if [(name, side.values(name)) for name in side.names] != self._flat.layout:
            raise RunMismatch("attach", "the shared memory is laid out for another model")
        self._sessions += 1
        return Session(self._sessions, control, attached, side)

    def start(self) -> None:
        """Serve the session, and attach again after losses, on a background thread."""
        self._thread = threading.Thread(target=self._run, name="swarm-port", daemon=True)
        self._thread.start()

    def send(self, session: Session, name: str, args: Document) -> None:
        """Make a call soon. Hand-overs always fit; scalars give way when the queue is full."""
        try:
            self._calls.put_nowait((session, name, args))
        except queue.Full:
            assert name == "scalars", "one hand-over per channel is in flight, so they fit"
            self.dropped_scalars += 1

    def room_for_scalars(self) -> bool:
        """Whether half the queue is free, the half that is kept for hand-overs."""
        return self._calls.qsize() < limits.PORT_QUEUE_MAX // 2

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait on the training thread until ``done()``, for at most ``timeout_s``.

        Polls shared memory with growing pauses (half a millisecond to ten); pushes cut them short.
        """
        deadline_s = host.mono_s() + timeout_s
        pause_s = _WAIT_FIRST_S
        while not done():
            if self.on_idle is not None:
                self.on_idle()
            left_s = deadline_s - host.mono_s()
            if left_s <= 0 or self._closing.is_set():
                return False
            with self._changed:
                self._changed.wait(min(pause_s, left_s))
            pause_s = min(_WAIT_MAX_S, 1.5 * pause_s)
        return True

    def close(self) -> None:
        """Say goodbye and stop. Safe to call twice."""
        session = self.session
        self._closing.set()
        self._wake_thread()
        attaching = self._attaching
        if attaching is not None:
            attaching.close()
        if self._thread is not None:
            self._thread.join(timeout=2 * limits.PORT_CALL_TIMEOUT_S)
        if session is not None:
            try:
                session.control.call("detach", {}, limits.PORT_CALL_TIMEOUT_S)
            except SwarmError as error:
                self._notify("detach_failed", {"why": str(error)})
            session.control.close()
        self._session = None

    def _pushed(self, document: Document) -> None:
        fields = dict(document)
        self._notify(str(fields.pop("event", "")), fields)
        with self._changed:
            self._changed.notify_all()

    def _wake_thread(self) -> None:
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            pass  # then the thread is awake
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            # A bug here: training must learn that nothing is shared any more.
            self.final = SwarmError("internal error", f"{type(error).__name__}: {error}")
            self._session = None
            raise

    def _serve(self) -> None:
        wait_s = limits.PORT_REATTACH_INTERVAL_S
        while not self._closing.is_set():
            session = self._session
            if session is not None and session.control.closed:
                self._session_lost(session)
            if session is None or session.control.closed:
                if self.final is not None or not self._attach_again():
                    self._closing.wait(wait_s)
                    wait_s = min(10 * limits.PORT_REATTACH_INTERVAL_S, 1.5 * wait_s)
                    continue
                wait_s = limits.PORT_REATTACH_INTERVAL_S
            item = self._calls.get()
            if item is not None:
                self._make(*item)
        while not self._calls.empty():  # what was handed over before the end still goes out
            item = self._calls.get_nowait()
            if item is not None:
                self._make(*item)

    def _session_lost(self, session: Session) -> None:
        if not session.loss_told:
            session.loss_told = True
            self._notify("peer_lost", {"in_flight": len(self._in_flight())})

    def _attach_again(self) -> bool:
        try:
            session = self.attach()
        except (ControlClosed, ControlTimeout):
            return False
        except SwarmError as error:
            if error.exit_code in FINAL_CODES:
                self.final = error
            self._notify("attach_refused", {"why": str(error), "final": self.final is not None})
            return False
        self._notify("peer_attached", {"session": session.number})
        return True

    def _make(self, session: Session, name: str, args: Document) -> None:
        if session.control.closed:
            return  # of a session that is gone: the next attach says what was in flight
        try:
            session.control.call(name, args, limits.PORT_CALL_TIMEOUT_S)
        except (ControlClosed, ControlTimeout) as error:
            self._notify("call_failed", {"call": name, "why": str(error)})
        except SwarmError as error:
            if name == "handover":
                session.refused[args["channel"]] = args["seq"]
            self._notify("call_refused", {"call": name, "why": str(error)})
        with self._changed:
            self._changed.notify_all()
