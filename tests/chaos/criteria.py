"""What must hold in a history, one function for each; the checker calls them.

Each looks only at what was written down, and each is shown to fail by a history made for that
(``test_check.py``). Bars are those of the run, already scaled where the factor applies.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from tests.chaos.history import (
    Finding,
    History,
    Key,
    Record,
    Span,
    lives,
    longest,
    majority_up,
    meet,
    there,
)

WAIT_S = 60.0
LOSS_RATIO = 1.02
LOSSES_SMOOTHED = 5
MEMORY_MB_PER_MIN = 1.0
WARM_S = 300.0
"""What is kept of the newest 64 rounds and 1024 figures fills up meanwhile. 4096 events take
longer, and 2 MB."""
WATCHED_MIN = 5.0
"""Minutes of peers beyond their warm-up below which a slope says nothing."""
AGED_S = (45.0, 75.0)
AGED_MIN = 10
FDS_MORE = 40
"""Bulk links come and go with the parts that a site owns: at most 32 of them."""
FDS_MAX = 200
TEMPORARY_S = 60.0
DONE_SHARE = 0.8
LOST = ("data_loss", "rewound", "log_superseded", "ledger_diverged", "conflicting_certificates")
TRACE = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)$", re.MULTILINE)
FATAL = re.compile(r"^Fatal Python error.*$", re.MULTILINE)
KNOWN_TRACES = ("KeyboardInterrupt",)


def _shown(items: list[str]) -> str:
    return "; ".join(items[:5]) + (f"; and {len(items) - 5} more" if len(items) > 5 else "")


# --- safety --------------------------------------------------------------------------------------


def one_hash(h: History) -> Finding:
    """Every committed round has one root, and every state one hash, in all histories."""
    roots: dict[Key, set[str]] = defaultdict(set)
    for _, r in h.events("round_committed"):
        roots[r["generation"] or 0, r["channel"], r["round"]].add(f"{r['attempt']} {r['root']}")
    for _, r in h.events("step_committed"):
        outcome = f"{r['attempt']} {r['micro_batches']} {r.get('loss')} {r.get('scale')}"
        roots[r["generation"] or 0, "steps", r["step"]].add(outcome)
    rebuilt: dict[str, int] = {}
    for _, r in h.events("stage_recovered"):
        channel = f"train/{r['stage']}/0"
        rebuilt[channel] = max(rebuilt.get(channel, -1), r["step"])
    states: dict[tuple[str, int], set[str]] = defaultdict(set)
    for _, r in h.events("state_applied"):
        if r["round"] > rebuilt.get(r["channel"], -1):
            states[r["channel"], r["round"]].add(r["state_hash"])
    torn = [f"{key}: {sorted(found)}" for key, found in roots.items() if len(found) > 1]
    torn += [f"state {key}: {sorted(found)}" for key, found in states.items() if len(found) > 1]
    if not roots:
        return Finding("one hash", False, "no round was committed at all")
    said = _shown(torn) or f"{len(roots)} rounds, {len(states)} states"
    return Finding("one hash", not torn, said, {"divergent": len(torn)})


def no_gap_no_repeat(h: History) -> Finding:
    """Rounds are numbered without gap; within one life of a site none comes twice or backwards."""
    wrong = []
    by_channel: dict[tuple[int, str], set[int]] = defaultdict(set)
    for generation, channel, round_ in h.commits():
        by_channel[generation, channel].add(round_)
    for where, rounds in by_channel.items():
        missing = sorted(set(range(min(rounds), max(rounds) + 1)) - rounds)
        if missing or (where[0] == 0 and min(rounds) > 0):
            wrong.append(f"{where}: rounds {missing or list(range(min(rounds)))} are missing")
    began = {site: [life["begin"] for life in of_site] for site, of_site in lives(h).items()}
    for site, records in h.sites.items():
        last: dict[tuple[int, str, str], int] = {}
        life = 0
        for record in records:
            now = sum(begin <= record["mono_s"] for begin in began.get(site, ()))
            if now != life:  # whoever starts again tells of its whole log
                life = now
                last.clear()
            if record["name"] in ("round_committed", "state_applied"):
                where3 = (record["generation"] or 0, record["channel"], record["name"])
                if record["round"] <= last.get(where3, -1):
                    wrong.append(f"{site}: {record['name']} {record['round']} after {last[where3]}")
                last[where3] = record["round"]
    count = sum(map(len, by_channel.values()))
    return Finding("no gap, no repeat", not wrong, _shown(wrong) or f"{count} rounds in a row")


def nothing_lost(h: History) -> Finding:
    """What anybody ever called committed is in everybody's state at the end, which is one state."""
    wrong = [f"{site}: {name}" for name in LOST for site, _ in h.events(name)]
    allowed = h.run.get("allowed", ())
    wrong = [one for one in wrong if one.split(": ")[1] not in allowed]
    asked = min((r["at_s"] for r in h.told("stand")), default=0.0)
    most: dict[str, int] = {}
    for (generation, channel, round_), at in h.commits().items():
        if generation == 0 and at < asked:
            most[channel] = max(most.get(channel, -1), round_)
    stands = h.told("stand")
    if not stands:
        wrong.append("nobody was asked for its state at the end")
    hashes: dict[str, set[str]] = defaultdict(set)
    for stand in stands:
        hashes[stand["channel"]].add(f"{stand['round']} {stand['hash']}")
        wanted = most.get("steps" if "steps" in most else stand["channel"], -1) + 1
        if stand["round"] < wanted:
            wrong.append(f"{stand['site']} ends before round {stand['round']}, not {wanted}")
    wrong += [f"{c} ends in {sorted(found)}" for c, found in hashes.items() if len(found) > 1]
    said = _shown(wrong) or f"{len(stands)} states at the end, rounds {most}"
    return Finding("nothing lost", not wrong, said, {"lost": len(wrong)})


def counted_once(h: History) -> Finding:
    """No contribution is in two committed rounds; the trainers' samples tell their number."""
    if h.run.get("trainers") != "synthetic":
        return Finding("counted once", None, "trainers whose contributions have no numbers")
    seen: Counter[tuple[str, float]] = Counter()
    for record in h.counted().values():
        for one in record["contributors"]:
            seen[h.name_of(one["id"]), one["samples"]] += 1
    twice = [f"{site} samples {samples}" for (site, samples), n in seen.items() if n > 1]
    if not seen:
        return Finding("counted once", False, "no contribution was counted at all")
    return Finding("counted once", not twice, _shown(twice) or f"{len(seen)} contributions")


# --- liveness ------------------------------------------------------------------------------------


def _run_spans(h: History) -> list[Span]:
    commits = h.commits()
    first = min(commits.values(), default=float(h.run["began_s"]))
    return [(first, float(h.run["settled_s"]))]


def no_long_wait(h: History) -> Finding:
    """No stretch without a commit beyond the bar while a majority is up."""
    bar = h.bar("wait_s", WAIT_S * h.factor)
    spans = meet(majority_up(h), _run_spans(h))
    wait, begin = longest(list(h.commits().values()), spans)
    said = f"longest {wait:.1f} s, from {begin - h.run['began_s']:.0f} s on (bar {bar:.0f} s)"
    if not spans:
        return Finding("no wait", None, "there was never a majority")
    return Finding("no wait", wait <= bar, said, {"longest_s": round(wait, 1), "bar_s": bar})


def no_member_waits(h: History) -> Finding:
    """No member that runs and is not cut off stands without a new state beyond the bar."""
    bar = h.bar("wait_s", WAIT_S * h.factor)
    cuts = [(f["at_s"], f["until_s"]) for f in h.told("fault") if f["kind"] in ("cut", "disk")]
    free: list[Span] = [(0.0, float(h.run["ended_s"]))]
    for begin, end in cuts:
        free = meet(free, [(0.0, begin), (end, float(h.run["ended_s"]) + 1.0)])
    up = meet(meet(majority_up(h), _run_spans(h)), free)
    worst, who = (0.0, 0.0), ""
    for site, spans in there(h).items():
        if site in h.run.get("idle", ()):
            continue  # it keeps the log and no state
        moments = [r["mono_s"] for r in h.sites.get(site, ()) if r["name"] == "state_applied"]
        found = longest(moments, meet(spans, up))
        if found > worst:
            worst, who = found, site
    said = f"longest {worst[0]:.1f} s ({who}), bar {bar:.0f} s"
    return Finding("no member waits", worst[0] <= bar, said, {"longest_s": round(worst[0], 1)})


def loss(h: History) -> Finding:
    """The smoothed loss at equal committed samples, against the undisturbed run."""
    if h.clean is None:
        return Finding("loss", None, "no undisturbed run to compare with")
    curves = [_smoothed(_losses(one)) for one in (h, h.clean)]
    if not all(curves):
        return Finding("loss", None, "too few evaluations")
    at = min(curve[-1][0] for curve in curves)
    mine, clean = (_loss_at(curve, at) for curve in curves)
    if mine is None or clean is None:
        return Finding("loss", None, "no evaluations at equal samples")
    bar = h.bar("loss_ratio", LOSS_RATIO)
    said = f"{mine:.4f} against {clean:.4f} after {at:.0f} samples, ratio {mine / clean:.4f}"
    figures = {"loss": round(mine, 4), "clean": round(clean, 4), "ratio": round(mine / clean, 4)}
    return Finding("loss", mine <= bar * clean, f"{said} (bar {bar})", figures)


def _losses(h: History) -> list[tuple[float, float]]:
    """(samples committed before, loss), by round."""
    before, total = {0: 0.0}, 0.0
    listed = h.counted()
    for key in sorted(listed):
        total += sum(one["samples"] for one in listed[key]["contributors"])
        before[key[2] + 1] = total
    found = {r["round"]: r["loss"] for _, r in h.events("evaluated")}
    return [(before[n], found[n]) for n in sorted(found) if n in before]


def _smoothed(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found = []
    for last in range(LOSSES_SMOOTHED, len(curve) + 1):
        some = curve[last - LOSSES_SMOOTHED : last]
        found.append((sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)))
    return found


def _loss_at(curve: list[tuple[float, float]], at: float) -> float | None:
    """Linear between the neighbours."""
    if len(curve) == 1 and curve[0][0] == at:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / max(1e-9, x1 - x0)
    return None


# --- leaks ---------------------------------------------------------------------------------------


def _samples(h: History) -> Iterator[tuple[str, float, list[Record]]]:
    """(site, begin of life, what was seen of the process) of every life of a peer process."""
    seen: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in h.told("sample"):
        seen[record["site"], record["pid"]].append(record)
    for site, of_site in lives(h).items():
        for life in of_site:
            yield site, life["begin"], seen[site, life["pid"]]


def memory(h: History) -> Finding:
    """Memory grows by less than the bar: within lives, and from life to life at one age.

    A process's own: resident, without the pages of files it has mapped.

    Within lives after a warm-up, each around its own mean; between lives where there are enough of
    them, at an age of about a minute against the time of the run.
    """
    bar = h.bar("memory_mb_per_min", MEMORY_MB_PER_MIN)
    warm_s = h.bar("warm_s", WARM_S)
    within: list[tuple[float, float]] = []
    aged: list[tuple[float, float]] = []
    watched = 0.0
    for _, begin, seen in _samples(h):
        points = [((r["at_s"] - begin) / 60.0, r["own_bytes"] / 2**20) for r in seen]
        old = [(x, y) for x, y in points if x * 60.0 > warm_s]
        if len(old) > 1:
            watched += old[-1][0] - old[0][0]
            mean = [sum(column) / len(old) for column in zip(*old, strict=True)]
            within += [(x - mean[0], y - mean[1]) for x, y in old]
        young = [y for x, y in points if AGED_S[0] <= 60.0 * x <= AGED_S[1]]
        if young:
            aged.append(((begin - h.run["began_s"]) / 60.0, sum(young) / len(young)))
    slopes = {}
    if watched >= WATCHED_MIN:
        slopes["within lives"] = _slope(within)
    if len(aged) >= AGED_MIN and aged and max(x for x, _ in aged) - min(x for x, _ in aged) >= 5:
        slopes["between lives"] = _slope(aged)
    most = max((r["rss_bytes"] for r in h.told("sample")), default=0) / 2**20
    if not slopes:
        said = f"{watched:.1f} minutes of peers older than {warm_s:.0f} s are too few"
        said = f"{said}; most {most:.0f} MB"
        return Finding("memory", None, said, {"rss_mb_max": round(most)})
    said = ", ".join(f"{name} {slope:+.2f} MB/min" for name, slope in slopes.items())
    figures = {name.replace(" ", "_"): round(slope, 3) for name, slope in slopes.items()}
    ok = all(slope < bar for slope in slopes.values())
    said = f"{said} (bar {bar:g}), most {most:.0f} MB"
    return Finding("memory", ok, said, {**figures, "rss_mb_max": round(most)})


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    x0 = sum(x for x, _ in points) / len(points)
    y0 = sum(y for _, y in points) / len(points)
    square = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / square if square else 0.0


def no_leaks(h: History) -> Finding:
    """Descriptors of a life do not pile up, temporary files and shared memory do not stay."""
    wrong, compared = [], 0
    for site, begin, seen in _samples(h):
        early = [r["fds"] for r in seen if 30.0 <= r["at_s"] - begin <= 60.0]
        late = [r["fds"] for r in seen if r["at_s"] - begin > 90.0][-6:]
        if early and late:
            compared += 1
            more = sorted(late)[len(late) // 2] - sorted(early)[len(early) // 2]
            if more > FDS_MORE:
                wrong.append(f"{site}: {more} more descriptors than after a minute")
        if max((r["fds"] for r in seen), default=0) > FDS_MAX:
            wrong.append(f"{site}: more than {FDS_MAX} descriptors")
    for record in h.told("left over"):
        old = [item for item in record["files"] if item["age_s"] > TEMPORARY_S]
        wrong += [f"{record['site']}: {one['name']} is {one['age_s']:.0f} s old" for one in old]
        if record["mappings"] > 1:
            wrong.append(f"{record['site']}: {record['mappings']} shared mappings")
    if not h.told("left over"):
        return Finding("no leaks", None, "nobody looked at the files at the end")
    said = _shown(wrong) or f"descriptors of {compared} lives compared, no file is left over"
    return Finding("no leaks", not wrong, said, {"lives_compared": compared})


def _class_of(last_line: str) -> str:
    return last_line.split(":")[0].split(".")[-1]


def no_traceback(h: History) -> Finding:
    """No process printed a traceback or called something a bug, or ended by itself."""
    wrong = []
    for name, text in h.outputs.items():
        traces = [one for one in TRACE.findall(text) if _class_of(one) not in KNOWN_TRACES]
        wrong += [f"{name}: {one[:160]}" for one in (*traces, *FATAL.findall(text))]
    wrong += [f"{site}: {r.get('why', '')[:160]}" for site, r in h.events("internal_error")]
    allowed = h.run.get("allowed_codes", ())
    for record in h.told("exit"):
        if record["by"] == "itself" and record["code"] not in (0, *allowed):
            who = f"{record['site']}'s {record['process']}"
            wrong.append(f"{who} ended by itself with {record['code']}: {record.get('last', '')}")
        elif record["by"] == "leave" and record["code"] != 0:
            wrong.append(f"{record['site']}'s {record['process']} left with {record['code']}")
    return Finding("no traceback", not wrong, _shown(wrong) or f"{len(h.outputs)} outputs")


def faults_happened(h: History) -> Finding:
    """What was planned was done: a run in which nothing happens proves nothing."""
    planned, done = Counter(h.run["planned"]), Counter(r["kind"] for r in h.told("fault"))
    missed = [
        f"{kind}: {done[kind]} of {n}" for kind, n in planned.items() if done[kind] < DONE_SHARE * n
    ]
    kills = sum(1 for r in h.told("exit") if r["by"] == "kill" and r["code"] == -9)
    if done["kill"] and not kills:
        missed.append("nobody was killed")
    said = _shown(missed) or ", ".join(f"{n} {kind}" for kind, n in sorted(done.items()))
    return Finding("faults happened", not missed, said or "none were planned")


COMMON: tuple[Callable[[History], Finding], ...] = (
    faults_happened,
    one_hash,
    no_gap_no_repeat,
    nothing_lost,
    no_long_wait,
    no_member_waits,
    memory,
    no_leaks,
    no_traceback,
)
