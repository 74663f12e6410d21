"""What a server has done, for Prometheus: GET /metrics."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flaxkd.serve.jobs import Job, Queue

SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one server: tests have several."""

    def __init__(self, queue: Queue):
        registry = self.registry = CollectorRegistry()
        made = lambda kind, name, words, *labels, **kwargs: kind(
            f"flaxkd_{name}", words, labels, registry=registry, **kwargs
        )
        self.answers = made(Counter, "answers", "Answers to HTTP requests", "path", "status")
        self.pictures = made(Counter, "pictures", "Pictures drawn", "model")
        self.waited = made(Histogram, "waited_seconds", "From a request to its first batch", buckets=SECONDS)
        self.drew = made(Histogram, "drawing_seconds", "Of a batch on the device", "model", buckets=SECONDS)
        self.batches = made(Histogram, "batch_pictures", "Pictures in a batch", "model", buckets=(1, 2, 4, 8, 16, 32))
        made(Gauge, "waiting_pictures", "Pictures in the queue").set_function(lambda: len(queue))

    def drawn(self, model: str, pictures: int, seconds: float, begun: Sequence[Job]) -> None:
        """A batch is done. begun: the jobs whose first picture is in it."""
        self.pictures.labels(model).inc(pictures)
        self.drew.labels(model).observe(seconds)
        self.batches.labels(model).observe(pictures)
        for job in begun:
            self.waited.observe(max(0.0, (job.started or job.created) - job.created))

    def text(self) -> bytes:
        return generate_latest(self.registry)
