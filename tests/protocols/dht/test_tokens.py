"""Tokens: who has read a key lately may write there, and nobody else."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.tokens import Tokens
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S

KEY, OTHER = id_bytes(key_id(b"k")), id_bytes(key_id(b"other"))
A, B = b"a" * 32, b"b" * 32
EPOCH_S = limits.DHT_TOKEN_EPOCH_S
BEGIN_S = WALL_S - WALL_S % EPOCH_S


def test_a_token_is_for_one_asker_one_key_one_node_and_one_run() -> None:
    tokens = Tokens(FakeKeyring("n"), RUN)
    token = tokens.make(WALL_S, A, KEY)
    assert 8 <= len(token) <= limits.DHT_TOKEN_BYTES_MAX
    assert tokens.valid(WALL_S, A, KEY, token)
    assert not tokens.valid(WALL_S, B, KEY, token)
    assert not tokens.valid(WALL_S, A, OTHER, token)
    assert not tokens.valid(WALL_S, A, KEY, b"")
    assert not tokens.valid(WALL_S, A, KEY, token[:-1])
    assert not Tokens(FakeKeyring("m"), RUN).valid(WALL_S, A, KEY, token)
    assert not Tokens(FakeKeyring("n"), bytes(32)).valid(WALL_S, A, KEY, token)


def test_a_token_lives_for_one_to_two_epochs_and_through_a_restart() -> None:
    tokens = Tokens(FakeKeyring("n"), RUN)
    late = tokens.make(BEGIN_S + EPOCH_S - 1, A, KEY)
    assert Tokens(FakeKeyring("n"), RUN).valid(BEGIN_S + EPOCH_S, A, KEY, late)
    assert tokens.valid(BEGIN_S + 2 * EPOCH_S - 1, A, KEY, late)
    assert not tokens.valid(BEGIN_S + 2 * EPOCH_S, A, KEY, late)
    for number in range(50):
        tokens.make(BEGIN_S + number * EPOCH_S, A, KEY)
    assert len(tokens._secrets) <= 2
