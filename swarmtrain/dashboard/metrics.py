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
COUNTERS = {
    "rounds_committed": "Rounds committed.",
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
        trainer = run.get("trainer") or {}
        if trainer.get("compute_utilization") is not None:
            yield GaugeMetricFamily(
                "swarmtrain_compute_utilization",
                "Share of wall time that the hook did not block the trainer.",
                value=float(trainer["compute_utilization"]),
            )


def render(snapshot: dict[str, Any]) -> bytes:
    """The metrics of a snapshot as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_RunCollector(snapshot))
    return generate_latest(registry)
