"""How small the small things are: a seed's memory, and what ``import swarmtrain`` costs.

    python benchmarks/footprint.py

Prints each figure beside its bar and exits with 1 if one is above it. The seed is the peer process
of ``swarmtrain seed``: a voting member that holds no state. It is measured as a member, beside the
founder that let it in; torch and numba may not be mapped into it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_peer.spawn import child_environment, spawn_peer, stop_process
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.tickets import Ticket

SEED_RSS_BYTES_MAX = 90_000_000
IMPORT_USER_S_MAX = 0.150
IMPORTS = 5
JOIN_TIMEOUT_S = 30.0
HEAVY = ("torch", "numba", "llvmlite")


def import_user_s() -> float:
    """Median user seconds of a fresh interpreter that imports swarmtrain; it may load no torch."""
    code = "import sys, swarmtrain; sys.exit('torch' in sys.modules)"
    spent = []
    for _ in range(IMPORTS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True)
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return statistics.median(spent)


def seed_rss_bytes() -> int:
    """Resident bytes of a seed's peer process once it is a member with a link.

    Raises:
        RuntimeError: it did not join, or holds a heavy library.
    """
    config = PeerConfig(name="founder", listen="127.0.0.1:0", trains=False, dashboard="")
    with tempfile.TemporaryDirectory() as folder:
        founder = found_site(Path(folder, "founder"), RunKeys(name="footprint"), config)
        first = spawn_peer(founder)
        try:
            with founder.connect() as client:
                answer = client.call("ticket", {"role": "seed", "vote": True, "uses": 0})
            config = PeerConfig(
                name="seed",
                listen="127.0.0.1:0",
                trains=False,
                holds_state=False,
                votes=True,
                dashboard="",
            )
            seed = enter_site(Path(folder, "seed"), Ticket.parse(str(answer["ticket"])), config)
            second = spawn_peer(seed)
            try:
                _wait_joined(seed)
                return _measure(second.pid)
            finally:
                stop_process(second)
        finally:
            stop_process(first)


def _wait_joined(site: Site) -> None:
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    with site.connect() as client:
        while time.monotonic() < deadline_s:
            peers = client.call("peers")["peers"]
            if len(peers) == 2 and all(peer["connected"] for peer in peers):
                return
            time.sleep(0.1)
    raise RuntimeError("the seed did not join")


def _measure(pid: int) -> int:
    process = psutil.Process(pid)
    mapped = " ".join(one.path for one in process.memory_maps())
    held = [name for name in HEAVY if f"/{name}/" in mapped]
    if held:
        raise RuntimeError(f"the seed holds {', '.join(held)}")
    return int(process.memory_info().rss)


def main() -> int:
    """Measure and print; returns the exit code."""
    spent_s, rss_bytes = import_user_s(), seed_rss_bytes()
    rows = [
        ("import swarmtrain, user ms", spent_s * 1e3, IMPORT_USER_S_MAX * 1e3),
        ("seed without state, RSS MB", rss_bytes / 1e6, SEED_RSS_BYTES_MAX / 1e6),
    ]
    for name, value, bar in rows:
        print(f"{name:28} {value:8.1f}   at most {bar:6.1f}   {'ok' if value <= bar else 'ABOVE'}")
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores")
    return int(any(value > bar for _, value, bar in rows))


if __name__ == "__main__":
    sys.exit(main())
