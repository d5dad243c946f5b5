"""``swarmtrain run``: the founder's orders to the whole run."""

from __future__ import annotations

from typing import Annotated

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, connect
from swarmtrain.cli.output import Output

run_app = typer.Typer(
    help="Orders to the whole run, from where it was founded.", no_args_is_help=True
)

Reason = Annotated[str, typer.Option("--reason", help="Shown to everybody.")]


def _give(kind: str, done: str, home: Home, site: SiteOption, as_json: bool, **fields: str) -> None:
    with connect(home, site) as client:
        answer = client.call("order", {"kind": kind, **fields}, timeout_s=CALL_TIMEOUT_S)
    Output(as_json=as_json).result({"ok": True, "order": kind, **answer}, [done])


@run_app.command("pause")
def pause(
    reason: Reason = "", site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """No new round is opened; the one in progress ends. Members stay and keep their state."""
    _give("pause", "paused; `swarmtrain run resume` goes on", home, site, as_json, reason=reason)


@run_app.command("resume")
def resume(
    reason: Reason = "", site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """Rounds go on after a pause."""
    _give("resume", "the run goes on", home, site, as_json, reason=reason)


@run_app.command("stop")
def stop(
    reason: Reason = "", site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """End the run for everybody, for good. Checkpoints stay on the disks of its members."""
    _give("stop", "the run has ended", home, site, as_json, reason=reason)


def ban(
    member: Annotated[str, typer.Argument(help="First digits of its key; see `swarmtrain peers`.")],
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Turn a member out and do not let it come back."""
    _give("ban", f"{member} is banned", home, site, as_json, reason=reason, member=member)
