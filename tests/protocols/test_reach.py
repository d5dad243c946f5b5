"""The reachability check: what is asked, what counts, and whom nobody can have dialled."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgpack
import pytest

from swarmtrain_protocols import limits, relay
from swarmtrain_protocols.core import Effect, PeerId, Send
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import MESSAGES, decode, encode
from swarmtrain_protocols.messages.reach import DialBack, DialBackRequest
from swarmtrain_protocols.reach import PREFACE, KnockAt, Reach, Verdict

VECTORS = Path(__file__).resolve().parents[2] / "protocols" / "vectors"
HEX = ("knock", "answer", "target", "token", "source")

A, B, C, D = (PeerId(bytes([n]) * 32) for n in range(1, 5))
HOME = "44.9.9.9"
CLAIM = "192.168.1.2:4000"
"""Behind a router."""
WHERE = {A: "44.1.0.1:4000", B: "44.2.0.1:4000", C: "44.2.0.2:4000", D: "44.4.0.1:4000"}
SECRET = b"k" * 16, b"a" * 16


def make() -> Reach:
    return Reach(random.Random(1).randbytes)


def asked(core: Reach) -> dict[PeerId, DialBackRequest]:
    found: list[Effect] = core.drain()
    return {
        e.peer: e.message
        for e in found
        if isinstance(e, Send) and isinstance(e.message, DialBackRequest)
    }


def answer(core: Reach, now: float, peer: PeerId, wish: DialBackRequest, *, is_open: bool) -> None:
    """As an honest responder does."""
    if is_open:
        assert core.knocked(wish.knock) == wish.answer
    reply = DialBack(wish.request, HOME, wish.ports if is_open else ())
    core.receive(now, peer, reply)


def checked(*answers: tuple[PeerId, bool]) -> Reach:
    core = make()
    core.listen(0.0, (CLAIM,))
    for peer, is_open in answers:
        core.connected(0.0, peer, WHERE[peer], True)
        answer(core, 0.1, peer, asked(core)[peer], is_open=is_open)
    return core


def test_two_of_two_others_make_it_reachable_or_not() -> None:
    yes = checked((A, True), (B, True)).verdict
    assert yes == Verdict("reachable", 2, 2, HOME, 4000)
    assert yes.confidence == "2 of 2"
    assert checked((A, False), (B, False)).verdict == Verdict("outgoing only", 2, 2, HOME, 0)
    assert checked((A, True), (B, False)).verdict.state == "unknown"
    assert checked((A, False), (B, True), (D, False)).verdict == Verdict(
        "outgoing only", 2, 3, HOME, 0
    )


def test_a_second_voter_of_one_subnet_has_no_say() -> None:
    core = checked((B, False))
    core.connected(0.2, C, WHERE[C], True)
    assert not asked(core)
    core.connected(0.2, A, WHERE[A], True)
    assert list(asked(core)) == [A]


def test_those_who_sit_beside_it_count_only_as_long_as_nobody_sees_it_from_outside() -> None:
    core = make()
    core.listen(0.0, (CLAIM,))
    for peer, address in ((A, "192.168.1.5:7"), (B, "192.168.1.6:7")):
        core.connected(0.0, peer, address, True)
        wish = asked(core)[peer]
        core.knocked(wish.knock)
        core.receive(0.1, peer, DialBack(wish.request, "192.168.1.2", (4000,)))
    assert core.verdict.state == "reachable"
    core.connected(1.0, D, WHERE[D], True)
    answer(core, 1.1, D, asked(core)[D], is_open=False)
    assert (core.verdict.state, core.verdict.asked) == ("outgoing only", 1)


def test_without_a_port_it_makes_outgoing_links_only() -> None:
    core = make()
    core.listen(0.0, ())
    core.connected(0.0, A, WHERE[A], True)
    assert not asked(core)
    assert core.verdict == Verdict("outgoing only")
    core.listen(2.0, (CLAIM,))
    assert list(asked(core)) == [A] and core.verdict.state == "unknown"
    core.listen(3.0, ())
    assert core.verdict.state == "outgoing only"


def test_whoever_got_through_is_a_proof() -> None:
    core = make()
    core.listen(0.0, (CLAIM,))
    core.connected(0.0, A, "44.1.0.1:50123", False)
    assert core.verdict == Verdict("reachable", 1, 1)


def test_open_without_a_knock_and_closed_with_one_count_for_nothing() -> None:
    core = make()
    core.listen(0.0, (CLAIM,))
    core.connected(0.0, A, WHERE[A], True)
    wish = asked(core)[A]
    core.receive(0.1, A, DialBack(wish.request, HOME, (4000,)))
    assert core.verdict.state == "unknown"
    core.connected(0.2, B, WHERE[B], True)
    wish = asked(core)[B]
    core.knocked(wish.knock)
    core.receive(0.3, B, DialBack(wish.request, HOME, ()))
    assert core.verdict.state == "unknown"


def test_a_new_address_makes_old_votes_void() -> None:
    core = checked((A, True), (B, True))
    core.disconnected(50.0, D)
    core.connected(100.0, D, WHERE[D], True)
    wish = asked(core)[D]
    core.receive(100.1, D, DialBack(wish.request, "44.77.0.1", ()))
    assert core.verdict == Verdict("outgoing only", 1, 1, "44.77.0.1", 0)
    core.tick(200.0)
    assert set(asked(core)) == {A, B}, "the others are asked about the new address"


def test_the_check_is_repeated() -> None:
    core = checked((A, True), (B, True))
    later = limits.DIAL_BACK_AGAIN_S + 1.0
    assert core.deadline() < later
    core.tick(later)
    wishes = asked(core)
    assert set(wishes) == {A, B}
    for peer, wish in wishes.items():
        answer(core, later + 0.1, peer, wish, is_open=False)
    assert core.verdict.state == "outgoing only"


@pytest.mark.parametrize(
    ("claims", "counts"),
    [
        (("192.168.1.2:4000",), True),
        ((f"{HOME}:4000",), True),
        (("44.9.9.8:4000",), False),
        (("swarm.example.org:4000",), False),
    ],
)
def test_a_closed_port_says_nothing_of_a_listener_elsewhere(
    claims: tuple[str, ...], counts: bool
) -> None:
    """A machine may dial out from another address than the one that it tells others."""
    core = make()
    core.listen(0.0, claims)
    core.connected(0.0, A, WHERE[A], True)
    answer(core, 0.1, A, asked(core)[A], is_open=False)
    assert core.verdict.state == ("outgoing only" if counts else "unknown")


def test_a_silent_responder_is_given_up() -> None:
    core = make()
    core.listen(0.0, (CLAIM,))
    core.connected(0.0, A, WHERE[A], True)
    first = asked(core)[A]
    core.tick(limits.DIAL_BACK_REPLY_S)
    assert not asked(core)
    core.receive(limits.DIAL_BACK_REPLY_S + 1, A, DialBack(first.request, HOME, ()))
    assert core.verdict.state == "unknown", "a late answer counts for nothing"
    assert core.knocked(first.knock) is None
    core.tick(core.deadline())
    assert list(asked(core)) == [A]


@pytest.mark.parametrize(
    "reply",
    [DialBack(1, "not an address", ()), DialBack(1, HOME, (5,)), DialBack(1, "example.org", ())],
)
def test_answers_that_cannot_be_are_malformed(reply: DialBack) -> None:
    core = make()
    core.listen(0.0, (CLAIM,))
    core.connected(0.0, A, WHERE[A], True)
    assert asked(core)[A].request == 1
    with pytest.raises(PeerFault) as caught:
        core.receive(0.1, A, reply)
    assert (caught.value.code, caught.value.peer) == ("malformed", A)
    assert core.verdict.state == "unknown"


# -- serving -----------------------------------------------------------------------------------


def test_a_responder_dials_the_link_of_the_asker_and_nothing_else() -> None:
    """No message holds a host: whoever asks can only have itself dialled."""
    core = make()
    core.connected(0.0, A, "44.9.9.9:50000", False)
    core.drain()
    core.receive(0.1, A, DialBackRequest(7, (4000,), *SECRET))
    assert core.drain() == [KnockAt(1, A, (4000,), *SECRET)]
    core.dialled(0.2, 1, (4000,))
    assert core.drain() == [Send(A, DialBack(7, "44.9.9.9", (4000,)))]
    fields = set(DialBackRequest.__struct_fields__)
    assert fields == {"request", "ports", "knock", "answer"}


def test_strangers_and_relayed_askers_have_nobody_dialled() -> None:
    core = make()
    core.receive(0.1, A, DialBackRequest(7, (4000,), *SECRET))
    assert core.drain() == [Send(A, DialBack(7, "", (), "unknown"))]


def test_questions_are_limited_per_asker_and_in_all() -> None:
    core = make()
    core.connected(0.0, A, "44.9.9.9:50000", False)
    core.drain()
    codes: list[str] = []
    for number in range(20):
        core.receive(0.1, A, DialBackRequest(number, (4000,), *SECRET))
        for effect in core.drain():
            if isinstance(effect, KnockAt):
                codes.append("dial")
                core.dialled(0.1, effect.ticket, ())
                core.drain()
            else:
                assert isinstance(effect, Send) and isinstance(effect.message, DialBack)
                codes.append(effect.message.code)
    assert codes.count("dial") == limits.DIAL_BACK_BURST
    assert codes.count("busy") == 20 - limits.DIAL_BACK_BURST
    many = [PeerId(bytes([n]) * 32) for n in range(10, 40)]
    for peer in many:
        core.connected(0.2, peer, "44.9.9.9:50000", False)
        core.receive(0.2, peer, DialBackRequest(1, (4000,), *SECRET))
    knocks = [e for e in core.drain() if isinstance(e, KnockAt)]
    assert len(knocks) == limits.DIAL_BACK_IN_FLIGHT_MAX


def test_the_vectors() -> None:
    """``reach.json``, decoded with another MessagePack package."""
    vectors = json.loads((VECTORS / "reach.json").read_text(encoding="utf-8"))
    classes = {cls.__struct_config__.tag: cls for cls in MESSAGES}
    for case in vectors["messages"]:
        fields = {
            name: bytes.fromhex(value) if name in HEX else value
            for name, value in case["fields"].items()
        }
        data = bytes.fromhex(case["bytes"])
        assert msgpack.unpackb(data) == {"type": case["tag"], **fields}
        plain = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        assert encode(classes[case["tag"]](**plain)) == data
        assert decode(data) == classes[case["tag"]](**plain)
    knock, stream = vectors["knock"], vectors["stream"]
    assert (PREFACE + bytes.fromhex(knock["knock"])).hex() == knock["responder_sends"]
    assert (relay.PREFACE + bytes.fromhex(stream["token"])).hex() == stream["member_sends"]
