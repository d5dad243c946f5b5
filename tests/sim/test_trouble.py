"""Each kind of trouble does to a toy protocol what its line in ``faults`` says, and then ends."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain_protocols import limits, merkle
from swarmtrain_protocols.core import Persist, Send
from swarmtrain_protocols.messages.session import Ping
from swarmtrain_protocols.testing.clock import HostClock
from swarmtrain_protocols.testing.disk import Disk
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import FLAP_S, KINDS, SLOW_EVENT_S, Fault
from swarmtrain_protocols.testing.small import run_small
from swarmtrain_protocols.testing.swarm import AIMS
from swarmtrain_protocols.testing.world import NetworkModel, World
from tests.sim.toy import CALM, ToyNode, acked, toy_world

ROOT = Path(__file__).resolve().parents[2]


def say(world: World, nonce: int) -> None:
    host = world.hosts["a"]
    host.node.out.append(Send(world.peers["b"], Ping(nonce)))
    host.settle()


def flood(world: World, count: int, *, from_s: float, every_s: float) -> None:
    """``a`` says 1 … ``count``; nobody repeats anything."""
    for number in range(1, count + 1):
        world.at(from_s + number * every_s, world.hosts["a"], say, world, number)


def linked(seed: int, model: NetworkModel = CALM) -> World:
    """Two hosts with a link, and nothing that they want."""
    world = toy_world(seed, model=model, goal=0)
    world.run(1.0)
    say(world, 1000)
    world.run(2.0)
    assert world.hosts["b"].node.received == [1000]
    world.hosts["b"].node.received.clear()
    return world


def test_a_power_cut_takes_all_that_is_not_synced_and_tells_nobody() -> None:
    slow = NetworkModel(sync_s=(0.2, 0.2))
    for seed in range(8):
        world = toy_world(seed, model=slow, goal=1)
        world.plan([Fault(0.0, "aim-power", "b", "persist", 1.0)])
        world.run(1.0, lambda world=world: world.hosts["b"].incarnation == 1)
        assert world.hosts["b"].incarnation == 1 and world.hosts["b"].disk.records == []
        kinds = [kind for kind, _ in world.hosts["a"].node.links]
        world.run(world.now + 0.9)
        assert [kind for kind, _ in world.hosts["a"].node.links] == kinds == ["up"]
        assert world.run(30.0, lambda world=world: acked(world) == 1)


def test_whoever_sleeps_sees_no_time_pass() -> None:
    times = {}
    for kind in ("pause", "sleep"):
        world = linked(3)
        host = world.hosts["b"]
        before = host.local_now()
        world.plan([Fault(2.0, kind, "b", "", 30.0)])
        world.run(33.0)
        times[kind] = host.local_now() - before
    assert times["pause"] == pytest.approx(31.0, abs=0.02)
    assert times["sleep"] == pytest.approx(1.0, abs=0.02)


def test_a_timer_that_was_set_before_a_sleep_gets_the_rest_of_its_time() -> None:
    world = toy_world(3, goal=0)
    world.run(1.0)
    node = world.hosts["a"].node
    node.goal, node.retry_at = 1, world.hosts["a"].local_now() + 10.0
    world.hosts["a"].settle()
    world.plan([Fault(2.0, "sleep", "a", "", 30.0)])
    ticks = len(node.calls)
    world.run(40.9)
    assert len(node.calls) == ticks
    world.run(41.5)
    assert len(node.calls) > ticks


def test_a_flapping_link_comes_and_goes_and_comes_back() -> None:
    world = linked(4)
    world.plan([Fault(2.0, "flap", "b", "", 12.0)])
    down = []
    for tenth in range(20, 200):
        world.run(tenth / 10)
        down.append(world.network.is_cut("a", "b"))
    turns = sum(one != two for one, two in itertools.pairwise(down))
    assert turns >= 12.0 / FLAP_S[1] and 10 < sum(down) < 110
    assert not any(down[125:])


def test_a_slow_node_handles_one_event_after_the_other() -> None:
    world = linked(5)
    world.plan([Fault(2.0, "slownode", "b", "", 60.0)])
    flood(world, 40, from_s=2.0, every_s=0.001)
    world.run(2.5)
    assert len(world.hosts["b"].node.received) < 0.5 / SLOW_EVENT_S[0]
    world.run(30.0)
    assert world.hosts["b"].node.received == list(range(1, 41))
    times = [at for kind, at in world.hosts["b"].node.calls if kind == "ping"][1:]
    assert min(two - one for one, two in itertools.pairwise(times)) > SLOW_EVENT_S[0] / 2


def test_datagrams_are_held_back_and_overtaken() -> None:
    world = linked(6, NetworkModel(mode="datagram"))
    world.plan([Fault(2.0, "reorder", "b", "", 30.0)])
    flood(world, 100, from_s=2.0, every_s=0.1)
    world.run(20.0)
    received = world.hosts["b"].node.received
    assert sorted(received) == list(range(1, 101)) != received
    held = world.seen["net:held-back"]
    assert 40 <= held <= 80  # of 100 each way; 60 expected, standard deviation 6.5


def test_delays_have_a_heavy_tail_and_streams_stay_in_order() -> None:
    world = linked(7)
    world.plan([Fault(2.0, "tail", "b", "", 300.0)])
    flood(world, 200, from_s=2.0, every_s=1.0)
    world.run(260.0)
    assert world.hosts["b"].node.received == list(range(1, 201))
    times = [at for kind, at in world.hosts["b"].node.calls if kind == "ping"][1:]
    late = sorted(at - times[0] - number for number, at in enumerate(times))
    assert late[100] - late[0] < 0.2 and late[-1] - late[0] > 1.0


def test_a_flipped_bit_on_the_way_ends_a_link_and_spoils_a_chunk() -> None:
    world = toy_world(8, goal=300)
    world.plan([Fault(1.0, "noisy", "b", "", 500.0)])
    world.run(60.0)
    kinds = [kind for kind, _ in world.hosts["a"].node.links]
    assert world.seen["net:flipped"] >= 5 and kinds.count("down") >= 5
    received = world.hosts["b"].node.received
    assert set(received) <= set(range(1, 301)) and acked(world) > 20  # what arrives is whole
    blob = merkle.Blob.of([bytes([i]) * 100 for i in range(4)])
    world.hosts["b"].node.blobs[blob.root] = blob
    for ticket in range(60):
        world.hosts["a"].node.fetch(ticket, world.peers["b"], blob.root, ticket % 4, 1)
    world.hosts["a"].settle()
    world.run(80.0)
    assert any(reason == "corrupt" for _, reason in world.hosts["a"].node.fetch_news)


def test_a_full_disk_holds_back_what_others_rely_on_and_nothing_else() -> None:
    """As ``tests/peer/test_journal.py`` shows of the real one."""
    world = toy_world(9, goal=0)
    world.run(1.0)
    host = world.hosts["b"]
    said = Send(world.peers["a"], Ping(1))
    world.plan([Fault(1.0, "diskfull", "b", "", 10.0)])
    world.run(1.1)
    host.node.out += [Persist(b"x" * 40, relied=False), said]
    host.settle()
    assert host.quiet and host.disk.records == []
    host.node.out += [Persist(b"y" * 40), said]
    host.settle()
    assert not host.quiet  # the message waits for its record
    world.run(2.0)
    assert ("up", world.peers["b"]) in world.hosts["a"].node.links
    world.run(1.2 + limits.DISK_FULL_PATIENCE_S + limits.DISK_FULL_RETRY_S)
    assert world.hosts["a"].node.links[-1] == ("down", world.peers["b"])  # it says that it is stuck
    world.run(15.0)
    assert host.quiet and host.disk.records == [b"x" * 40, b"y" * 40]


def test_what_waits_for_space_dies_with_its_process() -> None:
    world = toy_world(9, goal=0)
    world.run(1.0)
    host = world.hosts["b"]
    world.plan([Fault(1.0, "diskfull", "b", "", 3.0), Fault(2.0, "crash", "b", "", 0.5)])
    world.run(1.1)
    host.node.out.append(Persist(b"x" * 40))
    host.settle()
    world.run(9.0)
    assert host.incarnation == 1 and host.disk.records == []


def test_rot_flips_one_bit_of_one_file() -> None:
    disk, luck = Disk(Stream(1, "disk"), toy_world(1).seen, lambda: 0.0), Stream(1, "rot")
    assert disk.rot(luck) == ""
    before = {"one": bytes(50), "two": bytes(50)}
    for name, data in before.items():
        disk.write(name, data)
        disk.sync_file(name)
    name = disk.rot(luck)
    changed = int.from_bytes(disk.files[name], "big")
    assert changed.bit_count() == 1
    assert sum(disk.files[n] == data for n, data in before.items()) == 1


def test_clocks_drift_jump_and_are_set() -> None:
    clock = HostClock(Stream(1, "clock"))
    start = clock.local_s(10.0)
    assert clock.local_s(20.0) - start == pytest.approx(10.0, abs=0.01)
    clock.run_at(20.0, 1.25)
    assert clock.local_s(30.0) - start == pytest.approx(22.5, abs=0.01)
    assert clock.world_s(clock.local_s(30.0) + 12.5) == pytest.approx(40.0, abs=0.01)
    clock.jump(100.0)
    assert clock.local_s(30.0) - start == pytest.approx(122.5, abs=0.01)
    clock.jump(-5.0)
    held = clock.local_s(30.0)
    assert clock.local_s(33.9) == held < clock.local_s(34.1)  # it never goes back
    wall = clock.wall_s(30.0)
    clock.set_wall(-3600.0)
    assert clock.wall_s(30.0) == wall - 3600.0


def test_a_clock_that_jumps_fires_timers_at_once_and_a_slow_one_late() -> None:
    for fault, least, most in (
        (Fault(1.0, "jump", "a", "", 20.0), 0.9, 1.1),
        (Fault(1.0, "drift", "a", "0.8", 100.0), 13.2, 13.6),
        (Fault(1.0, "drift", "a", "1.25", 100.0), 8.7, 9.1),
    ):
        world = World(2, model=CALM)
        world.add("b", lambda ctx: ToyNode(ctx, None, 0, False))
        world.add("a", lambda ctx: ToyNode(ctx, ctx.peers["b"], 0, False))
        world.run(0.5)
        node = world.hosts["a"].node
        node.goal, node.retry_at = 1, world.hosts["a"].local_now() + 10.4
        world.hosts["a"].settle()
        world.plan([fault])
        fired = len(node.calls)
        world.run(30.0, lambda node=node, fired=fired: len(node.calls) > fired)
        assert least < world.now < most, (fault, world.now)


def everything(seed: int) -> str:
    """The trace of a small swarm that meets every kind of fault, and some aimed at roles."""
    values = {"wall": "3600.0", "drift": "1.25", "cut": "c", "cut1": "c"}
    kinds = [kind for kind in KINDS if kind != "vanish"]
    faults = [
        Fault(2.0 + 0.2 * number, kind, "ab"[number % 2], values.get(kind, ""), 0.4)
        for number, kind in enumerate(kinds)
    ]
    faults += [Fault(3.0, "aim-pause", role, what, 0.5) for role, what in AIMS]
    outcome = run_small(seed, faults)
    assert outcome.violation == "", outcome.text
    assert sum(outcome.seen[f"fault:{kind}"] for kind in kinds) >= len(kinds) - 6, outcome.seen
    return outcome.trace


def test_every_kind_replays_under_any_hash_seed() -> None:
    code = "from tests.sim.test_trouble import everything; print(everything(1))"
    path = os.pathsep.join(str(ROOT / name) for name in (".", "peer", "protocols"))
    outputs = []
    for hash_seed in ("0", "1", "777"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) > 64


def test_healing_ends_all_of_it() -> None:
    world = toy_world(6, goal=1000)
    kinds = ("flap", "slownode", "tail", "noisy", "reorder", "diskfull", "sleep")
    world.plan([Fault(1.0, kind, "b", "", 900.0) for kind in kinds])
    world.plan([Fault(1.0, "drift", "a", "0.8", 900.0)])
    world.run(5.0)
    world.heal()
    before, local = acked(world), world.hosts["a"].local_now()
    world.run(25.0)
    assert acked(world) > before + 100
    assert world.hosts["a"].local_now() - local == pytest.approx(20.0, abs=0.01)
