"""All-reduce of swarmtrain against gloo (and hivemind, where it can be imported), in one run.

N separate processes on this machine hold both a gloo group and a swarmtrain peer, and the systems
take turns call by call, so that a noisy machine disturbs all of them alike: trust the ratios. A
call's time is that of its slowest process; the table shows medians. Beside it stands the processor
floor of `floor.py`: what the work itself costs. Every result is checked against NumPy before it
counts.

    python benchmarks/allreduce.py [--peers 2,4] [--sizes 4,4MiB,64MiB] [--codecs fp32,int8]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


class Worker:
    """One process under test; commands and answers are JSON lines."""

    def __init__(self, rank: int, peers: int, systems: list[str], store: str) -> None:
        arguments = [str(rank), str(peers), ",".join(systems), store]
        self.rank = rank
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "allreduce_worker.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._answers.put(line)
        self._answers.put("")

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise SystemExit(f"worker {self.rank}: no answer within {timeout_s:g} s") from None
        if not line:
            raise SystemExit(f"worker {self.rank} ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self._process.poll() is None:
            self.tell(command="stop")
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(peers: int, systems: list[str], folder: str) -> list[Worker]:
    """Start the processes and hand the first one's ticket to the others."""
    workers = [Worker(rank, peers, systems, f"{folder}/store-{peers}") for rank in range(peers)]
    ticket = workers[0].answer(START_TIMEOUT_S)["ticket"]
    for worker in workers[1:]:
        worker.tell(command="ticket", ticket=ticket)
    for worker in workers:
        assert worker.answer(START_TIMEOUT_S)["ready"]
    return workers


def run_case(
    workers: list[Worker], systems: list[str], values: int, codec: str, calls: int
) -> dict[str, list[dict[str, float]]]:
    """Let every system reduce `calls` times, taking turns; the slowest process sets each time."""
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for call in range(calls + 1):
        for system in systems:
            for worker in workers:
                worker.tell(command="reduce", system=system, values=values, codec=codec, call=call)
            answers = [worker.answer(CALL_TIMEOUT_S) for worker in workers]
            for answer in answers:
                if "error" in answer:
                    raise SystemExit(f"{system}, {values} values, {codec}: {answer['error']}")
            assert len({answer["root"] for answer in answers}) == 1, f"{system}: results differ"
            if call:  # the first call warms buffers and kernels
                found[system].append(
                    {
                        "seconds": max(answer["seconds"] for answer in answers),
                        "error": max(answer["error_l2"] for answer in answers),
                    }
                )
    return found


def calls_for(nbytes: int) -> int:
    return 40 if nbytes < 1 << 16 else 15 if nbytes < 1 << 24 else 7


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    seconds = sorted(sample["seconds"] for sample in samples)
    return {
        "median_s": statistics.median(seconds),
        "min_s": seconds[0],
        "p90_s": seconds[int(0.9 * (len(seconds) - 1))],
        "calls": len(seconds),
        "error_l2": max(sample["error"] for sample in samples),
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, as one row each."""
    import floor

    rows: list[dict[str, Any]] = []
    costs = {codec: floor.measure(codec) for codec in arguments.codecs}
    with tempfile.TemporaryDirectory() as folder:
        for peers in arguments.peers:
            workers = start(peers, arguments.systems, folder)
            try:
                for nbytes in arguments.sizes:
                    for codec in arguments.codecs:
                        # gloo has no quantized mode: int8 is compared with its fp32 all the same
                        systems = [
                            system
                            for system in arguments.systems
                            if system != "hivemind" or codec == "fp32"
                        ]
                        values = max(1, nbytes // 4)
                        samples = run_case(workers, systems, values, codec, calls_for(nbytes))
                        rows.append(row(peers, values, codec, samples, costs[codec]))
                        show(rows[-1])
            finally:
                for worker in workers:
                    worker.stop()
    return rows


def row(
    peers: int, values: int, codec: str, samples: dict[str, list[dict[str, float]]], costs: Any
) -> dict[str, Any]:
    import floor

    from swarmtrain_protocols.codecs import get_codec

    parts = floor.floor_parts_s(
        costs, peers, values, get_codec(codec).encoded_nbytes(values), floor.cores()
    )
    systems = {system: summary(taken) for system, taken in samples.items()}
    result: dict[str, Any] = {
        "peers": peers,
        "nbytes": 4 * values,
        "codec": codec,
        "systems": systems,
        "floor_s": sum(parts.values()),
        "floor_parts_s": parts,
    }
    for other in ("gloo", "hivemind"):
        if {other, "swarmtrain"} <= systems.keys():
            ratio = systems["swarmtrain"]["median_s"] / systems[other]["median_s"]
            result[f"ratio_to_{other}"] = ratio
    if "swarmtrain" in systems:
        result["ratio_to_floor"] = systems["swarmtrain"]["median_s"] / result["floor_s"]
    return result


def spelled(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes} B"


def show(result: dict[str, Any]) -> None:
    systems = "  ".join(
        f"{name} {values['median_s'] * 1e3:9.2f} ms (p90 {values['p90_s'] * 1e3:.2f})"
        for name, values in result["systems"].items()
    )
    ratio = "".join(
        f"  x{result[f'ratio_to_{other}']:.2f} of {other}"
        for other in ("gloo", "hivemind")
        if f"ratio_to_{other}" in result
    )
    print(
        f"{result['peers']} peers  {spelled(result['nbytes']):>7}  {result['codec']:5} {systems}"
        f"  floor {result['floor_s'] * 1e3:.2f} ms{ratio}",
        flush=True,
    )


def machine() -> str:
    """A short name of the processor for the result's file name."""
    name = platform.processor() or platform.machine()
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.*)$", listed, re.MULTILINE)
        name = found[1] if found else name
    except OSError:
        name = platform.machine()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]


def write(rows: list[dict[str, Any]], output: Path | None) -> Path:
    import floor

    path = output or RESULTS / f"allreduce-{floor.cores()}core-{machine()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "allreduce",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": floor.cores(),
        "machine": machine(),
        "python": platform.python_version(),
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+)(KiB|MiB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write 4, 512KiB or 64MiB")
    return int(found[1]) * UNITS[found[2] or ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = lambda kind: lambda text: [kind(item) for item in text.split(",")]  # noqa: E731
    parser.add_argument("--peers", type=split(int), default=[2, 4])
    parser.add_argument("--sizes", type=split(size), default=[4, 4 << 20, 64 << 20])
    parser.add_argument("--codecs", type=split(str), default=["fp32", "int8"])
    parser.add_argument("--systems", type=split(str), default=None)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.systems is None:
        arguments.systems = ["gloo", "swarmtrain"]
        if importlib.util.find_spec("hivemind"):
            arguments.systems.append("hivemind")
    print(f"wrote {write(measure(arguments), arguments.output)}")


if __name__ == "__main__":
    main()
