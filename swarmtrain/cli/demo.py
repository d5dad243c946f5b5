"""``swarmtrain demo``: a whole swarm on this machine, from nothing, every peer a real process.

N homes in a temporary folder, each with one peer process and one trainer. The first founds the
run; the others enter with a ticket, as they would from another continent. This process and the
dashboard are not members. ``--chaos`` kills a member at a quarter of the rounds and the leader at
half of them; both come back.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
import typer

from swarmtrain.cli.demo_options import INNER_STEPS, INNER_STEPS_STAGES, STEPS, DemoOptions
from swarmtrain.cli.options import Json
from swarmtrain.cli.output import EXIT_SIGINT, Output
from swarmtrain.cli.session import TrainerCommand, preset_trainer
from swarmtrain.cli.summary import summarize, summary_lines
from swarmtrain.cli.telling import Teller
from swarmtrain_peer import host
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import ControlClient, error_to_dict
from swarmtrain_peer.events import Record, read_events
from swarmtrain_peer.founding import found_run
from swarmtrain_peer.site import Site, enter_site
from swarmtrain_peer.spawn import (
    Supervisor,
    child_environment,
    error_for_exit,
    output_tail,
    spawn_peer,
    start_process,
    stop_process,
)
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import QuorumLost, SwarmError
from swarmtrain_protocols.manifest import Ticket

VOTERS = 3
POLL_S = 0.1
STALL_S = 120.0
"""Without a commit for this long (and the time of the first), the demo gives up."""
END_S = 60.0
"""How long trainers may take to end after the run has."""
STEPS_STAGES = 60
STEPS_CHAOS = 2000
"""More, because a killed process needs seconds to come back."""
LEAVE_S = 15.0
STOP_S, STOP_FAILED_S = 10.0, 1.0
"""What a process may take to end on SIGTERM; nobody waits for goodbyes once the demo has failed."""
WARM_KERNELS = "from swarmtrain_protocols.codecs import kernels; kernels.use_numba(True)"
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


class Demo:
    """One demo. ``run`` returns the summary and leaves nothing running."""

    def __init__(self, options: DemoOptions, output: Output, folder: Path) -> None:
        self.options = options
        self.output = output
        self.folder = folder
        self.sites: list[Site] = []
        self.dashboard_url: str | None = None
        self._ready_file = folder / "dashboard.json"
        # A process that was killed comes back; one that failed by itself would fail again.
        self._supervisor = Supervisor(self._report, restart_helps=lambda code: code < 0)
        self._viewer: subprocess.Popen[bytes] | None = None
        self._clients: dict[int, ControlClient] = {}
        self._records: queue.SimpleQueue[tuple[int, Record]] = queue.SimpleQueue()
        self._commits: set[tuple[Any, ...]] = set()
        self._names: dict[str, str] = {}
        self._teller = Teller(self._names)
        self._end_by_s: float | None = None
        self.error: SwarmError | None = None
        self._last_progress_s = host.mono_s()
        self._chaos_done = 0
        self._stop = threading.Event()

    def run(self) -> dict[str, Any]:
        """Everything: found, join, train, end, count. ``error`` says what went wrong, if it did."""
        finished = False
        try:
            with self._signal_handlers():
                self._found()
                self._warm_kernels()
                self._start_peers()
                self._watch()
                finished = self._finish()
        except SwarmError as error:
            self.error = error
        finally:
            self.close()
        logs = [list(read_events(site.events_path)) for site in self.sites]
        return summarize(logs, finished=finished, dashboard_url=self.dashboard_url)

    def close(self) -> None:
        """End every process. Safe to call twice."""
        for client in self._clients.values():
            client.close()
        if self._viewer is not None:
            stop_process(self._viewer)
        self._supervisor.stop(STOP_S if self.error is None else STOP_FAILED_S)

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self._progress(line)

    def _progress(self, line: str) -> None:
        self.output.progress(f"demo: {line}")

    def _report(self, name: str, fields: dict[str, object]) -> None:
        if not self.output.as_json:
            self.output.event({"name": name, "severity": "warning", **fields})

    def _found(self) -> None:
        """The first site, whose trainer gets ready while everything else is."""
        config = self._config(0)
        self.sites.append(found_run(self.folder / "home-0", self.options.run_keys(), config))
        self._start_trainer(0)

    @staticmethod
    def _config(number: int) -> PeerConfig:
        return PeerConfig(
            name=f"peer-{number}", listen="127.0.0.1:0", votes=number < VOTERS, dashboard=""
        )

    def _warm_kernels(self) -> None:
        """Compile once, before peers would each do it.

        Raises:
            SwarmError: the kernels cannot be built here.
        """
        self._progress("preparing kernels")
        done = subprocess.run(
            [sys.executable, "-c", WARM_KERNELS],
            env=child_environment(ONE_THREAD),
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SwarmError("the kernels cannot be built", last, "is numba installed?")

    def _start_peers(self) -> None:
        """Peer processes, and beside each its trainer, which waits for it by itself."""
        founder = self.sites[0]
        self._check_failures()
        self._supervisor.add("peer-0", lambda: spawn_peer(founder))
        self._follow(0)
        if self.options.dashboard:
            self._start_dashboard(founder)
        tickets = {
            vote: Ticket.parse(str(self._ask(0, "ticket", _ticket(vote))["ticket"]))
            for vote in (True, False)
        }
        others = range(1, self.options.peers)
        for number in others:
            config, home = self._config(number), self.folder / f"home-{number}"
            self.sites.append(enter_site(home, tickets[config.votes], config))
            self._start_trainer(number)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(self._join, others))
        self._check_failures()
        for number in others:
            self._follow(number)
        self._progress(f"{self.options.peers} peers joined with a ticket")
        self._last_progress_s = host.mono_s()

    def _join(self, number: int) -> None:
        self._supervisor.add(f"peer-{number}", lambda: spawn_peer(self.sites[number]))

    def _start_trainer(self, number: int) -> None:
        preset = preset_trainer(self.sites[number], "cpu", limits.SPAWN_TIMEOUT_S)
        command = TrainerCommand(preset.arguments, environment=ONE_THREAD)
        start = functools.partial(command.start, self.sites[number])
        self._supervisor.add(f"trainer-{number}", start)

    def _start_dashboard(self, site: Site) -> None:
        """Start it; nobody waits for it, ``_look_for_dashboard`` tells once it can be seen."""
        arguments = [sys.executable, "-m", "swarmtrain.dashboard", "--site", str(site.folder)]
        arguments += ["--bind", "127.0.0.1:0", "--ready-file", str(self._ready_file)]
        self._viewer = start_process(arguments, self.folder / "dashboard.log", nice=10)

    def _look_for_dashboard(self) -> None:
        if self._viewer is None or self.dashboard_url is not None:
            return
        if self._ready_file.exists():
            self.dashboard_url = str(msgspec.json.decode(self._ready_file.read_bytes())["url"])
            self.output.note(f"dashboard: {self.dashboard_url}")
        elif self._viewer.poll() is not None:
            words = " | ".join(output_tail(self.folder / "dashboard.log").splitlines()[-3:])
            self.output.note(f"no dashboard: {words}")
            self._viewer = None

    def _follow(self, number: int) -> None:
        self._names[self.sites[number].identity().peer_id.hex()] = f"peer-{number}"
        client = self.sites[number].connect()
        client.subscribe(lambda push: self._on_push(number, push))
        client.call("events", {"follow": True, "since_seq": 0, "last": 1})
        self._clients[number] = client

    def _on_push(self, number: int, push: dict[str, Any]) -> None:
        if push.get("event") == "event":
            self._records.put((number, push["record"]))

    def _ask(self, number: int, call: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._clients[number].call(call, args, timeout_s=15.0)

    def _turn(self) -> None:
        """One turn of waiting: processes, events, signals, chaos, the watchdog."""
        if self._stop.wait(POLL_S):
            raise Interrupted
        self._supervisor.poll()
        self._look_for_dashboard()
        for number, client in list(self._clients.items()):
            peer = self._supervisor.processes[f"peer-{number}"]
            if client.closed and peer.process.poll() is None and peer.restart_at_s is None:
                with contextlib.suppress(SwarmError):
                    self._follow(number)
        while not self._records.empty():
            self._on_record(*self._records.get())

    def _on_record(self, number: int, record: Record) -> None:
        name = record["name"]
        if name in ("round_committed", "step_committed"):
            steps = name == "step_committed"
            at = ("steps", record["step"]) if steps else (record["channel"], record["round"])
            key = (record["generation"], *at)
            if key not in self._commits:
                self._commits.add(key)
                self._last_progress_s = now = host.mono_s()
                count, total = len(self._commits), self.options.commits
                self._tell(self._teller.coverage())
                self._tell(self._teller.committed(record, count, total, now))
        elif name == "stage_assigned":
            self._teller.assigned(record)
        elif name == "run_ended":
            self._end_by_s = self._end_by_s or host.mono_s() + END_S
        elif name == "evaluated":
            self._tell(self._teller.evaluated(record, steps=self.options.stepwise))
        elif record["severity"] != "info" and not self.output.as_json:
            self._tell(self._teller.trouble(f"peer-{number}", record))

    def _watch(self) -> None:
        """Until every trainer has ended: they do when the run has."""
        trainers = [f"trainer-{number}" for number in range(self.options.peers)]
        while any(self._is_running(name) for name in trainers):
            self._turn()
            self._chaos()
            self._check_failures()
            self._check_progress([name for name in trainers if self._is_running(name)])

    def _check_failures(self) -> None:
        """A process that ended with an error of its own ends the demo.

        Raises:
            SwarmError: the error of its exit code.
        """
        self._supervisor.poll()
        for one in self._supervisor.processes.values():
            if one.exit_code:
                raise error_for_exit(
                    f"{one.name} ended with exit code {one.exit_code}",
                    one.exit_code,
                    self._last_words(one.name),
                    f"run it again with --keep and look into {self.folder.parent}",
                )

    def _is_running(self, name: str) -> bool:
        return self._supervisor.processes[name].exit_code is None

    def _check_progress(self, running: list[str]) -> None:
        """The watchdog of ``_watch``.

        Raises:
            QuorumLost: no commit for too long, or trainers go on long after the end of the run.
        """
        now, todo = host.mono_s(), "run it again with --keep and look at the logs"
        if self._end_by_s is not None and now > self._end_by_s and running:
            why = f"{', '.join(running)} still running {END_S:g} s later"
            raise QuorumLost("the run ended but not every member did", why, todo)
        if self._end_by_s is None and now - self._last_progress_s > STALL_S:
            why = f"no commit for {STALL_S:g} s, {len(self._commits)} so far"
            raise QuorumLost("the demo stands still", why, todo)

    def _last_words(self, name: str) -> str:
        kind, _, number = name.partition("-")
        file = "peer.log" if kind == "peer" else "trainer.log"
        return " | ".join(output_tail(self.sites[int(number)].folder / file).splitlines()[-3:])

    def _finish(self) -> bool:
        """Let the peer processes end; they may wait for a goodbye. True if all ended well."""
        self._supervisor.expect_end()
        peers = [self._supervisor.processes[f"peer-{n}"] for n in range(self.options.peers)]
        for now in (False, True):
            for number, peer in enumerate(peers):
                if peer.process.poll() is None:
                    with contextlib.suppress(SwarmError):
                        self._ask(number, "leave", {"now": now})
            deadline_s = host.mono_s() + LEAVE_S
            while any(p.process.poll() is None for p in peers) and host.mono_s() < deadline_s:
                self._turn()
        return all(peer.process.poll() == 0 for peer in peers)

    def _chaos(self) -> None:
        """Kill at a quarter and at half of the rounds, by what the members say."""
        if not self.options.chaos or self._chaos_done >= 2 or self.options.peers < 2:
            return
        if len(self._commits) * 4 < self.options.commits * (self._chaos_done + 1):
            return
        leader = self._leader()
        if leader is None:
            return
        victim = leader if self._chaos_done == 1 else (leader + 1) % self.options.peers
        kinds = ("peer",) if victim == leader else ("peer", "trainer")
        self._chaos_done += 1
        for kind in kinds:
            process = self._supervisor.processes[f"{kind}-{victim}"].process
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        self.output.note(f"chaos: killed {' and '.join(f'{kind}-{victim}' for kind in kinds)}")

    def _leader(self) -> int | None:
        for number in range(self.options.peers):
            with contextlib.suppress(SwarmError):
                if self._ask(number, "status").get("is_leader"):
                    return number
        return None

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        before = {one: signal.signal(one, handler) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, old in before.items():
                signal.signal(one, old)


def _ticket(vote: bool) -> dict[str, Any]:
    return {"role": "trainer", "vote": vote, "expires_s": 24 * 3600, "uses": 0}


def demo(
    peers: Annotated[int, typer.Option("--peers", min=1, max=64)] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=INNER_STEPS,
            help=f"Inner steps per peer.  [default: {STEPS}; {STEPS_CHAOS} with --chaos; "
            f"{STEPS_STAGES} with --stages, of the whole pipeline]",
        ),
    ] = None,
    stages: Annotated[
        int,
        typer.Option("--stages", min=0, max=16, help="Cut the model into stages (a pipeline)."),
    ] = 0,
    pipeline_mode: Annotated[
        str,
        typer.Option(
            "--pipeline-mode",
            help="With --stages: sync (all step together) or diloco (each steps by itself and "
            f"meets the others of its stage every {INNER_STEPS_STAGES} steps).",
        ),
    ] = "sync",
    overlap: Annotated[str, typer.Option("--overlap", help="auto, off, delayed, eager.")] = "auto",
    codec: Annotated[str, typer.Option("--codec", help="fp32, bf16 or int8.")] = "int8",
    chaos: Annotated[bool, typer.Option("--chaos", help="Kill peers on the way.")] = False,
    dashboard: Annotated[bool, typer.Option("--dashboard/--no-dashboard")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and data.")] = 1234,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary folder.")] = False,
    as_json: Json = False,
) -> None:
    """Three peers on this machine train a small language model together.

    Needs no network, no GPU and no account. Each peer is a real process that joins by ticket.
    """
    output = Output(as_json=as_json)
    steps = steps or (STEPS_STAGES if stages else STEPS_CHAOS if chaos else STEPS)
    options = DemoOptions(
        peers, steps, overlap, codec, chaos, dashboard, seed, stages, pipeline_mode
    )
    _run(options, output, keep=keep)


def _run(options: DemoOptions, output: Output, *, keep: bool) -> None:
    """One demo in a temporary folder, and its summary; its exit code if it went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="swarmtrain-demo-"))
    started_s = host.mono_s()
    try:
        one = Demo(options, output, folder)
        summary = one.run()
    except Interrupted:
        output.note("demo: interrupted")
        raise typer.Exit(EXIT_SIGINT) from None
    finally:
        if keep:
            output.note(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if one.error is not None:
        Output().error(one.error)
        summary["error"] = error_to_dict(one.error)
    what = "steps" if options.stepwise else "rounds"
    output.result(summary, summary_lines(summary, host.mono_s() - started_s, what))
    if not summary["ok"]:
        raise typer.Exit(one.error.exit_code if one.error is not None else 1)
    output.text("your own swarm: `swarmtrain up`, then `swarmtrain join TICKET` elsewhere")
