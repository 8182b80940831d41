"""Prometheus metrics of the reward service; parts of composites count like items of their own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

# The rate of failures is that of verdict="failed" among these.
OUTCOMES = Counter("perigee_reward_outcomes_total", "Outcomes given", ["verifier", "verdict"])
CACHE_HITS = Counter("perigee_reward_cache_hits_total", "Items that another item's judgement answered", ["verifier"])
JUDGEMENT_SECONDS = Histogram(
    "perigee_reward_judgement_seconds",
    "Time from an item's arrival to its outcome",
    ["verifier"],
    buckets=(0.0005, 0.002, 0.01, 0.05, 0.2, 1, 5, 20, 60),
)
QUEUED_ITEMS = Gauge("perigee_reward_queued_items", "Items under way", ["verifier"])
AGREEMENTS = Counter(
    "perigee_reward_agreements_total",
    "Responses that two verifiers of a composite both judged, by whether they agreed",
    ["verifier", "other", "result"],
)
JUDGE_CALLS = Counter("perigee_reward_judge_calls_total", "Requests to judges by their end", ["judge", "end"])
JUDGE_TOKENS = Counter("perigee_reward_judge_tokens_total", "Tokens that judges read and wrote", ["judge", "kind"])
