"""``st.Peer`` on real sockets: exact means, groups, deaths, deadlines, the DHT."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import swarmtrain as st
from swarmtrain_peer.quorum import QuorumChanged
from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import ConfigError, GroupLost, LocalProtocolError, RoundFailed
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import dht as dm
from swarmtrain_protocols.messages import log as lm
from swarmtrain_protocols.rounds.member import Offer
from tests.protocols import reference_numbers as reference
from tests.swarm.harness import poll_until

F32 = NDArray[np.float32]
ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 30.0
CHUNK_VALUES = 1 << 18

pytestmark = pytest.mark.timeout(100)


@pytest.fixture(scope="module")
def trio() -> Iterator[list[st.Peer]]:
    """Three members of one run in this process; tests use groups of their own."""
    first = st.Peer.start(name="first")
    peers = [first]
    try:
        peers += [st.Peer.start(ticket=first.ticket, name=name) for name in ("second", "third")]
        yield peers
    finally:
        for peer in reversed(peers):
            peer.close()


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(WAIT_S) for future in [pool.submit(call) for call in calls]]


def reduce_all(
    peers: list[st.Peer], arrays: list[F32], weights: list[float], **arguments: Any
) -> list[Any]:
    def call(peer: st.Peer, array: F32, weight: float) -> Callable[[], Any]:
        return lambda: peer.all_reduce(
            array, weight=weight, expect=len(peers), timeout=WAIT_S, **arguments
        )

    return at_once([call(*one) for one in zip(peers, arrays, weights, strict=True)])


def mean_of(codec: str, arrays: list[F32], weights: list[float]) -> F32:
    """The agreed bytes, decoded, from the pure-Python reference of the codecs: members in order."""
    total = sum(weights)
    n = arrays[0].size
    out = np.empty(n, np.float32)
    for first in range(0, n, CHUNK_VALUES):
        part = slice(first, min(n, first + CHUNK_VALUES))
        size = part.stop - part.start
        acc: Any = [0.0] * size
        for array, weight in zip(arrays, weights, strict=True):
            sent = reference.encode(codec, array[part].tolist())
            received = reference.decode(codec, sent, size)
            acc = reference.accumulate(acc, reference.f32(weight / total), received)
        out[part] = reference.decode(codec, reference.encode(codec, list(acc)), size)
    return out


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_the_mean_is_exact_and_the_same_everywhere(trio: list[st.Peer], codec: str) -> None:
    rng = np.random.default_rng(11)
    ordered = sorted(trio, key=lambda peer: peer.id)  # member order is the order of the keys
    arrays = [rng.standard_normal(1000, np.float32) for _ in ordered]
    kept = [array.copy() for array in arrays]
    weights = [1.0, 2.5, 0.25]
    found = reduce_all(ordered, arrays, weights, codec=codec, group=f"exact-{codec}")
    want = mean_of(codec, arrays, weights)
    for reduced, array, before in zip(found, arrays, kept, strict=True):
        assert reduced.values.tobytes() == want.tobytes()
        assert reduced.root_hash == found[0].root_hash
        assert reduced.contributors == tuple(peer.id for peer in ordered)
        assert reduced.weight == 3.75
        assert reduced.round == 0
        assert not np.shares_memory(reduced.values, array)
        assert array.tobytes() == before.tobytes(), "the argument is never written"


def test_vectors_of_several_chunks_keep_their_shape(trio: list[st.Peer]) -> None:
    rng = np.random.default_rng(12)
    ordered = sorted(trio, key=lambda peer: peer.id)
    arrays = [rng.standard_normal((3, 200_000), np.float32) for _ in ordered]
    found = reduce_all(ordered, arrays, [1.0, 1.0, 2.0], group="large")
    acc = np.zeros((3, 200_000), np.float32)
    for array, weight in zip(arrays, (0.25, 0.25, 0.5), strict=True):
        acc += np.float32(weight) * array
    for reduced in found:
        assert reduced.values.shape == (3, 200_000)
        assert reduced.values.tobytes() == acc.tobytes()
    assert len({reduced.root_hash for reduced in found}) == 1


def test_groups_run_beside_each_other_and_calls_pair_up_in_order(trio: list[st.Peer]) -> None:
    def several(peer: st.Peer, group: int) -> Callable[[], list[float]]:
        weight = 2.0 if peer is trio[0] else 1.0  # of four: nothing is rounded

        def calls() -> list[float]:
            found = []
            for number in range(5):
                value = np.full(3, 100 * group + number, np.float32)
                reduced = peer.all_reduce(
                    value, weight=weight, group=f"beside-{group}", expect=3, timeout=WAIT_S
                )
                assert reduced.round == number
                assert len(reduced.contributors) == 3
                found.append(float(reduced.values[0]))
            return found

        return calls

    jobs = [(peer, group) for group in range(4) for peer in trio]
    for (_, group), values in zip(jobs, at_once([several(*job) for job in jobs]), strict=True):
        assert values == [100.0 * group + number for number in range(5)]


def test_a_call_that_nobody_joins_fails_in_time_and_the_next_one_works(
    trio: list[st.Peer],
) -> None:
    started = time.monotonic()
    with pytest.raises(RoundFailed) as failed:
        trio[0].all_reduce(np.ones(4, np.float32), group="lonely", expect=3, timeout=1.0)
    assert failed.value.retry
    assert time.monotonic() - started < 5.0
    found = reduce_all(trio, [np.ones(4, np.float32)] * 3, [1.0] * 3, group="lonely")
    assert all(len(reduced.contributors) == 3 for reduced in found)


def test_a_call_ends_when_no_majority_answers_and_one_after_that_works(
    trio: list[st.Peer],
) -> None:
    peer = trio[0]
    assert peer._loop is not None
    loop, runtime = peer._loop, peer._runtime

    def lose() -> None:
        poll_until(lambda: "group/majority" in peer._waiting, "the call waits")
        for lost in (True, False):
            loop.call_soon_threadsafe(runtime._on_event, QuorumChanged(lost))

    teller = threading.Thread(target=lose)
    teller.start()
    with pytest.raises(GroupLost) as failed:
        peer.all_reduce(np.ones(4, np.float32), group="majority", expect=3, timeout=WAIT_S)
    teller.join()
    assert failed.value.retry and failed.value.exit_code == 75
    found = reduce_all(trio, [np.ones(4, np.float32)] * 3, [1.0] * 3, group="majority")
    assert all(len(reduced.contributors) == 3 for reduced in found)


def test_what_cannot_be_reduced_is_refused_at_the_call(trio: list[st.Peer]) -> None:
    peer = trio[0]
    for bad in (np.ones(3), np.ones(3, np.int32), np.ones(0, np.float32), [1, 2]):
        with pytest.raises(ConfigError):
            peer.all_reduce(bad)
    with pytest.raises(ConfigError):
        peer.all_reduce(np.ones(3, np.float32), codec="int9")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            peer.all_reduce(np.ones(3, np.float32), weight=weight)
    with pytest.raises(LocalProtocolError):
        peer.all_reduce(np.array([1.0, np.nan], np.float32), group="finite", timeout=5.0)


def test_a_closed_peer_says_so_and_the_others_go_on(trio: list[st.Peer]) -> None:
    fourth = st.Peer.start(ticket=trio[1].ticket, name="fourth")
    assert fourth.id in trio[0].members or fourth.id in trio[1].members
    fourth.close()
    fourth.close()
    with pytest.raises(LocalProtocolError):
        fourth.all_reduce(np.ones(1, np.float32))
    with pytest.raises(LocalProtocolError):
        fourth.dht.get("anything")
    found = reduce_all(trio, [np.ones(2, np.float32)] * 3, [1.0] * 3, group="after")
    assert all(len(reduced.contributors) == 3 for reduced in found)


def test_the_dht_finds_what_others_stored(trio: list[st.Peer]) -> None:
    first, second, third = trio
    first.dht.store("colour", {"name": "green", "number": 1}, 60.0)
    assert third.dht.get("colour") == {"name": "green", "number": 1}
    second.dht.store("colour", "blue", 120.0)
    assert first.dht.get("colour") == "blue", "the latest expiry wins"
    assert first.dht.get_all("colour") == [
        (second.id, "blue"),
        (first.id, {"name": "green", "number": 1}),
    ]
    first.dht.store("colour", "red", 240.0)
    assert third.dht.get_all("colour") == [(first.id, "red"), (second.id, "blue")]
    assert third.dht.get("no such key") is None
    assert third.dht.get_all("no such key") == []
    with pytest.raises(LocalProtocolError):
        first.dht.store("large", "x" * 1100, 60.0)


MEMBER = """
import json, sys, threading, time
import numpy as np
import swarmtrain as st

ticket, rounds = sys.argv[1], int(sys.argv[2])
with st.Peer.start(ticket=ticket) as peer:
    print(json.dumps({"id": peer.id}), flush=True)
    times, roots = [], []
    for line in sys.stdin:
        order = json.loads(line)
        for number in range(order.get("rounds", 1)):
            value = np.full(order["values"], 1.0, np.float32)
            started = time.perf_counter()
            reduced = peer.all_reduce(
                value, group=order["group"], expect=order["expect"], timeout=60.0
            )
            times.append(time.perf_counter() - started)
            roots.append(reduced.root_hash)
        print(json.dumps({"times": times, "roots": roots}), flush=True)
"""


class Member:
    """A peer in a process of its own."""

    def __init__(self, ticket: str) -> None:
        path = ":".join([str(ROOT), *(entry for entry in sys.path if entry)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, ticket, "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment({"PYTHONPATH": path}),
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the member process ended"
        found: dict[str, Any] = msgspec.json.decode(line)
        return found

    def order(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(what) + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def test_a_member_that_breaks_the_protocol_is_named_and_ends_nobody(trio: list[st.Peer]) -> None:
    """What the cores of log and DHT find wrong in what a member says, told to the leader."""
    leads = next(peer for peer in trio if peer._runtime.node.log.is_leader)
    lies = next(peer for peer in trio if peer is not leads)
    victim, liar = leads._runtime, lies._runtime
    term = victim.node.log.term
    soon_s = int(time.time()) + 60
    forged = dm.SignedRecord(b"name", liar.node.me, 1, soon_s, b"\x01", bytes(64))
    # What the victim would have given it for reading the key first.
    token = victim.node.dht.serving.tokens.make(time.time(), liar.node.me, forged.key)
    wrong: list[Message] = [
        dm.StoreReply(1 << 52, "ok"),  # an answer to a request that was never made
        dm.StoreRecord(1, forged, token),
        lm.AppendReply(0, term, ok=True, index=10**6, commit=0, base=0),
    ]
    assert lies._loop is not None
    for message in wrong:
        lies._loop.call_soon_threadsafe(liar.transport.send, victim.node.me, message)

    def told() -> list[tuple[str, str]]:
        return [(r["peer"], r["fault"]) for r in victim.events.query(name="peer_fault")]

    poll_until(lambda: len(told()) >= len(wrong), "the faults are told")
    codes = ("dht_unasked", "bad_signature", "unexpected")
    assert told() == [(lies.id, code) for code in codes]
    assert not victim.failure.done(), "one member's fault is not the end of another"
    found = reduce_all(trio, [np.ones(3, np.float32)] * 3, [1.0] * 3, group="after a lie")
    assert all(reduced.weight == 3.0 for reduced in found)


def test_a_thread_that_breaks_ends_the_member_and_every_call_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda what: None)

    def break_down() -> None:
        raise ZeroDivisionError("a broken invariant")

    with st.Peer.start(name="broken") as peer:
        peer._runtime.transport._pool.submit(break_down)
        poll_until(peer._runtime.failure.done, "the member has ended")
        with pytest.raises(ZeroDivisionError, match="a broken invariant"):
            peer.all_reduce(np.ones(1, np.float32), expect=1, timeout=WAIT_S)


def test_values_that_are_not_numbers_are_refused_by_name_and_the_others_get_their_sum(
    trio: list[st.Peer],
) -> None:
    """A member that serves NaN under a root of its own, past its own checks; it owns no part."""
    with st.Peer.start(ticket=trio[0].ticket, listen="", name="liar") as liar:
        serve_nan(liar, "group/finite sum", expect=4)
        arrays = [np.full(4, value, np.float32) for value in (2.0, 4.0, 6.0)]
        calls = [
            lambda peer=peer, array=array: peer.all_reduce(  # type: ignore[misc]
                array, group="finite sum", expect=4, timeout=WAIT_S
            )
            for peer, array in zip(trio, arrays, strict=True)
        ]
        for reduced in at_once(calls):
            assert reduced.values.tolist() == pytest.approx([4.0] * 4)
            assert liar.id not in reduced.contributors and len(reduced.contributors) == 3
        told = [r for peer in trio for r in peer._runtime.events.query(name="peer_fault")]
        named = [r for r in told if r["fault"] == "invalid_contribution"]
        assert named and {r["peer"] for r in named} == {liar.id}


def serve_nan(liar: st.Peer, channel: str, expect: int) -> None:
    """Have ``liar`` offer f32[4] with a NaN in it."""
    runtime = liar._runtime
    bad = np.array([1.0, np.nan, 2.0, 3.0], np.float32).tobytes()

    def lie() -> None:
        blob = Blob.of([bad])
        runtime.data.register(blob)
        offer = Offer(channel, blob.root, 4, "fp32", 1.0, 0, expect)
        runtime.driver.run(runtime.node.contribute, offer)

    assert liar._loop is not None
    liar._loop.call_soon_threadsafe(lie)


def test_a_peer_killed_in_mid_call_is_left_behind(trio: list[st.Peer]) -> None:
    """Its process dies while its contribution waits; the others get the mean without it."""
    with Member(trio[0].ticket) as member:
        gone = member.hear()["id"]
        member.order(group="deadly", values=2 * CHUNK_VALUES, expect=4)
        waiting = threading.Event()
        waiting.wait(0.3)
        member.kill()
        arrays = [np.full(2 * CHUNK_VALUES, value, np.float32) for value in (1.0, 2.0, 6.0)]
        found = reduce_all(trio, arrays, [1.0] * 3, group="deadly")
    for reduced in found:
        assert gone not in reduced.contributors
        assert reduced.weight == 3.0
        assert np.allclose(reduced.values, 3.0, rtol=1e-6)
    assert len({reduced.root_hash for reduced in found}) == 1


@pytest.mark.slow
def test_four_processes_agree_on_four_bytes_forty_times() -> None:
    """One round after the other; how long one takes is for ``benchmarks/allreduce.py``."""
    with st.Peer.start() as first:
        with Member(first.ticket) as a, Member(first.ticket) as b, Member(first.ticket) as c:
            members = [a, b, c]
            for member in members:
                member.hear()
            for member in members:
                member.order(group="small", values=1, expect=4, rounds=40)
            roots = []
            for _ in range(40):
                value = np.full(1, 1.0, np.float32)
                reduced = first.all_reduce(value, group="small", expect=4, timeout=60.0)
                roots.append(reduced.root_hash)
                assert reduced.values.tolist() == [1.0]
                assert reduced.weight == 4.0
            assert all(member.hear()["roots"] == roots for member in members)
