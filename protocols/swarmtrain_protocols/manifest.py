"""What a run is: its keys, its founder, and the hash that names it (spec 05).

The manifest holds every key that must be equal on every peer, the founder's public key and a nonce.
``run id = BLAKE3(canonical MessagePack)``: whoever knows the run id can check a manifest that a
stranger handed over. Capabilities and tickets are in ``tickets.py`` and re-exported here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from blake3 import blake3
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import Genesis
from swarmtrain_protocols.errors import ConfigError, PeerFault, RunMismatch, VersionMismatch
from swarmtrain_protocols.identity import Keyring, verify_ed25519
from swarmtrain_protocols.tickets import (
    Capability,
    Ticket,
    parse_capability,
    sign_capability,
)

PROTOCOL_VERSION = 1
OVERLAPS = ("auto", "off", "delayed", "eager")
CODECS = ("fp32", "bf16", "int8")
"""Those that exist; the same as ``codecs.CODEC_NAMES``, which a test compares."""
INNER_OPTIMIZERS = ("adamw", "sgd")
PIPELINE_MODES = ("sync", "diloco")
BOUNDARY_CODECS = ("fp32", "bf16", "int8", "fp8", "subspace")
STAGES_MAX = limits.HOPS_MAX - 2
SWAPPED_STAGES_MIN = 4

Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""``Keyring.verify``: (peer, domain, payload, signature) -> covered."""

_COUNT_MAX = 1 << 53


class RunKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys that must be equal on every peer. 0 and None mean "auto" or "none" as stated.

    Raises:
        ConfigError: on construction, naming the key and the allowed values.
    """

    name: str = "tiny-lm"
    seed: int = 1234
    preset: str = "lm-tiny"
    model: dict[str, int] = msgspec.field(default_factory=dict)
    """Sizes that differ from the preset's: d_model, layers, heads, context, …"""
    corpus: str = "stdlib"
    """``stdlib`` or ``path:…``."""
    corpus_hash: bytes = b""
    """What ``corpus.Descriptor.hash`` says (32 bytes); empty pins nothing."""
    shards: int = 0
    """Shards that an epoch of the data is dealt in (spec 13); 0: windows drawn without end."""
    batch_size: int = 4
    inner_steps: int = 20
    inner_lr: float = 3e-3
    inner_weight_decay: float = 0.1
    inner_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    inner_warmup_steps: int = 50
    total_steps: int = 0
    """Inner steps over which the inner schedule decays; 0: no decay."""
    inner_optimizer: str = "adamw"
    outer_lr: float | None = None
    """None: auto (from overlap, members and planned rounds)."""
    outer_momentum: float | None = None
    overlap: str = "auto"
    codec_scatter: str = "int8"
    codec_gather: str = "int8"
    fragments: int = 1
    delay: int = 0
    """Inner steps between a fragment's boundary and the use of its result (streaming)."""
    mix: float = 0.5
    max_rounds: int = 0
    """Commits after which the run ends; 0: until stopped."""
    checkpoint_every_rounds: int = 10
    min_peers: int = 1
    """Contributors without whom no round opens."""
    start_peers: int = 1
    """Contributors that the first round waits for; later rounds go on with fewer."""
    grace_s: float = 0.0
    """Seconds the leader waits for late contributions; 0: auto."""
    round_timeout_s: float = 0.0
    """Seconds an attempt may take; 0: auto."""
    max_base_age_rounds: int = 2
    max_extra_steps_factor: float = 2.0
    """Inner steps while a round is undecided, as a multiple of ``inner_steps``, then wait."""
    stages: int = 0
    """Groups of blocks that the model is cut into (spec 11); 0: every trainer has the whole model,
    and the keys below mean nothing."""
    micro_batches: int = 16
    """Micro-batches of ``batch_size`` sequences in one step."""
    pipeline_mode: str = "sync"
    """``sync``: replicas of a stage step together. ``diloco``: each steps by itself, and they meet
    every ``inner_steps``."""
    boundary_codec: str = "int8"
    """Of activations and their gradients between stages."""
    replicas_min: int = 2
    """Members below which a stage counts as endangered."""
    ends_replicas: int = 3
    """Members that serve embedding and head, as far as there are enough."""
    close_fraction: float = 0.9
    """Share of ``micro_batches`` with which a step may close after its deadline."""
    swapped: bool = False
    """Exchange the first two and the last two stages in every other micro-batch (CheckFree+)."""
    skip_fraction: float = 0.0
    """Share of micro-batches that may leave out an overloaded inner stage."""
    generate_share: float = 0.1
    """Share of a worker's time that ``generate`` may take, in runs without stages, too."""
    stewards: int = 0
    """Members that vote in the log, as far as there are so many; 0: by how many could."""

    def __post_init__(self) -> None:
        for info in msgspec.structs.fields(type(self)):
            value = getattr(self, info.name)
            checked = _checked(info.name, value, info.type)
            # An int given for a float would have other canonical bytes and thus another run id.
            if type(checked) is not type(value):
                msgspec.structs.force_setattr(self, info.name, checked)
        if self.inner_optimizer == "adamw" and self.inner_lr == 0.0:
            raise ConfigError(
                "run key inner_lr = 0.0", "the model would never change", "choose a positive value"
            )
        if self.delay >= self.inner_steps:
            raise ConfigError(
                f"run key delay = {self.delay}",
                f"it must be below inner_steps = {self.inner_steps}",
                "lower delay or raise inner_steps",
            )
        if self.stages:
            self._check_pipeline()
            if self.shards:
                raise ConfigError(
                    f"run key shards = {self.shards}",
                    "the log of a pipeline names every micro-batch, nothing is dealt",
                    "leave shards at 0",
                )

    def _check_pipeline(self) -> None:
        """Keys that exclude each other in a pipeline."""
        if self.fragments != 1 or self.delay:
            raise ConfigError(
                f"run key stages = {self.stages}",
                "a pipeline has one channel per stage and no streaming",
                "leave fragments at 1 and delay at 0",
            )
        if self.pipeline_mode == "diloco" and self.overlap not in ("off", "auto"):
            raise ConfigError(
                f"run key overlap = {self.overlap}",
                "stages of a pipeline in mode diloco wait for their rounds, one after the other",
                "leave overlap at auto, or set it to off",
            )
        if self.swapped and self.stages < SWAPPED_STAGES_MIN:
            raise ConfigError(
                "run key swapped = True",
                f"it exchanges four stages, and stages = {self.stages}",
                f"raise stages to {SWAPPED_STAGES_MIN} or more",
            )
        if self.skip_fraction and self.stages == 1:
            raise ConfigError(
                f"run key skip_fraction = {self.skip_fraction}",
                "with one stage there would be nothing left",
                "raise stages, or leave skip_fraction at 0",
            )
        if self.ends_replicas < self.replicas_min:
            raise ConfigError(
                f"run key ends_replicas = {self.ends_replicas}",
                f"the ends are a stage, too, and replicas_min = {self.replicas_min}",
                "raise ends_replicas or lower replicas_min",
            )


def check_stages(stages: int, layers: int) -> int:
    """How many of a model's ``layers`` blocks each of ``stages`` stages gets.

    Raises:
        ConfigError: they cannot be cut into groups of equal size.
    """
    if not 0 < stages <= layers or layers % stages:
        raise ConfigError(
            f"run key stages = {stages}",
            f"a model of {layers} layers cannot be cut into that many equal stages",
            f"choose a divisor of {layers}",
        )
    return layers // stages


_Rule = tuple[Callable[[Any], bool], str]


def _between(low: float, high: float) -> _Rule:
    return (lambda value: low <= value <= high), f"{low:g} to {high:g}"


def _above(low: float, high: float) -> _Rule:
    return (lambda value: low < value <= high), f"more than {low:g}, at most {high:g}"


def _one_of(names: tuple[str, ...]) -> _Rule:
    return (lambda value: value in names), ", ".join(names)


def _optional(rule: _Rule) -> _Rule:
    return (lambda value: value is None or rule[0](value)), f"auto, or {rule[1]}"


def _text(low: int, high: int) -> _Rule:
    return (
        lambda value: low <= len(value) <= high and value.isprintable(),
        f"{low} to {high} printable characters",
    )


def _is_model(value: dict[str, int]) -> bool:
    return len(value) <= 64 and all(
        0 < len(key) <= limits.NAME_CHARS_MAX and 0 <= size <= _COUNT_MAX
        for key, size in value.items()
    )


_RULES: dict[str, _Rule] = {
    "name": _text(1, limits.NAME_CHARS_MAX),
    "seed": _between(0, _COUNT_MAX),
    "preset": _text(1, limits.NAME_CHARS_MAX),
    "model": (_is_model, f"at most 64 names with sizes of 0 to {_COUNT_MAX:g}"),
    "corpus": _text(1, 256),
    "corpus_hash": (lambda value: len(value) in (0, 32), "empty or a hash of 32 bytes"),
    "shards": _between(0, limits.SHARDS_MAX),
    "batch_size": _between(1, 1 << 20),
    "inner_steps": _between(1, 1_000_000),
    "inner_lr": _between(0.0, 100.0),
    "inner_weight_decay": _between(0.0, 10.0),
    "inner_clip": _between(0.0, 1e6),
    "inner_warmup_steps": _between(0, _COUNT_MAX),
    "total_steps": _between(0, _COUNT_MAX),
    "inner_optimizer": _one_of(INNER_OPTIMIZERS),
    "outer_lr": _optional(_above(0.0, 10.0)),
    "outer_momentum": _optional((lambda value: 0.0 <= value < 1.0, "0 (included) to 1 (excluded)")),
    "overlap": _one_of(OVERLAPS),
    "codec_scatter": _one_of(CODECS),
    "codec_gather": _one_of(CODECS),
    "fragments": _between(1, limits.CHANNELS_MAX),
    "delay": _between(0, 1_000_000),
    "mix": _between(0.0, 1.0),
    "max_rounds": _between(0, _COUNT_MAX),
    "checkpoint_every_rounds": _between(1, 1_000_000),
    "min_peers": _between(1, limits.MEMBERS_MAX),
    "start_peers": _between(1, limits.MEMBERS_MAX),
    "grace_s": _between(0.0, 86_400.0),
    "round_timeout_s": _between(0.0, 86_400.0),
    "max_base_age_rounds": _between(0, 64),
    "max_extra_steps_factor": _between(0.0, 1000.0),
    "stages": _between(0, STAGES_MAX),
    "micro_batches": _between(1, limits.MICRO_BATCHES_MAX),
    "pipeline_mode": _one_of(PIPELINE_MODES),
    "boundary_codec": _one_of(BOUNDARY_CODECS),
    "replicas_min": _between(1, limits.MEMBERS_MAX),
    "ends_replicas": _between(1, limits.MEMBERS_MAX),
    "close_fraction": _above(0.0, 1.0),
    "swapped": (lambda value: isinstance(value, bool), "true, false"),
    "skip_fraction": _between(0.0, 0.5),
    "generate_share": _between(0.0, 0.9),
    "stewards": (lambda value: value in (0, 1, 3, 5, 7), "0 (auto), 1, 3, 5, 7"),
}
assert tuple(_RULES) == RunKeys.__struct_fields__


def allowed_values(key: str) -> str:
    """What run key ``key`` may be, in words.

    Raises:
        KeyError: there is no such key.
    """
    return _RULES[key][1]


def _checked(key: str, value: object, wanted: Any) -> Any:
    """``value`` in the type of run key ``key``, or a ConfigError that names the key."""
    holds, allowed = _RULES[key]
    todo = f"allowed: {allowed}"
    try:
        converted = msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise ConfigError(f"run key {key} = {value!r:.80}", str(error), todo) from None
    finite = not isinstance(converted, float) or math.isfinite(converted)
    if not finite or not holds(converted):
        raise ConfigError(f"run key {key} = {value!r:.80}", "out of range", todo)
    return converted


def _from_text(key: str, value: object, wanted: Any) -> object:
    """Loosens what people write: ``auto``, a hash in hex, numbers as strings."""
    if value == "auto" and key in ("outer_lr", "outer_momentum"):
        return None
    if value == "auto" and key in ("grace_s", "round_timeout_s"):
        return 0.0
    if key == "corpus_hash" and isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            return value
    if isinstance(value, str) and wanted in (int, float, float | None, bool):
        try:
            return msgspec.convert(value, wanted, strict=False)
        except msgspec.ValidationError:
            return value
    return value


def _mapping_to_values(mapping: Mapping[str, object]) -> dict[str, Any]:
    types = {info.name: info.type for info in msgspec.structs.fields(RunKeys)}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), list(types), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(types)}"
            raise ConfigError(f"unknown run key {key!r:.80}", "no such key", hint)
        values[key] = _checked(key, _from_text(key, value, types[key]), types[key])
    return values


def run_keys_from_mapping(mapping: Mapping[str, object]) -> RunKeys:
    """Run keys from a flat mapping (TOML, flags, environment); missing keys take their defaults.

    Accepts ``"auto"`` where None or 0 means it, hex for ``corpus_hash``, and numbers as strings.

    Raises:
        ConfigError: unknown key (with a suggestion), wrong type, value out of range.
    """
    return RunKeys(**_mapping_to_values(mapping))


def check_run_keys(keys: RunKeys, given: Mapping[str, object]) -> None:
    """Check that what somebody asked for equals what the run has.

    Raises:
        ConfigError: the first key (in the order of RunKeys) that differs, or a bad key.
    """
    values = _mapping_to_values(given)
    for key in RunKeys.__struct_fields__:
        if key in values and values[key] != getattr(keys, key):
            raise ConfigError(
                f"run key {key} = {values[key]!r}",
                f"this run has {key} = {getattr(keys, key)!r}, and run keys are equal everywhere",
                f"leave {key} out, or found a run of your own",
            )


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run before anything has happened in it. ``nonce`` tells apart runs with equal keys."""

    protocol: Annotated[int, Meta(ge=1, le=65535)] = PROTOCOL_VERSION
    keys: RunKeys
    founder: Annotated[bytes, Meta(min_length=32, max_length=32)]
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]

    def to_bytes(self) -> bytes:
        """Canonical MessagePack: fields in declared order, map keys sorted, floats as float64."""
        return _encoder.encode(self)

    @property
    def run_id(self) -> bytes:
        """BLAKE3 of the canonical bytes, 32 bytes."""
        return blake3(self.to_bytes()).digest()


class _Version(msgspec.Struct):
    protocol: int


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_version_decoder = msgspec.msgpack.Decoder(_Version)
_decoder = msgspec.msgpack.Decoder(Manifest)


def make_manifest(keys: RunKeys, founder: bytes, nonce: bytes) -> Manifest:
    """A checked manifest; ``nonce`` is 16 bytes of entropy.

    Raises:
        ConfigError: it would not fit into a message.
    """
    assert len(founder) == 32 and len(nonce) == 16
    manifest = Manifest(keys=keys, founder=founder, nonce=nonce)
    nbytes = len(manifest.to_bytes())
    if nbytes > limits.MANIFEST_BYTES_MAX:
        raise ConfigError(
            "the run's keys are too long",
            f"{nbytes} bytes, at most {limits.MANIFEST_BYTES_MAX}",
            "shorten model or corpus",
        )
    return manifest


def parse_manifest(data: bytes, expect_run: bytes) -> Manifest:
    """The manifest in ``data`` if it is the one that ``expect_run`` names.

    The hash is checked first: nothing that the founder did not write reaches the decoder.

    Raises:
        RunMismatch: other bytes than the run id promises, or not canonical.
        VersionMismatch: a run of another protocol version.
    """
    if len(data) > limits.MANIFEST_BYTES_MAX:
        raise RunMismatch("manifest refused", f"longer than {limits.MANIFEST_BYTES_MAX} bytes")
    found = blake3(data).digest()
    if found != expect_run:
        raise RunMismatch(
            "manifest refused",
            f"its hash is {found.hex()[:16]}…, the run is {expect_run.hex()[:16]}…",
            "ask another peer; if it persists, the ticket is for another run",
        )
    todo = "install the version of swarmtrain that founded the run"
    try:
        version = _version_decoder.decode(data).protocol
        if version != PROTOCOL_VERSION:
            raise VersionMismatch(
                "manifest refused", f"protocol {version}, this is {PROTOCOL_VERSION}", todo
            )
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as error:
        raise RunMismatch("manifest refused", str(error), todo) from None
    if manifest.to_bytes() != data:
        raise RunMismatch("manifest refused", "its encoding is not canonical", todo)
    return manifest


def _genesis_payload(run: bytes, steward: bytes) -> bytes:
    assert len(run) == 32 and len(steward) == 32
    return run + steward


def make_genesis(founder: Keyring, run: bytes, steward: bytes) -> Genesis:
    """Entry 0: the founder names the first steward of ``run``."""
    return Genesis(
        run=run,
        founder=founder.peer_id,
        steward=steward,
        signature=founder.sign(b"genesis", _genesis_payload(run, steward)),
    )


def check_genesis(
    genesis: Genesis, *, run: bytes, founder: bytes, verify: Verify = verify_ed25519
) -> None:
    """Check entry 0 against the manifest.

    Raises:
        PeerFault: ``bad_genesis`` with the reason.
    """
    if genesis.run != run:
        raise PeerFault("bad_genesis", "it names another run")
    if genesis.founder != founder:
        raise PeerFault("bad_genesis", "it names another founder than the manifest")
    payload = _genesis_payload(genesis.run, genesis.steward)
    if not verify(founder, b"genesis", payload, genesis.signature):
        raise PeerFault("bad_genesis", "the founder did not sign it")


__all__ = [
    "BOUNDARY_CODECS",
    "CODECS",
    "INNER_OPTIMIZERS",
    "OVERLAPS",
    "PIPELINE_MODES",
    "PROTOCOL_VERSION",
    "Capability",
    "Manifest",
    "RunKeys",
    "Ticket",
    "Verify",
    "check_genesis",
    "check_run_keys",
    "check_stages",
    "make_genesis",
    "make_manifest",
    "parse_capability",
    "parse_manifest",
    "run_keys_from_mapping",
    "sign_capability",
]
