"""The command ``swarmtrain``: one app, thin commands, stable exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from swarmtrain.cli import demo, join, manage, query
from swarmtrain.cli.options import Home, SiteOption, site_of
from swarmtrain.cli.output import Output, wants_json
from swarmtrain_protocols.errors import SwarmError

app = typer.Typer(
    name="swarmtrain",
    help="Train one model together over ordinary internet links.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: tuple[Callable[..., None], ...] = (
    demo.demo,
    manage.init,
    join.up,
    join.seed,
    join.join,
    query.leave,
    query.status,
    query.peers,
    query.rounds,
    query.events,
    manage.version,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(manage.ticket_app, name="ticket")
app.add_typer(manage.ckpt_app, name="ckpt")
app.add_typer(manage.config_app, name="config")


@app.command()
def dashboard(
    bind: Annotated[str, typer.Option("--bind", help="host:port; port 0: any.")] = "127.0.0.1:8470",
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Needed beyond loopback.")
    ] = None,
    site: SiteOption = None,
    home: Home = None,
) -> None:
    """Serve the web dashboard of the local peer."""
    from swarmtrain.dashboard.server import serve

    place = site_of(home, site)
    token = None if token_file is None else token_file.read_text().strip()
    serve(place, bind, token=token, note=Output().note)


def main() -> None:
    """Entry point: errors become three lines and a stable exit code."""
    try:
        app()
    except SwarmError as error:
        Output(as_json=wants_json(sys.argv[1:])).error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
