"""Prometheus metrics of weight pushes, on both sides."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

BUCKETS = (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)

PUSHES = Counter("perigee_weights_pushes_total", "Pushes to one receiver", ["result"])
TRANSFER_SECONDS = Histogram("perigee_weights_transfer_seconds", "Bytes to one receiver", buckets=BUCKETS)
VERIFY_SECONDS = Histogram("perigee_weights_verify_seconds", "Checksums in a receiver", buckets=BUCKETS)
COMMIT_SECONDS = Histogram("perigee_weights_commit_seconds", "Swap into a receiver's engine", buckets=BUCKETS)
