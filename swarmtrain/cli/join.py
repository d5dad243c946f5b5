"""Becoming a member: ``up`` founds a run, ``join`` and ``seed`` enter one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from swarmtrain.cli.options import Home, Json, SiteOption, home_of, read_ticket_text
from swarmtrain.cli.output import Output
from swarmtrain.cli.session import MemberSession, TrainerCommand, preset_trainer
from swarmtrain.dashboard.bind import is_loopback, split_bind
from swarmtrain.trackers import open_trackers
from swarmtrain_peer import host
from swarmtrain_peer.config import PeerConfig, Settings, load_settings
from swarmtrain_peer.events import escape_text
from swarmtrain_peer.founding import found_run, same_run
from swarmtrain_peer.site import Site, enter_site, list_sites, site_at, write_private
from swarmtrain_peer.spawn import start_process, stop_process
from swarmtrain_protocols.errors import ConfigError, NotAuthorised, UsageError
from swarmtrain_protocols.manifest import Ticket

Name = Annotated[str | None, typer.Option("--name", help="What others see. Default: host name.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Listen = Annotated[
    str | None, typer.Option("--listen", help="host:port; port 0: any; empty: outgoing only.")
]
Announce = Annotated[
    str | None, typer.Option("--announce", help="Addresses to tell others, comma separated.")
]
Up = Annotated[str | None, typer.Option("--up", help="Upload cap, such as 50Mbit.")]
Down = Annotated[str | None, typer.Option("--down", help="Download cap, such as 200Mbit.")]
DataCap = Annotated[
    str | None, typer.Option("--data-cap", help="Bytes of all links, such as 50GB/month.")
]
Hours = Annotated[
    str | None, typer.Option("--hours", help="When to work, local time, such as 22:00-06:00.")
]
LogFormat = Annotated[
    str | None, typer.Option("--log-format", help="Of standard error: text or json.")
]
TensorBoard = Annotated[
    str | None, typer.Option("--tensorboard", help="Folder for event files of TensorBoard.")
]
Wandb = Annotated[
    str | None, typer.Option("--wandb", help="Project of Weights & Biases to report to.")
]
Config = Annotated[
    Path | None, typer.Option("--config", envvar="SWARMTRAIN_CONFIG", help="A TOML file.")
]
TicketFile = Annotated[Path | None, typer.Option("--ticket-file", help="Read the ticket there.")]


def settings_of(config: Path | None, **flags: object) -> Settings:
    """Settings with this machine's flags by their short names.

    Raises:
        ConfigError: see ``load_settings``.
    """
    keys = {
        "name": "peer.name",
        "device": "peer.device",
        "listen": "net.listen",
        "announce": "net.announce",
        "up": "net.up",
        "down": "net.down",
        "data_cap": "net.data_cap",
        "hours": "peer.hours",
        "log_format": "log.format",
        "tensorboard": "log.tensorboard",
        "wandb": "log.wandb",
        "trains": "peer.trains",
        "holds_state": "peer.holds_state",
        "votes": "peer.votes",
        "dashboard": "dashboard.bind",
    }
    given = {keys[flag]: value for flag, value in flags.items()}
    return load_settings(config, os.environ, given)


def of_machine(given: Mapping[str, object]) -> dict[str, object]:
    """Those of a command's arguments that ``up``, ``join`` and ``seed`` share."""
    return {name: given[name] for name in _OF_MACHINE if name in given}


_OF_MACHINE = (
    *("name", "device", "listen", "announce", "up", "down", "data_cap", "hours"),
    *("log_format", "tensorboard", "wandb"),
)


def split_command(
    ticket: str | None, command: list[str], ticket_file: Path | None
) -> tuple[str | None, list[str]]:
    """Tell the ticket from the first word of the user's command.

    With ``--ticket-file`` or ``SWARMTRAIN_TICKET`` the first word already belongs to the command.
    """
    elsewhere = ticket_file is not None or bool(os.environ.get("SWARMTRAIN_TICKET"))
    if ticket is not None and elsewhere and ticket != "-" and not ticket.startswith("swarm:"):
        return None, [ticket, *command]
    return ticket, command


def refuse_run_keys(settings: Settings, config: Path | None) -> None:
    """Whoever enters a run brings no keys for it.

    Raises:
        ConfigError: there are some.
    """
    if settings.given_run:
        raise ConfigError(
            f"run keys in {config or 'the environment'}",
            f"{', '.join(sorted(settings.given_run))}: the run has its own, equal on every peer",
            "leave them out, or found a run with `swarmtrain up`",
        )


def session_of(
    site: Site, output: Output, trainer: TrainerCommand | None, config: PeerConfig
) -> MemberSession:
    """A member in the foreground that logs, and reports elsewhere, as its settings say.

    Raises:
        ConfigError: a package for that is missing.
    """
    output.log_json, output.level = config.log_format == "json", config.log_level
    trackers = open_trackers(config.tensorboard, config.wandb, site.folder)
    return MemberSession(site, output, trainer, trackers)


def join(
    ticket: Annotated[str | None, typer.Argument(help="swarm://… or - for standard input.")] = None,
    command: Annotated[
        list[str] | None, typer.Argument(help="-- and your own training command.")
    ] = None,
    ticket_file: TicketFile = None,
    name: Name = None,
    device: Device = None,
    listen: Listen = None,
    announce: Announce = None,
    up: Up = None,
    down: Down = None,
    data_cap: DataCap = None,
    hours: Hours = None,
    log_format: LogFormat = None,
    tensorboard: TensorBoard = None,
    wandb: Wandb = None,
    vote: Annotated[
        bool | None, typer.Option("--vote/--no-vote", help="Vote in the log if the ticket grants.")
    ] = None,
    config: Config = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Join a run and train until it ends.

    Examples: ``swarmtrain join 'swarm://…'`` trains the run's own model;
    ``swarmtrain join 'swarm://…' -- python train.py`` runs your code, which calls ``st.join``.
    """
    output = Output(as_json=as_json)
    word, own = split_command(ticket, command or [], ticket_file)
    parsed = Ticket.parse(read_ticket_text(word, ticket_file))
    settings = settings_of(
        config,
        **of_machine(locals()),
        votes=parsed.unverified.vote if vote is None else vote,
    )
    refuse_run_keys(settings, config)
    if parsed.unverified.role != "trainer":
        raise NotAuthorised(
            "this ticket does not let you train",
            f"it is for the role {parsed.unverified.role}",
            "use `swarmtrain seed` with it, or ask for a trainer's ticket",
        )
    site = enter_site(home_of(home), parsed, settings.peer)
    if own:
        trainer = TrainerCommand(own, script=True)
    else:
        trainer = preset_trainer(site, settings.peer.device)
    session = session_of(site, output, trainer, settings.peer)
    session.start()
    output.note(f"joined run {site.folder.name} as {escape_text(settings.peer.display_name)}")
    raise typer.Exit(session.run())


def seed(
    ticket: Annotated[str | None, typer.Argument(help="swarm://… or - for standard input.")] = None,
    ticket_file: TicketFile = None,
    name: Name = None,
    listen: Listen = None,
    announce: Announce = None,
    up: Up = None,
    down: Down = None,
    data_cap: DataCap = None,
    hours: Hours = None,
    log_format: LogFormat = None,
    tensorboard: TensorBoard = None,
    wandb: Wandb = None,
    hold_state: Annotated[
        bool, typer.Option("--hold-state", help="Keep the model too; needs disk, no torch.")
    ] = False,
    config: Config = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Help a run without training: find peers, vote, reduce parts, hold the model."""
    output = Output(as_json=as_json)
    parsed = Ticket.parse(read_ticket_text(ticket, ticket_file))
    settings = settings_of(
        config,
        **of_machine(locals()),
        trains=False,
        holds_state=hold_state,
        votes=parsed.unverified.vote,
    )
    site = enter_site(home_of(home), parsed, settings.peer)
    session = session_of(site, output, None, settings.peer)
    session.start()
    output.note(f"serving run {site.folder.name} as {escape_text(settings.peer.display_name)}")
    raise typer.Exit(session.run())


def up(
    run_file: Annotated[Path | None, typer.Argument(help="run.toml; default: a small LM.")] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Also train on this machine.")
    ] = True,
    dashboard: Annotated[
        str | None, typer.Option("--dashboard", help="host:port; empty: none.")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Found a new run even if one exists.")] = False,
    name: Name = None,
    device: Device = None,
    listen: Listen = None,
    announce: Announce = None,
    up: Up = None,
    down: Down = None,
    data_cap: DataCap = None,
    hours: Hours = None,
    log_format: LogFormat = None,
    tensorboard: TensorBoard = None,
    wandb: Wandb = None,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Found a run, or go on with it, and print a ticket for others.

    Examples: ``swarmtrain up``; ``swarmtrain up run.toml --announce host.example:4433``.
    """
    output = Output(as_json=as_json)
    settings = settings_of(
        run_file,
        **of_machine(locals()),
        dashboard=dashboard,
        trains=None if train else False,
        votes=True,
    )
    place, old = open_or_found(home_of(home), site, settings, new=new)
    trainer = preset_trainer(place, settings.peer.device) if train else None
    session = session_of(place, output, trainer, settings.peer)
    session.start()
    viewer: subprocess.Popen[bytes] | None = None
    try:
        answer = session.client.call(
            "ticket", {"role": "trainer", "vote": False, "expires_s": 0, "uses": 0}
        )
        if settings.peer.dashboard:
            viewer = start_dashboard(place, settings.peer, output)
        print_founded(output, place, answer, settings.peer, old=old)
        exit_code = session.run()
    finally:
        session.close()
        if viewer is not None:
            stop_process(viewer)
    raise typer.Exit(exit_code)


def open_or_found(
    home: Path, explicit: str | None, settings: Settings, *, new: bool
) -> tuple[Site, bool]:
    """The site to serve, and whether it existed before.

    A run that was founded here with the same run keys is gone on with, unless ``new``.

    Raises:
        UsageError: the named site does not exist, or was not founded here.
        DataUnavailable: the corpus is not on this machine.
    """
    if explicit:
        found = site_at(home, explicit)
        if not found.is_founder:
            raise UsageError(
                f"site {found.folder}",
                "this run was not founded here",
                "enter it with `swarmtrain join TICKET`",
            )
        found.save_config(settings.peer)
        return found, True
    for one in list_sites(home) if not new else []:
        manifest = one.manifest() if one.is_founder else None
        if manifest is not None and same_run(settings.run, manifest.keys):
            one.save_config(settings.peer)
            return one, True
    return found_run(home, settings.run, settings.peer), False


def start_dashboard(site: Site, config: PeerConfig, output: Output) -> subprocess.Popen[bytes]:
    """The dashboard in its own process; what it prints goes to ``dashboard.log``.

    Beyond loopback it wants a token: one is made and kept beside the site's keys.
    """
    arguments = [sys.executable, "-m", "swarmtrain.dashboard", "--site", str(site.folder)]
    arguments += ["--bind", config.dashboard]
    if not is_loopback(split_bind(config.dashboard)[0]):
        token_file = site.folder / "dashboard.token"
        if not token_file.exists():
            write_private(token_file, host.entropy(24).hex().encode())
        arguments += ["--token-file", str(token_file)]
        output.note(f"the dashboard asks for the token in {token_file}")
    return start_process(arguments, site.folder / "dashboard.log", nice=5)


def print_founded(
    output: Output, site: Site, answer: dict[str, Any], config: PeerConfig, *, old: bool
) -> None:
    """The ticket, how to use it, and where to look."""
    ticket = str(answer["ticket"])
    lines = [
        f"run {site.folder.name} {'goes on' if old else 'founded'}",
        f"site {site.folder}",
        "ticket for others (it is a secret):",
        f"  {ticket}",
        f"they type: swarmtrain join '{ticket}'",
    ]
    document = {
        "ok": True,
        "run": site.run_id.hex(),
        "site": str(site.folder),
        "ticket": ticket,
        "dashboard_url": f"http://{config.dashboard}/" if config.dashboard else None,
    }
    if config.dashboard:
        lines.append(f"dashboard http://{config.dashboard}/")
    output.result(document, lines)
