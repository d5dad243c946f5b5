"""What zstd level 1 saves on the bytes that cross the wire, and what it costs.

``python benchmarks/compression.py`` trains ``lm-small`` alone for some rounds of 20 steps with a
real outer step, then packs chunks as they would be served: contributions in each codec, the
canonical state (θ and outer momentum) and the corpus. Prints, per kind, the share that is
saved, the speed of both directions on one core, the bandwidth of a link below which packing would
shorten a transfer, and the seconds that 8 MB take over a path of 20 Mbit/s as the peer sends them,
when the asker takes packed chunks and when not. Writes JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from swarmtrain.training.data import Corpus, load_corpus, position_of
from swarmtrain.training.presets import build
from swarmtrain_peer.bulk import BulkConnection, BulkPool, Job
from swarmtrain_protocols import limits
from swarmtrain_protocols.bulklink import BulkKeys, Header
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.state import decode_chunks, encode_chunks

STEPS = 20
PATH_BYTES_PER_S = 2.5e6
Chunks = list[bytes]


def vector_of(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def load(model: torch.nn.Module, values: np.ndarray) -> None:
    at = 0
    with torch.no_grad():
        for parameter in model.parameters():
            part = values[at : at + parameter.numel()]
            parameter.copy_(torch.from_numpy(part).view_as(parameter))
            at += parameter.numel()


def train(rounds: int, corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last pseudo-gradient, θ and the outer momentum after it, f32[n] each; rule (0.7, 0.9)."""
    keys = RunKeys(preset="lm-small")
    fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
    preset = build(fields, torch.device("cpu"))
    theta = vector_of(preset.model)
    delta, momentum, codec = theta, np.zeros_like(theta), get_codec("int8")
    for step in range(rounds * STEPS):
        preset.set_lr(step, step)
        batch = corpus.batch(1, position_of(0, step), keys.batch_size, preset.context)
        loss = preset.loss(*(torch.from_numpy(part) for part in batch))
        torch.autograd.backward(loss)
        preset.optimizer.step()
        preset.optimizer.zero_grad()
        if (step + 1) % STEPS == 0:
            delta = theta - vector_of(preset.model)
            mean = np.empty_like(delta)
            decode_chunks(list(encode_chunks(delta, codec)), codec, mean)
            momentum = np.float32(0.9) * momentum + mean
            theta = theta - np.float32(0.7) * (mean + np.float32(0.9) * momentum)
            load(preset.model, theta)
    return delta, theta, momentum


def kinds(rounds: int) -> dict[str, Chunks]:
    """Chunks by kind of blob, as a provider would have them."""
    corpus = load_corpus("stdlib")
    delta, theta, momentum = train(rounds, corpus)
    found: dict[str, Chunks] = {}
    for name in ("fp32", "bf16", "int8"):
        found[f"contribution {name}"] = [bytes(c) for c in encode_chunks(delta, get_codec(name))]
    cuts = range(0, theta.size, limits.CHUNK_VALUES)
    both = [x[i : i + limits.CHUNK_VALUES].tobytes() for i in cuts for x in (theta, momentum)]
    found["state"] = [a + b for a, b in zip(both[::2], both[1::2], strict=True)]
    found["theta alone"] = [theta[i : i + limits.CHUNK_VALUES].tobytes() for i in cuts]
    text, size = corpus.train.tobytes(), limits.CORPUS_CHUNK_BYTES
    found["corpus"] = [text[i : i + size] for i in range(0, 8 * size, size)]
    return found


def best_s(work: Any, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(chunks: Sequence[bytes]) -> dict[str, float]:
    """Share saved and speeds in MB/s of uncompressed bytes, on one core."""
    pack, unpack = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    packed = [pack.compress(chunk) for chunk in chunks]
    nbytes, small = sum(map(len, chunks)), sum(map(len, packed))
    pack_s = best_s(lambda: [pack.compress(chunk) for chunk in chunks])
    unpack_s = best_s(lambda: [unpack.decompress(chunk) for chunk in packed])
    saved = 1 - small / nbytes
    cost_s = pack_s + unpack_s
    return {
        "chunks": len(chunks),
        "chunk_bytes": len(chunks[0]),
        "saved": round(saved, 4),
        "compress_mb_per_s": round(nbytes / pack_s / 1e6, 1),
        "decompress_mb_per_s": round(nbytes / unpack_s / 1e6, 1),
        "pays_below_mbit_per_s": round(max(0.0, saved) * nbytes * 8 / cost_s / 1e6, 1),
    }


class Silent:
    """A sink for a connection that only sends."""

    def begin(self, conn: BulkConnection, header: Header) -> memoryview | None:
        return None

    def end(self, conn: BulkConnection, header: Header, ok: bool) -> None: ...

    def closed(self, conn: BulkConnection, fault: PeerFault | None) -> None: ...


def over_path_s(chunks: Sequence[bytes], bytes_per_s: float, may_pack: bool) -> float:
    """Seconds until the last byte has come out of a path of that rate with small buffers."""
    pool, done = BulkPool(1), threading.Event()
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    right.settimeout(0.2)
    keys = BulkKeys(b"s" * 32, b"i" * 16, b"r" * 16, True)
    conn = pool.add(left, PeerId(b"p" * 32), keys, Silent())
    views = [(i, memoryview(chunk)) for i, chunk in enumerate(chunks)]
    conn.send(Job(1, views, lambda job: done.set(), may_pack=may_pack))
    begin_s, end_s, received = time.perf_counter(), 0.0, 0
    while not done.is_set():
        with contextlib.suppress(TimeoutError):
            received += len(right.recv(16384))
            end_s = begin_s + received / bytes_per_s
            time.sleep(max(0.0, end_s - time.perf_counter()))
    right.close()
    pool.close()
    return end_s - begin_s


def paths(chunks: Sequence[bytes]) -> dict[str, float]:
    """Seconds for 8 MB over 20 Mbit/s, as it is and packed."""
    times = -(-8_000_000 // sum(map(len, chunks)))
    many = (list(chunks) * times)[: max(1, 8_000_000 // len(chunks[0]))]
    return {
        "plain_s": round(over_path_s(many, PATH_BYTES_PER_S, False), 2),
        "packed_s": round(over_path_s(many, PATH_BYTES_PER_S, True), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made = kinds(given.rounds)
    found = {name: {**measure(chunks), **paths(chunks)} for name, chunks in made.items()}
    for name, row in found.items():
        print(f"{name:20}" + "".join(f"  {key} {value:g}" for key, value in row.items()))
    default = Path(__file__).parent / "results" / f"compression-{platform.machine()}.json"
    document = {"level": 1, "zstd": zstandard.ZSTD_VERSION, "rounds": given.rounds, "kinds": found}
    (given.out or default).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
