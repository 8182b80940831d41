"""Prometheus metrics of the sandbox."""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

from services.sandbox.runtime.jobs import Verdict

JOBS = Counter("perigee_sandbox_jobs_total", "Jobs by kind and outcome.", ["kind", "outcome"])
JOB_SECONDS = Histogram(
    "perigee_sandbox_job_seconds",
    "Time of a job in its slot.",
    ["kind"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
WAIT_SECONDS = Histogram(
    "perigee_sandbox_wait_seconds",
    "Time that a job waited for its slot.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60),
)
WAITING = Gauge("perigee_sandbox_waiting_jobs", "Jobs that wait for a slot.")
BUSY = Gauge("perigee_sandbox_busy_slots", "Slots that run a job.")
REFUSED = Counter("perigee_sandbox_refused_jobs_total", "Jobs that were refused a slot.")
CLEARED = Counter("perigee_sandbox_places_cleared_total", "Places cleared after a failure or a cancelled job.")
SESSIONS = Gauge("perigee_sandbox_sessions", "Sessions that are open.")


def count(kind: str, verdict: Verdict, started: float) -> None:
    """Counts a job that began at `started`, monotonic seconds."""
    JOBS.labels(kind, verdict.name).inc()
    JOB_SECONDS.labels(kind).observe(time.monotonic() - started)
