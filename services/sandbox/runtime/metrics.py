"""Prometheus metrics of the sandbox."""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

JOBS = Counter("perigee_sandbox_jobs_total", "Jobs by kind and status.", ["kind", "status"])
JOB_SECONDS = Histogram(
    "perigee_sandbox_job_seconds",
    "Time of a job in its slots.",
    ["kind"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
WAIT_SECONDS = Histogram(
    "perigee_sandbox_wait_seconds",
    "Time that a job waited in the queue.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60),
)
WAITING = Gauge("perigee_sandbox_waiting_jobs", "Jobs in the queue.")
BUSY = Gauge("perigee_sandbox_busy_slots", "Pairs of slots that run a job.")
REFUSED = Counter("perigee_sandbox_refused_jobs_total", "Jobs that the queue refused.")
CLEARED = Counter("perigee_sandbox_cleared_slots_total", "Slots cleared after a failure or a cancelled job.")
COMPILE_CACHE_HITS = Counter("perigee_sandbox_compile_cache_hits_total", "Programs that were not compiled again.")
SESSIONS = Gauge("perigee_sandbox_sessions", "Sessions that are open.")


def count(kind: str, status: str, started: float) -> None:
    """Counts a job that began at `started`, monotonic seconds."""
    JOBS.labels(kind, status).inc()
    JOB_SECONDS.labels(kind).observe(time.monotonic() - started)
