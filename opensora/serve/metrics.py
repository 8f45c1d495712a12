"""/metrics: Prometheus' text format, version 0.0.4, written by hand.

Source: prometheus.io/docs/instrumenting/exposition_formats. Labels come from fixed sets only, so a
client can neither inject a line nor make series without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opensora.serve import jobs
from opensora.serve.jobs import Store
from opensora.serve.workers import Workers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Rows = Iterable[tuple[Mapping[str, object], float]]


def text(store: Store, workers: Workers, answers: Mapping[tuple[str, int], int]) -> str:
    """The page."""
    states: dict[str, int] = {}
    for status in (jobs.QUEUED, jobs.RUNNING, jobs.COMPLETED, jobs.FAILED):
        states[status] = 0
    for job in store.jobs():
        states[job.status] += 1
    counts = workers.counts
    done = counts.finished["completed"]
    parts = [
        _one("jobs", "gauge", "jobs in the output folder", _by("status", states)),
        _one("queue_length", "gauge", "jobs that wait", [({}, workers.num_waiting)]),
        _one("queue_capacity", "gauge", "jobs that may wait", [({}, workers.capacity)]),
        _one("finished_total", "counter", "jobs since the start",
             _by("outcome", counts.finished)),
        _one("steps_total", "counter", "denoising steps since the start", [({}, counts.steps)]),
        _summary("draw_seconds", "from a job's start to its file", counts.seconds, done),
        _one("http_requests_total", "counter", "answers since the start",
             [({"method": m, "status": s}, n) for (m, s), n in sorted(answers.items())]),
    ]  # fmt: skip
    return "".join(parts)


def _by(label: str, values: Mapping[str, float]) -> _Rows:
    return [({label: key}, value) for key, value in values.items()]


def _one(name: str, kind: str, meaning: str, rows: _Rows) -> str:
    lines = [f"# HELP opensora_{name} {meaning}", f"# TYPE opensora_{name} {kind}"]
    for labels, value in rows:
        inside = ",".join(f'{key}="{label}"' for key, label in labels.items())
        lines.append(f"opensora_{name}{f'{{{inside}}}' if inside else ''} {value:.15g}")
    return "\n".join(lines) + "\n"


def _summary(name: str, meaning: str, total: float, count: int) -> str:
    return (
        f"# HELP opensora_{name} {meaning}\n# TYPE opensora_{name} summary\n"
        f"opensora_{name}_sum {total:.15g}\nopensora_{name}_count {count}\n"
    )
