"""``GET /metrics``, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response

from chai_export.serve.job import Job
from chai_export.serve.model import ServedModel

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Figures of one server: those of the engine as they are when asked for, and times of its texts."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._first = self._histogram("time_to_first_token", "From arrival to the first token.", _FIRST)
        self._token = self._histogram("time_per_token", "Of each text, after its first token.", _TOKEN)
        self._whole = self._histogram("text", "From arrival to the end of a text.", _WHOLE)

    def observe(self, job: Job) -> None:
        """Note the times of a job that has ended."""
        times = job.request.token_times
        if not times:
            return
        self._first.observe(times[0] - job.submitted)
        self._whole.observe(times[-1] - job.submitted)
        if len(times) > 1:
            self._token.observe((times[-1] - times[0]) / (len(times) - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine knows."""
        engine = self._model.engine
        counts, (pages, held, kept) = engine.batch.counts, engine.batch.pages
        running = len(engine.batch.running)
        for name, text, number in (
            ("texts", "Texts that were made.", counts.texts),
            ("failed_texts", "Texts that ended with an error.", counts.failed),
            ("aborted_texts", "Texts whose clients left.", counts.aborted),
            ("preemptions", "Times that a text gave up its row to an older one.", counts.preempted),
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("reused_prompt_tokens", "Those of them that the cache held.", counts.reused_tokens),
            ("generated_tokens", "Tokens that were made.", counts.new_tokens),
        ):
            yield CounterMetricFamily(f"chai_{name}", text, value=number)
        for name, text, number in (
            ("rows", "Texts that can be computed at one time.", engine.rows),
            ("running_texts", "Texts that have a row.", running),
            ("waiting_texts", "Texts that wait for one.", max(0, engine.open_jobs - running)),
            ("pages", "Pages of the cache.", pages),
            ("held_pages", "Pages that are not free.", held),
            ("kept_pages", "Pages that are kept for texts to come.", kept),
            ("page_bytes", "Bytes of a page.", self._model.session.page_bytes),
            ("held_bytes", "Bytes of the pages that are not free.", self._model.session.held_bytes),
        ):
            yield GaugeMetricFamily(f"chai_{name}", text, value=number)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"chai_{name}_seconds", text, buckets=buckets, registry=self.registry)


def metrics_route(metrics: Metrics) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.get("/metrics")
    async def show() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return router
