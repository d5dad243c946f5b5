"""Criteria of single scenarios: how soon members are back, what a partition may do, and others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from tests.chaos.criteria import counted_once, loss
from tests.chaos.history import Finding, History, Record, lives, p95, spread

RATE_SHARE = 0.7


def _rate(h: History, begin: float, end: float) -> float:
    """Commits per second in that time."""
    return sum(begin < at <= end for at in h.commits().values()) / max(1e-9, end - begin)


def rate(h: History) -> Finding:
    """Rounds per second in the trouble against those of the calm time before it."""
    begin, end = h.trouble
    calm, mine = _rate(h, float(h.run["calm_from_s"]), begin), _rate(h, begin, end)
    share, bar = mine / max(1e-9, calm), h.bar("rate_share", RATE_SHARE)
    said = f"{60 * mine:.1f} rounds a minute against {60 * calm:.1f} in the calm, {share:.2f}"
    figures = {"share": round(share, 3), "per_min": round(60 * mine, 1)}
    return Finding("rate", share >= bar, f"{said} (bar {bar:g})", figures)


# --- back again ----------------------------------------------------------------------------------


def _counted_at(h: History) -> dict[str, list[float]]:
    """By site the moments at which rounds were committed that count a contribution of it."""
    commits, found = h.commits(), defaultdict(list)
    for key, record in h.counted().items():
        if key in commits:
            for one in record["contributors"]:
                found[h.name_of(one["id"])].append(commits[key])
    return {site: sorted(moments) for site, moments in found.items()}


def _back(h: History, returns: list[tuple[str, float, float]], bar: float, name: str) -> Finding:
    """Of (site, back at, gone again at): how long until a round counted it; p95 within the bar."""
    counted = _counted_at(h)
    waited, never = [], []
    for site, at, until in returns:
        first = next((m for m in counted.get(site, ()) if m > at), None)
        if first is not None and first <= until:
            waited.append(first - at)
        elif until - at > bar:
            never.append(f"{site} of {at - h.run['began_s']:.0f} s")
    figures = {**spread(waited), "never": len(never), "bar_s": round(bar, 1)}
    if not waited and not never:
        return Finding(name, None, "nobody came back for long enough to be counted", figures)
    late = len(never) + sum(one > bar for one in waited)
    ok = late <= 0.05 * (len(waited) + len(never))
    said = f"{len(waited)} counted, p95 {p95(waited) if waited else 0:.1f} s, bar {bar:.0f} s"
    return Finding(name, ok, said + (f"; never: {', '.join(never[:5])}" if never else ""), figures)


def _gone(h: History, site: str, at: float) -> float:
    """When the site was next struck or ended, after a moment."""
    ends = [r["at_s"] for r in h.told("exit") if r["site"] == site and r["at_s"] > at]
    ends += [
        f["at_s"]
        for f in h.told("fault")
        if f.get("site") == site and f["at_s"] > at and f["kind"] in ("freeze", "kill", "leave")
    ]
    return min([*ends, float(h.run["settled_s"])])


def restarted(h: History) -> Finding:
    """From the start of a process that was killed to the first round that counts the site."""
    first = {site: of_site[0]["begin"] for site, of_site in lives(h).items()}
    returns = [
        (r["site"], r["at_s"], _gone(h, r["site"], r["at_s"]))
        for r in h.told("start")
        if r["at_s"] > first[r["site"]] + 1.0 or first[r["site"]] > h.trouble[0]
    ]
    return _back(h, returns, h.bar("restart_s", 30.0 * h.factor), "restarted")


def thawed(h: History) -> Finding:
    """From SIGCONT to the first round that counts the site."""
    returns = [
        (f["site"], f["until_s"], _gone(h, f["site"], f["until_s"]))
        for f in h.told("fault")
        if f["kind"] == "freeze"
    ]
    return _back(h, returns, h.bar("thawed_s", 20.0 * h.factor), "thawed")


def leader_back(h: History) -> Finding:
    """From the loss of the leader to the next commit."""
    bar, commits = h.bar("leader_s", 15.0 * h.factor), sorted(h.commits().values())
    gaps = []
    for fault in h.told("fault"):
        if fault.get("leader") and fault["kind"] in ("kill", "freeze", "old copy"):
            after = next((at for at in commits if at > fault["at_s"] + 0.5), None)
            gaps.append((after or float(h.run["ended_s"])) - fault["at_s"])
    if not gaps:
        return Finding("leader back", None, "no leader was struck")
    said = f"{len(gaps)} leaders, p95 {p95(gaps):.1f} s, most {max(gaps):.1f} s (bar {bar:.0f} s)"
    return Finding("leader back", p95(gaps) <= bar, said, spread(gaps))


# --- partitions and links ------------------------------------------------------------------------


def one_side(h: History) -> Finding:
    """While the members are cut in two, at most one side commits; soon after, both are one."""
    wrong, healed = [], []
    commits, ids = h.commits(), h.run["sites"]
    counted = h.counted()
    cuts = [f for f in h.told("fault") if f["kind"] == "cut"]
    for cut in cuts:
        side_of = {site: n for n, side in enumerate(cut["sides"]) for site in side}
        begin, end = cut["at_s"] + h.bar("cut_grace_s", 1.0), cut["until_s"]
        if cut["whole"]:
            who: dict[int, set[str]] = defaultdict(set)
            for site, r in h.events("round_committed"):
                if begin < r["mono_s"] < end and site in side_of:
                    who[side_of[site]].add(f"{r['channel']} {r['round']} {r['root']}")
            if len(who) > 1:
                wrong.append(
                    f"both sides committed: { {n: sorted(s)[-2:] for n, s in who.items()} }"
                )
        both = [
            at
            for key, at in sorted(commits.items(), key=lambda item: item[1])
            if at > end
            and key in counted
            and {side_of.get(h.name_of(c["id"])) for c in counted[key]["contributors"]} >= {0, 1}
        ]
        healed.append((both[0] if both else float(h.run["ended_s"])) - end)
    bar = h.bar("healed_s", 30.0 * h.factor)
    if not cuts or not ids:
        return Finding("partition", False, "nobody was cut off")
    slow = [one for one in healed if one > bar]
    ok = not wrong and len(slow) <= 0.05 * len(healed)
    said = f"{len(cuts)} cuts, both sides in one round {p95(healed):.1f} s (p95) after healing"
    return Finding(
        "partition", ok, "; ".join([f"{said} (bar {bar:.0f} s)", *wrong]), spread(healed)
    )


def reconnected(h: History) -> Finding:
    """From the loss of a link to the next one between the same two, if both are there."""
    bar = h.bar("reconnect_s", 5.0 * h.factor)
    ups: dict[frozenset[str], list[float]] = defaultdict(list)
    downs: list[tuple[frozenset[str], float]] = []
    for name, store in (("peer_connected", ups), ("peer_disconnected", None)):
        for site, r in h.events(name):
            pair = frozenset((site, h.name_of(r["peer"])))
            if store is None:
                downs.append((pair, r["mono_s"]))
            else:
                store[pair].append(r["mono_s"])
    begin, end = h.trouble
    took = []
    for pair, at in downs:
        if begin < at < end - bar:
            after = [m for m in ups[pair] if m > at - 0.5]
            took.append(max(0.0, min(after) - at) if after else end - at)
    if not took:
        return Finding("reconnected", None, "no link was lost")
    ok = p95(took) <= bar
    said = (
        f"{len(took)} links lost, p95 {p95(took):.1f} s, most {max(took):.1f} s (bar {bar:.0f} s)"
    )
    return Finding("reconnected", ok, said, spread(took))


def flips_detected(h: History) -> Finding:
    """A connection with a flipped bit is closed by whoever got it; flipped files are refused."""
    flips, bar = h.told("flip"), h.bar("flip_s", 10.0 * h.factor)
    wrong = [
        f"a flipped bit to {flip['site']} at {flip['at_s']:.0f} s went unnoticed"
        for flip in flips
        if flip["closed_after_s"] is None or flip["closed_after_s"] > bar
    ]
    files = [f for f in h.told("fault") if f["kind"] == "corrupt"]
    for fault in files:
        later = [r for r in h.sites.get(fault["site"], ()) if r["mono_s"] > fault["at_s"]]
        noticed = any(_says_damaged(r, fault["file"]) for r in later)
        refused = any(
            r["site"] == fault["site"] and r["at_s"] > fault["at_s"] and "damaged" in r["last"]
            for r in h.told("exit")
        )
        if not noticed and not refused:
            wrong.append(f"a flipped bit in {fault['file']} of {fault['site']} went unnoticed")
    if not flips and not files:
        return Finding("flips detected", False, "no bit was flipped")
    said = "; ".join(wrong[:5]) or f"{len(flips)} on the wire, {len(files)} in files"
    figures = {"wire": len(flips), "files": len(files), "unnoticed": len(wrong)}
    return Finding("flips detected", not wrong, said, figures)


def _says_damaged(record: Record, file: str) -> bool:
    names = ("checkpoint_refused", "resync", "contacts_unreadable", "state_synced", "state_fetched")
    if record["name"] in names:
        return True
    return record["name"] == "fallback" and file.split("/")[-1] in str(record.get("what"))


# --- disks and clocks ----------------------------------------------------------------------------


def disk_alarms(h: History) -> Finding:
    """A disk that takes nothing is told of, once it is written to, and told of as free again."""
    wrong = []
    faults = [f for f in h.told("fault") if f["kind"] == "disk" and f["mode"] != "slow"]
    for fault in faults:
        said = [
            r["name"]
            for r in h.sites.get(fault["site"], ())
            if fault["at_s"] <= r["mono_s"] <= fault["until_s"] + 30.0 * h.factor
        ]
        gone = _gone(h, fault["site"], fault["at_s"]) < fault["until_s"] + 2.0
        if fault["mode"] == "broken":
            if "checkpoint_refused" not in said and not gone:
                wrong.append(f"{fault['site']}: {fault['mode']} disk, nothing was said")
        elif "disk_full" not in said and not gone:
            wrong.append(f"{fault['site']}: {fault['mode']} disk, no alarm")
        elif "disk_full" in said and "disk_freed" not in said and not gone:
            wrong.append(f"{fault['site']}: {fault['mode']} disk, never free again")
    if not faults:
        return Finding("disk alarms", None, "no disk failed")
    return Finding("disk alarms", not wrong, "; ".join(wrong[:5]) or f"{len(faults)} disks failed")


def reborn(h: History) -> Finding:
    """All killed at once at the end and started again: the same state, from their own disks."""
    before = {(r["site"], r["channel"]): r for r in h.told("before rebirth")}
    after = {(r["site"], r["channel"]): r for r in h.told("after rebirth")}
    if not before:
        return Finding("reborn", None, "nobody was killed at the end")
    wrong = []
    for key, record in before.items():
        found = after.get(key)
        if found is None or found["round"] < record["round"]:
            wrong.append(f"{key[0]} has {found and found['round']}, had {record['round']}")
        elif found["round"] == record["round"] and found["hash"] != record["hash"]:
            wrong.append(f"{key[0]} has another state of round {record['round']}")
    said = "; ".join(wrong[:5]) or f"{len(before)} states, all as they were or later"
    return Finding("reborn", not wrong, said)


def no_expiry_storm(h: History) -> Finding:
    """Clocks that jump cost nobody its membership, its links or its ticket."""
    begin, end = h.trouble
    lost: Counter[str] = Counter()
    for name in ("member_left", "join_refused", "link_refused", "member_suspended", "peer_fault"):
        lost[name] += sum(begin < r["mono_s"] < end for _, r in h.events(name))
    jumps = [f for f in h.told("fault") if f["kind"] == "clock" and abs(f["offset_s"]) > 600.0]
    noticed = {site for site, _ in h.events("clock_off")}
    unseen = sorted({f["site"] for f in jumps} - noticed)
    wrong = [f"{n} {name}" for name, n in sorted(lost.items()) if n]
    wrong += [f"nothing was said of the clocks of {unseen}"] if unseen else []
    said = "; ".join(wrong) or f"{len(jumps)} jumps of an hour, all told of, nobody lost"
    return Finding("no expiry storm", not wrong, said)


# --- floods and stages ---------------------------------------------------------------------------


def flood_withstood(h: History) -> Finding:
    """Floods cost honest members at most three times the time and a bound of memory."""
    begin, end = h.trouble
    calm = [r["took_s"] for r in h.told("probe") if h.run["calm_from_s"] <= r["at_s"] < begin]
    mine = [r["took_s"] for r in h.told("probe") if begin <= r["at_s"] <= end]
    sockets = sum(r["opened"] for r in h.told("flooded"))
    if not calm or not mine or not sockets:
        return Finding("flood withstood", False, "no flood, or nobody was asked during it")
    more = _rss(h, begin, end, max) - _rss(h, h.run["calm_from_s"], begin, max)
    ratio, bar = p95(mine) / p95(calm), h.bar("flood_ratio", 3.0)
    bound = h.bar("flood_mb", 128.0)
    ok = ratio <= bar and more / 2**20 <= bound
    said = (
        f"{sockets / (end - begin):.0f} sockets a second, honest p95 {ratio:.2f} times the calm "
        f"(bar {bar:g}), memory {more / 2**20:+.0f} MB (bar {bound:g})"
    )
    figures = {"ratio": round(ratio, 2), "memory_mb": round(more / 2**20, 1), "sockets": sockets}
    return Finding("flood withstood", ok, said, figures)


def _rss(h: History, begin: float, end: float, pick: Callable[[Iterator[int]], int]) -> int:
    """Of the largest peer process in that time."""
    return pick(r["rss_bytes"] for r in h.told("sample") if begin <= r["at_s"] < end)


def stages_back(h: History) -> Finding:
    """A stage whose sites are all gone steps again within the bar; each loss has one recovery."""
    bar = h.bar("stage_s", 45.0 * h.factor)
    steps = sorted(at for key, at in h.commits().items() if key[1] == "steps")
    gaps = []
    for fault in h.told("fault"):
        if fault["kind"] in ("kill", "kill stage"):
            after = next((at for at in steps if at > fault["at_s"] + 0.5), None)
            gaps.append((after or float(h.run["ended_s"])) - fault["at_s"])
    lost = {(r["stage"], r["step"]) for _, r in h.events("stage_lost")}
    back = Counter((r["stage"], r["step"], r["choice"]) for _, r in h.events("stage_recovered"))
    chosen = Counter(key[:2] for key in back)
    wrong = [f"stage {key} was recovered in {n} ways" for key, n in chosen.items() if n > 1]
    if not gaps:
        return Finding("stages back", False, "no site was killed")
    ok = not wrong and max(gaps) <= bar
    said = f"{len(gaps)} losses of sites, {len(lost)} of stages, {len(chosen)} recovered; "
    said += f"next step after at most {max(gaps):.1f} s (bar {bar:.0f} s)"
    return Finding("stages back", ok, "; ".join([said, *wrong]), spread(gaps))


def full_steps(h: History) -> Finding:
    """Every step that was committed has all its micro-batches."""
    wanted = int(h.run["micro_batches"])
    bad = {r["step"]: r["micro_batches"] for _, r in h.events("step_committed")}
    short = {step: n for step, n in bad.items() if not wanted * 0.9 <= n <= wanted}
    said = f"{short}" if short else f"{len(bad)} steps of {wanted}"
    return Finding("full steps", bool(bad) and not short, said)


SPECIAL: dict[str, Callable[[History], Finding]] = {
    "counted_once": counted_once,
    "disk_alarms": disk_alarms,
    "flips_detected": flips_detected,
    "flood_withstood": flood_withstood,
    "full_steps": full_steps,
    "leader_back": leader_back,
    "loss": loss,
    "no_expiry_storm": no_expiry_storm,
    "one_side": one_side,
    "rate": rate,
    "reborn": reborn,
    "reconnected": reconnected,
    "restarted": restarted,
    "stages_back": stages_back,
    "thawed": thawed,
}
