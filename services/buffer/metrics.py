"""Prometheus metrics of the buffer."""

from collections import Counter as Counts
from collections.abc import Sequence

from prometheus_client import Counter, Histogram

from services.buffer.packing import ITEM_BYTES
from services.buffer.types import Chunk, Outcome

CHUNKS = Counter("perigee_buffer_chunks_total", "Chunks by what became of them.", ["outcome"])
TOKENS_RECEIVED = Counter("perigee_buffer_received_tokens_total", "Tokens in the chunks received.")
TOKENS_READ = Counter("perigee_buffer_read_tokens_total", "Response tokens streamed to readers.")
LEASES = Counter("perigee_buffer_leases_total", "Leases given.")
VERDICTS = Counter("perigee_buffer_verdicts_total", "Verdicts recorded.")
COMMITS = Counter("perigee_buffer_commits_total", "Iterations committed.")
DURABILITY_SECONDS = Histogram(
    "perigee_buffer_durability_seconds", "Seconds of durable changes, the sync to disk included."
)
SERVER_RESTARTS = Counter("perigee_buffer_server_restarts_total", "Restarts of the Valkey server that the buffer runs.")


def count_chunks(chunks: Sequence[Chunk], outcomes: Sequence[Outcome]) -> None:
    """Counts the chunks of one call."""
    TOKENS_RECEIVED.inc(sum(len(chunk.tokens) for chunk in chunks) // ITEM_BYTES)
    for outcome, count in Counts(outcomes).items():
        CHUNKS.labels(outcome.name.lower()).inc(count)
