"""Capabilities and ticket URLs."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.errors import ConfigError, NotAuthorised
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.tickets import Capability, Ticket, parse_capability, sign_capability

FOUNDER = Ed25519Keyring(b"\x01" * 32)
OTHER = Ed25519Keyring(b"\x02" * 32)
RUN = bytes(range(32))
SEED = Capability(id=b"12345678", run=RUN, role="seed", vote=True, expires_s=1_000, uses=3)
SIGNED = sign_capability(FOUNDER, SEED)


def refusal(data: bytes, **changed: object) -> str:
    arguments: dict[str, object] = {"founder": FOUNDER.peer_id, "run": RUN, "wall_s": 999.9}
    with pytest.raises(NotAuthorised) as caught:
        parse_capability(data, **{**arguments, **changed})  # type: ignore[arg-type]
    assert caught.value.exit_code == 6
    assert caught.value.todo
    return caught.value.why


def test_a_capability_says_what_the_founder_signed() -> None:
    assert parse_capability(SIGNED, founder=FOUNDER.peer_id, run=RUN, wall_s=999.9) == SEED
    for_ever = sign_capability(FOUNDER, Capability(id=b"12345678", run=RUN))
    assert parse_capability(for_ever, founder=FOUNDER.peer_id, run=RUN, wall_s=9e9).uses == 0


def test_why_a_capability_is_refused() -> None:
    assert "expired 0 s" in refusal(SIGNED, wall_s=1_000.0)
    assert "wrong run" in refusal(SIGNED, run=bytes(32))
    assert "bad signature" in refusal(SIGNED, founder=OTHER.peer_id)
    assert "bad signature" in refusal(sign_capability(OTHER, SEED))
    assert "malformed" in refusal(SIGNED[:-1])
    assert "malformed" in refusal(b"")
    assert "malformed" in refusal(SIGNED + b"\xc0")
    assert "malformed" in refusal(bytes(10_000))


def test_no_flipped_bit_is_accepted() -> None:
    for position in range(len(SIGNED)):
        flipped = bytearray(SIGNED)
        flipped[position] ^= 1
        why = refusal(bytes(flipped))
        assert "malformed" in why or "bad signature" in why


@given(st.binary(max_size=600))
def test_any_bytes_give_a_typed_refusal(data: bytes) -> None:
    assert refusal(data)


def test_a_signature_for_another_domain_does_not_count() -> None:
    payload, _ = msgspec.msgpack.decode(SIGNED)
    forged = msgspec.msgpack.encode([payload, FOUNDER.sign(b"genesis", payload)])
    assert "bad signature" in refusal(forged)


def test_nonsense_is_not_signed() -> None:
    with pytest.raises(msgspec.ValidationError):
        sign_capability(FOUNDER, Capability(id=b"short", run=RUN))
    with pytest.raises(msgspec.ValidationError):
        king = Capability(id=b"12345678", run=RUN, role="king")  # type: ignore[arg-type]
        sign_capability(FOUNDER, king)


def test_a_ticket_survives_copying() -> None:
    ticket = Ticket(("198.51.100.7:4242", "[2001:db8::1]:99", "seed.example:1"), RUN, SIGNED)
    text = str(ticket)
    assert text.startswith("swarm://198.51.100.7:4242,[2001:db8::1]:99,seed.example:1/00010203")
    assert Ticket.parse(f"  {text}\n") == ticket
    assert ticket.unverified == SEED
    assert len(text) < 400


def test_the_secret_is_in_no_repr_and_in_no_error() -> None:
    ticket = Ticket(("h:1",), RUN, SIGNED)
    secret = str(ticket).partition("#")[2]
    assert secret not in repr(ticket)
    assert SIGNED.hex() not in repr(ticket)
    assert "***" in repr(ticket)
    for broken in (
        f"swarm://h:1/{'0' * 64}#{secret}",
        f"swarm://h/{RUN.hex()}#{secret}",
        f"swarm://h:{secret[:60]}/{RUN.hex()}#{secret}",  # pasted into the wrong place
    ):
        with pytest.raises(ConfigError) as caught:
            Ticket.parse(broken)
        assert secret[8:40] not in f"{caught.value} {caught.value.todo}"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.replace("swarm://", "http://"), "begin with swarm://"),
        (lambda t: t.partition("#")[0], "missing"),
        (lambda t: t.partition("#")[0] + "#", "missing"),
        (lambda t: t[:-9], "cut short"),
        (lambda t: t + "!", "characters"),
        (lambda t: t.replace("h:1", "h"), "no port"),
        (lambda t: t.replace("h:1", "h:0"), "1 to 65535"),
        (lambda t: t.replace("h:1", ""), "no port"),
        (lambda t: t.replace("h:1", "::1:5"), "brackets"),
        (lambda t: t.replace("h:1", ",".join(["h:1"] * 9)), "1 to 8 addresses"),
        (lambda t: t.replace(RUN.hex(), RUN.hex()[:-2]), "64 hex digits"),
        (lambda t: t.replace(RUN.hex(), "ff" * 32), "another run"),
        (lambda t: t.replace("swarm://", "swarm://" + "h:1," * 2000), "longer than"),
        (lambda t: "", "begin with"),
    ],
)
def test_malformed_tickets_say_what_is_wrong(change: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        Ticket.parse(change(str(Ticket(("h:1",), RUN, SIGNED))))  # type: ignore[operator]
    assert caught.value.exit_code == 3
    assert "swarm://host:port" in caught.value.todo


@given(st.text(max_size=300))
def test_any_text_gives_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Ticket.parse("swarm://" + text)


def test_what_is_too_long_is_refused_before_it_is_copied() -> None:
    """Found by fuzzing: white space around 34 kB of it was stripped first."""
    text = f" swarm://{chr(0xDC80) * 34_000} "  # two bytes a character
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="longer than"):
            Ticket.parse(text)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000
