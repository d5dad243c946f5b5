"""``/metrics`` in the format of Prometheus. No secret and no peer's text is in a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GAUGES = {
    "members": "Members of the run.",
    "connected": "Members this site has a link to.",
    "generation": "Generation of the run.",
    "term": "Term of the log.",
    "loss": "Loss of the canonical state, nats per token.",
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
        yield from _stages(run.get("pipeline") or {})
        trainer = run.get("trainer") or {}
        if trainer.get("compute_utilization") is not None:
            yield GaugeMetricFamily(
                "swarmtrain_compute_utilization",
                "Share of wall time that the hook did not block the trainer.",
                value=float(trainer["compute_utilization"]),
            )


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
