"""What looks for planted bugs: named ways to run one schedule; each says what was wrong, or ''.

All of them are quiet on the code as it is (``tests/sim`` runs them so).
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from swarmtrain_protocols.errors import CheckpointError, PeerFault
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.faults import Fault, generate
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.local_swarm import run_built as run_local_built
from swarmtrain_protocols.testing.local_swarm import run_local
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.pipeline_audit import DRIVER_STATES, WORKER_PHASES, run_audit
from swarmtrain_protocols.testing.pipeline_site import PipelinePart
from swarmtrain_protocols.testing.pipeline_swarm import build as build_pipeline
from swarmtrain_protocols.testing.pipeline_swarm import make_spec, run_built, run_pipeline
from swarmtrain_protocols.testing.relayed import run_nat
from swarmtrain_protocols.testing.shard_swarm import run_data_swarm
from swarmtrain_protocols.testing.site import SitePart
from swarmtrain_protocols.testing.small import run_small, small_spec
from swarmtrain_protocols.testing.swarm import assemble, build, run_swarm, spec_of
from swarmtrain_protocols.testing.swarm import run_built as run_small_built
from swarmtrain_protocols.testing.toystage import Toy
from swarmtrain_protocols.testing.unlike_swarm import ALIKE, UnlikePart, run_unlike
from swarmtrain_protocols.testing.unlike_swarm import build as build_unlike
from swarmtrain_protocols.testing.world import Violation, World
from tests.protocols import shards_kit
from tests.protocols.log_chaos import Chaos
from tests.sim import test_dht_world as dht
from tests.sim import test_pipeline_paths, test_stage_loss, test_unlike
from tests.sim.test_log_sim import POWER_CUT, plan, run_log
from tests.sim.test_pipeline_diloco import calm
from tests.sim.test_stage_loss import Loss
from tests.sim.test_swarm import first_holder_lost

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = ROOT / "tests" / "protocols"

Run = Callable[[int], str]
"""(seed) -> the class of what was wrong, or ''."""


def judged(scenario: Callable[[int], object]) -> Run:
    """A scenario that raises if something is wrong."""

    def run(seed: int) -> str:
        try:
            scenario(seed)
        except Violation as broken:
            return broken.kind
        except (AssertionError, PeerFault, CheckpointError) as broken:
            return (str(broken) or type(broken).__name__).splitlines()[0][:60]
        return ""

    return run


def calls(test: Callable[[], object]) -> Run:
    """A test as a suite; the seed is not used."""
    return judged(lambda seed: test())


def units(*files: str) -> Run:
    """Files of unit tests below ``tests/protocols``, run in this process; the seed is not used."""

    def run(seed: int) -> str:
        paths = [str(PROTOCOLS / name) for name in files]
        flags = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            failed = pytest.main([*flags, "-c", str(ROOT / "pyproject.toml"), *paths])
        if failed not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(said.getvalue())
        return "a unit test" if failed else ""

    return run


# --- rounds --------------------------------------------------------------------------------------


def rounds(seed: int) -> str:
    """A swarm and the schedule of its seed."""
    return run_swarm(seed).violation


def stored_then_lost(seed: int) -> str:
    """Everybody dies after storing a result and before saying so: the attempt is aborted."""
    names = [part.name for part in spec_of(seed)[1]]
    cuts = [
        Fault(at_s, "aim-crash", name, "send:holding", 1.5)
        for at_s in (9.0, 15.0)
        for name in names
    ]
    return run_swarm(seed, cuts).violation


def owners_die(seed: int) -> list[Fault]:
    """Whoever is about to sum a part dies, now and then: deputies have to."""
    names = [part.name for part in spec_of(seed)[1][1:]]
    return [
        Fault(at_s, "aim-crash", name, "do:ReducePart", 3.0)
        for at_s in (7.0, 11.0, 15.0, 19.0)
        for name in names
    ]


def owners_die_in_turn(seed: int) -> str:
    """In a swarm with a loud member one owner after the other dies as it is about to sum.

    One at a time: the others' contributions and deputies stay. The seed counts such swarms.
    """
    loud = itertools.islice(
        (n for n in itertools.count() if spec_of(n)[1][0].loud > 1.0), seed, None
    )
    swarm = next(loud)
    names = [part.name for part in spec_of(swarm)[1][1:]]
    faults = [
        Fault(6.5 + 1.5 * number, "aim-crash", names[number % len(names)], "do:ReducePart", 1.0)
        for number in range(12)
    ]
    return run_swarm(swarm, faults).violation


def two_left(seed: int) -> str:
    """Three sites of which one is loud; a quiet one is away for a while."""
    parts = [SitePart(name, loud=30.0 if name == "b" else 1.0) for name in "abc"]
    swarm = assemble(seed, small_spec(seed), parts, model=NetworkModel(), within_s=0.5)
    return run_small_built(swarm, [Fault(4.5, "crash", "c", "", 4.0)], heal_at_s=9.0).violation


def holder_lost(seed: int) -> str:
    """The first holder of a result is lost for good before any other has stored it."""
    return run_swarm(seed, first_holder_lost(seed)).violation


WRITES = ("RoundOpened", "RoundSet", "RoundCommitted", "RoundAborted")
STRIKES = ("aim-isolate", "aim-crash", "aim-pause")


def leader_writes(seed: int) -> str:
    """Three sites; the leader is struck right after it has sent an entry of a round to another.

    The seed says which entry, the how manieth, and whether it is cut off, killed or stopped.
    """
    what, strike, number = seed % 4, seed // 4 % 3, 1 + seed // 12
    aim = Fault(1.0, STRIKES[strike], "@leader", f"append:{WRITES[what]}#{number}", 2.5)
    return run_small(seed, [aim]).violation


RECOVERIES = (
    *("notice:fallback:deputy", "send:takeover", "send:round?", "round:later-attempt"),
    *("decided:aborted", "decided:excluded", "notice:fallback:result by committed root"),
)


def sometimes(seed: int) -> str:
    """Ways out of trouble that two dozen schedules never took: nothing is wrong, and nothing works.

    The seed counts in two dozens.
    """
    runs = [run_swarm(number) for number in range(24 * seed, 24 * seed + 24)]
    wrong = next((run.violation for run in runs if run.violation), "")
    never = [name for name in RECOVERIES if not any(run.seen[name] for run in runs)]
    return wrong or ("never " + never[0] if never else "")


# --- the log -------------------------------------------------------------------------------------


def log(seed: int) -> str:
    """Three stewards and two followers under the schedule of the seed."""
    return run_log(seed, generate(seed, plan()))[2]


def log_power_cut(seed: int) -> str:
    """All stewards lose power at once."""
    return run_log(seed, POWER_CUT)[2]


def signer_dies(seed: int) -> str:
    """The leader has one other steward left, which loses power as it writes an entry.

    The leader is cut off as it commits that entry: the other two must not have forgotten it.
    """
    at_s = 7.0 + 0.13 * seed
    faults = [
        Fault(6.0, "cut", "a", "b", 8.0),
        Fault(at_s, "aim-power", "c", "persist", 1.0),
        Fault(at_s, "aim-cut", "a", "emit:Committed", 6.0),
    ]
    return run_log(seed, faults)[2]


def chaos(crew: int, recovers: bool = False) -> Run:
    """Random orders of deaths, cuts and changes of the steward set, without a network."""
    return judged(lambda seed: Chaos(seed, crew=crew, recovers=recovers).run())


# --- pipelines -----------------------------------------------------------------------------------


def pipelines(seed: int) -> str:
    """A pipeline and the schedule of its seed."""
    return run_pipeline(seed).violation


def workers_die(seed: int) -> str:
    """A worker dies every other step, at each phase in turn; replies are lost, requests doubled."""
    return run_audit(26, WORKER_PHASES, 2, seed=seed).outcome.violation


def drivers_die(seed: int) -> str:
    """A driver dies in every step."""
    audit = run_audit(8, DRIVER_STATES, 1, seed=seed, drivers="ab", lost=0.0, doubled=0.0)
    return audit.outcome.violation


def driver_gone(seed: int) -> str:
    """One of two drivers is gone for good with all that it was leased; no step may lack anything.

    The seed says what it was about to do.
    """
    about = ("do:NeedTokens", "send:hop?", "send:hop?#3")[seed % 3]
    spec = replace(make_spec(seed, Toy(seed, 2, 12), close_fraction=1.0), room=2)
    parts = [PipelinePart(name, drives=name in "ab") for name in "abcde"]
    swarm = build_pipeline(seed, spec, parts, model=NetworkModel())
    return run_built(swarm, seed, [Fault(8.0, "aim-vanish", "b", about)]).violation


class OneDriverEach(Checker):
    """PL11 as drivers see it: no two are at one micro-batch while both leases live a second more.

    A driver counts its lease from when it hears of it, which is a little later than the leader.
    """

    def always(self, world: World, host: Host) -> None:
        mine = self._held(host)
        for other in world.hosts.values():
            both = mine & self._held(other) if mine and other is not host else set()
            if both:
                world.violation("PL11", f"{host.name} and {other.name} both drive {sorted(both)}")

    def _held(self, host: Host) -> set[tuple[object, int]]:
        if host.node is None:
            return set()
        driver = host.node.core.pipeline.driver
        if driver._expires < host.local_now() + 1.0:
            return set()
        return {(driver._view, k) for k, batch in driver.batches.items() if not batch.done}


def leader_gone(seed: int) -> str:
    """The leader dies, and one of two drivers cannot tell the next one what it is at."""
    spec = make_spec(seed, Toy(seed, 2, 12), close_fraction=1.0)
    spec = replace(spec, room=2, work_s=(0.05, 0.2))
    parts = [PipelinePart(name, drives=name in "ef") for name in "abcdef"]
    swarm = build_pipeline(seed, spec, parts, model=NetworkModel())
    when = f"a/send:lease#{4 + seed % 5}"
    faults = [Fault(8.0, "aim-isolate", "e", when, 2.5), Fault(8.0, "aim-crash", "a", when, 8.0)]
    return run_built(swarm, seed, faults, OneDriverEach()).violation


def closed_late(seed: int) -> str:
    """Slow workers, and steps that close without stragglers while backwards are under way."""
    timeout_s = (0.75, 1.0, 1.25)[seed % 3]
    spec = make_spec(seed, Toy(seed, 2, 8), close_fraction=0.5, round_timeout_s=timeout_s)
    spec = replace(spec, work_s=(0.01, 0.3), hop_s=(0.005, 0.1), lost=0.1, doubled=0.1, room=4)
    parts = [PipelinePart(n, drives=n in "ab", slower=6.0 if n in "cd" else 1.0) for n in "abcdef"]
    swarm = build_pipeline(seed, spec, parts, model=NetworkModel())
    return run_built(swarm, seed, []).violation


def _stage_lost(seed: int) -> None:
    loss = Loss(seed)
    loss.kill(*loss.serving(2))
    loss.goes_on()


def _stage_calm(seed: int) -> None:
    loss = Loss(seed)
    loss.world.run(loss.world.now + 40.0)


def local_steps(seed: int) -> str:
    """A pipeline that steps by itself, in calm weather but for doubled and lost requests."""
    return run_local_built(calm(seed, doubled=0.2, lost=0.05), seed, []).violation


# --- members -------------------------------------------------------------------------------------


def _members(seed: int, fault: str) -> None:
    """One of four sites or more is away; 100 s later everybody's view must be true again."""
    fits = [n for n in range(200) if len(spec_of(n)[1]) >= 4]
    swarm = build(fits[seed])
    world, last = swarm.world, spec_of(fits[seed])[1][-1].name
    duration_s = 0.0 if fault == "vanish" else 45.0
    world.plan([Fault(12.0, fault, last, "", duration_s)])
    world.run(60.0)
    world.heal()
    for checker in world.checkers:
        checker.healed(world)
    world.run(135.0)
    assert swarm.rounds.committed, "rounds go on"


# --- members that differ -------------------------------------------------------------------------


def _stubborn(seed: int) -> None:
    test_unlike.test_a_member_that_does_not_adapt_is_not_waited_for(*test_unlike.STUBBORN[seed])


def _loud(seed: int) -> None:
    """Who has a slow link hands over several phases at once, and is a little loud."""
    parts = (*ALIKE[:3], UnlikePart("d", up_share=0.1, loud=1.7))
    build_unlike(seed, ("off", "eager")[seed % 2], parts).world.run(120.0)


def _turns(seed: int) -> None:
    test_unlike.test_slow_members_do_not_set_the_pace_and_their_samples_count("off", 0.75, 0.8)


SUITES: dict[str, Run] = {
    "rounds": rounds,
    "rounds: stored, then lost": stored_then_lost,
    "rounds: owners die": lambda seed: run_swarm(seed, owners_die(seed)).violation,
    "rounds: owners die in turn": owners_die_in_turn,
    "rounds: two left": two_left,
    "rounds: holder lost": holder_lost,
    "rounds: sometimes": sometimes,
    "small": lambda seed: run_small(seed).violation,
    "small: leader as it writes": leader_writes,
    "log": log,
    "log: power cut": log_power_cut,
    "log: signer dies": signer_dies,
    "log: chaos of 3": chaos(3),
    "log: chaos of 5": chaos(5),
    "log: chaos of 7": chaos(7),
    "log: recoveries": chaos(3, recovers=True),
    "pipelines": pipelines,
    "pipelines: workers die": workers_die,
    "pipelines: drivers die": drivers_die,
    "pipelines: driver gone": driver_gone,
    "pipelines: closed late": closed_late,
    "pipelines: leader gone": leader_gone,
    "pipelines: stage lost": judged(_stage_lost),
    "pipelines: calm": judged(_stage_calm),
    "pipelines: late messages": judged(test_stage_loss.late_messages),
    "pipelines: skipping": lambda seed: (
        test_pipeline_paths.run(seed, skip_fraction=test_pipeline_paths.SHARE).violation
    ),
    "pipelines: local steps": local_steps,
    "local": lambda seed: run_local(seed).violation,
    "unlike": lambda seed: run_unlike(seed).violation,
    "unlike: loud": judged(_loud),
    "unlike: turns": judged(_turns),
    "unlike: two phases": calls(
        test_unlike.test_a_link_that_would_take_two_phases_does_not_hold_the_others_up
    ),
    "unlike: stubborn": judged(_stubborn),
    "data": lambda seed: run_data_swarm(seed).violation,
    "data: shards alone": judged(lambda seed: shards_kit.play(seed, calm=seed % 2 == 1)),
    "members: behind NAT": lambda seed: run_nat(seed).violation,
    "members: gone for good": judged(lambda seed: _members(seed, "vanish")),
    "members: away for long": judged(lambda seed: _members(seed, "isolate")),
    "units: leader": units("test_rounds_leader.py", "test_rounds_leader_decides.py"),
    "units: lobby": units("test_rounds_lobby.py"),
    "units: residual": units("test_codecs_feedback.py"),
    "units: overlap": units("test_overlap.py"),
    "units: catch-up": units("test_rounds_catchup.py"),
    "units: download": units("test_rounds_download.py"),
    "units: ledger": units("test_ledger.py", "test_channels.py", "test_leadership.py"),
    "units: attempt": units("test_rounds_attempt.py"),
    "units: sums": units("pipeline/test_sums.py", "pipeline/test_worker.py"),
    "units: log": units(
        *(f"test_log_{name}.py" for name in ("entrylog", "acceptor", "leader", "state"))
    ),
    "units: view": units("test_log_view.py"),
    "units: access": units("test_access.py"),
    "units: owners": units("test_suspension.py", "test_rounds_owners.py"),
    "units: records": units("dht/test_records.py"),
    "units: leases": units("pipeline/test_leases.py"),
    "units: steps": units("pipeline/test_steps.py"),
    "dht: led away": dht.led_away,
    "dht: invented": dht.invented,
    "dht: flood": dht.flood,
    "dht: blind": dht.blind,
    "dht: squatted": dht.squatted,
    "dht: reflected": dht.reflected,
    "dht: split": dht.split,
    "dht: halves": dht.halves,
    "dht: waves": dht.waves,
    "dht: ground": dht.ground,
}
"""By the name that the catalogue uses."""

YARDSTICKS: dict[str, Callable[[], object]] = {
    "unlike: turns": lambda: test_unlike.among_like_members("off"),
    "unlike: two phases": lambda: test_unlike.among_like_members("eager"),
    "unlike: stubborn": lambda: [
        test_unlike.among_like_members(m) for m, _ in test_unlike.STUBBORN
    ],
}
"""What a suite compares with; it is remembered, and measured before a bug is planted."""
