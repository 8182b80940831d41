"""Prometheus metrics of a rollout worker."""

from prometheus_client import Counter, Gauge, Histogram

GENERATED_TOKENS = Counter("perigee_rollout_generated_tokens", "Response tokens generated.")
CACHED_TOKENS = Counter("perigee_rollout_cached_tokens", "Prompt and earlier tokens served from the prefix cache.")
SEGMENTS = Counter("perigee_rollout_segments", "Segments by the reason for their end; `failed` is one.", ["end_reason"])
RUNNING = Gauge("perigee_rollout_running_sequences", "Sequences accepted and not ended.")
READY = Gauge("perigee_rollout_ready", "1 while the worker holds pushed weights and serves.")
POLICY_VERSION = Gauge("perigee_rollout_policy_version", "Policy version that the engine holds.")
ENGINE_RESTARTS = Counter("perigee_rollout_engine_restarts", "Engines that died and were started again.")
ENGINE_START_SECONDS = Histogram(
    "perigee_rollout_engine_start_seconds", "Seconds until an engine runs.", buckets=(5, 10, 20, 40, 80, 160, 320)
)
COMMIT_SECONDS = Histogram("perigee_rollout_commit_seconds", "Seconds of a weight commit in the engine.")
APPEND_SECONDS = Histogram("perigee_rollout_append_seconds", "Seconds of an append to the buffer.")
