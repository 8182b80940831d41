"""A run in words: its metrics, phases, evaluations, workers and state as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.report.ranges import find_warnings
from perigee.report.records import Evaluation
from perigee.rollout.v1 import rollout_pb2
from perigee.rpc import ChannelOptions
from perigee.statistics import Interval

CALL_TIMEOUT_S = 5.0
# Units of a snapshot's phase_done and phase_total.
_UNITS: Mapping[int, str] = {
    pb.RUN_PHASE_SFT: "steps",
    pb.RUN_PHASE_EVALUATION: "responses",
    pb.RUN_PHASE_ROLLOUT: "trajectories",
    pb.RUN_PHASE_SCORING: "responses",
    pb.RUN_PHASE_TRAINING: "steps",
    pb.RUN_PHASE_WEIGHTS: "workers",
}
# Why a worker takes no work.
_WORKER_STATES: Mapping[int, str] = {
    rollout_pb2.WORKER_STATUS_STARTING: "starting",
    rollout_pb2.WORKER_STATUS_EMPTY: "without weights",
    rollout_pb2.WORKER_STATUS_AWAY: "away: the trainer has its devices",
}
# Key in the metrics, label, format.
_SHOWN_METRICS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/accuracy/overall", "accuracy", "{:.3f}"),
    ("reward/responses", "of responses", "{:,.0f}"),
    ("rollout/response_tokens/mean", "length", "{:.1f}"),
    ("rollout/response_tokens/p95", "length p95", "{:.0f}"),
    ("rollout/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("rollout/prefill_share", "prefilled", "{:.1%}"),
    ("rollout/partial_rate", "partial", "{:.1%}"),
    ("rollout/repetition_rate", "repeated", "{:.1%}"),
    ("rollout/finished", "finished", "{:,.0f}"),
    ("train/groups", "groups trained", "{:,.0f}"),
    ("train/grad_norm", "gradient norm", "{:.3g}"),
    ("train/train_infer_logprob_diff_mean", "mismatch", "{:.1e}"),
)


def phase_name(phase: int) -> str:
    """Returns the phase in lower case: rollout, training, ..."""
    return pb.RunPhase.Name(pb.RunPhase.ValueType(phase)).removeprefix("RUN_PHASE_").lower()


def progress_line(snapshot: pb.RunSnapshot) -> str:
    """Returns where the run stands, and how much of the phase is done when that is known."""
    parts = [f"iteration {snapshot.iteration} of {snapshot.iterations}", f"policy version {snapshot.policy_version}"]
    if snapshot.phase_total:
        parts.append(f"{snapshot.phase_done:,} of {snapshot.phase_total:,} {_UNITS.get(snapshot.phase, '')}".rstrip())
    if snapshot.waiting_for:
        parts.append(f"waiting for {snapshot.waiting_for}")
    if phases := [phase for phase in snapshot.phases if phase != phase_name(snapshot.phase)]:
        parts.append(f"now {' and '.join(phases)}")
    return ", ".join(parts)


def worker_state(worker: pb.WorkerSnapshot) -> str:
    """Returns whether a worker takes work, or why not."""
    return "ready" if worker.ready else _WORKER_STATES.get(worker.status, "not ready")


@dataclass(frozen=True)
class ShownMetric:
    """Metric of an iteration for people: its key, a short label, and its value as text."""

    key: str
    label: str
    text: str


def result_line(result: pb.IterationResult) -> str:
    """Returns the metrics of an iteration in one line."""
    metrics = result.metrics
    parts = [f"iteration {result.iteration} of {result.iterations}"]
    parts += [f"{metric.label} {metric.text}" for metric in shown_metrics(metrics)]
    phases = phase_seconds(metrics)
    if phases:
        parts.append(" ".join(f"{name} {seconds:.1f}s" for name, seconds in phases.items()))
    return "  ".join(parts)


def remaining_seconds(snapshot: pb.RunSnapshot) -> float | None:
    """Returns the seconds that the iterations left will take at the pace of the latest; None before there is one."""
    pace = snapshot.metrics.get("time/iteration_seconds")
    left = snapshot.iterations - snapshot.metrics.get("iteration", 0.0)
    return pace * left if pace and left > 0 else None


def new_warnings(metrics: Mapping[str, float], known: set[str]) -> list[str]:
    """Returns the warnings whose metric had none in the iteration before, and keeps in `known` those that have one."""
    found = find_warnings(metrics)
    fresh = [f"warning: {text}" for key, text in found.items() if key not in known]
    known.clear()
    known.update(found)
    return fresh


def shown_metrics(metrics: Mapping[str, float]) -> list[ShownMetric]:
    """Returns the metrics of an iteration that people are shown, as far as there are any."""
    return [ShownMetric(key, label, form.format(metrics[key])) for key, label, form in _SHOWN_METRICS if key in metrics]


def read_evaluation(result: pb.EvaluationResult) -> Evaluation:
    """Returns an evaluation that the coordinator reports."""
    greedy = {a.domain: _read_estimate(a.greedy) for a in result.accuracies if a.HasField("greedy")}
    sampled = {a.domain: _read_estimate(a.sampled) for a in result.accuracies if a.HasField("sampled")}
    return Evaluation(result.iteration, greedy, sampled)


def evaluation_line(evaluation: Evaluation) -> str:
    """Returns held-out accuracy in one line, with the 95% intervals."""
    parts = []
    for domain in evaluation.domains:
        kinds = (("sampled", evaluation.sampled.get(domain)), ("greedy", evaluation.greedy.get(domain)))
        found = [f"{kind} {estimate}" for kind, estimate in kinds if estimate is not None]
        parts.append(f"{domain} {' '.join(found)}")
    return f"held-out accuracy at iteration {evaluation.iteration}: {', '.join(parts)}"


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each phase of the iteration, in the order in which they began."""
    starts = {key.split("/")[1]: start for key, start in metrics.items() if key.endswith("/start")}
    return {name: metrics[f"time/{name}/seconds"] for name in sorted(starts, key=lambda name: starts[name])}


def format_seconds(seconds: float) -> str:
    """Returns a duration for people: 8.2 s, 3 m 05 s, 2 h 07 m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} m"


def _read_estimate(estimate: pb.AccuracyEstimate) -> Interval:
    return Interval(estimate.mean, estimate.low, estimate.high)


async def read_coordinator(address: str, channel: ChannelOptions) -> pb.GetStatusResponse:
    """Returns the coordinator's status. Raises UnavailableError when it cannot be reached."""
    async with CoordinatorClient(address, channel) as client:
        return await client.get_status(pb.GetStatusRequest(), timeout_s=CALL_TIMEOUT_S)


def status_lines(status: pb.GetStatusResponse) -> list[str]:
    """Returns workers and run of a coordinator, a line each."""
    lines = []
    for worker in status.workers:
        lines.append(
            f"worker {worker.worker_id} at {worker.address}: {worker_state(worker)}, {worker.running} running, "
            f"policy version {worker.policy_version}, lease {format_seconds(worker.lease_remaining_seconds)}"
        )
    if not status.workers:
        lines.append("no rollout worker is registered: one registers when its engine has loaded")
    if not status.HasField("run"):
        lines.append("no run")
        return lines
    run = status.run
    lines.append(f"run {run.run_id}: {phase_name(run.phase)}, {progress_line(run)}")
    if found := shown_metrics(run.metrics):
        lines.append("latest iteration: " + ", ".join(f"{metric.label} {metric.text}" for metric in found))
    if run.error:
        lines.append(f"error: {run.error}")
    return lines
