"""Options that several commands share, and the site they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from swarmtrain_peer.control import ControlClient
from swarmtrain_peer.site import Site, default_home, find_site
from swarmtrain_protocols.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")]
SiteOption = Annotated[
    str | None,
    typer.Option(
        "--site",
        envvar="SWARMTRAIN_SITE",
        help="Site folder, or the first digits of the run id. Default: the only live site.",
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="SWARMTRAIN_HOME", help="Folder of keys and runs.", show_default=False
    ),
]
CALL_TIMEOUT_S = 15.0


def home_of(home: Path | None) -> Path:
    """The folder of ``--home``, ``SWARMTRAIN_HOME`` or the platform."""
    return home if home is not None else default_home(os.environ)


def site_of(home: Path | None, site: str | None, *, stopped: bool = False) -> Site:
    """The site a command is about; see ``find_site``.

    Raises:
        UsageError: none, or several.
    """
    return find_site(home_of(home), site, stopped=stopped)


def connect(home: Path | None, site: str | None) -> ControlClient:
    """A client of the live site a command is about.

    Raises:
        UsageError: none, or several.
        ControlClosed: the named site is not live.
    """
    return site_of(home, site).connect()


def read_ticket_text(argument: str | None, ticket_file: Path | None) -> str:
    """The ticket from ``--ticket-file``, standard input (``-``), the argument or the environment.

    Raises:
        UsageError: none of them has one, or the file cannot be read.
    """
    if ticket_file is not None:
        try:
            return ticket_file.read_text()
        except OSError as error:
            raise UsageError(
                f"ticket file {ticket_file}", error.strerror or str(error), "check the path"
            ) from None
    if argument == "-":
        return typer.get_text_stream("stdin").readline()
    if argument:
        return argument
    variable = os.environ.get("SWARMTRAIN_TICKET", "")
    if variable:
        return variable
    raise UsageError(
        "no ticket",
        "neither an argument, nor --ticket-file, nor SWARMTRAIN_TICKET",
        "get one from somebody in the run: swarmtrain ticket create",
    )
