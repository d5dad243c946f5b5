"""Hostile sockets against the listeners of a swarm: ``python -m tests.chaos.attacker``.

Arguments: how many new sockets a second, for how many seconds, and the addresses. Each socket does
one of these: says nothing, drips a byte a second, begins a frame of a gigabyte, sends random bytes,
or closes at once. Prints as JSON how many were opened, refused and cut off.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import sys
import time
from collections import Counter

HELD_MAX = 1500
STAYS_S = 20.0
KINDS = ("silent", "drips", "huge", "noise", "closes")


class Attack:
    """One flood against some addresses."""

    def __init__(self, addresses: list[str], seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._luck = random.Random(seed)
        self._addresses = addresses
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, per_s: float, for_s: float) -> None:
        """Open ``per_s`` sockets a second for ``for_s`` seconds."""
        began = time.monotonic()
        for number in range(int(per_s * for_s)):
            await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
            if len(self._tasks) < HELD_MAX:
                address = self._addresses[number % len(self._addresses)]
                task = asyncio.create_task(self._one(address, KINDS[number // 3 % len(KINDS)]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        for task in self._tasks:
            task.cancel()

    async def _one(self, address: str, kind: str) -> None:
        host, port = address.rsplit(":", 1)
        try:
            async with asyncio.timeout(5.0):
                reader, writer = await asyncio.open_connection(
                    host, int(port), local_addr=self._source(host)
                )
        except (OSError, TimeoutError):
            self.done["refused"] += 1
            return
        self.done["opened"] += 1
        self.done[kind] += 1
        try:
            async with asyncio.timeout(STAYS_S):
                await self._talk(kind, reader, writer)
            self.done["cut off"] += 1
        except TimeoutError:
            self.done["stayed"] += 1
        except OSError:
            self.done["cut off"] += 1
        finally:
            writer.close()

    def _source(self, host: str) -> tuple[str, int] | None:
        """Hosts of its own: on loopback of Linux any of 127/8, so that no honest one is meant."""
        if sys.platform != "linux" or not host.startswith("127."):
            return None
        return f"127.9.{self._luck.randrange(4)}.{self._luck.randint(1, 8)}", 0

    async def _talk(
        self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until the other side ends it."""
        if kind == "closes":
            return
        if kind == "huge":
            writer.write(struct.pack(">I", 1 << 30) + bytes(1024))
        elif kind == "noise":
            writer.write(self._luck.randbytes(self._luck.randint(1, 65536)))
        if kind == "drips":
            ending = asyncio.ensure_future(reader.read(1))
            try:
                while not ending.done():
                    writer.write(b"\x00")
                    await writer.drain()
                    await asyncio.wait({ending}, timeout=1.0)
                await ending
            finally:
                ending.cancel()
                await asyncio.gather(ending, return_exceptions=True)
        else:
            while await reader.read(4096):
                continue


def main(arguments: list[str]) -> int:
    """Attack, and say what came of it."""
    attack = Attack(arguments[2:], seed=1)
    asyncio.run(attack.run(float(arguments[0]), float(arguments[1])))
    sys.stdout.write(json.dumps(attack.done) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
