"""``swarmtrain ckpt prune|pin|unpin``: by the live site, or in the folder of a stopped one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import UsageError

PRUNE_TIMEOUT_S = 20 * CALL_TIMEOUT_S
"""What is kept is read and hashed first."""


def _carry_out(place: Site, action: str, number: int, keep: int) -> dict[str, Any]:
    if place.is_live():
        arguments = {"action": action, "number": number, "keep": keep}
        with place.connect() as client:
            return client.call("curate", arguments, timeout_s=PRUNE_TIMEOUT_S)
    from swarmtrain_peer.pruning import Curator
    from swarmtrain_peer.store import StateStore

    with place.lock():
        curator = Curator(StateStore(place.state_path))
        if action == "prune":
            return curator.prune(keep)
        return (
            curator.remove(number) if action == "remove" else curator.pin(number, action == "pin")
        )


def ckpt_prune(
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="How many states of each channel stay.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--number", min=1, help="Remove this checkpoint alone.")
    ] = None,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Remove old checkpoints of this site.

    The newest good state, pinned checkpoints and what members are fetching now always stay. Exit
    code 11 if --number names one that must stay.
    """
    if (keep is None) == (number is None):
        raise UsageError("ckpt prune", "either --keep or --number", "--keep 2 keeps the newest two")
    place = site_of(home, site, stopped=True)
    action = "prune" if number is None else "remove"
    answer = _carry_out(place, action, number or 0, keep or 0)
    removed = ", ".join(map(str, answer["removed"])) or "none"
    lines = [f"removed: {removed}"]
    lines += [f"kept: {row['number']} ({row['why']})" for row in answer["kept"]]
    lines += [f"damaged: {error}" for error in answer["damaged"]]
    Output(as_json=as_json).result({"ok": True, **answer}, lines)


Number = Annotated[int, typer.Argument(min=1, help="See `swarmtrain ckpt list`.")]


def ckpt_pin(
    number: Number, site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """Keep a checkpoint until it is unpinned, whatever prunes."""
    answer = _carry_out(site_of(home, site, stopped=True), "pin", number, 0)
    Output(as_json=as_json).result({"ok": True, **answer}, [f"checkpoint {number} is pinned"])


def ckpt_unpin(
    number: Number, site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """Let a checkpoint go like any other."""
    answer = _carry_out(site_of(home, site, stopped=True), "unpin", number, 0)
    Output(as_json=as_json).result({"ok": True, **answer}, [f"checkpoint {number} is not pinned"])


def register(app: typer.Typer) -> None:
    """Add these commands to ``swarmtrain ckpt``."""
    for name, command in (("prune", ckpt_prune), ("pin", ckpt_pin), ("unpin", ckpt_unpin)):
        app.command(name)(command)
