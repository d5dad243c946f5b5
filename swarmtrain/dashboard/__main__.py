"""``python -m swarmtrain.dashboard --site FOLDER``: the dashboard as a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from swarmtrain.cli.output import Output
from swarmtrain.dashboard.server import serve
from swarmtrain_peer.site import default_home, find_site
from swarmtrain_protocols.errors import SwarmError


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="swarmtrain dashboard")
    parser.add_argument("--site", default=os.environ.get("SWARMTRAIN_SITE"))
    parser.add_argument("--bind", default="127.0.0.1:8470")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--host", action="append", default=[], help="a name it is called by")
    given = parser.parse_args()
    try:
        site = find_site(default_home(os.environ), given.site)
        token = None if given.token_file is None else given.token_file.read_text().strip()
        serve(site, given.bind, token=token, ready_file=given.ready_file, hosts=tuple(given.host))
    except SwarmError as error:
        Output().error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
