"""No secret leaves the files that are made for it, whatever is asked of a run, whoever errs.

Threat T19: keys, tickets, tokens and session cookies are looked for, in every spelling, in whatever
a run of real processes says: its files, the replicated log, events, standard output and error,
argument lists and environments of its processes, answers of control socket and dashboard.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from swarmtrain_peer.keys import read_key_file
from swarmtrain_peer.spawn import child_environment, stop_process
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.tickets import Ticket
from tests.swarm.harness import WAIT_S, Seat, Swarm, closing_all
from tests.swarm.synthetic import Plan, Trainer

SAFE = frozenset({"identity.key", "founder.key", "ticket", "token"})
"""Names of the files that hold secrets, readable by their owner alone."""
CALLS = ("status", "peers", "rounds", "events", "tickets", "access", "metrics", "states", "ping")
PAGES = (
    "/ /api/v1/run /api/v1/peers /api/v1/rounds /api/v1/events?last=500 /api/v1/pipeline /metrics "
    "/healthz /readyz /login /v1/models /static/app.js /no/such/page"
).split()
TOKEN = "canary-" + "7f3a9b51c2" * 4


def spellings(secret: bytes) -> Iterator[bytes]:
    """A secret as somebody may write it: raw, hex, base64 of both alphabets wherever it begins."""
    yield secret
    for text in (secret.hex(), secret.hex().upper()):
        yield text.encode()
    for skip in range(3):
        plain = base64.b64encode(secret[skip:])[:-4].rstrip(b"=")
        yield plain
        yield plain.replace(b"+", b"-").replace(b"/", b"_")
    yield repr(secret)[2:-1].encode()


class Watch:
    """Secrets by name, what was looked through, and where one was found."""

    def __init__(self) -> None:
        self.secrets: dict[str, bytes] = {}
        self.looked: dict[str, int] = {}
        self.found: list[str] = []

    def look(self, where: str, data: bytes | str) -> None:
        text = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        self.looked[where] = len(text)
        for name, secret in self.secrets.items():
            if any(spelled in text for spelled in spellings(secret)):
                self.found.append(f"{name} in {where}")

    def processes(self, moment: str) -> int:
        """Argument lists and environments of this process's descendants."""
        count = 0
        for pid in _descendants(os.getpid()):
            for part in ("cmdline", "environ"):
                try:
                    data = Path(f"/proc/{pid}/{part}").read_bytes()
                except OSError:
                    continue  # it has ended
                count += bool(data)
                self.look(f"{moment}: {part} of {pid}", data)
        return count


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(text.rpartition(")")[2].split()[1])
    found, new = [], [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def _key(path: Path) -> bytes:
    return read_key_file(path).reveal()


def _swarmtrain(*arguments: str, given: str = "", **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "swarmtrain", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=child_environment(environment),
    )
    return done.returncode, done.stdout + done.stderr


def _damaged(ticket: Ticket) -> str:
    text = str(ticket)
    return text[:-30] + ("A" if text[-30] != "A" else "B") + text[-29:]


def _mistakes(watch: Watch, folder: Path, ticket: Ticket) -> None:
    """Tickets that do not work, given in each way there is."""
    home = {"SWARMTRAIN_HOME": str(folder / "nobody")}
    bad = _damaged(ticket)
    file = folder / "ticket"
    file.touch(mode=0o600)
    file.write_text(bad)
    for arguments, given, environment in (
        (["join", "-"], bad, home),
        (["join", "--ticket-file", str(file)], "", home),
        (["join"], "", {**home, "SWARMTRAIN_TICKET": bad}),
        (["join", "-"], str(ticket)[:-9], home),
        (["dashboard", "--ticket", "-", "--bind", "127.0.0.1:0"], bad, home),
    ):
        code, said = _swarmtrain(*arguments, given=given, **environment)
        assert code in (2, 3, 4, 6, 8), said
        watch.look(f"swarmtrain {arguments[0]} with a bad ticket ({len(given)} given)", said)


def _dashboard(watch: Watch, folder: Path, seat: Seat) -> None:
    """The dashboard with a token: its pages, a log-in, wrong tokens, its output."""
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(TOKEN + "\n")
    place = ["--site", str(seat.site.folder), "--token-file", str(file)]
    viewer = subprocess.Popen(
        [sys.executable, "-m", "swarmtrain", "dashboard", "--bind", "127.0.0.1:0", *place],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    try:
        assert viewer.stdout is not None
        for line in viewer.stdout:
            said.append(line)
            if found := re.search(r"dashboard: (http\S+)", line):
                break
        assert found, said
        rest = threading.Thread(target=lambda: said.extend(viewer.stdout or ()), daemon=True)
        rest.start()
        url = found[1].rstrip("/")
        watch.look("address of the dashboard", url)
        watch.processes("dashboard")
        _browse(watch, url)
        viewer.send_signal(signal.SIGINT)
        viewer.wait(WAIT_S)
        rest.join(WAIT_S)
    finally:
        stop_process(viewer)
    watch.look("output of the dashboard", "".join(said))


def _browse(watch: Watch, url: str) -> None:
    with httpx.Client(base_url=url, timeout=WAIT_S) as browser:
        for page in PAGES:
            for token in (TOKEN, "wrong" * 8):
                answer = browser.get(page, headers={"Authorization": f"Bearer {token}"})
                watch.look(
                    f"{page} with {token[:5]}", answer.content + bytes(str(answer.headers), "utf-8")
                )
        answer = browser.post("/login", data={"token": "wrong"})
        assert answer.status_code == 401
        watch.look("refused log-in", answer.content)
        answer = browser.post("/login", data={"token": TOKEN})
        assert answer.status_code == 303
        watch.look("log-in", answer.content + answer.headers["location"].encode())
        (cookie,) = browser.cookies.jar
        assert "HttpOnly" in cookie._rest and cookie.value
        watch.secrets["session cookie"] = cookie.value.encode()
        for page in PAGES:
            watch.look(f"{page} after log-in", browser.get(page).content)


@pytest.mark.slow
@pytest.mark.parametrize("around", [b"", b"a", b"ab", b"abc"])
def test_a_secret_is_found_however_it_is_spelled(around: bytes) -> None:
    secret = bytes(range(200, 240))
    written = around + secret + around
    for text in (
        written,
        written.hex(),
        written.hex().upper(),
        base64.b64encode(written),
        base64.urlsafe_b64encode(written),
        repr(written),
    ):
        watch = Watch()
        watch.secrets["it"] = secret
        watch.look("here", b"before " + text if isinstance(text, bytes) else f"before {text}")
        assert watch.found == ["it in here"], text
    watch.look("there", base64.b64encode(bytes(100)))
    assert len(watch.found) == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_secret_is_in_any_output_of_a_run(tmp_path: Path) -> None:
    watch = Watch()
    watch.secrets["dashboard token"] = TOKEN.encode()
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2)
        ticket = founder.ticket()
        ada = swarm.enter("ada", ticket)
        watch.secrets["founder's key"] = _key(founder.site.founder_path)
        for seat in (founder, ada):
            watch.secrets[f"identity of {seat.name}"] = _key(seat.site.identity_path)
        watch.secrets["ticket"] = ticket.capability
        watch.secrets["end of the ticket"] = ticket.capability[-40:]
        trainers = [
            Trainer(s.site, Plan(key=k, phase_s=0.05)).start() for k, s in ((1, founder), (2, ada))
        ]
        with closing_all(*trainers):
            ada.wait_applied(2)
            assert watch.processes("training") >= 4
            _mistakes(watch, tmp_path, ticket)
            _dashboard(watch, tmp_path, founder)
            for seat in (founder, ada):
                _ask(watch, seat)
        for seat in (founder, ada):
            seat.stop()
    _files(watch, tmp_path)
    assert not watch.found, "\n".join(watch.found)
    assert len(watch.looked) > 80 and sum(watch.looked.values()) > 100_000


def _ask(watch: Watch, seat: Seat) -> None:
    for call in CALLS:
        try:
            answer: Any = seat.call(call)
        except SwarmError as error:
            answer = f"{error.what} {error.why} {error.todo}"
        watch.look(f"{call} of {seat.name}", msgspec.json.encode(answer))
    for command in ("status", "peers", "rounds", "events", "ticket list", "config show"):
        arguments = [*command.split(), "--site", str(seat.site.folder)]
        watch.look(f"{command} of {seat.name}", _swarmtrain(*arguments, "--json")[1])
    watch.look(f"repr of {seat.name}", repr((seat.site, seat.site.ticket(), seat.site.identity())))


def _files(watch: Watch, folder: Path) -> None:
    """Every file that the run has left; the safe ones hold the secrets, or the test is blind."""
    safe = Watch()
    safe.secrets = {k: v for k, v in watch.secrets.items() if "cookie" not in k}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            continue
        if path.name in SAFE:
            assert stat.S_IMODE(status.st_mode) == 0o600, f"{path} is not for its owner alone"
            safe.look(path.name, path.read_bytes())
        else:
            watch.look(str(path.relative_to(folder)), path.read_bytes())
    told = {line.rpartition(" in ")[0] for line in safe.found}
    assert told == set(safe.secrets), "a secret is not where it is kept: the search is blind"
