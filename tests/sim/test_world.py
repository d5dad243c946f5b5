"""The simulator itself, driven by a toy protocol whose right answers are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_protocols import merkle, messages
from swarmtrain_protocols.core import Connect, Disconnect, Persist, Send
from swarmtrain_protocols.messages.session import Ping
from swarmtrain_protocols.testing.checks.base import Always, missing, settle_within
from swarmtrain_protocols.testing.faults import Fault, generate
from swarmtrain_protocols.testing.host import SPINS_MAX
from swarmtrain_protocols.testing.world import NetworkModel, Violation, World
from tests.sim.toy import (
    CALM,
    PLAN,
    Events,
    ToyNode,
    acked,
    counters,
    toy_run,
    toy_world,
    trace_of,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_calm_world_delivers_everything_in_order() -> None:
    world = toy_world(1)
    assert world.run(30.0, lambda world=world: acked(world) == 20)
    assert world.hosts["b"].node.received == list(range(1, 21))
    assert world.hosts["a"].node.links == [("up", world.peers["b"])]
    # 20 exchanges of two latencies of 10-50 ms and a sync of 0.5-10 ms, plus three for the dial.
    assert 20 * 0.0205 < world.now < 23 * 0.11


def test_same_seed_same_trace_and_other_seed_other_trace() -> None:
    assert trace_of(3) == trace_of(3)
    assert trace_of(3) != trace_of(4)


def test_trace_does_not_depend_on_the_hash_seed() -> None:
    code = "from tests.sim.toy import trace_of; print([trace_of(s) for s in (3, 7, 11, 12)])"
    path = os.pathsep.join(str(ROOT / name) for name in (".", "peer", "protocols"))
    outputs = []
    for hash_seed in ("0", "1", "777"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) > 4 * 64


def test_a_crash_before_the_sync_loses_the_record_and_holds_back_the_answer() -> None:
    slow_disk = NetworkModel(sync_s=(0.2, 0.2))
    outcomes = []
    for seed in range(12):
        world = toy_world(seed, model=slow_disk, goal=1)
        world.plan([Fault(0.0, "aim-crash", "b", "persist", 1.0)])
        world.run(1.0, lambda world=world: world.hosts["b"].incarnation == 1)
        assert world.hosts["b"].incarnation == 1
        outcomes.append(len(world.hosts["b"].disk.records))
        assert world.hosts["a"].node.acked == 0  # the answer waits for a sync that never came
        assert world.run(20.0, lambda world=world: acked(world) == 1)
        assert len(world.hosts["b"].disk.records) >= 1
    assert 0 in outcomes and 1 in outcomes  # lost for some seeds, kept for others


def test_a_crash_after_the_sync_keeps_the_record() -> None:
    world = toy_world(5, goal=1)
    world.plan([Fault(0.0, "aim-crash", "b", "synced", 1.0)])
    world.run(1.0, lambda world=world: world.hosts["b"].incarnation == 1)
    assert len(world.hosts["b"].disk.records) == 1
    assert world.hosts["a"].node.acked == 0
    world.run(10.0)
    assert world.hosts["b"].node.stored == {world.peers["a"]: 1}
    assert world.hosts["a"].node.acked == 1


def test_reset_replaces_all_records_at_once() -> None:
    world = toy_world(2, goal=3)
    world.run(5.0)
    world.checkers.clear()
    host = world.hosts["b"]
    assert len(host.disk.records) == 3
    host.node.out += [Persist(b"x" * 40, reset=True), Persist(b"y" * 40)]
    host.settle()
    assert len(host.disk.records) == 3  # nothing is durable yet
    world.run(6.0)
    assert host.disk.records == [b"x" * 40, b"y" * 40]


def test_a_pause_holds_everything_and_then_bursts() -> None:
    world = World(7, model=CALM)
    world.add("b", lambda ctx: ToyNode(ctx, None, 0, False))
    world.add("a", lambda ctx: ToyNode(ctx, ctx.peers["b"], 1, False))
    world.run(2.0)
    assert world.hosts["a"].node.acked == 1
    world.plan([Fault(2.0, "pause", "b", "", 1.5)])
    for step in range(5):
        world.at(2.1 + step * 0.2, world.hosts["a"], _say, world, 100 + step)
    world.run(3.4)
    assert world.hosts["b"].node.received == [1]
    world.run(3.6)
    assert world.hosts["b"].node.received == [1, 100, 101, 102, 103, 104]
    times = [at for kind, at in world.hosts["b"].node.calls if kind == "ping"][1:]
    assert max(times) - min(times) < 1e-6  # all at once, at the moment of resuming


def _say(world: World, nonce: int) -> None:
    host = world.hosts["a"]
    host.node.out.append(Send(world.peers["b"], Ping(nonce)))
    host.settle()


def test_a_long_cut_ends_the_connection_at_both_ends_and_heals() -> None:
    world = toy_world(9, goal=400)
    world.plan([Fault(1.0, "cut", "a", "b", 15.0)])
    world.run(0.99)
    before = world.hosts["a"].node.acked
    assert before > 3
    world.run(2.9)
    stalled = world.hosts["a"].node.acked
    assert stalled <= before + 1
    world.run(12.0)  # detection takes at most 8 s
    assert ("down", world.peers["b"]) in world.hosts["a"].node.links
    assert ("down", world.peers["a"]) in world.hosts["b"].node.links
    assert not world.network.linked("a", "b")
    assert world.hosts["a"].node.acked == stalled
    world.run(30.0)
    assert world.network.linked("a", "b")
    assert world.hosts["a"].node.acked > stalled + 20


def test_a_short_cut_of_a_stream_only_delays() -> None:
    world = toy_world(9, goal=100)
    world.plan([Fault(1.0, "cut", "a", "b", 1.0)])
    world.run(30.0)
    assert world.hosts["a"].node.acked == 100
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up"]
    received = world.hosts["b"].node.received
    assert received == sorted(received)


def test_a_one_way_cut_lets_the_other_way_through() -> None:
    world = toy_world(4, goal=1000)
    world.plan([Fault(1.0, "cut1", "b", "a", 1.5)])
    world.run(1.1)
    before, received = acked(world), len(world.hosts["b"].node.received)
    world.run(2.4)
    assert acked(world) <= before + 1
    assert len(world.hosts["b"].node.received) > received  # retries arrive, answers do not


def test_datagrams_are_lost_doubled_and_reordered() -> None:
    model = NetworkModel(mode="datagram", loss=0.2, duplicate=0.3, latency_s=(0.01, 0.5))
    world = toy_world(11, model=model, goal=0)
    world.run(1.0)
    for number in range(1, 201):
        world.at(2.0 + number * 0.01, world.hosts["a"], _say, world, number)
    world.run(1.5)
    world.hosts["a"].node.out.append(Connect(world.peers["b"]))
    world.hosts["a"].settle()
    world.run(8.0)
    received = world.hosts["b"].node.received
    distinct = sorted(set(received))
    assert 140 <= len(distinct) <= 180  # 160 expected, standard deviation 5.7
    doubled = len(received) - len(distinct)
    assert 30 <= doubled <= 68  # 48 expected, standard deviation 5.8
    assert received != sorted(received)
    assert world.seen["net:lost"] >= 20 and world.seen["net:doubled"] >= 30


def test_a_lost_packet_of_a_stream_is_a_reset() -> None:
    world = toy_world(13, model=NetworkModel(loss=0.02), goal=300)
    assert world.run(200.0, lambda world=world: acked(world) == 300)
    kinds = [kind for kind, _ in world.hosts["a"].node.links]
    assert world.seen["net:reset"] >= 3
    assert kinds.count("down") >= 3 and kinds.count("up") == kinds.count("down") + 1


def test_a_vanished_host_is_noticed_only_by_silence_and_stays_away() -> None:
    world = toy_world(6, goal=1000)
    world.plan([Fault(1.0, "vanish", "b", "", 1.0)])
    world.run(2.9)
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up"]
    world.run(12.0)
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up", "down"]
    world.heal()
    world.run(40.0)
    assert not world.hosts["b"].alive


def test_a_crashed_process_is_noticed_at_once_and_comes_back() -> None:
    world = toy_world(6, goal=1000)
    world.plan([Fault(1.0, "crash", "b", "", 2.0)])
    world.run(1.2)
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up", "down"]
    world.run(6.0)
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up", "down", "up"]
    assert world.hosts["b"].incarnation == 1
    assert world.hosts["b"].node.stored[world.peers["a"]] >= 5


def test_disconnect_tells_both_ends() -> None:
    world = toy_world(6, goal=1)
    world.run(2.0)
    world.hosts["b"].node.out.append(Disconnect(world.peers["a"], "busy", "enough"))
    world.hosts["b"].settle()
    world.run(3.0)
    assert [kind for kind, _ in world.hosts["a"].node.links] == ["up", "down"]
    assert [kind for kind, _ in world.hosts["b"].node.links] == ["up", "down"]


def test_clocks_of_hosts_have_nothing_to_do_with_each_other() -> None:
    world = toy_world(8)
    world.run(5.0)
    a, b = world.hosts["a"], world.hosts["b"]
    assert abs(a.local_now() - b.local_now()) > 1.0
    start = a.local_now()
    world.run(105.0)
    assert abs((a.local_now() - start) - 100.0) <= 100.0 * 2.1e-4


def _fetch_world(seed: int, model: NetworkModel = CALM) -> tuple[World, merkle.Blob]:
    world = toy_world(seed, model=model, goal=0)
    world.run(0.5)
    blob = merkle.Blob.of([bytes([i]) * 1000 for i in range(10)])
    world.hosts["b"].node.blobs[blob.root] = blob
    return world, blob


def test_fetch_moves_verified_chunks_at_the_rate_of_the_link() -> None:
    world, blob = _fetch_world(1, NetworkModel(rate_bytes_per_s=1000.0))
    node = world.hosts["a"].node
    node.fetch(1, world.peers["b"], blob.root, 2, 3)
    node.fetch(2, world.peers["b"], blob.root, 5, 2)
    world.hosts["a"].settle()
    world.run(4.0)
    assert node.fetch_news == [(1, "ok")]
    assert node.accepted == [(("purpose", 1), 2, [bytes([i]) * 1000 for i in (2, 3, 4)])]
    world.run(6.0)  # 5000 bytes at 1000 per second, a dial and a request
    assert node.fetch_news == [(1, "ok"), (2, "ok")]
    assert world.bytes_moved["b"] == 5000


@pytest.mark.parametrize(
    ("first", "known", "reason"),
    [(0, False, "refused:unknown"), (9, True, "refused:range")],
)
def test_fetch_of_what_is_not_there_is_refused(first: int, known: bool, reason: str) -> None:
    world, blob = _fetch_world(2)
    node = world.hosts["a"].node
    node.fetch(7, world.peers["b"], blob.root if known else bytes(32), first, 2)
    world.hosts["a"].settle()
    world.run(2.0)
    assert node.fetch_news == [(7, reason)]
    assert node.accepted == []


def test_flipped_bits_are_seen_and_reported_as_corrupt() -> None:
    world, blob = _fetch_world(3, NetworkModel(corrupt=0.5))
    node = world.hosts["a"].node
    for ticket in range(60):
        node.fetch(ticket, world.peers["b"], blob.root, ticket % 10, 1)
    world.hosts["a"].settle()
    world.run(5.0)
    results = dict(node.fetch_news)
    assert len(results) == 60
    corrupt = sum(reason == "corrupt" for reason in results.values())
    assert 18 <= corrupt <= 42
    assert len(node.accepted) == 60 - corrupt
    assert all(chunks == [bytes([first]) * 1000] for _, first, chunks in node.accepted)


@pytest.mark.parametrize("kind", ["crash", "cut", "vanish"])
def test_a_fetch_ends_when_the_link_does(kind: str) -> None:
    world, blob = _fetch_world(4, NetworkModel(rate_bytes_per_s=500.0))
    node = world.hosts["a"].node
    node.fetch(1, world.peers["b"], blob.root, 0, 10)
    world.hosts["a"].settle()
    world.plan([Fault(2.0, kind, "b", "a" if kind == "cut" else "", 12.0)])
    world.run(11.0)
    assert node.fetch_news == [(1, "disconnected")]


def test_a_cancelled_fetch_gives_no_answer() -> None:
    world, blob = _fetch_world(4)
    node = world.hosts["a"].node
    node.fetch(1, world.peers["b"], blob.root, 0, 10)
    world.hosts["a"].settle()
    world.transfers.cancel(world.hosts["a"], 1)
    world.run(3.0)
    assert node.fetch_news == [] and node.accepted == []


def test_a_provider_that_serves_wrong_bytes_is_a_violation() -> None:
    world, blob = _fetch_world(5)
    other = merkle.Blob.of([b"other"] * 10)
    world.hosts["b"].node.blobs[blob.root] = other
    world.hosts["a"].node.fetch(1, world.peers["b"], blob.root, 0, 1)
    world.hosts["a"].settle()
    with pytest.raises(Violation, match="blob"):
        world.run(3.0)


def test_unknown_effects_go_to_the_node_and_completions_die_with_it() -> None:
    events = Events()
    world = toy_world(6, goal=0)
    world.watch(events)
    world.run(1.0)
    host = world.hosts["b"]
    host.node.out.append("work")
    host.settle()
    world.run(2.0)
    assert events.events[0] == ("b", ("executed", "work"))
    name, (what, took_s) = events.events[1]  # type: ignore[misc]
    assert (name, what) == ("b", "completed") and abs(took_s - 0.25) < 1e-3
    host.node.out.append("more")
    host.settle()
    world.crash("b", restart_s=0.1)
    world.run(4.0)
    assert [e for e in events.events if e[1][0] == "completed"] == [events.events[1]]  # type: ignore[index]


def test_an_exception_in_a_node_is_a_violation() -> None:
    world = toy_world(6)
    world.at(1.0, None, lambda: setattr(world.hosts["b"].node, "stored", None))
    with pytest.raises(Violation, match="exception AttributeError"):
        world.run(3.0)


def test_what_goes_to_many_as_one_object_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = toy_world(1)
    world.run(1.0)
    made: list[object] = []
    encode = messages.encode
    monkeypatch.setattr(messages, "encode", lambda m: (made.append(m), encode(m))[1])
    host, peer = world.hosts["a"], world.peers["b"]
    ping, same = Ping(2**40), Ping(2**40)
    for message in (ping, ping, same, ping):
        world.execute(host, Send(peer, message))
    assert [id(m) for m in made] == [id(ping), id(same), id(ping)]
    assert world.seen["send:ping"] >= 4


def test_a_message_that_decodes_as_another_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    world = toy_world(1)
    world.run(1.0)
    monkeypatch.setattr(messages, "decode", lambda data: Ping(7))
    with pytest.raises(Violation, match="codec"):
        world.execute(world.hosts["a"], Send(world.peers["b"], Ping(8)))


def test_a_timer_that_stays_in_the_past_is_a_violation() -> None:
    world = toy_world(6)
    world.at(1.0, None, lambda: setattr(world.hosts["a"].node, "deadline", lambda: 0.0))
    with pytest.raises(Violation, match="spin"):
        world.run(3.0)
    ticks = [1 for kind, _ in world.hosts["a"].node.calls if kind == "tick"]
    assert len(ticks) >= SPINS_MAX


def test_always_checker_stops_at_the_first_event() -> None:
    world = toy_world(6, goal=10)
    world.watch(Always("many", lambda w: "too many" if acked(w) > 4 else ""))
    with pytest.raises(Violation, match="many"):
        world.run(10.0)
    assert world.hosts["a"].node.acked == 5


def test_liveness_is_bounded() -> None:
    world = toy_world(6, goal=10)
    world.plan([Fault(0.0, "isolate", "a", "", 100.0)])
    world.run(5.0)
    assert settle_within(world, 10.0, lambda: acked(world) == 10, lambda: "") < 10.0
    with pytest.raises(Violation, match="liveness"):
        settle_within(world, 10.0, lambda: acked(world) == 11, lambda: "never")


def test_healing_resumes_stopped_processes_now() -> None:
    world = toy_world(6, goal=1000)
    world.plan([Fault(1.0, "pause", "b", "", 1000.0), Fault(1.0, "crash", "a", "", 1000.0)])
    world.run(10.0)
    before = len(world.hosts["b"].node.received)
    world.heal()
    world.run(12.0)
    assert len(world.hosts["b"].node.received) > before + 3
    assert world.hosts["a"].alive


def test_all_seeds_are_safe_and_live_and_every_kind_of_trouble_occurs() -> None:
    seen, failed = counters(range(120))
    assert failed == []
    wanted = [
        *("crash", "pause", "cut", "cut1", "isolate", "split", "slow", "lossy", "duplicate"),
        *("slowdisk", "aim-crash", "aim-cut", "aim-pause"),
    ]
    wanted = ["fault:" + kind for kind in wanted]
    wanted += ["net:lost", "net:reset", "net:doubled", "net:dial-failed", "disk:lost", "disk:torn"]
    assert missing([{name: 1} for name in seen], wanted, share=0.0) == []
    assert all(seen[name] >= 2 for name in wanted), seen


def test_the_planted_bug_is_found() -> None:
    _, failed = counters(range(60), hasty=True)
    assert len(failed) >= 5


def test_missing_reports_points_that_never_fire() -> None:
    runs = [{"a": 1}, {"a": 2, "b": 0}, {"b": 1}]
    assert missing(runs, ["a", "b", "c"], share=0.5) == ["b: 1/3", "c: 0/3"]


def test_a_schedule_is_replayed_from_its_text() -> None:
    schedule = generate(21, PLAN)
    first, _ = toy_run(21, schedule)
    again, _ = toy_run(21, list(reversed(schedule)))
    assert first.trace.digest() == again.trace.digest()
