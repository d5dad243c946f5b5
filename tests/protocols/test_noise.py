"""Noise XX against its vectors and against an independent implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.noise import SUITES, CipherState, NoiseXX, Suite, hkdf, public_key

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "noise_xx.json"


def _vectors() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(VECTORS.read_text())["vectors"]
    return loaded


def _suite(vector: dict[str, Any]) -> Suite:
    suite = vector["protocol_name"].split("_")[3]
    assert suite in SUITES
    return "AESGCM" if suite == "AESGCM" else "ChaChaPoly"


def _side(vector: dict[str, Any], who: str) -> NoiseXX:
    return NoiseXX(
        initiator=who == "init",
        static_key=bytes.fromhex(vector[f"{who}_static"]),
        ephemeral_key=bytes.fromhex(vector[f"{who}_ephemeral"]),
        prologue=bytes.fromhex(vector[f"{who}_prologue"]),
        suite=_suite(vector),
    )


def check_vector(vector: dict[str, Any]) -> None:
    """Both our sides give exactly the vector's bytes; the transport keys alternate after it."""
    init, resp = _side(vector, "init"), _side(vector, "resp")
    ciphers: dict[str, tuple[CipherState, CipherState]] = {}
    for i, message in enumerate(vector["messages"]):
        payload, sealed = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
        writer, reader = (init, resp) if i % 2 == 0 else (resp, init)
        if i < 3:
            assert writer.write(payload) == sealed
            assert reader.read(sealed) == payload
        else:
            ciphers = ciphers or {"init": init.split(), "resp": resp.split()}
            from_, to = ("init", "resp") if i % 2 == 0 else ("resp", "init")
            assert ciphers[from_][0].encrypt(payload) == sealed
            assert ciphers[to][1].decrypt(sealed) == payload
    assert init.handshake_hash == resp.handshake_hash == bytes.fromhex(vector["handshake_hash"])


def oracle(vector: dict[str, Any]) -> tuple[list[str], str]:
    """The same conversation by the noiseprotocol package: ciphertexts and handshake hash, hex."""
    sides = {}
    for who in ("init", "resp"):
        side = NoiseConnection.from_name(vector["protocol_name"].encode())
        (side.set_as_initiator if who == "init" else side.set_as_responder)()
        side.set_prologue(bytes.fromhex(vector[f"{who}_prologue"]))
        side.set_keypair_from_private_bytes(Keypair.STATIC, bytes.fromhex(vector[f"{who}_static"]))
        side.set_keypair_from_private_bytes(
            Keypair.EPHEMERAL, bytes.fromhex(vector[f"{who}_ephemeral"])
        )
        side.start_handshake()
        sides[who] = side
    out: list[str] = []
    hash_ = ""
    for i, message in enumerate(vector["messages"]):
        writer, reader = ("init", "resp") if i % 2 == 0 else ("resp", "init")
        payload = bytes.fromhex(message["payload"])
        if i < 3:
            sealed = bytes(sides[writer].write_message(payload))
            assert sides[reader].read_message(sealed) == payload
            if i == 2:
                hash_ = sides["init"].get_handshake_hash().hex()
        else:
            sealed = bytes(sides[writer].encrypt(payload))
            assert sides[reader].decrypt(sealed) == payload
        out.append(sealed.hex())
    return out, hash_


@pytest.mark.parametrize("vector", _vectors(), ids=lambda v: f"{v['protocol_name']}-{v['comment']}")
def test_vectors(vector: dict[str, Any]) -> None:
    check_vector(vector)


@pytest.mark.parametrize("vector", _vectors(), ids=lambda v: f"{v['protocol_name']}-{v['comment']}")
def test_vectors_agree_with_an_independent_implementation(vector: dict[str, Any]) -> None:
    ciphertexts, handshake_hash = oracle(vector)
    assert ciphertexts == [m["ciphertext"] for m in vector["messages"]]
    assert handshake_hash == vector["handshake_hash"]


def _pair(suite: Suite = "AESGCM", prologue: tuple[bytes, bytes] = (b"", b"")) -> list[NoiseXX]:
    return [
        NoiseXX(
            initiator=first,
            static_key=bytes([1 + i]) * 32,
            ephemeral_key=bytes([3 + i]) * 32,
            prologue=prologue[i],
            suite=suite,
        )
        for i, first in enumerate((True, False))
    ]


def _complete(a: NoiseXX, b: NoiseXX) -> None:
    for payload in (b"one", b"two", b"three"):
        writer, reader = (a, b) if a.our_turn else (b, a)
        assert reader.read(writer.write(payload)) == payload


@pytest.mark.parametrize("suite", SUITES)
def test_both_sides_learn_the_static_keys_and_share_a_secret(suite: Suite) -> None:
    a, b = _pair(suite)
    _complete(a, b)
    assert a.remote_static == public_key(b"\2" * 32)
    assert b.remote_static == public_key(b"\1" * 32)
    assert a.export(b"bulk") == b.export(b"bulk") != a.export(b"other")
    assert a.export(b"bulk") not in (hkdf(a._symmetric.chaining_key, b"", 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.data())
def test_a_flipped_bit_in_the_handshake_never_completes(turn: int, data: st.DataObject) -> None:
    a, b = _pair()
    faults = 0
    for i in range(3):
        writer, reader = (a, b) if i % 2 == 0 else (b, a)
        message = bytearray(writer.write(b"payload"))
        if i == turn:
            bit = data.draw(st.integers(0, len(message) * 8 - 1))
            message[bit // 8] ^= 1 << bit % 8
        try:
            reader.read(bytes(message))
        except PeerFault as fault:
            assert fault.code == "tampered"
            faults += 1
            break
    # The first message is clear: a flip there shows in the second at the latest. X25519 ignores
    # the top bit of a public key, the transcript hash does not.
    assert faults == 1


@pytest.mark.parametrize("nbytes", [0, 1, 31])
def test_short_messages(nbytes: int) -> None:
    _, b = _pair()
    with pytest.raises(PeerFault, match="malformed"):
        b.read(b"x" * nbytes)


@pytest.mark.parametrize("nbytes", [31, 32, 79, 80, 95])
def test_short_second_message(nbytes: int) -> None:
    a, b = _pair()
    b.read(a.write())
    with pytest.raises(PeerFault):
        a.read(b.write()[:nbytes])


def test_small_order_key_is_refused() -> None:
    _, b = _pair()
    b.read(b"\0" * 32)
    with pytest.raises(PeerFault, match="tampered"):
        b.write()


def test_different_prologues_do_not_meet() -> None:
    a, b = _pair(prologue=(b"a", b"b"))
    b.read(a.write())
    with pytest.raises(PeerFault, match="tampered"):
        a.read(b.write())


def test_replay_reorder_and_truncation_do_not_decrypt() -> None:
    a, b = _pair()
    _complete(a, b)
    (send, _), (_, receive) = a.split(), b.split()
    first, second = send.encrypt(b"1"), send.encrypt(b"2")
    for wrong in (second, first[:-1], b"", first + b"x"):
        with pytest.raises(PeerFault, match="tampered"):
            receive.decrypt(wrong)
    assert receive.decrypt(first) == b"1"
    with pytest.raises(PeerFault, match="tampered"):
        receive.decrypt(first)
    assert receive.decrypt(second) == b"2"


def test_misuse_raises() -> None:
    a, b = _pair()
    for call in (b.write, lambda: a.read(b""), a.split, lambda: a.export(b"x")):
        with pytest.raises(LocalProtocolError):
            call()
