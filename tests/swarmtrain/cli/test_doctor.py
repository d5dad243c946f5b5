"""Every cause that ``doctor`` knows is produced here, and its sentence read."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swarmtrain.cli import doctor
from swarmtrain.cli.main import app
from swarmtrain_peer import checkup
from swarmtrain_peer.findings import CAUSES, CHECKS, Finding, amount, good, span
from swarmtrain_peer.routes import Route, probe, reach
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import RunKeys, Ticket
from swarmtrain_protocols.messages.session import Refused
from swarmtrain_protocols.tickets import Capability, sign_capability
from tests.peer.transport_kit import Node
from tests.swarmtrain.cli.rig import Rig

RUN = b"r" * 32
KEY = Ed25519Keyring(b"\x07" * 32)
HOUR_S = 3600.0
Produced = list[Finding]


def ticket(*addresses: str, **grant: Any) -> Ticket:
    """Signed by somebody: nobody here asks by whom."""
    capability = Capability(**{"id": b"ticket-1", "run": RUN, **grant})
    return Ticket(addresses or ("127.0.0.1:4000",), RUN, sign_capability(KEY, capability))


def key_file(folder: Path, data: bytes, mode: int) -> Produced:
    path = folder / "identity.key"
    path.write_bytes(data)
    path.chmod(mode)
    return [checkup.check_key(path)[0]]


def reached(address: str) -> Produced:
    trouble, _ = asyncio.run(reach(address, 5.0))
    assert trouble is not None
    return [trouble]


async def tried(address: str, timeout_s: float = 5.0) -> Route:
    return await probe(address, keyring=KEY, run=RUN, capability=b"", timeout_s=timeout_s)


def probed(**hello: Any) -> Produced:
    """A probe of a real peer on loopback that says or does what ``hello`` has."""

    async def story() -> Produced:
        async with Node(3, **hello) as peer:
            return (await tried(peer.address)).findings

    return asyncio.run(story())


def served(answer: Callable[[asyncio.StreamWriter], Awaitable[None]], timeout_s: float) -> Produced:
    """A probe of a server that is no peer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(writer)

    async def story() -> Produced:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return (await tried(f"127.0.0.1:{port}", timeout_s)).findings
        finally:
            server.close()

    return asyncio.run(story())


async def web_page(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 50)
    await writer.drain()
    writer.close()


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(2.0)
    writer.close()


def closed_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def taken_port() -> Produced:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return [checkup.check_port(f"127.0.0.1:{sock.getsockname()[1]}")]


def forbidden_port(patch: pytest.MonkeyPatch) -> Produced:
    """The system's refusal, which the tests may be too mighty to get."""

    class Forbidden(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    patch.setattr(checkup.socket, "socket", Forbidden)
    return [checkup.check_port("0.0.0.0:443")]


def slow_disk(folder: Path, patch: pytest.MonkeyPatch) -> Produced:
    times = iter((0.0, 2.5))
    patch.setattr(checkup.host, "mono_s", lambda: next(times))
    return checkup.check_disk(folder, 0)


def blocked_folder(folder: Path) -> Produced:
    (folder / "file").write_text("not a folder")
    return checkup.check_disk(folder / "file" / "home", 0)


def without_torch(folder: Path, patch: pytest.MonkeyPatch) -> Produced:
    """The device probe in an environment whose ``torch`` is not there."""
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    before = doctor.child_environment()
    found = {**before, "PYTHONPATH": f"{folder}{os.pathsep}{before.get('PYTHONPATH', '')}"}
    patch.setattr(doctor, "child_environment", lambda: found)
    return [doctor.check_device("auto")]


def unwell(folder: Path) -> Produced:
    """A live site whose run has lost its stewards."""
    rig = Rig(folder)
    try:
        live = doctor.live_site(rig.home, None)
        assert live is not None
        live.status["leader"], live.peers = None, live.peers[:1]
        return doctor.look_at_live(live, 0.5)
    finally:
        rig.close()


Produce = Callable[[Path, pytest.MonkeyPatch], Produced]
NOW_S = time.time()
MEMBER = {"members": 3, "connected": 2}
CASES: dict[str, tuple[Produce, str]] = {
    "key_open": (
        lambda f, p: key_file(f, bytes(32), 0o644),
        "Others on this machine may read the key file",
    ),
    "key_damaged": (
        lambda f, p: key_file(f, b"short", 0o600),
        "is damaged: 5 bytes instead of 32.",
    ),
    "ticket_malformed": (
        lambda f, p: [checkup.check_ticket("swarm://h:1/abc#x", NOW_S)[0]],
        "The ticket is not whole: the run id between / and # is not 64 hex digits.",
    ),
    "ticket_expired": (
        lambda f, p: [checkup.check_ticket(str(ticket(expires_s=10_000)), 10_300.0)[0]],
        "The ticket expired 5 min ago, if this machine's clock is right.",
    ),
    "ticket_role": (
        lambda f, p: [checkup.check_ticket(str(ticket(role="seed")), NOW_S)[0]],
        "The ticket is for the role seed, which does not train.",
    ),
    "name_unknown": (
        lambda f, p: reached("no-such-host.invalid:4000"),
        "The name no-such-host.invalid cannot be resolved.",
    ),
    "nobody_listens": (
        lambda f, p: reached(closed_port()),
        "answers, and nothing listens on that port.",
    ),
    "no_route": (
        lambda f, p: reached("255.255.255.255:4000"),
        "This machine has no way to 255.255.255.255:4000: ",
    ),
    "no_answer": (
        lambda f, p: served(silence, 0.5),
        "Nothing comes back from 127.0.0.1:",
    ),
    "not_a_peer": (
        lambda f, p: served(web_page, 5.0),
        "answers, and it is no swarmtrain peer.",
    ),
    "other_version": (
        lambda f, p: probed(version=2),
        "speaks another version of the protocol than this one.",
    ),
    "other_run": (
        lambda f, p: probed(run=b"x" * 32),
        "serves another run than the ticket's.",
    ),
    "turned_away": (
        lambda f, p: probed(admit=lambda peer, hello: Refused("not_allowed", "no")),
        "does not let this machine in: this machine's key is not on the run's allow list.",
    ),
    "clock_ahead": (
        lambda f, p: probed(wall_s=int(time.time() - 3 * HOUR_S)),
        "This machine's clock is 3.0 h ahead of that of 127.0.0.1:",
    ),
    "clock_behind": (
        lambda f, p: probed(wall_s=int(time.time() + 600)),
        "This machine's clock is 10 min behind that of 127.0.0.1:",
    ),
    "port_taken": (
        lambda f, p: taken_port(),
        "Another program listens on 127.0.0.1:",
    ),
    "port_forbidden": (
        lambda f, p: forbidden_port(p),
        "This user may not listen on 0.0.0.0:443.",
    ),
    "address_elsewhere": (
        lambda f, p: [checkup.check_port("198.51.100.7:4000")],
        "198.51.100.7:4000 is not an address of this machine.",
    ),
    "outgoing_only": (
        lambda f, p: [checkup.check_port("")],
        "This machine does not listen, so others cannot dial it.",
    ),
    "private_address": (
        lambda f, p: checkup.check_announced(("192.168.1.5:4000",), ("8.8.8.8:4000",)),
        "Others are told 192.168.1.5:4000, which only machines in the same network can dial.",
    ),
    "not_dialled": (
        lambda f, p: checkup.check_member(MEMBER, {"reachable": False}),
        "The log lists this machine as one that others cannot dial.",
    ),
    "nobody_linked": (
        lambda f, p: checkup.check_member({"members": 3, "connected": 0}, {}),
        "This site is one of 3 members, and has a link to none of the others.",
    ),
    "slow_uplink": (
        lambda f, p: [checkup.check_speed((1_000_000.0, 0.0), 125_000_000, "bf16")],
        "Sending one contribution takes 250 s at the measured 1.0 MB/s.",
    ),
    "disk_full": (
        lambda f, p: checkup.check_disk(f / "home", 10**18),
        "and this needs about 4000000.0 TB.",
    ),
    "disk_forbidden": (
        lambda f, p: blocked_folder(f),
        "cannot be written: Not a directory.",
    ),
    "disk_slow": (
        slow_disk,
        "takes 2.5 s.",
    ),
    "memory_low": (
        lambda f, p: [checkup.check_memory(10**13, RunKeys())],
        "of memory are free, and the model of this run needs",
    ),
    "no_torch": (
        without_torch,
        "PyTorch is not installed here, so this machine cannot train.",
    ),
    "no_device": (
        lambda f, p: [doctor.check_device("abacus")],
        "The device abacus cannot be used: ",
    ),
    "run_unwell": (
        lambda f, p: unwell(f),
        "The run is stalled: no majority of stewards answers.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_produced_and_told_in_a_sentence(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce, sentence = CASES[cause]
    found = [one for one in produce(tmp_path, monkeypatch) if one.cause]
    assert [one.cause for one in found] == [cause], "one cause, and no other"
    (one,) = found
    assert sentence in one.sentence and "{" not in one.sentence + one.todo
    assert one.todo.endswith(".") and one.check == CAUSES[cause].check
    assert (one.state == "bad") == (one.exit_code > 0)


def test_nothing_is_found_where_all_is_well(tmp_path: Path) -> None:
    found = probed(wall_s=int(time.time()))
    found += probed()  # an older peer does not say what time it is
    key, keyring = checkup.check_key(tmp_path / "identity.key")
    assert keyring is not None and keyring.peer_id.hex() in key.sentence
    again, same = checkup.check_key(tmp_path / "identity.key")
    assert same is not None and same.peer_id == keyring.peer_id, "the key is made once"
    found += [key, again, checkup.check_ticket(str(ticket()), NOW_S)[0]]
    found += [checkup.check_port("127.0.0.1:0"), checkup.check_memory(1000, RunKeys())]
    found += checkup.check_announced(("192.168.1.5:0",), ("192.168.1.9:4000",))
    found += checkup.check_announced(("8.8.4.4:9",), ("8.8.8.8:4000",))
    found += checkup.check_member(MEMBER, {"reachable": True})
    found += [checkup.check_speed((0.0, 0.0), 1000, "int8")]
    found += [checkup.check_speed((1e6, 1e6), 1000, "int8")]
    found += checkup.check_disk(tmp_path / "not" / "yet", 0)
    found += [checkup.check_memory(0, None)]
    assert {one.state for one in found} == {"good"}
    assert {one.check for one in found} <= set(CHECKS)
    assert not list(tmp_path.glob(".swarmtrain*"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole command without a process that loads torch."""
    monkeypatch.setattr(doctor, "check_device", lambda name: good("device", f"{name} works"))
    monkeypatch.delenv("SWARMTRAIN_TICKET", raising=False)
    yield


def invoke(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments, "--home", str(home)])


@pytest.mark.usefixtures("quick")
def test_the_exit_code_is_the_one_that_joining_would_end_with(tmp_path: Path) -> None:
    assert invoke(tmp_path).exit_code == 0
    bad = invoke(tmp_path, "--ticket", str(ticket(closed_port())))
    assert bad.exit_code == 4 and "1 to correct" in bad.stdout
    assert "BAD   route" in bad.stdout and "Is the peer still running there?" in bad.stdout
    assert invoke(tmp_path, "--ticket", "swarm://nonsense").exit_code == 3
    assert invoke(tmp_path, "--ticket", str(ticket(expires_s=5))).exit_code == 6
    secret = str(ticket()).partition("#")[2]
    assert secret not in invoke(tmp_path, "--ticket", str(ticket())).stdout


@pytest.mark.usefixtures("quick")
def test_one_open_address_is_enough(tmp_path: Path) -> None:
    opened, done = threading.Event(), threading.Event()
    where: list[str] = []

    async def serve() -> None:
        async with Node(3, wall_s=int(time.time())) as peer:
            where.append(peer.address)
            opened.set()
            await asyncio.to_thread(done.wait, 30)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert opened.wait(10)
        text = str(ticket(closed_port(), where[0]))
        result = invoke(tmp_path, "--ticket", text, "--json", "--timeout", "3")
    finally:
        done.set()
        thread.join()
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["ok"] is True
    routes = {f["address"]: f for f in document["findings"] if f["check"] == "route"}
    assert [routes[a]["state"] for a in (text_addresses(text)[0], where[0])] == ["note", "good"]
    assert len(document["key"]) == 64


def text_addresses(text: str) -> tuple[str, ...]:
    return Ticket.parse(text).addresses


@pytest.mark.usefixtures("quick")
def test_a_live_site_is_asked_and_its_peers_are_knocked_at(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        document = json.loads(invoke(tmp_path, "--json", "--timeout", "0.2").stdout)
    finally:
        rig.close()
    checks = {one["check"] for one in document["findings"]}
    assert {"run", "speed", "reachability", "route", "memory"} <= checks


def test_a_live_site_says_whether_its_clock_agrees_with_most_others() -> None:
    def cause(off_s: float | None) -> str:
        return doctor.clock_of({"clock_off_s": off_s}).cause

    assert [cause(off_s) for off_s in (None, 0.0, 30.0)] == ["", "", ""]
    assert [cause(off_s) for off_s in (-9000.0, 400.0)] == ["clock_ahead", "clock_behind"]


def test_units_are_for_people() -> None:
    assert [span(s) for s in (40, 119, 300, 5 * HOUR_S, 86400 * 3)] == [
        "40 s", "119 s", "5 min", "5.0 h", "3.0 d",
    ]  # fmt: skip
    assert [amount(n) for n in (7, 1500, 2e6, 3e9)] == ["7 B", "1.5 kB", "2.0 MB", "3.0 GB"]
