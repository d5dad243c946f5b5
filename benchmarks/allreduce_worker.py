"""One process of `allreduce.py`: holds every system under test and reduces on command.

Arguments: rank, number of processes, systems, path of a rendezvous file. Commands come as JSON
lines on standard input, answers go out as JSON lines.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

F32 = npt.NDArray[np.float32]
ERROR_L2_MAX = {"fp32": 1e-6, "bf16": 5e-3, "int8": 2e-2}


def vector(rank: int, values: int) -> F32:
    """Gaussian f32[values] of one rank; any rank can make any other rank's."""
    return np.random.default_rng([rank, values]).standard_normal(values, dtype=np.float32)


@functools.lru_cache(maxsize=1)
def inputs(rank: int, peers: int, values: int) -> tuple[F32, F32]:
    """This rank's vector and the mean over all ranks, before the factor of a call."""
    mean = np.mean([vector(other, values) for other in range(peers)], axis=0, dtype=np.float64)
    return vector(rank, values), mean.astype(np.float32)


class Gloo:
    """torch.distributed with TCP on loopback; a mean, so the division is timed too."""

    def __init__(self, rank: int, peers: int, store: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self._torch, self._dist, self._peers = torch, dist, peers
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=peers)

    def barrier(self) -> None:
        self._dist.barrier()

    def reduce(self, array: F32, codec: str) -> F32:
        tensor = self._torch.from_numpy(array.copy())
        self._dist.all_reduce(tensor)
        tensor /= self._peers
        result: F32 = tensor.numpy()
        return result

    def close(self) -> None:
        self._dist.destroy_process_group()


class Swarmtrain:
    """A member without training: `swarmtrain.Peer`."""

    def __init__(self, rank: int, peers: int, ticket: str | None) -> None:
        import swarmtrain

        self._peers = peers
        self._peer = swarmtrain.Peer.start(ticket=ticket, listen="127.0.0.1:0", name=f"rank{rank}")
        self.ticket: str = self._peer.ticket

    def barrier(self) -> None:
        self._peer.all_reduce(np.zeros(1, np.float32), group="barrier", expect=self._peers)

    def reduce(self, array: F32, codec: str) -> F32:
        group = f"{codec}-{len(array)}"
        reduced = self._peer.all_reduce(array, codec=codec, group=group, expect=self._peers)
        assert len(reduced.contributors) == self._peers, "a contribution was left out"
        return np.asarray(reduced.values)

    def close(self) -> None:
        self._peer.close()


class Hivemind:
    """hivemind's averager with a target group size, which spares it the matchmaking timeout."""

    def __init__(self, rank: int, peers: int, addresses: list[str] | None) -> None:
        import hivemind
        import torch

        self._torch, self._hivemind, self._peers = torch, hivemind, peers
        self._dht = hivemind.DHT(initial_peers=addresses or [], start=True)
        self.addresses = [str(address) for address in self._dht.get_visible_maddrs()]
        self._averager: Any = None
        self._size = 0

    def barrier(self) -> None:
        return

    def reduce(self, array: F32, codec: str) -> F32:
        if self._size != len(array):
            if self._averager is not None:
                self._averager.shutdown()
            self._averager = self._hivemind.DecentralizedAverager(
                [self._torch.zeros(len(array))],
                dht=self._dht,
                prefix=f"bench{len(array)}",
                target_group_size=self._peers,
                min_group_size=self._peers,
                min_matchmaking_time=1.0,
                request_timeout=0.5,
                start=True,
            )
            self._size = len(array)
        with self._averager.get_tensors() as tensors:
            tensors[0].copy_(self._torch.from_numpy(array))
        assert self._averager.step(timeout=60) is not None, "no group was formed"
        with self._averager.get_tensors() as tensors:
            result: F32 = tensors[0].numpy().copy()
        return result

    def close(self) -> None:
        if self._averager is not None:
            self._averager.shutdown()
        self._dht.shutdown()


def say(**answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def timed(system: Any, name: str, rank: int, peers: int, command: dict[str, Any]) -> dict[str, Any]:
    """One call: seconds, and the distance from NumPy's mean relative to its length."""
    values, codec, call = command["values"], command["codec"], command["call"]
    own, mean = inputs(rank, peers, values)
    factor = np.float32(1 + call)  # another input each time: a stale result is a wrong result
    array, expected = own * factor, mean * factor
    system.barrier()
    start = time.perf_counter()
    result = system.reduce(array, codec)
    seconds = time.perf_counter() - start
    error = float(np.linalg.norm(result - expected) / (np.linalg.norm(expected) or 1.0))
    allowed = ERROR_L2_MAX[codec if name == "swarmtrain" else "fp32"]
    if not error <= allowed:
        return {"error": f"rank {rank}: relative error {error:.3g}, at most {allowed:g}"}
    if name == "hivemind":  # its members end with results that differ in the last bits
        return {"seconds": seconds, "error_l2": error, "root": ""}
    root = blake3(np.ascontiguousarray(result).view(np.uint8)).hexdigest()
    return {"seconds": seconds, "error_l2": error, "root": root}


def main() -> None:
    rank, peers, names, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    systems: dict[str, Any] = {}
    wanted = names.split(",")
    ticket: dict[str, Any] = {}
    if rank:
        ticket = json.loads(sys.stdin.readline())["ticket"]
    if "swarmtrain" in wanted:
        systems["swarmtrain"] = Swarmtrain(rank, peers, ticket.get("swarmtrain"))
    if "hivemind" in wanted:
        systems["hivemind"] = Hivemind(rank, peers, ticket.get("hivemind"))
    if not rank:
        given: dict[str, Any] = {}
        if "swarmtrain" in systems:
            given["swarmtrain"] = systems["swarmtrain"].ticket
        if "hivemind" in systems:
            given["hivemind"] = systems["hivemind"].addresses
        say(ticket=given)
    if "gloo" in wanted:
        systems["gloo"] = Gloo(rank, peers, store)
    say(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "stop":
            break
        name = command["system"]
        try:
            say(**timed(systems[name], name, rank, peers, command))
        except Exception as error:  # noqa: BLE001 (the driver prints it and ends the run)
            say(error=f"rank {rank}: {type(error).__name__}: {error}")
    for system in systems.values():
        system.close()


if __name__ == "__main__":
    main()
