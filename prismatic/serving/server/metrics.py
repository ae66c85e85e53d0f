"""What is counted: Prometheus metrics in a registry of the application's own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prismatic.serving.server.payloads import PolicyResponse

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_STAGES = ("queue", "preprocessing", "vision", "pruner", "llm", "infer", "total")


class Metrics:
    """Counters of one server.

    Args:
        queue_length, connections, dropped_events: called when somebody looks.
    """

    def __init__(
        self, queue_length: Callable[[], float], connections: Callable[[], float], dropped_events: Callable[[], float]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._outcomes = Counter(
            "lightvla_requests", "Policy queries by protocol and outcome.", ["protocol", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "lightvla_stage_seconds", "Seconds of an answer by stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._batch = Histogram(
            "lightvla_batch_size", "Policy queries answered together, by query.", buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )  # fmt: skip
        self._kept = Histogram(
            "lightvla_kept_tokens", "Visual tokens that stayed.", buckets=(8, 16, 32, 64, 96, 128, 192, 256, 384, 512),
            registry=registry,
        )  # fmt: skip
        self._outside = Counter(
            "lightvla_out_of_bounds_dimensions", "Action dimensions of an answer outside the training data's bounds.",
            registry=registry,
        )  # fmt: skip
        for name, what, source in (
            ("lightvla_queue_length", "Policy queries that wait.", queue_length),
            ("lightvla_connections", "Open WebSockets that ask.", connections),
            ("lightvla_dropped_events", "Events that watchers missed since the start.", dropped_events),
        ):
            Gauge(name, what, registry=registry).set_function(source)

    def answered(self, protocol: str, answer: PolicyResponse) -> None:
        self._outcomes.labels(protocol, "ok").inc()
        for stage in _STAGES:
            if stage in answer.timing:
                self._seconds.labels(stage).observe(answer.timing[stage] / 1000)
        self._batch.observe(answer.timing.get("batch", 1))
        self._kept.observe(int(answer.kept.sum()))
        self._outside.inc(len(answer.warnings))

    def refused(self, protocol: str, code: str) -> None:
        self._outcomes.labels(protocol, code).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
