"""Settings: a TOML file, the environment and flags, and where each value came from.

Order of force: flag, environment, file, default. Two kinds of keys, visibly different: *run keys*
are equal on every peer and hashed into the run id (``manifest.RunKeys``), *peer keys* are this
machine's own business (``PeerConfig``). An unknown key is an error with a suggestion, never
ignored.
"""

from __future__ import annotations

import difflib
import math
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from swarmtrain_peer.allowance import DataCap, Hours
from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys, run_keys_from_mapping

Relay = Literal["auto", "yes", "no"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one site decides for itself; kept in its ``peer.json``.

    Raises:
        ConfigError: on construction, naming the key.
    """

    name: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)] = ""
    """For people; empty: the machine's host name."""
    listen: str = "0.0.0.0:0"
    """``host:port`` to listen on; port 0: any free one; empty: outgoing links only."""
    announce: Annotated[tuple[str, ...], Meta(max_length=limits.ADDRESSES_PER_PEER_MAX)] = ()
    """Addresses to tell others instead of those found by looking."""
    relay: Relay = "auto"
    """Carry streams between members that cannot dial each other: ``auto``: if this site does not
    train; ``yes``; ``no``: neither that, nor have its own carried."""
    port_mapping: bool = True
    """Ask the gateway for a port (PCP, NAT-PMP, UPnP) where others cannot dial this site."""
    trains: bool = True
    holds_state: bool = True
    votes: bool = False
    """Ask to become a steward; only a ticket with the grant allows it."""
    up_bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    """0: measured, no cap."""
    down_bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    data_cap: str = ""
    """Bytes of all links, such as ``50GB/month``; empty: any number."""
    hours: str = ""
    """When the site works, such as ``22:00-06:00``; empty: always."""
    donor_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.2
    """Of the measured uplink, for members that fetch state, old results or a corpus."""
    device: str = "auto"
    leave_grace_s: Annotated[float, Meta(ge=0.0, le=3600.0)] = 30.0
    """How long a polite leave may wait for the round to end."""
    owned: bool = False
    """Leave when the last trainer closes (``st.join``); false for ``up``, ``join`` and ``seed``."""
    dashboard: str = "127.0.0.1:8470"
    """``host:port`` of the dashboard; empty: none."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    """Of what commands write to standard error: lines for people, or JSON records."""
    tensorboard: Annotated[str, Meta(max_length=1024)] = ""
    """Folder of event files; empty: none."""
    wandb: Annotated[str, Meta(max_length=128)] = ""
    """Project of Weights & Biases; empty: none."""

    def __post_init__(self) -> None:
        Hours.parse(self.hours)
        DataCap.parse(self.data_cap)
        for address in (self.listen, self.dashboard):
            if address:
                _check_listen(address)
        for address in self.announce:
            try:
                split_address(address)
            except ValueError as error:
                raise _bad("net.announce", address, str(error)) from None

    @property
    def display_name(self) -> str:
        return self.name or socket.gethostname()[: limits.NAME_CHARS_MAX] or "peer"


def _bad(key: str, value: object, why: str, todo: str = "see `swarmtrain config show`") -> Any:
    return ConfigError(f"{key} = {value!r:.80}", why, todo)


def _check_listen(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        split_address(f"{host}:{port}" if port != "0" else f"{host}:1")
    except ValueError as error:
        raise _bad("listen address", address, str(error), "write host:port") from None


_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)(bit|b|B|iB)?(?:/s|ps)?\Z")
_SCALE = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}


def parse_rate(text: str | int | float) -> int:
    """Bytes per second of ``50Mbit``, ``10 MB/s``, ``250000`` (bytes) or ``auto`` (0).

    Raises:
        ConfigError: anything else.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool) and 0 <= text < math.inf:
        return int(text)
    if text in ("auto", ""):
        return 0
    match = _RATE.match(str(text).strip())
    number, scale, unit = match.groups() if match is not None else ("inf", "", "")
    factor = 1024 ** ("kMG".find(scale) + 1) if unit == "iB" else _SCALE[scale]
    scaled = float(number) * factor
    if math.isinf(scaled):  # no number, or one of hundreds of digits
        raise _bad("rate", text, "not a rate", "write 50Mbit, 10MB/s or auto")
    return int(scaled / 8 if unit in ("bit", "b") else scaled)


RUN_KEYS: dict[str, tuple[str, ...]] = {
    "run.name": ("name",),
    "run.seed": ("seed",),
    "run.max_rounds": ("max_rounds",),
    "run.min_peers": ("min_peers",),
    "run.start_peers": ("start_peers",),
    "run.stewards": ("stewards",),
    "train.preset": ("preset",),
    "train.model": ("model",),
    "train.corpus": ("corpus",),
    "train.corpus_hash": ("corpus_hash",),
    "train.shards": ("shards",),
    "train.batch_size": ("batch_size",),
    "train.inner_steps": ("inner_steps",),
    "train.inner_optimizer": ("inner_optimizer",),
    "train.inner_lr": ("inner_lr",),
    "train.inner_weight_decay": ("inner_weight_decay",),
    "train.inner_clip": ("inner_clip",),
    "train.inner_warmup_steps": ("inner_warmup_steps",),
    "train.total_steps": ("total_steps",),
    "train.outer_lr": ("outer_lr",),
    "train.outer_momentum": ("outer_momentum",),
    "train.overlap": ("overlap",),
    "train.fragments": ("fragments",),
    "train.delay": ("delay",),
    "train.mix": ("mix",),
    "train.max_base_age_rounds": ("max_base_age_rounds",),
    "train.max_extra_steps_factor": ("max_extra_steps_factor",),
    "comm.codec": ("codec_scatter", "codec_gather"),
    "comm.codec_scatter": ("codec_scatter",),
    "comm.codec_gather": ("codec_gather",),
    "comm.grace_s": ("grace_s",),
    "comm.round_timeout_s": ("round_timeout_s",),
    "checkpoint.every_rounds": ("checkpoint_every_rounds",),
    "pipeline.stages": ("stages",),
    "pipeline.micro_batches": ("micro_batches",),
    "pipeline.mode": ("pipeline_mode",),
    "pipeline.codec": ("boundary_codec",),
    "pipeline.replicas_min": ("replicas_min",),
    "pipeline.ends_replicas": ("ends_replicas",),
    "pipeline.close_fraction": ("close_fraction",),
    "pipeline.swapped": ("swapped",),
    "pipeline.skip_fraction": ("skip_fraction",),
    "pipeline.generate_share": ("generate_share",),
}
PEER_KEYS: dict[str, str] = {
    "peer.name": "name",
    "peer.trains": "trains",
    "peer.holds_state": "holds_state",
    "peer.votes": "votes",
    "peer.device": "device",
    "peer.leave_grace_s": "leave_grace_s",
    "peer.hours": "hours",
    "net.listen": "listen",
    "net.announce": "announce",
    "net.up": "up_bytes_per_s",
    "net.down": "down_bytes_per_s",
    "net.data_cap": "data_cap",
    "net.donor_share": "donor_share",
    "net.relay": "relay",
    "net.port_mapping": "port_mapping",
    "dashboard.bind": "dashboard",
    "log.level": "log_level",
    "log.format": "log_format",
    "log.tensorboard": "tensorboard",
    "log.wandb": "wandb",
}
_SHORT_ENVIRONMENT = {
    "NAME": "peer.name",
    "DEVICE": "peer.device",
    "LISTEN": "net.listen",
    "ANNOUNCE": "net.announce",
    "UP": "net.up",
    "DOWN": "net.down",
    "DATA_CAP": "net.data_cap",
    "HOURS": "peer.hours",
    "LOG": "log.level",
}
_NOT_SETTINGS = ("CONFIG", "HOME", "OFFLINE", "OWNED", "SITE", "TICKET", "TOKEN", "NO_TELEMETRY")
_PREFIX = "SWARMTRAIN_"


@dataclass(frozen=True, slots=True)
class Value:
    """One setting with its origin: ``flag``, ``environment NAME``, ``file PATH`` or ``default``."""

    key: str
    value: object
    origin: str
    kind: Literal["run", "peer"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything, resolved. ``given_run`` holds only the run keys that somebody wrote down."""

    run: RunKeys
    peer: PeerConfig
    given_run: dict[str, object]
    values: tuple[Value, ...]


def unknown_key(key: str, origin: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = [*RUN_KEYS, *PEER_KEYS]
    near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.6)
    last = [name for name in known if name.split(".")[1] == key.split(".")[-1]]
    guess = (last or near or [""])[0]
    todo = f"did you mean {guess}?" if guess else "see `swarmtrain config show`"
    return ConfigError(f"unknown key {key!r:.80}", f"in {origin}", todo)


def _flatten(document: Mapping[str, object], origin: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for section, body in document.items():
        if not isinstance(body, dict):
            raise unknown_key(section, origin)
        for name, value in body.items():
            flat[f"{section}.{name}"] = value
    return flat


def read_toml(path: Path) -> dict[str, object]:
    """The keys of a TOML file as ``section.key``.

    Raises:
        ConfigError: no such file, not TOML.
    """
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"config file {path}", error.strerror or str(error), "check the path"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config file {path}", f"not TOML: {error}", "correct it") from None
    return _flatten(document, str(path))


def read_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    """The settings among environment variables, with their names.

    ``SWARMTRAIN_COMM__CODEC`` is ``comm.codec``; a few have short names (``SWARMTRAIN_LISTEN``).

    Raises:
        ConfigError: a ``SWARMTRAIN_`` variable that means nothing.
    """
    found: dict[str, tuple[object, str]] = {}
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX):
            continue
        rest = variable.removeprefix(_PREFIX)
        if rest in _NOT_SETTINGS:
            continue
        key = _SHORT_ENVIRONMENT.get(rest) or rest.lower().replace("__", ".", 1)
        if key not in RUN_KEYS and key not in PEER_KEYS:
            raise unknown_key(key, f"environment variable {variable}")
        found[key] = (environ[variable], variable)
    return found


def _peer_value(key: str, value: object) -> object:
    field = PEER_KEYS[key]
    if field.endswith("_bytes_per_s"):
        return parse_rate(value)  # type: ignore[arg-type]
    if key == "net.announce" and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, str) and field in ("trains", "holds_state", "votes"):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() not in words:
            raise _bad(key, value, "neither true nor false")
        return words[value.lower()]
    return value


def _peer_config(values: Mapping[str, object]) -> PeerConfig:
    fields = {PEER_KEYS[key]: _peer_value(key, value) for key, value in values.items()}
    try:
        return msgspec.convert(fields, PeerConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError("peer keys", str(error), "see `swarmtrain config show`") from None


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """Resolve all settings. ``flags`` maps ``section.key`` to a value; None means not given.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; it names the key and the origin.
    """
    layers: list[tuple[dict[str, object], dict[str, str]]] = []
    if path is not None:
        body = read_toml(path)
        layers.append((body, dict.fromkeys(body, f"file {path}")))
    variables = read_environment(environ or {})
    layers.append(
        (
            {key: value for key, (value, _) in variables.items()},
            {key: f"environment {name}" for key, (_, name) in variables.items()},
        )
    )
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    layers.append((given, dict.fromkeys(given, "flag")))
    run: dict[str, object] = {}
    peer: dict[str, object] = {}
    origins: dict[str, str] = {}
    for values, sources in layers:
        for key in _general_first(values):
            if key in RUN_KEYS:
                for field in RUN_KEYS[key]:
                    run[field], origins[field] = values[key], sources[key]
            elif key in PEER_KEYS:
                peer[key], origins[key] = values[key], sources[key]
            else:
                raise unknown_key(key, sources[key])
    keys, config = run_keys_from_mapping(run), _peer_config(peer)
    return Settings(keys, config, run, tuple(_table(keys, config, origins)))


def _general_first(keys: Iterable[str]) -> list[str]:
    """``comm.codec`` before ``comm.codec_gather``, so that the special one wins in a file."""
    return sorted(keys, key=lambda key: -len(RUN_KEYS.get(key, ("",))))


def settled(keys: RunKeys, config: PeerConfig, origins: Mapping[str, str]) -> Settings:
    """Settings that are in force somewhere; ``origins`` by run key, and by ``section.key``."""
    return Settings(keys, config, {}, tuple(_table(keys, config, origins)))


def _table(keys: RunKeys, config: PeerConfig, origins: Mapping[str, str]) -> list[Value]:
    table: list[Value] = []
    for key, fields in RUN_KEYS.items():
        if len(fields) == 1:
            origin = origins.get(fields[0], "default")
            table.append(Value(key, getattr(keys, fields[0]), origin, "run"))
    for key, field in PEER_KEYS.items():
        table.append(Value(key, getattr(config, field), origins.get(key, "default"), "peer"))
    return table
