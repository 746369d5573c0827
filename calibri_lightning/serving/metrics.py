"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The numbers of one server, in a registry of their own: several servers can live in a process.

    Attributes:
        requests: Requests by path and status; 499 where the client was gone before its answer.
        items: Pictures scored, by reward.
        failures: Pictures whose request failed because the reward raised or returned nonsense, by reward.
        queue_seconds: From a batch's first arrival until it begins, by reward.
        scoring_seconds: Duration of a call of the reward, by reward.
        batch_size: Pictures of a call, by reward.
        queue_length: Pictures that wait, by device.
    """

    def __init__(self) -> None:
        """Makes the registry."""
        self.registry = CollectorRegistry()
        prefix, registry = "calibri_reward_", self.registry
        self.requests = Counter(prefix + "requests", "Requests", ["path", "status"], registry=registry)
        self.items = Counter(prefix + "items", "Pictures scored", ["reward"], registry=registry)
        self.failures = Counter(prefix + "failures", "Pictures of failed requests", ["reward"], registry=registry)
        self.queue_seconds = Histogram(
            prefix + "queue_seconds", "Seconds in the queue", ["reward"], buckets=_SECONDS, registry=registry
        )
        self.scoring_seconds = Histogram(
            prefix + "scoring_seconds",
            "Seconds of a call of the reward",
            ["reward"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            prefix + "batch_size", "Pictures of a call of the reward", ["reward"], buckets=_SIZES, registry=registry
        )
        self.queue_length = Gauge(prefix + "queue_length", "Pictures that wait", ["device"], registry=registry)

    def render(self) -> bytes:
        """Writes all numbers down.

        Returns:
            Prometheus' text format.
        """
        return generate_latest(self.registry)
