"""Prometheus metrics of the sandbox."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

JOBS = Counter("perigee_sandbox_jobs_total", "Jobs by kind and outcome.", ["kind", "outcome"])
JOB_SECONDS = Histogram(
    "perigee_sandbox_job_seconds",
    "Time of a job in its slot.",
    ["kind"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
WAITING = Gauge("perigee_sandbox_waiting_jobs", "Jobs that wait for a slot.")
BUSY = Gauge("perigee_sandbox_busy_slots", "Slots that run a job.")
RESTARTS = Counter("perigee_sandbox_slot_restarts_total", "Slots that were killed and started again.")
