"""``swarmtrain run recover``: the founder begins the log again after its stewards were lost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swarmtrain.cli.options import Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output
from swarmtrain_peer.recovering import Recovered, founder_keys, plan, recover_site

FounderKey = Annotated[
    Path | None,
    typer.Option("--founder-key", help="The key of the founder of now, if it is on another site."),
]
Really = Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would be.")]


def recover(
    founder: FounderKey = None,
    yes: Really = False,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Go on after losing a majority of the stewards for good, from this stopped site's log.

    Do it once, at the member whose log goes furthest. Members of the old log follow; old stewards
    that come back are told so and may join again.
    """
    chosen = site_of(home, site, stopped=True)
    keys = founder_keys(chosen, founder)
    told = recover_site(chosen, keys) if yes else plan(chosen, keys)[1]
    Output(as_json=as_json).result({"ok": True, "done": yes, **asdict(told)}, _lines(told, yes))


def _lines(told: Recovered, done: bool) -> list[str]:
    rounds = ", ".join(f"{name} at round {number}" for name, number in told.rounds.items())
    lost = ", ".join(key[:8] for key in told.stewards_lost) or "none"
    lines = [
        f"generation {told.generation} of run {told.run[:16]}, with {told.steward[:8]} as steward",
        f"kept: {told.kept_entries} entries, {rounds or 'no model yet'}",
        f"given up: {told.unproven_entries} entries without proof; votes of {lost}",
    ]
    if done:
        return [*lines, f"the old log is in {told.old_log}", "now start this site again"]
    return [*lines, "nothing was changed; --yes does it"]
