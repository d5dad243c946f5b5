"""The command ``swarmtrain``: one app, thin commands, stable exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from swarmtrain.cli import (
    dashboard,
    demo,
    doctor,
    export,
    generate,
    join,
    logs,
    manage,
    prune,
    query,
    recover,
    run,
    ticket,
    top,
)
from swarmtrain.cli.output import Output, wants_json, wants_json_log
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
    logs.logs,
    top.top,
    export.export,
    run.ban,
    doctor.doctor,
    generate.generate,
    dashboard.dashboard,
    manage.version,
)
for command in COMMANDS:
    app.command()(command)
run.run_app.command("recover")(recover.recover)
prune.register(manage.ckpt_app)
app.add_typer(run.run_app, name="run")
app.add_typer(run.allow_app, name="allow")
app.add_typer(ticket.ticket_app, name="ticket")
app.add_typer(manage.ckpt_app, name="ckpt")
app.add_typer(manage.config_app, name="config")


def main() -> None:
    """Entry point: errors become three lines and a stable exit code."""
    try:
        app()
    except SwarmError as error:
        log_format = "json" if wants_json_log(sys.argv[1:]) else "text"
        Output(as_json=wants_json(sys.argv[1:]), log_format=log_format).error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
