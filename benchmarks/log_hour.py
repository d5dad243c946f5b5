"""``python -m benchmarks.log_hour``: what the replicated log costs in an hour of training.

Five stewards and the other members as followers, in virtual time: a round every few seconds, with
the entries and sizes that rounds really have, a member that comes or goes every ten seconds, and
other stewards every ten minutes. Counted are the bytes that each site writes, what lies on its disk
at most, and what it sends. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blake3

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId, Persist
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.messages import Message, RoundKey, encode
from tests.protocols import log_world
from tests.protocols.log_world import FOUNDER, RUN, Site, World

CHURN_S = 10.0
STEWARDS_S = 600.0
VOTERS = 5
CHANNEL = "train/0/0"


def name_of(number: int) -> str:
    return chr(ord("A") + number)


def hashed(*words: object) -> bytes:
    return blake3.blake3(repr(words).encode()).digest()


class Costly(World):
    """A world with the real ledger at every site, that counts bytes."""

    def __init__(self, members: int, parts: int) -> None:
        super().__init__(1, "".join(map(name_of, range(members))), compact_every=512, hints=5)
        self.parts = parts
        self.wire: Counter[str] = Counter()
        self.by_site: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.on_disk: Counter[str] = Counter()
        self.round = 0

    def send(self, source: Site, to: PeerId, message: Message) -> None:
        nbytes = len(encode(message))
        self.wire[type(message).__name__] += nbytes
        self.by_site[source.name] += nbytes
        super().send(source, to, message)

    def wrote(self, site: Site, effect: Persist) -> None:
        framed = len(effect.record) + 12
        self.written[site.name] += framed
        lies = sum(len(record) + 12 for record in site.disk)
        self.on_disk[site.name] = max(self.on_disk[site.name], lies)

    def joined(self, number: int) -> e.MemberJoined:
        return e.MemberJoined(
            member=self.sites[name_of(number)].id,
            name=f"machine-{number}",
            addresses=(f"203.0.113.{number}:40001",),
            trains=True,
            holds_state=True,
            may_vote=True,
            reachable=True,
            ticket=bytes(8),
            life=bytes(8),
        )

    def train(self, members: list[int]) -> None:
        """One round, entry by entry."""
        number, people = self.round, [self.sites[name_of(n)].id for n in members]
        key = RoundKey(0, CHANNEL, number, 0)
        listed = tuple(e.Contributor(p, hashed(number, p), 80.0, number) for p in sorted(people))
        owners = sorted(people)[: self.parts]
        parts = tuple(
            e.Part(i, 1, owner, owners[(i + 1) % len(owners)]) for i, owner in enumerate(owners)
        )
        holders = tuple(sorted(people))
        opened = e.RoundOpened(
            key, listed, parts, holders, self.parts << 18, "int8", "int8", hashed("state", number)
        )
        share = e.Coefficient
        chosen = tuple(share(i, 1.0 / len(listed)) for i in range(len(listed)))
        for body in (
            opened,
            e.RoundSet(key, chosen),
            e.RoundCommitted(key, hashed("result", number), holders[: len(holders) // 2 + 1]),
        ):
            assert self.propose(body=body)
        self.round += 1


class RealLedger:
    """The ledger of a run, behind the interface of the log's test world."""

    def __init__(self) -> None:
        self.index = -1
        self.digest = bytes(32)
        self.real = Ledger()

    def apply(self, index: int, term: int, body: e.EntryBody) -> None:
        self.index = index
        self.real.apply(index, body)

    def snapshot(self) -> bytes:
        return self.real.snapshot()

    def load(self, index: int, data: bytes) -> None:
        self.index, self.real = index, load_snapshot(data)


def run_hour(members: int, round_s: float, parts: int, seconds: float = 3600.0) -> dict[str, Any]:
    """Figures of one hour (or less, scaled up)."""
    with patch.object(log_world, "Ledger", RealLedger):
        return _run(members, round_s, parts, seconds)


def _run(members: int, round_s: float, parts: int, seconds: float) -> dict[str, Any]:
    world, rng = Costly(members, parts), random.Random(2)
    _watch(world)
    everybody = list(range(members))
    world.start("".join(map(name_of, everybody)))
    for number in everybody:
        assert world.propose(body=world.joined(number))
    root = hashed("state", 0)
    layout = (e.ChannelLayout(CHANNEL, parts << 18),)
    assert world.propose(body=e.ModelDefined(bytes(32), layout, (root,), FOUNDER.peer_id))
    world.vote_with("".join(map(name_of, everybody[:VOTERS])))
    assert world.run(20.0, lambda: world.set_in_force("".join(map(name_of, everybody[:VOTERS]))))
    world.wire.clear(), world.written.clear(), world.by_site.clear()
    present, away, began = list(everybody), -1, world.now
    churn, stewards, other = began + CHURN_S, began + STEWARDS_S, False
    while world.now < began + seconds:
        world.train(present)
        world.run(round_s)
        if world.now >= churn:
            churn += CHURN_S
            if away < 0:
                away = rng.choice(present[VOTERS + 1 :] or present[-1:])
                present.remove(away)
                leaver = world.sites[name_of(away)].id
                assert world.propose(body=e.MemberLeft(leaver, "lost"))
            else:
                assert world.propose(body=world.joined(away))
                present, away = sorted([*present, away]), -1
        if world.now >= stewards:
            stewards, other = stewards + STEWARDS_S, not other
            chosen = [*range(VOTERS - 1), VOTERS if other else VOTERS - 1]
            world.vote_with("".join(map(name_of, chosen)))
    assert world.run(30.0, world.caught_up)
    return _figures(world, members, round_s, 3600.0 / seconds)


def _watch(world: Costly) -> None:
    for site in world.sites.values():
        write = site._write

        def counted(effect: Persist, site: Site = site, write: Any = write) -> None:
            write(effect)
            world.wrote(site, effect)

        site._write = counted  # type: ignore[method-assign]


def _figures(world: Costly, members: int, round_s: float, scale: float) -> dict[str, Any]:
    stewards = [name_of(n) for n in range(VOTERS - 1)]
    others = [n for n in world.sites if n not in stewards and n != name_of(VOTERS)]
    site = next(s for s in world.sites.values() if s.core is not None)
    entries = sum(len(body) for _, body in world.newest.truth)
    leader = max(world.by_site, key=lambda n: world.by_site[n])
    return {
        "members": members,
        "stewards": VOTERS,
        "rounds_per_hour": round(world.round * scale),
        "entries_per_hour": round(len(world.newest.truth) * scale),
        "entry_bytes_per_hour": round(entries * scale),
        "steward_writes_bytes_per_hour": round(max(world.written[n] for n in stewards) * scale),
        "member_writes_bytes_per_hour": round(max(world.written[n] for n in others) * scale),
        "on_disk_bytes_max": max(world.on_disk.values()),
        "entries_kept_max": 2 * limits.LOG_COMPACT_ENTRIES,
        "snapshot_bytes": len(site.ledger.snapshot()),
        "leader_sends_bytes_per_hour": round(world.by_site[leader] * scale),
        "other_sites_send_bytes_per_hour": round(
            max(world.by_site[n] for n in world.sites if n != leader) * scale
        ),
        "all_sent_bytes_per_hour_by_kind": {
            kind: round(nbytes * scale) for kind, nbytes in sorted(world.wire.items())
        },
        "run": RUN.hex()[:8],
        "round_s": round_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--round-s", type=float, default=5.0)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3600.0, help="simulated, scaled up")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = run_hour(given.members, given.round_s, given.parts, given.seconds)
    text = json.dumps(found, indent=1)
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
