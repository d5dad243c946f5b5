"""``swarmtrain run``: the founder's orders to the whole run; and who may be in it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, connect
from swarmtrain.cli.output import Output, table
from swarmtrain_protocols.errors import UsageError

run_app = typer.Typer(
    help="Orders to the whole run, from where it was founded.", no_args_is_help=True
)
allow_app = typer.Typer(
    help="Who may enter: with a list, a ticket alone is not enough.", no_args_is_help=True
)

Reason = Annotated[str, typer.Option("--reason", help="Shown to everybody.")]
Member = Annotated[str, typer.Argument(help="First digits of its key; see `swarmtrain peers`.")]


def order(kind: str, home: Home, site: SiteOption, **fields: object) -> dict[str, Any]:
    """Have an order logged; what the peer process answers.

    Raises:
        SwarmError: see ``swarmtrain_peer.orders.give_order``.
    """
    with connect(home, site) as client:
        return client.call("order", {"kind": kind, **fields}, timeout_s=CALL_TIMEOUT_S)


def _give(
    kind: str, done: str, home: Home, site: SiteOption, as_json: bool, **fields: object
) -> None:
    answer = order(kind, home, site, **fields)
    text = done.format_map({key: str(value) for key, value in answer.items()})
    Output(as_json=as_json).result({"ok": True, "order": kind, **answer}, [text])


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


@run_app.command("set")
def change(
    setting: Annotated[str, typer.Argument(metavar="KEY=VALUE", help="Such as inner_steps=40.")],
    at_round: Annotated[
        int | None,
        typer.Option("--at-round", min=1, help="First round that has it.  [default: in two]"),
    ] = None,
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Change a run key while the run goes on, at the same round for every member.

    inner_steps, inner_lr, inner_weight_decay, inner_clip, inner_warmup_steps, total_steps,
    outer_lr, outer_momentum, max_extra_steps_factor, min_peers, grace_s, round_timeout_s,
    max_rounds, checkpoint_every_rounds; in a pipeline only the last two.
    """
    key, equals, value = setting.partition("=")
    if not equals or not key or not value:
        raise UsageError(f"{setting!r:.80}", "not KEY=VALUE", "write inner_steps=40, for example")
    key = key.strip().rpartition(".")[2]  # as in run.toml: train.inner_steps
    said = "from round {at_round} on, {key} is {value}"
    fields = {"key": key, "value": value.strip(), "at_round": at_round, "reason": reason}
    _give("set", said, home, site, as_json, **fields)


@run_app.command("rollback")
def rollback(
    number: Annotated[
        int | None, typer.Argument(metavar="ROUND", min=0, help="Go on from the state before it.")
    ] = None,
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take the whole run back to an earlier round; without ROUND, list where it can go back to."""
    if number is not None:
        said = "the run goes on from round {round}, in generation {generation}"
        _give("rollback", said, home, site, as_json, round=number, reason=reason)
        return
    with connect(home, site) as client:
        answer = client.call("states", timeout_s=CALL_TIMEOUT_S)
    rows = [
        (one["round"], name, state[:16])
        for one in answer["rounds"]
        for name, state in one["states"].items()
    ]
    lines = table(("round", "channel", "state"), rows)
    Output(as_json=as_json).result(answer, lines if rows else ["no earlier state is held"])


@run_app.command("evict")
def evict(
    member: Member,
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Turn a member out; unlike a banned one it may come back by starting again."""
    said = f"{member} is no member any more"
    _give("evict", said, home, site, as_json, reason=reason, member=member)


@run_app.command("handover")
def handover(
    member: Member,
    keep_tickets: Annotated[
        bool,
        typer.Option("--keep-tickets/--void-tickets", help="Whether tickets made so far are good."),
    ] = True,
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Hand the run over: from now on that member's key gives the orders and makes the tickets."""
    said = "the run is {founder}'s now; orders are given at that site"
    fields = {"member": member, "tickets": keep_tickets, "reason": reason}
    _give("handover", said, home, site, as_json, **fields)


def ban(
    member: Annotated[
        str | None,
        typer.Argument(help="First digits of its key; all 64 if it is no member."),
    ] = None,
    lift: Annotated[bool, typer.Option("--lift", help="Let it come back.")] = False,
    reason: Reason = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Turn a member out and do not let it come back. Without MEMBER: list who is banned."""
    if member is None:
        _list(home, site, as_json, "banned", ("key", "reason"))
        return
    said = f"{member} may come back" if lift else f"{member} is banned"
    _give("unban" if lift else "ban", said, home, site, as_json, reason=reason, member=member)


def _list(
    home: Home, site: SiteOption, as_json: bool, name: str, header: tuple[str, ...]
) -> list[dict[str, Any]]:
    with connect(home, site) as client:
        answer = client.call("access", timeout_s=CALL_TIMEOUT_S)
    rows = [tuple(row[key] for key in header) for row in answer[name]]
    lines = table(header, rows, width=64) if rows else ["nobody"]
    if name == "allowed":
        held = "only these keys may enter" if answer["closed"] else "whoever has a ticket may enter"
        lines = [held, *(lines if rows else [])]
    Output(as_json=as_json).result({name: answer[name], "closed": answer["closed"]}, lines)
    return list(answer[name])


@allow_app.command("add")
def allow_add(
    key: Annotated[str, typer.Argument(help="All 64 hex digits; the machine's doctor prints it.")],
    note: Annotated[str, typer.Option("--note", help="Whose it is.")] = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Put a key on the list. From the first one on, only listed keys may enter."""
    said = "{member} may enter; newcomers that are not listed may not"
    _give("allow", said, home, site, as_json, member=key, add=True, note=note)


@allow_app.command("rm")
def allow_rm(
    key: Annotated[str, typer.Argument(help="First digits of a key on the list.")],
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take a key off the list. Who is in stays; `swarmtrain ban` turns members out."""
    _give("allow", "{member} is off the list", home, site, as_json, member=key, add=False)


@allow_app.command("off")
def allow_off(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """Lift the list: whoever has a ticket may enter again."""
    _give("allow", "whoever has a ticket may enter", home, site, as_json, member="", add=True)


@allow_app.command("on")
def allow_on(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """Let the list hold as it is, also if it is empty: then nobody new may enter."""
    _give("allow", "only listed keys may enter", home, site, as_json, member="", add=False)


@allow_app.command("list")
def allow_list(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """The keys that may enter, and whether the list holds."""
    _list(home, site, as_json, "allowed", ("key", "note"))
