"""``swarmtrain export``: the run's model from this site's disk, for other programs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from swarmtrain.cli.options import Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output, human_bytes
from swarmtrain_protocols.errors import CheckpointError, ConfigError, UsageError

if TYPE_CHECKING:
    from swarmtrain_peer.store import Checkpoint, StateStore

FORMATS = ("safetensors", "hf")


def export(
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(FORMATS)}.")] = "safetensors",
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("export"),
    number: Annotated[
        int | None,
        typer.Option("--checkpoint", help="See `swarmtrain ckpt list`.  [default: the newest]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODULE:FUNCTION", help="Builds the model of a run with own code."
        ),
    ] = None,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the model of a checkpoint: safetensors, or a folder that transformers loads."""
    if to not in FORMATS:
        raise UsageError(f"--to {to!r:.40}", "no such format", f"one of {', '.join(FORMATS)}")
    place = site_of(home, site, stopped=True)
    manifest = place.manifest()
    if manifest is None:
        raise CheckpointError(f"site {place.folder}", "it has not learned the run's keys yet")
    from swarmtrain_peer.store import StateStore

    store = StateStore(place.state_path, writable=False)
    chosen = _choose(store, number)
    states = {entry.channel: store.state(chosen, entry).theta for entry in chosen.entries}
    from swarmtrain.training import export as exporting

    keys = msgspec.structs.asdict(manifest.keys)
    found = exporting.trained_model(keys, states, None if model is None else _maker(model))
    rounds = {entry.channel: entry.round for entry in chosen.entries}
    metadata = {
        "run": place.run_id.hex(),
        **{f"round.{entry.channel}": str(entry.round) for entry in chosen.entries},
        **{f"state.{entry.channel}": entry.root_hex for entry in chosen.entries},
    }
    write = exporting.write_hugging_face if to == "hf" else exporting.write_safetensors
    paths = write(found, out, metadata)
    nbytes = sum(path.stat().st_size for path in paths)
    document: dict[str, Any] = {
        "ok": True,
        "format": to,
        "checkpoint": chosen.number,
        "rounds": rounds,
        "files": [str(path) for path in paths],
        "nbytes": nbytes,
    }
    latest = max(rounds.values())
    line = f"round {latest} of run {place.run_id.hex()[:12]}: {human_bytes(nbytes)} in {out}"
    Output(as_json=as_json).result(document, [line, *(f"  {path.name}" for path in paths)])


def _choose(store: StateStore, number: int | None) -> Checkpoint:
    found, broken = store.checkpoints()
    for checkpoint in found:
        if number is None or checkpoint.number == number:
            return checkpoint
    if broken:
        raise broken[0]
    what = "no checkpoint" if number is None else f"no checkpoint {number}"
    raise CheckpointError(what, "nothing to export", "swarmtrain ckpt list; seeds hold none")


def _maker(name: str) -> Callable[[], Any]:
    """The function that ``--model`` names, from the current folder or an installed module."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"--model {name!r:.60}", "not MODULE:FUNCTION", "e.g. train:make_model")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--model {name}", str(error), "is this the script's folder?") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(make):
        raise ConfigError(f"--model {name}", "it is no function")
    found: Callable[[], Any] = make
    return found
