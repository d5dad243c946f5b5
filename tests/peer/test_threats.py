"""Rows of the threat table (docs/reliability.md) that no other test shows whole: T2, T4, T15.

Each shows three things: what is hostile is refused, whoever sent it is named, and nobody's state
is another than without it. The other rows are shown where the code they concern is tested; the
table in the document names the test of every row, and the last test here compares.
"""

from __future__ import annotations

import functools
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from swarmtrain_peer import storeformat
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols import entries as e
from swarmtrain_protocols import messages
from swarmtrain_protocols.codecs import CODEC_NAMES, get_codec
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds import leader
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.state import CanonicalState
from tests.protocols.rounds_kit import CHUNK, IDS, TRAIN, VALUES, Net, full

ROOT = Path(__file__).resolve().parents[2]
LIAR = 2

# -- T2: values and scales that are no numbers ----------------------------------------------------

NUMBERS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**101)
HOSTILE: dict[str, list[Callable[[memoryview], None]]] = {}


def _write(view: memoryview, kind: str, at: int, value: float) -> None:
    np.frombuffer(view, kind)[at] = value


def _write_bf16(view: memoryview, value: float) -> None:
    bits = np.array([value], np.float32).view(np.uint32)[0] >> 16
    np.frombuffer(view, "<u2")[0] = bits


HOSTILE["fp32"] = [functools.partial(_write, kind="<f4", at=0, value=value) for value in NUMBERS]
HOSTILE["bf16"] = [functools.partial(_write_bf16, value=value) for value in NUMBERS]
# The scale of a block stands first, and no code can mend it.
HOSTILE["int8"] = [
    functools.partial(_write, kind="<f4", at=0, value=value) for value in (*NUMBERS, -1.0, -1e-30)
]
CASES = [(name, number) for name in CODEC_NAMES for number in range(len(HOSTILE[name]))]


def _poisoned(codec: str, number: int) -> Blob:
    """Honest values, but for one that the codec's own encoder would never write."""
    found, chunks = get_codec(codec), []
    for start in range(0, VALUES, CHUNK):
        n = min(CHUNK, VALUES - start)
        chunk = bytearray(found.encoded_nbytes(n))
        found.encode(np.full(n, 0.5, np.float32), chunk)
        chunks.append(memoryview(chunk))
    with np.errstate(over="ignore"):
        HOSTILE[codec][number](chunks[0])
    return Blob.of(chunks)


def _honest_parts(patch: pytest.MonkeyPatch) -> None:
    """The liar owns nothing, or it would spoil a sum that only it sees."""
    plan = leader.plan_parts

    def fair(values: int, owners: list[bytes], *others: Any) -> tuple[e.Part, ...]:
        return plan(values, [k for k in owners if k != IDS[LIAR]], *others)

    patch.setattr(leader, "plan_parts", fair)


def _round(codec: str, poison: int | None) -> tuple[Net, list[bytes]]:
    """One round of three members, or of two beside a liar; what the honest two hold then."""
    net = Net(3, codec_scatter=codec, codec_gather="fp32", outer_momentum=0.9)
    net.model()
    for index, value in enumerate((1.0, 3.0)):
        peer = net[index]
        blob = peer.data.encode(full(value), codec)
        peer.node.contribute(net.now, _offer(blob, codec))
        net.carry_out(peer)
    if poison is not None:
        liar, blob = net[LIAR], _poisoned(codec, poison)
        liar.data.register(blob)
        liar.node.contribute(net.now, _offer(blob, codec))
        net.carry_out(liar)
    net.run(20.0)
    return net, [net[i].data.states[TRAIN].root() for i in (0, 1)]


def _offer(blob: Blob, codec: str) -> Offer:
    return Offer(TRAIN, blob.root, VALUES, codec, samples=4.0, base_round=0, expect=0)


@functools.cache
def _without(codec: str) -> list[bytes]:
    return _round(codec, None)[1]


@pytest.mark.parametrize(("codec", "number"), CASES)
def test_t2_values_and_scales_that_are_no_numbers_change_no_bit(
    codec: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _honest_parts(monkeypatch)
    with pytest.raises(PeerFault) as refused:
        get_codec(codec).check(bytes(_poisoned(codec, number).chunks[0]), CHUNK)
    assert refused.value.code in ("non_finite", "malformed")
    net, found = _round(codec, number)
    assert found == _without(codec), "a bit of somebody else's state is another"
    history = net[0].node.ledger.channels[TRAIN].history
    assert [member for member, _, _ in history[0].contributors] == sorted(IDS[:2])
    accused = {
        (event.fields["peer"], event.fields["fault"])
        for index in (0, 1)
        for event in net[index].told_of(fx.Notice)
        if event.name == "peer_fault"
    }
    assert {peer for peer, _ in accused} == {IDS[LIAR].hex()}


# -- T4: replay -----------------------------------------------------------------------------------


def test_t4_everything_that_was_ever_said_is_said_again_and_counts_once() -> None:
    """Votes, contributions, results and joins of ten rounds, to whom they were said, twice."""
    net = Net(3)
    theta = net.model()
    for _ in range(10):
        for index in range(3):
            net.contribute(index, full(3.0))
        net.run(2.0)
        theta = theta - np.float32(3.0)
    said = list(net.log)
    assert len(said) > 300
    before = [peer.node.ledger.snapshot() for peer in net.peers.values()]
    for _ in range(2):
        for sender, to, message in said:
            again = messages.decode(messages.encode(message))
            net.peers[to].node.receive(net.now, PeerId(sender), again)
        net.run(1.0)
    for peer, snapshot in zip(net.peers.values(), before, strict=True):
        found = msgspec.msgpack.decode(peer.node.ledger.snapshot())
        was = msgspec.msgpack.decode(snapshot)
        assert found["channels"] == was["channels"], "a round was decided twice"
        assert peer.data.states[TRAIN].round == 10
        assert peer.data.states[TRAIN].theta.tobytes() == theta.tobytes()
    for index in range(3):
        net.contribute(index, full(6.0))
    net.run(5.0)
    for peer in net.peers.values():
        assert peer.data.states[TRAIN].theta.tobytes() == (theta - np.float32(6.0)).tobytes()


# -- T15: names that lead elsewhere ---------------------------------------------------------------

PIECES = (
    "..", ".", "/", "\\", "\x00", "etc", "passwd", "C:", "%2e%2e", "~", "\u2024\u2024", "\n", " ",
    "CON", "dev/zero", "\u202e", "a" * 200, "$HOME", "state.safetensors", "-rf",
)  # fmt: skip


def hostile_names(count: int = 500) -> list[str]:
    rng = Random(15)
    fixed = ["", ".", "..", "../x", "/etc/passwd", "a/../../b", "a\x00b", "..\\..\\x", "\u2025/x"]
    made = ["".join(rng.choices(PIECES, k=rng.randrange(1, 5))) for _ in range(count - len(fixed))]
    return fixed + made


def _sealed(entry: dict[str, object]) -> bytes:
    body = msgspec.json.encode({"format": 1, "channels": [entry]})
    return blake3(body).hexdigest().encode() + b"\n" + body


def test_t15_no_name_leads_out_of_its_folder(tmp_path: Path) -> None:
    """A checkpoint's manifest with a right checksum and 500 wrong file names; channels likewise."""
    store = StateStore(tmp_path / "state")
    state = CanonicalState.first(TRAIN, np.arange(40, dtype=np.float32), chunk_values=16)
    store.save([state])
    (manifest,) = (tmp_path / "state").rglob("manifest*")
    (stored,) = (tmp_path / "state").rglob("*.safetensors")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(stored.read_bytes())
    entry = msgspec.to_builtins(storeformat.entry_of(state))
    good = manifest.read_bytes()
    for name in [*hostile_names(), "../../outside.safetensors", str(outside)]:
        manifest.write_bytes(_sealed({**entry, "file": name}))
        loaded = StateStore(tmp_path / "state").load()
        assert loaded.channels == {} and len(loaded.refused) == 1, name
        assert str(manifest.parent) in str(loaded.refused[0]), "it does not say which file"
    manifest.write_bytes(good)
    assert StateStore(tmp_path / "state").load().channels[TRAIN].state.root() == state.root()
    for name in hostile_names():
        path = tmp_path / f"{storeformat.file_name(name)}.safetensors"
        assert path.resolve().parent == tmp_path.resolve(), name
    assert outside.read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("kind", ["link", "folder", "sparse"])
def test_t15_what_is_no_plain_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    """A link to something else, a folder, a file that claims terabytes: named, and not read."""
    store = StateStore(tmp_path / "state")
    state = CanonicalState.first(TRAIN, np.arange(40, dtype=np.float32), chunk_values=16)
    store.save([state])
    (stored,) = (tmp_path / "state").rglob("*.safetensors")
    stored.unlink()
    if kind == "link":
        (tmp_path / "secret").write_bytes(b"s" * 999)
        stored.symlink_to(tmp_path / "secret")
    elif kind == "folder":
        stored.mkdir()
    else:
        with stored.open("wb") as file:
            file.truncate(1 << 40)
    loaded = StateStore(tmp_path / "state").load()
    assert loaded.channels == {} and len(loaded.refused) == 1
    assert str(stored) in str(loaded.refused[0])


def test_t15_loading_takes_the_memory_that_the_manifest_says(tmp_path: Path) -> None:
    """CK5: the values and momentum of an entry, read once; of a file that is too large, nothing."""
    values, spare = 1 << 20, 1 << 20
    told = 8 * values
    store = StateStore(tmp_path / "state")
    store.save([CanonicalState.first(TRAIN, np.ones(values, np.float32), chunk_values=1 << 16)])
    assert told * 0.9 < _peak_bytes(tmp_path, channels=1) < 2 * told + spare
    (stored,) = (tmp_path / "state").rglob("*.safetensors")
    with stored.open("ab") as file:
        file.truncate(64 * told)
    assert _peak_bytes(tmp_path, channels=0) < spare


def _peak_bytes(folder: Path, channels: int) -> int:
    """Most that was allocated while the checkpoint in ``folder`` was loaded."""
    tracemalloc.start()
    try:
        loaded = StateStore(folder / "state").load()
        assert len(loaded.channels) == channels
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- the table ------------------------------------------------------------------------------------

ROWS = ("T2", "T3", "T4", "T10", "T12", "T13", "T15", "T16", "T17", "T19")


def test_the_table_of_threats_names_a_test_that_exists_for_every_row() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = text.split("\n## Threats\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (T\d+) \|.*\|([^|]*)\|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(ROWS)
    for name, cell in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", cell)
        assert named, name
        for file, test in named:
            path = ROOT / file
            assert path.is_file(), (name, file)
            assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), (name, test)
