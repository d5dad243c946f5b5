"""``Swarm``: what ``st.join`` returns; it hooks the real optimizer.

The hook runs after each optimizer step, on the training thread. Network trouble never raises there:
it is an event (``mailbox``), and training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from swarmtrain.training.dealing import Dealer, by_turns, dealt
from swarmtrain.training.flat import Flat
from swarmtrain.training.mailbox import Callback, Mailbox
from swarmtrain.training.phase import Phase, first_boundary
from swarmtrain.training.phaserules import Rules
from swarmtrain.training.port import Control, Document, Port, Session
from swarmtrain.training.tempo import Progress, Tempo
from swarmtrain.training.view import SwarmState, read_theta, samples_in
from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClosed, ControlTimeout
from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import LocalProtocolError, QuorumLost, SwarmError

Batch = TypeVar("Batch")
F32 = NDArray[np.float32]

AWAY_S_MAX = 60.0
STARVED_S = 0.05
CLOSE_FLUSH_S = 30.0  # how long ``close`` waits for the last round by default


class Swarm:
    """A handle on the run. Use on the training thread, or as a context manager.

    Offline (no ``port``) every method works and nothing is shared.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        connect: Callable[[], Control] | None = None,
        fragments: int = 1,
        on_event: Callback | None = None,
        on_close: Callable[[], None] | None = None,
        wait_s_max: float = limits.TRAINER_WAIT_S_MAX,
    ) -> None:
        """Attach, take up θ, and hook the optimizer; ``connect=None`` is offline.

        Blocks until this site's state is synced, at most ``wait_s_max``.

        Raises:
            SwarmError: nobody answers, the run refuses this model, or no state arrives in time.
        """
        self.model = model
        self.optimizer = optimizer
        self.run: Document = {}
        self.attached: Session | None = None
        self._flat = Flat(model, fragments)
        self._mail = Mailbox(self._seen, on_event)
        self._on_close = on_close
        self._state = SwarmState()
        self._losses: list[float] = []
        self._pending_samples = self._total_samples = 0.0
        self._blocked_s = self._phase_blocked_s = 0.0
        self._steps = 0
        self._steps_s = 0.0
        self._stop: str | None = None
        self._closed = False
        self.error: SwarmError | None = None
        """Set when training diverged here; ``should_stop`` is true then."""
        self._members: tuple[str, ...] = ()
        self.next_position: int | None = None
        self._port: Port | None = None
        self._phases: list[Phase] = []
        self._tempo = Tempo(1)
        self._progress = Progress()
        self._dealer: Dealer | None = None
        if connect is not None:
            self._enter(connect, wait_s_max)
        self._first_parameter = self._flat.places(self._flat.channels[0])[0].parameter
        self._begin_s = self._phase_begin_s = self._left_s = host.mono_s()
        self._handles: list[Any] = [
            optimizer.register_step_post_hook(self._after_step),
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
        ]

    # --- entering -------------------------------------------------------------------------------

    def _enter(self, connect: Callable[[], Control], wait_s_max: float) -> None:
        device = str(self._flat.places(self._flat.channels[0])[0].parameter.device)
        port = self._port = Port(
            connect, self._flat, self._mail.put, self._in_flight, device=device
        )
        deadline_s = host.mono_s() + wait_s_max
        self._state = replace(self._state, syncing=True)
        while True:
            try:
                session = port.attach(max(0.0, deadline_s - host.mono_s()))
                if not self._phases:
                    self._prepare(session, wait_s_max)
                if self._sync(port, session, deadline_s):
                    break
            except (ControlClosed, ControlTimeout):
                if self.attached is None or host.mono_s() > deadline_s:
                    port.close()
                    raise
            except SwarmError:
                port.close()
                raise
            if host.mono_s() > deadline_s:
                port.close()
                raise QuorumLost(
                    "no state of the model arrived",
                    f"waited {wait_s_max:g} s",
                    "look at `swarmtrain status`: is a member with the state in reach?",
                )
        self._state = replace(self._state, syncing=False)
        port.on_idle = self._mail.deliver_while_waiting
        port.start()

    def _prepare(self, session: Session, wait_s_max: float) -> None:
        self.attached = session
        self.run = session.attached.run
        self.next_position = session.attached.next_position
        rules = Rules.from_run(self.run, wait_s_max)
        largest = max(n for _, n in self._flat.layout)
        scratch = (np.empty(largest, np.float32), np.empty(largest, np.float32))
        channels = self._flat.channels
        self._tempo = Tempo(rules.inner_steps, len(channels), rules.delay + 1)
        self._take_up(session.attached.tempo)
        self._phases = [
            Phase(
                name,
                self._flat,
                rules,
                first_boundary(i, len(channels), rules.inner_steps),
                scratch,
                self._tempo,
            )
            for i, name in enumerate(channels)
        ]

    def _sync(self, port: Port, session: Session, deadline_s: float) -> bool:
        """Define the model if nobody has, then wait for θ; false if the peer process went away."""
        if session.attached.need_theta0:
            seqs = {phase.channel: phase.write_theta0(session) for phase in self._phases}
            left_s = max(0.0, deadline_s - host.mono_s())
            session.control.call("define", {"seqs": seqs}, left_s)
        side = session.side

        def there() -> bool:
            shown = all(side.published_round(p.channel) is not None for p in self._phases)
            return shown or port.session is not session

        left_s = max(0.0, deadline_s - host.mono_s())
        port.wait_until(there, left_s)
        self._members = session.attached.members
        members = max(1, len(self._members))
        self._state = replace(self._state, members=members)
        return port.session is session and all(p.start(session, members) for p in self._phases)

    # --- the hook -------------------------------------------------------------------------------

    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count samples: the first dimension of the first tensor that goes into the model.

        Gradients that are ``None`` mean that a new step begins, so the samples of a step that was
        skipped (by a GradScaler) are not carried over into the next.
        """
        if not (module.training and torch.is_grad_enabled()):
            return
        if self._first_parameter.grad is None:
            self._pending_samples = 0.0
        self._pending_samples += samples_in(args, kwargs)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]
    ) -> None:
        began_s = host.mono_s()
        self._steps += 1
        self._steps_s += began_s - self._left_s
        self._mail.spent_s = 0.0
        samples = self._pending_samples or 1.0
        self._pending_samples = 0.0
        self._total_samples += samples
        self._state = replace(self._state, step=self._state.step + 1)
        if self._port is not None:
            self._share(self._port, samples)
        spent_s = host.mono_s() - began_s - self._mail.spent_s
        self._blocked_s += spent_s
        self._phase_blocked_s += spent_s
        self._mail.deliver()
        self._left_s = host.mono_s()

    def _extra(self) -> Document:
        """What goes with the hand-overs that are made now."""
        finite = [value for value in self._losses if math.isfinite(value)]
        return {
            "loss": sum(finite) / len(finite) if finite else None,
            "phase_s": host.mono_s() - self._phase_begin_s,
            "step_s": self._steps_s / max(1, self._steps),
            "blocked_s": self._phase_blocked_s,
            "next_position": self.next_position,
        }

    def _share(self, port: Port, samples: float) -> None:
        extra, boundaries = self._extra(), sum(phase.boundaries for phase in self._phases)
        for phase in self._phases:
            phase.after_step(port, self._mail.put, samples, extra)
            self.error = phase.diverged or self.error
        self._account(port, extra, boundaries)

    def _starved(self) -> None:
        """Nothing is left to train on: hand over what there is, and wait a moment."""
        port, dealer, began_s = self._port, self._dealer, host.mono_s()
        assert port and dealer
        extra, boundaries = self._extra(), sum(phase.boundaries for phase in self._phases)
        self._phases[0].hand_over_early(port, self._mail.put, extra)
        port.wait_until(dealer.has_some, STARVED_S)
        self._account(port, extra, boundaries)
        spent_s = host.mono_s() - began_s
        self._blocked_s, self._left_s = self._blocked_s + spent_s, self._left_s + spent_s

    def _account(self, port: Port, extra: Document, boundaries: int) -> None:
        """Note what has changed since there were so many boundaries."""
        if sum(phase.boundaries for phase in self._phases) != boundaries:
            loss = extra["loss"]
            self._state = replace(self._state, loss=math.nan if loss is None else loss)
            self._losses.clear()
            if self._tempo.phase_done(extra["step_s"]):
                self._mail.put("phase_length", {"steps": self._tempo.steps})
            for phase in self._phases:
                phase.retime()
            self._steps, self._steps_s = 0, 0.0
            self._phase_begin_s = host.mono_s()
            self._phase_blocked_s = 0.0
        session = port.session
        if session is not None:
            if session is not self.attached:
                self.attached = session
                self._members = session.attached.members
                if self._dealer is not None:
                    port.send(session, "data", self._dealer.args)
            self._stop = session.side.should_stop() or self._stop
            shown = [session.side.published_round(p.channel) for p in self._phases]
            self._state = replace(self._state, round=min(r or 0 for r in shown))
        failed = port.final or self.error
        if failed is not None:
            self._stop = str(failed)

    def _in_flight(self) -> dict[str, int]:
        flying = [(phase.channel, phase.in_flight) for phase in self._phases]
        return {channel: it.seq for channel, it in flying if it is not None}

    # --- events ---------------------------------------------------------------------------------

    def _seen(self, name: str, fields: Document) -> None:
        """Take up what an event says, before user code hears of it."""
        if name == "leases" and self._dealer is not None:
            self._dealer.update(fields)
        self._take_up(fields)

    def _take_up(self, fields: Document) -> None:
        members, state_hash = fields.get("members"), fields.get("state_hash")
        if isinstance(members, list):
            self._members = tuple(str(member) for member in members)
            self._state = replace(self._state, members=max(1, len(members)))
        if isinstance(state_hash, str):
            self._state = replace(self._state, state_hash=state_hash)
        if "pace_s" in fields:
            self._tempo.heard(float(fields["pace_s"]))
            self._progress.heard(float(fields["progress"]), float(fields["gain"]))

    # --- for users ------------------------------------------------------------------------------

    @property
    def state(self) -> SwarmState:
        """What is known here and now."""
        return self._state

    @property
    def inner(self) -> InnerStep | None:
        """How the run wants phases to be trained now; None offline.

        The built-in trainer follows it. In a loop of your own the number of steps between rounds
        follows by itself, and the rest is yours to obey (the founder may change it in flight).
        """
        return self._phases[0].inner if self._phases else None

    @property
    def progress(self) -> float:
        """Samples that count so far, of all members: what a schedule should go by.

        Offline, those that have gone through the model here.
        """
        if not self._phases:
            return self._total_samples
        return self._progress.at(self._phases[0].done_share)

    @property
    def offline(self) -> bool:
        """Whether nothing is shared at all."""
        return self._port is None

    @property
    def should_stop(self) -> bool:
        """Whether the run asks this trainer to end."""
        return self._stop is not None

    @property
    def stop_reason(self) -> str | None:
        return self._stop

    @property
    def compute_utilization(self) -> float:
        """1 - (time the hook blocked the trainer) / wall time since ``join``."""
        wall_s = host.mono_s() - self._begin_s
        return 1.0 - self._blocked_s / wall_s if wall_s > 0 else 1.0

    def on(self, name: str, callback: Callback) -> None:
        """Call ``callback(event)`` between steps for each event of that name."""
        self._mail.on(name, callback)

    def log(self, **scalars: float) -> None:
        """Report numbers; ``loss`` is averaged over the phase and shown to the swarm."""
        values = {name: float(value) for name, value in scalars.items()}
        if "loss" in values:
            self._losses.append(values["loss"])
        session = self._port.session if self._port is not None else None
        if self._port is not None and session is not None:
            rest = {name: value for name, value in values.items() if name != "loss"}
            if rest and self._port.room_for_scalars():
                self._port.send(session, "scalars", {"values": rest, "step": self._state.step})

    def evaluated(self, round: int, loss: float, tokens: int) -> None:
        """Report the loss of θ of ``round`` on the held-out set, nats per token."""
        self.tell("evaluated", {"round": round, "loss": loss, "tokens": tokens})

    def tell(self, call: str, args: Document) -> None:
        """Make a call to the peer process soon, if there is one."""
        session = self._port.session if self._port is not None else None
        if self._port is not None and session is not None:
            self._port.send(session, call, args)

    def shown(self) -> tuple[int, ...]:
        """Rounds of the θ that ``theta`` would read now, by channel; empty offline."""
        session = (self._port.session if self._port is not None else None) or self.attached
        if session is None:
            return ()
        return tuple(session.side.published_round(p.channel) or 0 for p in self._phases)

    def data(self, loader: Iterable[Batch], *, name: str = "", rows: int = 0) -> Iterator[Batch]:
        """This site's share of ``loader``. Offline: everything.

        With run key ``shards``: samples of its dataset, each once in every epoch, until the run
        ends (``dealing.Batches``); ``name`` tells apart data of equal length; of a stream say how
        many ``rows`` an epoch has. Else batch ``i`` goes to member ``i mod members``.
        """
        if not self.offline and self.run.get("shards"):
            return dealt(loader, name, rows, self.deal)
        site = self.attached.attached.site if self.attached is not None else ""
        return by_turns(loader, site, lambda: self._members, lambda: self.should_stop)

    def deal(self, samples: int, digest: bytes, shuffle: bool = True) -> Dealer:
        """Have the run's data dealt: ``samples`` of an epoch, named by ``digest`` (32 bytes).

        Raises:
            SwarmError: these are not the data of the run, or they cannot be dealt.
        """
        session = self._port.session if self._port is not None else None
        if session is None:
            raise LocalProtocolError("swarm.deal", "no peer process is attached", "join a run")
        seed, phase = int(self.run["seed"]) if shuffle else None, self._phases[0]
        dealer = Dealer(samples, digest, seed, phase.hurry, self._starved, lambda: self.should_stop)
        dealer.update(session.control.call("data", dealer.args, limits.TRAINER_WAIT_S_MAX))
        self._dealer, phase.book = dealer, dealer.book
        return dealer

    def theta(self) -> tuple[int, dict[str, F32]]:
        """Round and canonical vectors f32[n] by channel; offline the model's own parameters.

        The round is the lowest of the channels'.
        """
        session = self._port.session if self._port is not None else None
        return read_theta(self._flat, session or self.attached)  # or what was shown last

    def canonical(self) -> dict[str, torch.Tensor]:
        """The trainable part of a state dict, of θ: CPU f32 tensors by parameter name.

        This is the model of the run, equal on all members of a round. The model in the loop is this
        trainer's private view of it.
        """
        return self.state_dict(self.theta()[1])

    def state_dict(self, vectors: dict[str, F32]) -> dict[str, torch.Tensor]:
        """Vectors by channel, as ``theta`` gives them, as CPU f32 tensors by parameter name."""
        return self._flat.state_dict(vectors)

    def flush(self, timeout_s: float = CLOSE_FLUSH_S) -> bool:
        """Wait until no hand-over is undecided; false if that took longer."""
        port = self._port
        if port is None:
            return True

        def settled() -> bool:
            session = port.session
            return all(session is None or phase.settled(session) for phase in self._phases)

        done = port.wait_until(settled, timeout_s)
        self._mail.deliver()
        return done and not self._in_flight()

    def finish(self, away_s_max: float = AWAY_S_MAX) -> None:
        """All planned steps are done: say so, and evaluate on request until the run ends.

        Returns when the run asks to stop, or the peer process was away for ``away_s_max`` seconds.
        """
        port = self._port
        if port is None:
            return
        self.flush()
        told: Session | None = None
        seen_s = host.mono_s()

        def over() -> bool:
            nonlocal told, seen_s
            session = port.session
            if session is None:
                return host.mono_s() - seen_s > away_s_max
            seen_s = host.mono_s()
            if session is not told:
                told = session
                port.send(session, "finished", {})
            self._stop = session.side.should_stop() or self._stop
            return self.should_stop

        while not over():
            port.wait_until(over, 1.0)

    def close(self, flush_timeout_s: float | None = None) -> None:
        """Wait for the last round (30 s by default), say goodbye and leave the loop alone.

        Safe to call twice.
        """
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._port is not None:
            if not self.should_stop:
                self.flush(CLOSE_FLUSH_S if flush_timeout_s is None else flush_timeout_s)
            self._port.close()
        self._mail.deliver()
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(None if kind is None else 0.0)
