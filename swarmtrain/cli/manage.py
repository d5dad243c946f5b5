"""Checkpoints, settings, new projects, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output, human_bytes, table
from swarmtrain_peer.config import PEER_KEYS, Settings, load_settings, settled
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import CheckpointError, ConfigError, UsageError
from swarmtrain_protocols.manifest import PROTOCOL_VERSION, RunKeys, run_keys_from_mapping

ckpt_app = typer.Typer(help="Checkpoints on this site's disk.", no_args_is_help=True)
config_app = typer.Typer(help="Settings and where they come from.", no_args_is_help=True)


def read_checkpoints(folder: Path) -> tuple[list[dict[str, Any]], list[CheckpointError]]:
    """What lies on disk, newest first, by its manifests; nothing is changed."""
    from swarmtrain_peer.store import StateStore, is_pinned

    found, broken = StateStore(folder, writable=False).checkpoints()
    rows: list[dict[str, Any]] = [
        {
            "number": checkpoint.number,
            "channel": entry.channel,
            "round": entry.round,
            "state_hash": entry.root.hex(),
            "values": entry.values,
            "pinned": is_pinned(checkpoint.path),
        }
        for checkpoint in found
        for entry in checkpoint.entries
    ]
    return rows, broken


@ckpt_app.command("list")
def ckpt_list(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """Checkpoints of this site."""
    place = site_of(home, site, stopped=True)
    rows, broken = read_checkpoints(place.state_path)
    lines = table(
        ("checkpoint", "channel", "round", "values", "state", "pinned"),
        [
            (
                *(row[key] for key in ("number", "channel", "round", "values")),
                row["state_hash"][:16],
                "yes" if row["pinned"] else "",
            )
            for row in rows
        ],
    )
    lines += [f"refused: {error}" for error in broken]
    document = {"checkpoints": rows, "refused": [str(error) for error in broken]}
    Output(as_json=as_json).result(document, lines)


@ckpt_app.command("verify")
def ckpt_verify(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """Read every checkpoint and compare its hashes. Exit code 11 if one is damaged."""
    from swarmtrain_peer.store import StateStore

    place = site_of(home, site, stopped=True)
    rows, broken = read_checkpoints(place.state_path)
    store = StateStore(place.state_path, writable=False)
    good = 0
    nbytes = 0
    for row in rows:
        try:
            blob = store.checkpoint(row["channel"], row["round"])
        except CheckpointError as error:
            broken.append(error)
        else:
            good += 1
            nbytes += sum(len(chunk) for chunk in blob.chunks)
    document = {"ok": not broken, "good": good, "damaged": [str(error) for error in broken]}
    lines = [f"{good} good ({human_bytes(nbytes)}), {len(broken)} damaged"]
    lines += [f"damaged: {error}" for error in broken]
    Output(as_json=as_json).result(document, lines)
    if broken:
        raise typer.Exit(CheckpointError.exit_code)


RunFile = Annotated[Path | None, typer.Argument(help="A TOML file.")]


def _settings(run_file: Path | None) -> Settings:
    return load_settings(run_file, os.environ)


def plain(value: object) -> Any:
    """A setting as JSON has it: bytes as hex, tuples as lists, None as ``auto``."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return list(value)
    return "auto" if value is None else value


def in_force(place: Site) -> Settings:
    """What holds at a site: the run's keys, with what was changed in flight, and its own.

    Raises:
        ConfigError: the site has not fetched the run's manifest yet.
    """
    manifest = place.manifest()
    if manifest is None:
        why = "the run's manifest is not here yet"
        raise ConfigError(f"site {place.folder}", why, "join first")
    keys, origins = manifest.keys, dict.fromkeys(RunKeys.__struct_fields__, "the run")
    with contextlib.suppress(ControlClosed), place.connect() as client:
        status = client.call("status", timeout_s=CALL_TIMEOUT_S)
        front = max((c["round"] for c in status["channels"].values()), default=0)
        given: dict[str, object] = {}
        for change in status.get("changes") or []:
            if change["at_round"] <= front:
                given[change["key"]] = change["value"]
                origins[change["key"]] = f"changed at round {change['at_round']}"
        merged = {name: getattr(keys, name) for name in RunKeys.__struct_fields__} | given
        keys = run_keys_from_mapping(merged)
    origins |= dict.fromkeys(PEER_KEYS, f"file {place.config_path}")
    return settled(keys, place.config(), origins)


@config_app.command("show")
def config_show(
    run_file: RunFile = None,
    origin: Annotated[bool, typer.Option("--origin", help="Where each value comes from.")] = False,
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As a flag would.")
    ] = None,
    running: Annotated[
        bool, typer.Option("--run", help="What holds at this machine's site, now.")
    ] = False,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """All settings. Run keys are equal on every peer; peer keys are this machine's own."""
    if running and (run_file is not None or given):
        raise UsageError("config show --run", "a run has its keys", "leave FILE and --set out")
    flags: dict[str, object] = {}
    for setting in given or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r:.80}", "not KEY=VALUE", "write net.up=50Mbit")
        flags[key.strip()] = value.strip()
    if running:
        settings = in_force(site_of(home, site, stopped=True))
    else:
        settings = load_settings(run_file, os.environ, flags)
    rows = [
        (value.kind, value.key, plain(value.value), *([value.origin] if origin else []))
        for value in settings.values
    ]
    header = ("kind", "key", "value", *(["origin"] if origin else []))
    document = {
        value.key: {"kind": value.kind, "value": plain(value.value), "origin": value.origin}
        for value in settings.values
    }
    Output(as_json=as_json).result(document, table(header, rows, width=120))


@config_app.command("check")
def config_check(run_file: RunFile = None, as_json: Json = False) -> None:
    """Check a file and the environment. Exit code 3 names the first mistake."""
    settings = _settings(run_file)
    given = sum(value.origin != "default" for value in settings.values)
    Output(as_json=as_json).result({"ok": True, "given": given}, [f"good: {given} key(s) given"])


RUN_TOML = """\
# A run: keys that are equal on every peer. `swarmtrain config show run.toml --origin` lists all.
[run]
name = "{name}"
seed = 1234
max_rounds = 0          # 0: until stopped

[train]
preset = "lm-tiny"      # without your own code, peers train this byte-level language model
corpus = "stdlib"       # or "path:FOLDER" of text files; pinned by hash, others fetch it
inner_steps = 20        # steps between two rounds
overlap = "auto"        # off | delayed | eager

[comm]
codec = "int8"          # fp32 | bf16 | int8

# For a model that is larger than a machine: stages that members serve (docs/configuration.md).
# [pipeline]
# stages = 2            # must divide the number of layers
# micro_batches = 16    # in a step
# replicas_min = 2      # below it a stage is endangered
"""
TRAIN_PY = '''\
"""Your own model in the swarm: three lines more than without.

    swarmtrain join 'swarm://...' -- python train.py
"""

import torch

import swarmtrain as st

model = torch.nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
swarm = st.join(model, optimizer)
while not swarm.should_stop:
    x = torch.randn(32, 16)
    loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    swarm.log(loss=float(loss))
swarm.close()
'''


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a run.toml and a train.py to begin with; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c for c in folder.resolve().name if c.isalnum() or c in "-_")[:32] or "run"
    files = {folder / "run.toml": RUN_TOML.format(name=name), folder / "train.py": TRAIN_PY}
    for path in files:
        if path.exists():
            raise ConfigError(f"file {path}", "it exists already", "choose another folder")
    for path, text in files.items():
        path.write_text(text)
    written = [str(path) for path in files]
    lines = [*(f"wrote {path}" for path in written), f"next: swarmtrain up {folder / 'run.toml'}"]
    Output(as_json=as_json).result({"ok": True, "files": written}, lines)


def package_version() -> str:
    """The installed version, or what says that there is none."""
    try:
        return importlib.metadata.version("swarmtrain")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def version(as_json: Json = False) -> None:
    """Versions of swarmtrain, its protocol and Python."""
    document = {
        "swarmtrain": package_version(),
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    Output(as_json=as_json).result(document, [f"{k} {v}" for k, v in document.items()])
