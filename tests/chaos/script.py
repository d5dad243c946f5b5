"""A history in the making, for tests of the checker, and the ways to break it."""

from __future__ import annotations

from typing import Any

from tests.chaos.history import History

SITES = {f"site-{n}": f"{n:02x}" * 16 for n in range(4)}
CHANNEL = "train/0/0"
BEGAN, CALM, FAULTS, HEALED, SETTLED, ENDED = 1000.0, 1010.0, 1100.0, 1400.0, 1420.0, 1430.0
ROUND_S = 4.0
Record = dict[str, Any]


class Script:
    """A history in the making: four sites, a round every four seconds, nothing wrong."""

    def __init__(self, faults: list[Record] | None = None) -> None:
        self.sites: dict[str, list[Record]] = {site: [] for site in SITES}
        self.conductor: list[Record] = []
        self.outputs = {"site-0.peer.log": "listening\n"}
        self.run: Record = {
            "scenario": "C0",
            "factor": 1.0,
            "sites": dict(SITES),
            "trainers": "synthetic",
            "planned": {},
            "criteria": [],
            "bars": {},
            "micro_batches": 6,
            "began_s": BEGAN,
            "calm_from_s": CALM,
            "faults_from_s": FAULTS,
            "faults_until_s": HEALED,
            "settled_s": SETTLED,
            "ended_s": ENDED,
        }
        for number, site in enumerate(SITES):
            self.note("start", BEGAN, site=site, process="peer", pid=100 + number)
            self.log(site, "peer_started", BEGAN + 1)
            self.log(site, "stewards_changed", BEGAN + 2, voters=list(SITES.values())[:3])
            for at in range(int(BEGAN) + 5, int(ENDED), 5):
                seen = {
                    "pid": 100 + number,
                    "rss_bytes": 80 << 20,
                    "own_bytes": 80 << 20,
                    "fds": 40,
                }
                self.note("sample", float(at), site=site, **seen)
            self.note("stand", ENDED, site=site, channel=CHANNEL, round=101, hash="h101")
            self.note("left over", ENDED, site=site, files=[], mappings=1)
            stand = {"site": site, "channel": CHANNEL, "round": 101, "hash": "h101"}
            self.note("before rebirth", ENDED, **stand)
            self.note("after rebirth", ENDED, **stand)
        for round_ in range(101):
            self.commit(round_, BEGAN + 10 + ROUND_S * round_)
        for at in range(int(CALM), int(HEALED), 2):
            self.note("probe", float(at), site="site-0", took_s=0.01)

    def commit(self, round_: int, at: float) -> None:
        for site in SITES:
            where = {"generation": 0, "channel": CHANNEL, "round": round_, "attempt": 0}
            self.log(site, "round_committed", at, root=f"r{round_}", **where)
            where |= {"round": round_ + 1}
            self.log(site, "state_applied", at + 0.1, state_hash=f"h{round_ + 1}", **where)
            loss = 5.0 - 0.01 * round_
            self.log(site, "evaluated", at + 0.2, loss=loss, round=round_ + 1)
        listed = [{"id": i, "samples": 1 + round_ / 8192} for i in SITES.values()]
        key = {"generation": 0, "channel": CHANNEL, "round": round_}
        self.note("round", at + 1, contributors=listed, **key)

    def log(self, site: str, name: str, at: float, **fields: Any) -> None:
        blank = {"generation": None, "channel": None, "round": None, "attempt": None}
        self.sites[site].append({"name": name, "mono_s": at, **blank, **fields})

    def note(self, what: str, at: float, **fields: Any) -> None:
        self.conductor.append({"what": what, "at_s": at, **fields})

    def fault(self, kind: str, at: float, for_s: float = 0.0, **fields: Any) -> None:
        self.run["planned"][kind] = self.run["planned"].get(kind, 0) + 1
        self.note("fault", at, kind=kind, until_s=at + for_s, **fields)

    def killed(self, site: str, at: float, back_s: float) -> None:
        """A site that was killed and is back after a while."""
        self.fault("kill", at, back_s, site=site, leader=False, process="peer")
        self.note("exit", at, site=site, process="peer", by="kill", code=-9, last="")
        self.note("start", at + back_s, site=site, process="peer", pid=999)

    def silence(self, begin: float, end: float, sites: tuple[str, ...] = tuple(SITES)) -> None:
        """Nothing was committed or applied in that time."""
        for site in sites:
            kept = [r for r in self.sites[site] if not begin < r["mono_s"] < end]
            self.sites[site] = kept

    def drop_rounds(self, begin: float, end: float) -> None:
        """Renumber what is left after a silence, so that only time is lost and no round."""
        self.silence(begin, end)
        for records in self.sites.values():
            for name, shift in (("round_committed", 0), ("state_applied", 1), ("evaluated", 1)):
                for number, r in enumerate(r for r in records if r["name"] == name):
                    r["round"] = number + shift
                    r |= {"root": f"r{number}"} if name == "round_committed" else {}
                    r |= {"state_hash": f"h{number + 1}"} if name == "state_applied" else {}
        last = sum(r["name"] == "round_committed" for r in self.sites["site-0"])
        for record in self.conductor:
            if record["what"] == "stand":
                record |= {"round": last, "hash": f"h{last}"}
        listed = [r for r in self.conductor if r["what"] == "round"]
        kept = [r for r in listed if not begin < r["at_s"] - 1 < end]
        for number, record in enumerate(kept):
            record["round"] = number
        self.conductor = [r for r in self.conductor if r not in listed or r in kept]

    def history(self) -> History:
        self.conductor.sort(key=lambda r: r["at_s"])
        for records in self.sites.values():
            records.sort(key=lambda r: r["mono_s"])
        return History(self.run, self.conductor, self.sites, self.outputs)


def torn_root(s: Script) -> None:
    next(r for r in s.sites["site-2"] if r["name"] == "round_committed")["root"] = "other"


def torn_state(s: Script) -> None:
    next(r for r in s.sites["site-2"] if r["name"] == "state_applied")["state_hash"] = "other"


def two_attempts(s: Script) -> None:
    next(r for r in s.sites["site-2"] if r["name"] == "round_committed")["attempt"] = 1


def nothing_committed(s: Script) -> None:
    s.silence(BEGAN + 5, ENDED)


def gap(s: Script) -> None:
    for records in s.sites.values():
        records[:] = [r for r in records if (r["name"], r["round"]) != ("round_committed", 40)]


def first_missing(s: Script) -> None:
    for records in s.sites.values():
        records[:] = [r for r in records if (r["name"], r["round"]) != ("round_committed", 0)]


def said_twice(s: Script) -> None:
    one = next(r for r in s.sites["site-1"] if r["name"] == "round_committed")
    s.sites["site-1"].append({**one, "mono_s": ENDED})


def applied_backwards(s: Script) -> None:
    one = next(r for r in s.sites["site-1"] if r["name"] == "state_applied")
    s.sites["site-1"].append({**one, "mono_s": ENDED})


def lost_round(s: Script) -> None:
    for record in s.conductor:
        if record["what"] == "stand":
            record |= {"round": 100, "hash": "h100"}


def one_behind(s: Script) -> None:
    next(r for r in s.conductor if r["what"] == "stand")["round"] = 99


def ends_differ(s: Script) -> None:
    next(r for r in s.conductor if r["what"] == "stand")["hash"] = "other"


def nobody_asked(s: Script) -> None:
    s.conductor = [r for r in s.conductor if r["what"] != "stand"]


def data_loss(s: Script) -> None:
    s.log("site-3", "data_loss", 1200.0, reason="all holders are gone")


def rewound(s: Script) -> None:
    s.log("site-3", "rewound", 1200.0, reason="", generation=1)


def twice_counted(s: Script) -> None:
    rounds = [r for r in s.conductor if r["what"] == "round"]
    rounds[7]["contributors"][1]["samples"] = rounds[6]["contributors"][1]["samples"]


def none_counted(s: Script) -> None:
    s.conductor = [r for r in s.conductor if r["what"] != "round"]


def long_wait(s: Script) -> None:
    s.drop_rounds(1200.0, 1270.0)


def member_waits(s: Script) -> None:
    s.silence(1200.0, 1270.0, ("site-2",))


def grows(s: Script) -> None:
    for record in s.conductor:
        if record["what"] == "sample":
            record["own_bytes"] += int((record["at_s"] - BEGAN) / 60.0 * 1.2 * 2**20)


def each_life_larger(s: Script) -> None:
    """No process lives for two minutes, and each one begins where the one before it ended."""
    s.conductor = [r for r in s.conductor if r["what"] != "sample"]
    s.note("exit", BEGAN + 1, site="site-1", process="peer", by="kill", code=-9, last="")
    for number in range(20):
        at, pid = BEGAN + 20.0 * number, 500 + number
        s.note("start", at, site="site-1", process="peer", pid=pid)
        grown = int((80 + 1.2 * (at - BEGAN) / 60.0) * 2**20)
        s.note(
            "sample", at + 50.0, site="site-1", pid=pid, rss_bytes=grown, own_bytes=grown, fds=40
        )
        s.note("exit", at + 19.0, site="site-1", process="peer", by="kill", code=-9, last="")


def leaks_descriptors(s: Script) -> None:
    for record in s.conductor:
        if record["what"] == "sample" and record["site"] == "site-1":
            record["fds"] += int((record["at_s"] - BEGAN) / 6)


def holds_descriptors(s: Script) -> None:
    next(r for r in s.conductor if r["what"] == "sample")["fds"] = 250


def leaves_files(s: Script) -> None:
    found = next(r for r in s.conductor if r["what"] == "left over")
    found["files"] = [{"name": "x.safetensors.partial", "age_s": 75.0}]


def leaves_mappings(s: Script) -> None:
    next(r for r in s.conductor if r["what"] == "left over")["mappings"] = 2


TRACE = """
Traceback (most recent call last):
  File "swarmtrain_peer/driver.py", line 12, in run
    core.tick(now)

AssertionError: a broken invariant
"""


def trace(s: Script) -> None:
    s.outputs["site-1.trainer.log"] = f"training\n{TRACE}done\n"


def fatal(s: Script) -> None:
    s.outputs["site-1.trainer.log"] = "Fatal Python error: Segmentation fault\n"


def internal_error(s: Script) -> None:
    s.log("site-1", "internal_error", 1200.0, why="task failed")


def ended_by_itself(s: Script) -> None:
    s.note("exit", 1200.0, site="site-1", process="trainer", by="itself", code=1, last="")


def left_badly(s: Script) -> None:
    s.note("exit", 1200.0, site="site-1", process="peer", by="leave", code=-9, last="")


def not_done(s: Script) -> None:
    s.run["planned"] = {"freeze": 5}


def nobody_died(s: Script) -> None:
    s.fault("kill", 1200.0, site="site-1", leader=False)
