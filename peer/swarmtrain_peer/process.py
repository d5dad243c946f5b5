"""The peer process of a site: ``python -m swarmtrain_peer SITE_DIR``. Never imports torch.

It reads everything from the site's folder, so no secret stands in the argument list. It ends when
the run has ended and no trainer is attached, when it is asked to leave, or on SIGTERM (politely,
within the grace time). Errors are three lines on standard error and the error's exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from functools import partial
from pathlib import Path

from swarmtrain_peer import host, rollback
from swarmtrain_peer.admission import refused_error
from swarmtrain_peer.backend import Backend, Desk
from swarmtrain_peer.controlserver import ControlServer
from swarmtrain_peer.desk import TrainerDesk
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.librarian import Librarian
from swarmtrain_peer.loop import on_bug, run
from swarmtrain_peer.onlooker import Onlooker
from swarmtrain_peer.runtime import PeerRuntime, total_bytes
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_peer.shifts import Watch, rest_of
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import is_owned, watch_owner
from swarmtrain_peer.stage_life import StageLife
from swarmtrain_peer.token_desk import TokenDesk
from swarmtrain_peer.writer import Writer
from swarmtrain_protocols.entries import RoundCommitted
from swarmtrain_protocols.errors import ConfigError, SiteRests, SwarmError
from swarmtrain_protocols.node_events import LedgerChanged

LINGER_S = 1.0
SHIFT_S = 1.0
"""How often hours and data cap are looked at, besides after every round."""
REST_LOOK_S = 60.0
"""Whoever rests looks at the clock so often: it may be set, and summer time comes and goes."""
DISMISS_S = 10.0
"""A leaver's trainer gets this long to end by itself; a script may never ask whether it should."""
FAREWELL_NOW_S = 0.5
"""Whoever goes down at once still says so: the others do not have to find out."""
FAREWELL_S = 20.0
"""After the end of the run: for others that still fetch its last entries and results here."""


def settings_of(site: Site) -> PeerSettings:
    """Everything a peer needs, from the files of its site.

    Raises:
        ConfigError: a file is damaged, or there is neither a ticket nor a founder's key.
    """
    config = site.config()
    ticket, founder = site.ticket(), site.founder()
    if ticket is None and founder is None:
        raise ConfigError(f"site {site.folder}", "it has neither ticket nor founder's key", "join")
    return PeerSettings(
        keyring=site.identity(),
        run=site.run_id,
        name=config.display_name,
        listen=config.listen,
        announce=config.announce,
        trains=config.trains,
        holds_state=config.holds_state,
        votes=config.votes or founder is not None,
        caps_bytes_per_s=(config.up_bytes_per_s, config.down_bytes_per_s),
        donor_share=config.donor_share,
        relay=config.relay,
        port_mapping=config.port_mapping,
        manifest=site.manifest(),
        founder=founder,
        ticket=ticket,
        records=site.log_path,
        state=site.state_path,
        tickets=site.tickets_path,
        save_manifest=site.save_manifest,
        port=site.port_path,
        contacts=site.contacts_path,
        fast_kernels=config.trains,
    )


class PeerProcess:
    """One peer, its control socket and its end."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stop = asyncio.Event()
        self._now = False
        self._reason = "run ended"
        self.rests = False
        """It has left for the time being; ``shifts.rest_of`` says until when."""

    def stop(self, now: bool) -> None:
        """Leave politely, or at once."""
        self._now = self._now or now
        self._reason = "left"
        self._stop.set()

    async def serve(self) -> None:
        """Run until there is nothing left to do.

        Raises:
            SwarmError: the run cannot be reached or refuses this site.
        """
        site = self._site
        settings = settings_of(site)
        events = EventLog(site.events_path, settings.keyring.peer_id.hex())
        runtime = PeerRuntime(settings, events)
        watch = Watch(site, events)
        desk: Desk | None = None
        librarian: Librarian | None = None
        writer: Writer | None = None
        control: ControlServer | None = None
        tasks: list[asyncio.Task[None]] = []
        try:
            stages: list[StageLife] = []
            runtime.on_node = lambda: _open_stages(runtime, site, stages)
            await runtime.start()
            on_bug(asyncio.get_running_loop(), runtime.fail)
            rollback.watch(runtime)
            desk = stages[0] if stages else TrainerDesk(runtime, site.folder)
            librarian = Librarian(runtime, site.corpus_path)
            backend = Backend(runtime, desk, librarian, self.stop)
            writer = _open_writer(runtime, desk, backend)
            control = ControlServer(site.control_path, backend)
            await control.start()
            self._handle_signals()
            tasks = [
                asyncio.ensure_future(desk.beat()),
                asyncio.ensure_future(self._watch_end(runtime, desk)),
                asyncio.ensure_future(self._watch_shift(runtime, watch)),
            ]
            if not settings.trains and not settings.holds_state:
                tasks.append(asyncio.ensure_future(Onlooker(runtime).watch()))
            await librarian.look()
            await self._until_done(runtime)
            if not self._now and self._reason == "left":
                grace_s = site.config().leave_grace_s
                await desk.dismiss(min(grace_s, DISMISS_S), lambda: self._now)
                await runtime.leave("leave", grace_s, lambda: self._now)
            if self._now and self._reason == "left":
                await runtime.leave("leave", FAREWELL_NOW_S, at_once=True)
        finally:
            for task in tasks:
                task.cancel()
            if control is not None:
                await control.close()
            for part in (librarian, writer):
                if part is not None:
                    part.close()
            if desk is not None:
                desk.close()
            await runtime.close(self._reason)
            watch.ended(host.local_now(), _moved_bytes(runtime))
            events.close()

    async def _until_done(self, runtime: PeerRuntime) -> None:
        runtime.failure.add_done_callback(lambda _: self._stop.set())
        await self._stop.wait()
        if self._reason == "left":
            return
        if runtime.failure.done():
            error = runtime.failure.result()
            self._reason = str(error)
            raise error

    async def _watch_end(self, runtime: PeerRuntime, desk: Desk) -> None:
        while True:
            await asyncio.sleep(0.2)
            refused = runtime.node.joiner.refused
            if refused and not runtime.failure.done():
                runtime.failure.set_result(refused_error(refused))
            if desk.over:
                await desk.figures.see_everybody_off(FAREWELL_S)
                await asyncio.sleep(LINGER_S)
                self._stop.set()
                return

    async def _watch_shift(self, runtime: PeerRuntime, watch: Watch) -> None:
        """Leave politely when the hours are over or the data cap is used."""
        round_over = asyncio.Event()
        runtime.listeners.append(partial(_count_rounds, watch, round_over))
        while True:
            round_over.clear()
            rest = watch.look(host.local_now(), _moved_bytes(runtime))
            if rest is not None:
                until = rest.until.isoformat(timespec="minutes")
                runtime.events.emit("resting", reason=rest.reason, until=until)
                self.rests = True
                self.stop(now=False)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SHIFT_S):
                    await round_over.wait()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop, False)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the command line's affair
        watch_owner(partial(self._owner_gone, loop))

    def _owner_gone(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self.stop, False)


def _open_stages(runtime: PeerRuntime, site: Site, stages: list[StageLife]) -> None:
    """In a run of stages, have them served from the node's first moment."""
    if runtime.manifest.keys.stages:
        stages.append(StageLife(runtime, site.stages_path))


def _open_writer(runtime: PeerRuntime, desk: Desk, backend: Backend) -> Writer:
    """Texts for the control socket, whether trainers have stages or the whole model."""
    if isinstance(desk, StageLife):
        stage_desk = desk.desk
        writer = Writer(runtime, desk.tensors, lambda: stage_desk.text_model)
    else:
        tokens = TokenDesk(runtime)
        backend.offer({"generates": tokens.offer, "logits": tokens.logits})
        writer = Writer(runtime, tokens.tensors, lambda: tokens.model)
    backend.offer({"generate": writer.generate})
    return writer


def _moved_bytes(runtime: PeerRuntime) -> int:
    """On all links, both ways, since the start of this process."""
    if not hasattr(runtime, "transport"):
        return 0
    stats = runtime.transport.stats
    return total_bytes(stats, "sent") + total_bytes(stats, "received")


def _count_rounds(watch: Watch, round_over: asyncio.Event, event: object) -> None:
    if isinstance(event, LedgerChanged) and any(
        isinstance(body, RoundCommitted) for _, body, accepted in event.entries if accepted
    ):
        watch.round_done()
        round_over.set()


def serve_in_shifts(site: Site) -> None:
    """Serve, rest, and serve again; a process that was started by another one leaves that to it.

    Raises:
        SwarmError: whatever ends a life of a peer process; ``SiteRests`` if it may not work now.
    """
    while True:
        if (rest := rest_of(site, host.local_now())) is not None:
            if is_owned():
                raise SiteRests(f"site {site.folder.name}", rest.sentence, "start it again then")
            time_left_s = (rest.until - host.local_now()).total_seconds()
            host.doze(min(REST_LOOK_S, max(0.0, time_left_s)))
            continue
        process = PeerProcess(site)
        run(process.serve())
        if not process.rests or is_owned():
            return


def main(arguments: list[str]) -> int:
    """Serve the site whose folder is given; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m swarmtrain_peer SITE_DIR", file=sys.stderr)
        return 2
    # Threads wait for the interpreter lock at most this long; the default of 5 ms costs rounds.
    sys.setswitchinterval(0.001)
    site = Site(Path(arguments[0]).resolve())
    try:
        with site.lock():
            serve_in_shifts(site)
    except SwarmError as error:
        for line in (error.what, error.why, error.todo):
            if line:
                print(line, file=sys.stderr)
        return error.exit_code
    return 0
