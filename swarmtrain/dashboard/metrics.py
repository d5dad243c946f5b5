"""``/metrics`` in the format of Prometheus. No secret and no peer's text is in a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MEMBERS_SHOWN = 64
"""Beyond so many, labels by member would cost more than they tell."""
GAUGES = {
    "members": "Members of the run.",
    "connected": "Members this site has a link to.",
    "generation": "Generation of the run.",
    "term": "Term of the log.",
    "loss": "Loss of the canonical state, nats per token.",
    "train_loss": "Loss of this site's trainer, mean of its latest phase.",
    "outer_lr": "Learning rate of the outer step.",
    "outer_momentum": "Momentum of the outer step.",
}
STATES = {
    "ended": "1 if the run has ended.",
    "paused": "1 while the run is paused.",
    "syncing": "1 while this site catches up.",
    "disk_full": "1 while this site's disk takes no more.",
}
"""Of these the value is whether there is one."""
TRAINER = {
    "attached": ("trainer_attached", "1 if a trainer is at work here."),
    "step": ("trainer_steps", "Inner steps of this site's trainer."),
    "samples": ("trainer_samples", "Samples that this site's trainer has handed over."),
}
DATA = {
    "samples": ("data_samples", "Samples in an epoch of the data."),
    "shards": ("data_shards", "Shards that an epoch is dealt in."),
    "epoch": ("data_epoch", "The oldest epoch that is not finished."),
    "epochs": ("data_epochs", "Samples counted, in epochs."),
    "shards_done": ("data_shards_done", "Shards of that epoch that are done."),
    "shards_held": ("data_shards_held", "Shards that members hold."),
    "shards_free": ("data_shards_free", "Shards that lost their holder."),
}
MEMBER = {
    "connected": ("member_connected", "1 if this site has a link to the member."),
    "round": ("member_round", "Round of its latest figures."),
    "last_report_age_s": ("member_report_age_seconds", "Since its latest figures."),
    "samples_left": ("member_samples_left", "Samples left in the shards that it holds."),
}
MEMBER_ROUND = {
    **{
        f"{phase}_s": (f"member_{phase}_seconds", f"Its latest round: {phase}.")
        for phase in ("compute", "wait", "encode", "send", "receive", "reduce", "apply")
    },
    "bytes_sent": ("member_round_bytes_sent", "Bytes it sent in its latest round."),
    "bytes_received": ("member_round_bytes_received", "Bytes it received in its latest round."),
    "loss": ("member_train_loss", "Loss of its trainer in its latest phase."),
    "compute_utilization": ("member_compute_utilization", "Share of time its trainer computed."),
}

STAGE_GAUGES = {
    "present": ("stage_members", "Members in reach that serve the stage."),
    "ready": ("stage_ready", "Those of them that have its state."),
    "minimum": ("stage_minimum", "Members below which the stage is endangered."),
    "busy": ("stage_busy", "Share of their time that they compute for it."),
    "micro_batches_per_s": ("stage_micro_batches_per_second", "Micro-batches done there."),
    "generation": ("stage_generation", "How often the stage was rebuilt."),
}
COUNTERS = {
    "rounds_committed": "Rounds committed, or steps of a pipeline.",
    "rounds_aborted": "Attempts aborted.",
    "bytes_sent": "Bytes sent by this site.",
    "bytes_received": "Bytes received by this site.",
}


class _RunCollector(Collector):
    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        run = self._snapshot["run"]
        up = self._snapshot["source"]["connected"]
        yield GaugeMetricFamily("swarmtrain_up", "1 if the peer process answers.", value=int(up))
        for name, text in GAUGES.items():
            if run.get(name) is not None:
                yield GaugeMetricFamily(f"swarmtrain_{name}", text, value=float(run[name]))
        for name, text in COUNTERS.items():
            if run.get(name) is not None:
                yield CounterMetricFamily(f"swarmtrain_{name}", text, value=float(run[name]))
        leads = int(bool(run.get("is_leader")))
        yield GaugeMetricFamily("swarmtrain_is_leader", "1 if this site leads.", value=leads)
        rounds = GaugeMetricFamily("swarmtrain_round", "Round of a channel.", labels=["channel"])
        for channel, state in sorted((run.get("channels") or {}).items()):
            rounds.add_metric([channel], float(state.get("round") or 0))
        yield rounds
        yield from _reach(run)
        yield from _site(run)
        peers = self._snapshot.get("peers") or []
        yield from _of_members(MEMBER, [(str(one["id"]), one) for one in peers])
        yield from _of_members(
            MEMBER_ROUND, [(str(one["id"]), one.get("metrics") or {}) for one in peers]
        )
        yield from _stages(run.get("pipeline") or {})
        trainer = run.get("trainer") or {}
        if trainer.get("compute_utilization") is not None:
            yield GaugeMetricFamily(
                "swarmtrain_compute_utilization",
                "Share of wall time that the hook did not block the trainer.",
                value=float(trainer["compute_utilization"]),
            )


def _reach(run: dict[str, Any]) -> Iterator[Metric]:
    """Whether others can dial this site, and what it carries for those whom nobody can dial."""
    state = (run.get("reachability") or {}).get("state")
    if state in ("reachable", "outgoing only"):
        text = "1 if others can dial this site."
        yield GaugeMetricFamily("swarmtrain_reachable", text, value=int(state == "reachable"))
    if relay := run.get("relay"):
        text, value = "Bytes carried between other members.", float(relay["relayed_bytes"])
        yield CounterMetricFamily("swarmtrain_relayed_bytes", text, value=value)


def _site(run: dict[str, Any]) -> Iterator[Metric]:
    """What this site knows of the run, its trainer and the data."""
    for name, text in STATES.items():
        there = float(bool(run.get(name)))
        yield GaugeMetricFamily(f"swarmtrain_{name}", text, value=there)
    stewards = float(len(run.get("stewards") or []))
    yield GaugeMetricFamily("swarmtrain_stewards", "Voters of the log.", value=stewards)
    data = run.get("data") or {}
    for known, found in ((TRAINER, run.get("trainer") or {}), (DATA, data)):
        for key, (name, text) in known.items():
            if found.get(key) is not None:
                yield GaugeMetricFamily(f"swarmtrain_{name}", text, value=float(found[key]))
    if data:
        text, counted = "Samples in committed rounds, each once.", float(data["samples_counted"])
        yield CounterMetricFamily("swarmtrain_data_samples_counted", text, value=counted)


def _of_members(
    known: dict[str, tuple[str, str]], members: list[tuple[str, dict[str, Any]]]
) -> Iterator[Metric]:
    """By label ``member``: the first 16 hex digits of the id, no name that somebody chose."""
    for key, (name, text) in known.items():
        gauge = GaugeMetricFamily(f"swarmtrain_{name}", text, labels=["member"])
        for member, found in members[:MEMBERS_SHOWN]:
            if found.get(key) is not None:
                gauge.add_metric([member[:16]], float(found[key]))
        if gauge.samples:
            yield gauge


def _stages(pipeline: dict[str, Any]) -> Iterator[Metric]:
    coverage = pipeline.get("coverage") or []
    if not coverage:
        return
    lost = GaugeMetricFamily("swarmtrain_stage_lost", "1 while it is rebuilt.", labels=["stage"])
    for one in coverage:
        lost.add_metric([str(one["stage"])], float(one["state"] == "lost"))
    yield lost
    for key, (name, text) in STAGE_GAUGES.items():
        gauge = GaugeMetricFamily(f"swarmtrain_{name}", text, labels=["stage"])
        for one in coverage:
            if one.get(key) is not None:
                gauge.add_metric([str(one["stage"])], float(one[key]))
        yield gauge


def render(snapshot: dict[str, Any]) -> bytes:
    """The metrics of a snapshot as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_RunCollector(snapshot))
    return generate_latest(registry)
