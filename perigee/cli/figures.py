"""The figures of a run in words: what a snapshot says, as text for the views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.report.headline import describe
from perigee.report.records import Estimate, Evaluation

# Units of a snapshot's phase_done and phase_total.
_UNITS: Mapping[int, str] = {
    pb.RUN_PHASE_SFT: "steps",
    pb.RUN_PHASE_EVALUATION: "problems",
    pb.RUN_PHASE_ROLLOUT: "trajectories",
    pb.RUN_PHASE_SCORING: "responses",
    pb.RUN_PHASE_TRAINING: "steps",
    pb.RUN_PHASE_WEIGHTS: "workers",
}
# Key in the metrics, label, format.
_FIGURES = (
    ("reward/mean", "reward", "{:.3f}"),
    ("accuracy/overall", "accuracy", "{:.3f}"),
    ("response_tokens/mean", "length", "{:.1f}"),
    ("response_tokens/p95", "length p95", "{:.0f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("share_partial", "partial", "{:.1%}"),
    ("share_repeated", "repeated", "{:.1%}"),
)


def phase_name(phase: int) -> str:
    """The phase in lower case: rollout, training, ..."""
    return pb.RunPhase.Name(pb.RunPhase.ValueType(phase)).removeprefix("RUN_PHASE_").lower()


def progress_line(snapshot: pb.RunSnapshot) -> str:
    """Where the run stands, and how much of the phase is done when that is known."""
    parts = [f"iteration {snapshot.iteration} of {snapshot.iterations}", f"policy version {snapshot.policy_version}"]
    if snapshot.phase_total:
        parts.append(f"{snapshot.phase_done:,} of {snapshot.phase_total:,} {_UNITS.get(snapshot.phase, '')}".rstrip())
    return ", ".join(parts)


@dataclass(frozen=True)
class Figure:
    """A figure of an iteration: its key in the metrics, a short label, and its value as text."""

    key: str
    label: str
    text: str


def result_line(result: pb.IterationResult) -> str:
    """The figures of an iteration in one line; what the metrics lack is left out."""
    metrics = result.metrics
    parts = [f"iteration {result.iteration} of {result.iterations}"]
    parts += [f"{figure.label} {figure.text}" for figure in figures(metrics)]
    phases = phase_seconds(metrics)
    if phases:
        parts.append(" ".join(f"{name} {seconds:.1f}s" for name, seconds in phases.items()))
    return "  ".join(parts)


def figures(metrics: Mapping[str, float]) -> list[Figure]:
    """The figures of an iteration; what the metrics lack is left out."""
    return [Figure(key, label, form.format(metrics[key])) for key, label, form in _FIGURES if key in metrics]


def read_evaluation(result: pb.EvaluationResult) -> Evaluation:
    """An evaluation as the coordinator tells it."""
    greedy = {a.domain: _read_estimate(a.greedy) for a in result.accuracies if a.HasField("greedy")}
    sampled = {a.domain: _read_estimate(a.sampled) for a in result.accuracies if a.HasField("sampled")}
    return Evaluation(result.iteration, greedy, sampled)


def evaluation_line(evaluation: Evaluation) -> str:
    """Held-out accuracy in one line, with the 95% intervals."""
    parts = []
    for domain in evaluation.domains:
        kinds = (("sampled", evaluation.sampled.get(domain)), ("greedy", evaluation.greedy.get(domain)))
        found = [f"{kind} {describe(estimate)}" for kind, estimate in kinds if estimate is not None]
        parts.append(f"{domain} {' '.join(found)}")
    return f"held-out accuracy at iteration {evaluation.iteration}: {', '.join(parts)}"


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase of the iteration, in the order in which they began."""
    keys = [key for key in metrics if key.startswith("phases/") and key.endswith("/seconds")]
    keys.sort(key=lambda key: metrics.get(key.replace("/seconds", "/start"), 0.0))
    return {key.split("/")[1]: metrics[key] for key in keys}


def format_seconds(seconds: float) -> str:
    """A duration for people: 8.2 s, 3 m 05 s, 2 h 07 m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} m"


def _read_estimate(estimate: pb.AccuracyEstimate) -> Estimate:
    low = estimate.low if estimate.HasField("low") else None
    return Estimate(estimate.mean, low, estimate.high if estimate.HasField("high") else None)
