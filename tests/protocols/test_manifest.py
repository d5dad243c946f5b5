"""Run keys, the manifest's hash, and the genesis signature."""

from __future__ import annotations

import math
from typing import Any

import msgpack  # the independent implementation; the product uses msgspec
import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import codecs, limits
from swarmtrain_protocols.errors import (
    ConfigError,
    PeerFault,
    RunMismatch,
    SwarmError,
    VersionMismatch,
)
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import (
    CODECS,
    Manifest,
    RunKeys,
    check_genesis,
    check_run_keys,
    check_stages,
    make_genesis,
    make_manifest,
    parse_manifest,
    run_keys_from_mapping,
)

FOUNDER = Ed25519Keyring(b"\x01" * 32)
NONCE = bytes(range(16))


def manifest(**keys: object) -> Manifest:
    return make_manifest(run_keys_from_mapping(keys), FOUNDER.peer_id, NONCE)


def test_canonical_bytes_agree_with_an_independent_encoder() -> None:
    made = manifest(model={"layers": 2, "d_model": 64, "heads": 4}, outer_lr=1)
    fields = {
        "protocol": 1,
        "keys": {name: getattr(made.keys, name) for name in RunKeys.__struct_fields__},
        "founder": FOUNDER.peer_id,
        "nonce": NONCE,
    }
    fields["keys"]["model"] = dict(sorted(made.keys.model.items()))
    assert made.to_bytes() == msgpack.packb(fields, use_bin_type=True)
    assert made.run_id == blake3(made.to_bytes()).digest()
    assert len(made.run_id) == 32


def test_the_run_id_does_not_depend_on_how_the_keys_were_written() -> None:
    one = manifest(model={"layers": 2, "heads": 4}, outer_lr=1, inner_lr=3e-3)
    two = manifest(inner_lr="0.003", outer_lr=1.0, model={"heads": 4, "layers": 2})
    assert one.run_id == two.run_id
    direct = Manifest(
        keys=RunKeys(model={"heads": 4, "layers": 2}, outer_lr=1),
        founder=FOUNDER.peer_id,
        nonce=NONCE,
    )
    assert direct.run_id == one.run_id


def test_every_key_is_in_the_run_id() -> None:
    other: dict[str, object] = {
        "name": "b", "seed": 1, "preset": "p", "model": {"x": 1}, "corpus": "path:x",
        "corpus_hash": "ab" * 32, "shards": 64, "batch_size": 5, "inner_steps": 21, "inner_lr": 0.1,
        "inner_weight_decay": 0.2, "inner_clip": 2.0, "inner_warmup_steps": 1, "total_steps": 9,
        "inner_optimizer": "sgd", "outer_lr": 0.7, "outer_momentum": 0.9, "overlap": "eager",
        "codec_scatter": "bf16", "codec_gather": "fp32", "fragments": 2, "delay": 3, "mix": 0.1,
        "max_rounds": 5, "checkpoint_every_rounds": 3, "min_peers": 2, "start_peers": 3,
        "grace_s": 1.0, "round_timeout_s": 2.0, "max_base_age_rounds": 1,
        "max_extra_steps_factor": 1.0, "stages": 4, "micro_batches": 8, "pipeline_mode": "diloco",
        "boundary_codec": "fp32", "replicas_min": 3, "ends_replicas": 4, "close_fraction": 1.0,
        "swapped": True, "skip_fraction": 0.1, "generate_share": 0.2,
        "stewards": 5,
    }  # fmt: skip
    assert tuple(other) == RunKeys.__struct_fields__
    ids = {manifest(**{key: value}).run_id for key, value in other.items()}
    assert len(ids | {manifest().run_id}) == len(other) + 1


def test_round_trip_and_mismatch() -> None:
    made = manifest(corpus_hash="00" * 32)
    data = made.to_bytes()
    assert parse_manifest(data, made.run_id) == made
    with pytest.raises(RunMismatch, match="its hash is"):
        parse_manifest(data, bytes(32))
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with pytest.raises(RunMismatch):
            parse_manifest(bytes(flipped), made.run_id)
    with pytest.raises(RunMismatch, match="longer than"):
        parse_manifest(bytes(limits.MANIFEST_BYTES_MAX + 1), made.run_id)


def test_a_manifest_that_hashes_right_but_says_wrong_things_is_refused() -> None:
    raw = msgspec.msgpack.decode(manifest().to_bytes())

    def check(error: type[SwarmError], match: str, changed: dict[str, object]) -> None:
        data = msgspec.msgpack.encode(changed)
        with pytest.raises(error, match=match):
            parse_manifest(data, blake3(data).digest())

    check(VersionMismatch, "protocol 2", {**raw, "protocol": 2, "future": True})
    check(RunMismatch, "unknown field", {**raw, "future": True})
    check(RunMismatch, "unknown field", {**raw, "keys": {**raw["keys"], "future": 1}})
    check(RunMismatch, "batch_size", {**raw, "keys": {**raw["keys"], "batch_size": 0}})
    check(RunMismatch, "canonical", {**raw, "keys": {**raw["keys"], "inner_lr": 1}})
    check(RunMismatch, "canonical", dict(reversed(raw.items())))
    check(RunMismatch, "nonce", {**raw, "nonce": b"short"})


@given(st.binary(max_size=200))
def test_any_bytes_with_their_own_hash_give_a_typed_error(data: bytes) -> None:
    with pytest.raises((RunMismatch, VersionMismatch)):
        parse_manifest(data, blake3(data).digest())


def test_unknown_keys_get_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        run_keys_from_mapping({"inner_step": 3})
    assert "inner_step" in caught.value.what
    assert caught.value.todo == "did you mean inner_steps?"
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError) as caught:
        run_keys_from_mapping({"zzzz": 3})
    assert "known keys: name, seed" in caught.value.todo


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("overlap", "egaer", "auto, off, delayed, eager"),
        ("codec_scatter", "int3", "int8"),
        ("codec_gather", "", "int8"),
        ("inner_optimizer", "muon", "adamw"),
        ("batch_size", 0, "1 to"),
        ("batch_size", True, "1 to"),
        ("batch_size", "four", "1 to"),
        ("batch_size", 1.5, "1 to"),
        ("inner_lr", math.nan, "0 to"),
        ("inner_lr", math.inf, "0 to"),
        ("outer_lr", 0.0, "auto"),
        ("outer_momentum", 1.0, "excluded"),
        ("corpus_hash", "abc", "32 bytes"),
        ("corpus_hash", "ab", "32 bytes"),
        ("model", {"layers": -1}, "sizes"),
        ("model", {"layers": "two"}, "sizes"),
        ("name", "a\nb", "printable"),
        ("seed", 1 << 60, "0 to"),
        ("fragments", 0, "1 to"),
        ("mix", 1.1, "0 to 1"),
        ("stages", -1, "0 to 128"),
        ("stages", 129, "0 to 128"),
        ("micro_batches", 0, "1 to 4096"),
        ("pipeline_mode", "async", "sync, diloco"),
        ("boundary_codec", "int2", "int8"),
        ("replicas_min", 0, "1 to"),
        ("ends_replicas", 0, "1 to"),
        ("close_fraction", 0.0, "more than 0, at most 1"),
        ("swapped", 1, "true, false"),
        ("swapped", "perhaps", "true, false"),
        ("skip_fraction", 0.6, "0 to 0.5"),
        ("generate_share", 1.0, "0 to 0.9"),
        ("stewards", 2, "1, 3, 5, 7"),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    for build in (lambda: run_keys_from_mapping({key: value}), lambda: RunKeys(**{key: value})):
        with pytest.raises(ConfigError) as caught:
            build()
        assert key in caught.value.what
        assert allowed in caught.value.todo


def test_keys_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="inner_steps = 20"):
        RunKeys(delay=20)
    with pytest.raises(ConfigError, match="inner_lr"):
        RunKeys(inner_lr=0.0)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"stages": 4, "fragments": 2}, "one channel per stage"),
        ({"stages": 4, "delay": 3}, "no streaming"),
        ({"stages": 3, "swapped": True}, "four stages"),
        ({"stages": 1, "skip_fraction": 0.1}, "nothing left"),
        ({"stages": 2, "replicas_min": 3, "ends_replicas": 2}, "replicas_min = 3"),
    ],
)
def test_keys_that_exclude_each_other_in_a_pipeline(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RunKeys(**fields)
    RunKeys(**{**fields, "stages": 0})  # without a pipeline they mean nothing


def test_a_model_is_cut_into_equal_stages() -> None:
    assert [check_stages(stages, 12) for stages in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    for stages, layers in ((5, 12), (13, 12), (24, 12), (0, 12), (1, 0)):
        with pytest.raises(ConfigError, match=f"stages = {stages}"):
            check_stages(stages, layers)


def test_what_people_write() -> None:
    keys = run_keys_from_mapping(
        {"outer_lr": "auto", "grace_s": "auto", "inner_steps": "7", "corpus_hash": "ff" * 32}
    )
    assert (keys.outer_lr, keys.grace_s, keys.inner_steps) == (None, 0.0, 7)
    assert keys.corpus_hash == b"\xff" * 32
    assert run_keys_from_mapping({}) == RunKeys()
    assert run_keys_from_mapping({"swapped": "true"}).swapped is True
    assert run_keys_from_mapping({"swapped": "0"}).swapped is False


def test_a_joiner_that_asks_for_other_keys_is_told_which() -> None:
    keys = RunKeys()
    check_run_keys(keys, {"inner_steps": 20, "outer_lr": "auto"})
    with pytest.raises(ConfigError, match="this run has inner_steps = 20"):
        check_run_keys(keys, {"inner_steps": 21})
    with pytest.raises(ConfigError, match="unknown"):
        check_run_keys(keys, {"steps": 21})


def test_too_long_a_manifest_is_refused_where_it_is_made() -> None:
    # The bounds of the keys keep every manifest far below the limit of a message.
    keys = RunKeys(
        model={f"{i:02}".ljust(limits.NAME_CHARS_MAX, "m"): (1 << 53) for i in range(64)},
        corpus="ü" * 256,
    )
    assert len(make_manifest(keys, FOUNDER.peer_id, NONCE).to_bytes()) < limits.MANIFEST_BYTES_MAX


def test_genesis() -> None:
    run = manifest().run_id
    steward = Ed25519Keyring(b"\x02" * 32)
    genesis = make_genesis(FOUNDER, run, steward.peer_id)
    check_genesis(genesis, run=run, founder=FOUNDER.peer_id)
    replace = msgspec.structs.replace
    bad = {
        "another run": replace(genesis, run=bytes(32)),
        "another founder": make_genesis(steward, run, steward.peer_id),
        "did not sign": replace(genesis, steward=FOUNDER.peer_id),
    }
    for why, forged in bad.items():
        with pytest.raises(PeerFault, match=why) as caught:
            check_genesis(forged, run=run, founder=FOUNDER.peer_id)
        assert caught.value.code == "bad_genesis"
    stranger = replace(make_genesis(steward, run, steward.peer_id), founder=FOUNDER.peer_id)
    with pytest.raises(PeerFault, match="did not sign"):
        check_genesis(stranger, run=run, founder=FOUNDER.peer_id)


def test_the_codecs_a_run_may_name_are_those_that_exist() -> None:
    assert CODECS == codecs.CODEC_NAMES
    with pytest.raises(ConfigError, match="codec_scatter"):
        RunKeys(codec_scatter="int4")
