"""``swarmtrain ticket``: making tickets, who came with which, and voiding them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, connect
from swarmtrain.cli.output import Output, table
from swarmtrain.cli.run import order
from swarmtrain_peer import host
from swarmtrain_protocols.errors import UsageError
from swarmtrain_protocols.tickets import ROLES

ticket_app = typer.Typer(help="Tickets let machines in.", no_args_is_help=True)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_duration(text: str, option: str = "--expires") -> int:
    """Seconds of ``90s``, ``15m``, ``12h``, ``7d``, ``2w`` or ``never`` (0).

    Raises:
        UsageError: anything else.
    """
    if text == "never":
        return 0
    number, unit = text[:-1], text[-1:]
    if not number.isdigit() or unit not in _UNITS_S or int(number) == 0:
        raise UsageError(f"{option} {text!r:.40}", "not a duration", "write 12h, 7d or never")
    return int(number) * _UNITS_S[unit]


@ticket_app.command("create")
def create(
    role: Annotated[str, typer.Option("--role", help=f"One of {', '.join(ROLES)}.")] = "trainer",
    vote: Annotated[bool, typer.Option("--vote", help="The bearer may vote in the log.")] = False,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", help="12h, 7d or never.  [default: 7d; elsewhere as its own ticket]"
        ),
    ] = None,
    uses: Annotated[
        int, typer.Option("--uses", min=0, help="Members that may come with it; 0: any number.")
    ] = 0,
    note: Annotated[str, typer.Option("--note", help="For your own list of tickets.")] = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a ticket that leads to this site. Its text is a secret.

    Rights are granted where the run was founded; elsewhere it has those of the site's own ticket.
    """
    if role not in ROLES:
        raise UsageError(f"--role {role!r:.40}", "no such role", f"one of {', '.join(ROLES)}")
    expires_s = None if expires is None else parse_duration(expires)
    arguments = {"role": role, "vote": vote, "expires_s": expires_s, "uses": uses, "note": note}
    with connect(home, site) as client:
        answer = client.call("ticket", arguments, timeout_s=CALL_TIMEOUT_S)
    Output(as_json=as_json).result({"ok": True, **answer}, [str(answer["ticket"])])


def state_of(row: dict[str, Any], wall_s: float) -> str:
    """Whether a ticket lets anybody in, in a word; ``wall_s``: Unix time."""
    if row["revoked"] is not None:
        return "revoked"
    if row["expires_s"] and wall_s >= row["expires_s"]:
        return "expired"
    if row["uses"] and len(row["bearers"]) >= row["uses"]:
        return "used up"
    return "good" if row["role"] is not None else "made elsewhere"


@ticket_app.command("list")
def list_tickets(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """Tickets that were made here, or that members came with. Never their secrets."""
    with connect(home, site) as client:
        answer = client.call("tickets", timeout_s=CALL_TIMEOUT_S)
    now = host.wall_s()
    for row in answer["tickets"]:
        row["state"] = state_of(row, now)
    rows = [
        (
            row["id"],
            row["state"],
            row["role"] or "-",
            "yes" if row["vote"] else "-",
            f"{len(row['bearers'])} of {row['uses']}" if row["uses"] else len(row["bearers"]),
            _left(row["expires_s"], now),
            row["note"] or "",
        )
        for row in answer["tickets"]
    ]
    header = ("ticket", "state", "role", "votes", "used", "expires", "note")
    Output(as_json=as_json).result(answer, table(header, rows) if rows else ["no tickets"])


def _left(expires_s: int | None, now: float) -> str:
    if not expires_s:
        return "-" if expires_s is None else "never"
    left_s = expires_s - now
    if left_s <= 0:
        return "over"
    return f"in {left_s / 86400:.1f} d" if left_s > 2 * 86400 else f"in {left_s / 3600:.1f} h"


@ticket_app.command("revoke")
def revoke(
    ticket: Annotated[str, typer.Argument(help="First digits of its id; see `ticket list`.")],
    reason: Annotated[str, typer.Option("--reason", help="Told to whoever brings it.")] = "",
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let nobody new in with it. Who came with it stays; `swarmtrain ban` turns members out."""
    answer = order("revoke", home, site, ticket=ticket, reason=reason)
    line = f"ticket {answer['ticket']} is void"
    Output(as_json=as_json).result({"ok": True, "order": "revoke", **answer}, [line])
