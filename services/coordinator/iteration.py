"""One iteration: rollout with scoring, training, checkpoint, weights, commit, and its line of metrics.jsonl.

A line has `iteration` and `policy_version`, and metrics under four namespaces: `rollout/` for generation, `reward/` for
verdicts and rewards, `train/` for the update, `time/` for seconds. Means and rates of nothing are null. The trainer
names the metrics that it measures in the update; they are absent when the iteration trained nothing.

- `rollout/ended/REASON` counts segments by end reason; `rollout/partial_rate` is the fraction that ended by the token
  budget.
- `reward/mean`, `reward/accuracy/DOMAIN`, `rollout/response_tokens/...` and the rates of ungradable, capped, repeated
  and overlong responses are over the responses of the groups that the iteration completed, however many iterations or
  processes these took: `reward/groups` groups with `reward/responses` judged responses. Short responses finish first,
  so a mean over whatever has finished would rise by itself. Rewards are those of the verifier, before shaping.
- `rollout/prefilled_tokens` are the prompt and earlier tokens that the engines computed for segments that ended, and
  `rollout/cached_tokens` those that they had in their prefix caches; `rollout/prefill_share` is the fraction of the
  former in all tokens computed. `rollout/prefill_seconds` and `rollout/decode_seconds` are of the engines' steps, a
  sum over the workers; `rollout/prefill_time_share` is the fraction of the former.
- `rollout/tokens` are those of the iteration's budgets. `rollout/ahead_tokens` of them, the fraction
  `rollout/ahead_share`, were sampled by an earlier version while the trainer trained (`run.rollout.during_training`),
  which makes each one version older than it would be; `time/ahead` is that time, in the line of the iteration trained.
- `rollout/token_budget/base` is the token budget of short contexts, `mean` and `max` are of what trajectories might
  add, their length limit included; `rollout/planned_prefill_share` is the share of prefill in that work, by
  `run.rollout.costs`.
- `train/uniform_rate` is the fraction of the complete groups with equal rewards.
- `events` are what happened to the run since the line before: workers joined or left, engines started again.
- `warnings` has a sentence for each metric outside of its range (`perigee/report/ranges.py`), by its key.
- `train/tokens_by_version/VERSION` counts tokens of the trained trajectories by the policy version that sampled them.
- `time/PHASE/start` and `time/PHASE/seconds` are a phase's offset from the iteration's start and its length.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge

from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import DataLossError, InternalError, first_error
from perigee.report.ranges import find_warnings
from perigee.reward.scoring import ScoringPipeline, read_reward
from perigee.reward.v1 import reward_pb2
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.context import RunContext
from services.coordinator.groups import LiveGroups, Trajectory
from services.coordinator.rewards import ShapingWeights, TrainingBatch, make_training_batch, score_responses
from services.coordinator.rollout_phase import RolloutCounts, RolloutPhase, read_response_texts
from services.coordinator.run_log import Timeline
from services.coordinator.run_status import RunStatus
from services.coordinator.samples import SampleCollector, reason_name
from services.coordinator.sampling import Sampler, SamplerState
from services.coordinator.weight_sync import WeightSync
from services.kit.telemetry import get_logger

ITERATION = Gauge("perigee_coordinator_iteration", "Iterations committed by the run.")
POLICY_VERSION = Gauge("perigee_coordinator_policy_version_number", "Policy version that the run has committed.")
REWARD = Gauge("perigee_coordinator_reward_mean", "Mean reward of the latest iteration.")
TOKEN_BUDGET = Gauge("perigee_coordinator_token_budget_tokens", "Token budget of the latest iteration.")
PREFILLED = PrometheusCounter(
    "perigee_coordinator_prefilled_tokens", "Prompt and earlier tokens computed in training rollouts."
)
GENERATED = PrometheusCounter("perigee_coordinator_generated_tokens", "Tokens generated in training rollouts.")
TRAINED = PrometheusCounter("perigee_coordinator_trained_trajectories", "Trajectories trained on.")

WARNINGS = PrometheusCounter("perigee_coordinator_warnings", "Iterations with a metric out of range.", ["metric"])
log = get_logger(__name__)

END_NAMES = ("stop", "repetition", "max_response_tokens", "budget")
# Metric of the trainer whose maximum over the run goes into the summary.
LOGPROB_DIFF = "train/train_infer_logprob_diff_max"


@dataclass
class Totals:
    """Sums over the iterations committed so far."""

    tokens_generated: int = 0
    trajectories_trained: int = 0
    trajectories_multi_version: int = 0
    train_infer_logprob_diff_max: float = 0.0
    # Seconds per phase, those before the first iteration included.
    seconds: dict[str, float] = field(default_factory=dict)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Adds to a phase's seconds."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def with_iteration(self, line: Mapping[str, Any], timeline: Timeline) -> Totals:
        """Returns the sums with an iteration's line added."""
        totals = Totals(
            tokens_generated=self.tokens_generated + line["rollout/tokens"],
            trajectories_trained=self.trajectories_trained + line["train/trajectories"],
            trajectories_multi_version=self.trajectories_multi_version + line["train/trajectories_multi_version"],
            train_infer_logprob_diff_max=max(self.train_infer_logprob_diff_max, line.get(LOGPROB_DIFF) or 0.0),
            seconds=dict(self.seconds),
        )
        for name, phase in timeline.phases.items():
            totals.add_seconds(name, phase.seconds)
        return totals


@dataclass
class CoordinatorState:
    """State of a run between iterations; each commit stores it in the buffer."""

    sampler: SamplerState
    # Number of the next group.
    next_group: int = 0
    # Age of the run without the time in which no coordinator ran.
    elapsed_seconds: float = 0.0
    # Age at which the first iteration began.
    started_seconds: float | None = None
    totals: Totals = field(default_factory=Totals)
    # Tokens of the trajectories of each live group: what the next iteration adds counts from here, however often it is
    # cut and done again. None in a state that an earlier release has stored.
    starts: dict[str, list[int]] | None = None
    # Work per second of the rollout phases, by which budgets are chosen.
    rollout_speed: float | None = None
    # Entropy of the policy that the first training began with.
    first_entropy: float | None = None
    # The last committed iteration's line of metrics.jsonl: written again when a crash lost it.
    last_line: dict[str, Any] | None = None

    def encode(self) -> bytes:
        """Returns the state as JSON."""
        return json.dumps(asdict(self)).encode()


def decode_state(data: bytes) -> CoordinatorState:
    """Reads a state from JSON; raises DataLossError when it is none."""
    try:
        values = json.loads(data)
        values["sampler"] = SamplerState(**values["sampler"])
        values["totals"] = Totals(**values["totals"])
        return CoordinatorState(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DataLossError(f"The run's state in the buffer cannot be read: {error}") from error


@dataclass
class Committed:
    """Latest commit of the buffer, as far as the next iteration needs it."""

    iteration: int
    policy_version: int
    state: CoordinatorState

    @property
    def untrained(self) -> int:
        """Iterations so far in which no group trained."""
        return int((self.state.last_line or {}).get("untrained_iterations", 0))

    def uncounted(self, iterations: int) -> int:
        """Returns how many iterations do not count towards `iterations`: those without training, as many at most."""
        return min(self.untrained, iterations)


class Iteration:
    """The iteration after the committed one. `run` changes `committed` only when the buffer has committed it."""

    def __init__(
        self,
        context: RunContext,
        committed: Committed,
        groups: LiveGroups,
        sampler: Sampler,
        weight_sync: WeightSync,
        rollout: RolloutPhase,
        *,
        skips_zero_advantages: bool,
    ) -> None:
        self._context = context
        self._skips_zero_advantages = skips_zero_advantages
        self._committed = committed
        self._rollout = rollout
        self._groups = groups
        self._sampler = sampler
        self._weight_sync = weight_sync
        self._number = committed.iteration + 1
        self._next_group = committed.state.next_group
        self._timeline = Timeline()
        # The time for which workers may generate ahead: until they have the new weights.
        self._ahead = ExitStack()
        self._scoring_failures = 0
        inputs = context.inputs
        self._samples = SampleCollector(inputs.prompts, inputs.tokenizer, inputs.config, self._number)

    async def run(self) -> dict[str, Any]:
        """Runs the iteration and returns its line of metrics.jsonl."""
        with self._ahead:
            return await self._run()

    async def _run(self) -> dict[str, Any]:
        context, config = self._context, self._context.config
        context.status.iteration = self._number
        self._weight_sync.begin(self._number, self._timeline)
        with self._timeline.phase("preparation"):
            await self._weight_sync.ensure(self._committed.policy_version)
            await self._create_groups()
        counts = await self._roll_out()
        weights = ShapingWeights.at(config, self._number)
        batch = make_training_batch(
            self._groups, weights, config.drop_uniform_groups, self._sampler.left_out, self._skips_zero_advantages
        )
        learning_rate = learning_rate_at(config.optimizer.learning_rate, config.final_lr_ratio, self._progress())
        result: trainer_pb2.TrainResult | None = None
        version = self._committed.policy_version
        if batch.groups:
            self._begin_ahead()
            result = await self._train(batch, learning_rate)
            version = result.policy_version
            with self._timeline.phase("checkpoint"):
                await self._weight_sync.save(version)
        line: dict[str, Any] = {
            "iteration": self._number,
            "policy_version": version,
            "untrained_iterations": self._committed.untrained + (not batch.groups),
            **reward_metrics(batch, self._scoring_failures, weights),
            **rollout_metrics(counts, batch, self._timeline, weights),
            "rollout/live_groups": len(self._groups) - len(batch.consumed),
            "rollout/workers": len(context.registry.all()),
            **train_metrics(batch, result, learning_rate),
            "time/elapsed_seconds": round(context.status.elapsed_seconds, 3),
            **time_metrics(self._timeline),
        }
        if entropy := line.get("train/entropy"):
            line["train/entropy_ratio"] = entropy / (self._committed.state.first_entropy or entropy)
        reported = context.status.event_count
        line["events"] = unrecorded_events(context.status, self._committed.state.last_line)
        line["warnings"] = find_warnings(line)
        for key, warning in line["warnings"].items():
            WARNINGS.labels(key).inc()
            log.warning(warning, run=context.run_id, iteration=self._number, metric=key)
        await self._close(batch, version, line)
        context.status.events_recorded = reported
        return line

    async def _create_groups(self) -> None:
        config = self._context.config
        missing = config.max_live_groups - len(self._groups)
        prompts = self._sampler.sample(max(0, missing), self._number, self._groups.prompt_ids())
        named = [(f"g{self._next_group + offset:08d}", prompt) for offset, prompt in enumerate(prompts)]
        self._next_group += len(named)
        await self._groups.create(named, self._number, config.group_size)

    async def _roll_out(self) -> RolloutCounts:
        context, status = self._context, self._context.status
        version = self._committed.policy_version
        async with score_responses(context.peers.reward, context.settings.scoring, self._record) as scoring:
            self._rollout.begin(version, self._number, self._committed.state.rollout_speed, scoring, self._samples)
            unscored = [t for t in self._groups.trajectories() if t.finished and not t.judged]
            moving = sum(not t.finished or t.added > 0 for t in self._groups.trajectories())
            status.enter(coordinator_pb2.RUN_PHASE_ROLLOUT, moving)
            with self._timeline.phase("rollout"):
                async with self._weight_sync.run(version):
                    await self._score_again(unscored, scoring)
                    await self._rollout.run()
            status.enter(coordinator_pb2.RUN_PHASE_SCORING)
            with self._timeline.phase("scoring"):
                await scoring.drain()
        return await self._rollout.count()

    def _begin_ahead(self) -> None:
        """Has workers that stay go on with what is not trained, if they shall and this is not the last iteration."""
        config, stays = self._context.config, self._weight_sync.stays
        is_last = self._number - self._committed.uncounted(config.iterations) >= config.iterations
        workers = self._context.registry.with_version(self._committed.policy_version)
        if config.rolls_out_during_training and not is_last and any(map(stays, workers)):
            self._ahead.enter_context(self._timeline.phase("ahead"))
            self._rollout.begin_ahead(stays)

    async def _score_again(self, unscored: Sequence[Trajectory], scoring: ScoringPipeline) -> None:
        """Submits the responses without a verdict that had finished when a coordinator died, or ahead."""
        context = self._context
        async for trajectory, text in read_response_texts(context, unscored):
            prompt, versions = trajectory.group.prompt, trajectory.tokens_by_version
            self._samples.add(trajectory.id, prompt, text, trajectory.tokens, versions, trajectory.end_reason)
            await scoring.submit(context.inputs.score_job(trajectory.id, prompt, text))

    async def _record(self, outcomes: list[reward_pb2.ScoreResponse]) -> None:
        """Makes verdicts durable, then counts them. The first verdict recorded stands."""
        context = self._context
        self._samples.judge(outcomes)
        request = buffer_pb2.RecordVerdictsRequest(
            run_id=context.run_id,
            verdicts=[
                buffer_pb2.TrajectoryVerdict(
                    trajectory_id=outcome.id, verdict=outcome.verdict, reward=read_reward(outcome)
                )
                for outcome in outcomes
            ],
        )
        response = await context.peers.buffer.record_verdicts(request, timeout_s=context.settings.control_timeout_s)
        trajectories = [self._groups.trajectory(outcome.id) for outcome in outcomes]
        for trajectory, outcome in zip(trajectories, outcomes, strict=True):
            trajectory.verdict, trajectory.reward = outcome.verdict, read_reward(outcome)
            self._scoring_failures += outcome.verdict == buffer_pb2.VERDICT_FAILED
            if outcome.unjudgeable:
                self._leave_out(trajectory.group.prompt.id, outcome.reason)
        if response.recorded < len(outcomes):
            await self._groups.refresh(trajectories)

    def _leave_out(self, prompt_id: str, reason: str) -> None:
        if prompt_id not in self._sampler.left_out:
            self._sampler.left_out.add(prompt_id)
            self._context.status.report(f"prompt {prompt_id} is left out: {reason}")

    async def _train(self, batch: TrainingBatch, learning_rate: float) -> trainer_pb2.TrainResult:
        context, config = self._context, self._context.config
        base = self._committed.policy_version
        request = trainer_pb2.TrainRequest(
            run_id=context.run_id,
            iteration=self._number,
            base_version=base,
            new_version=base + 1,
            groups=batch.groups,
            algorithm=config.algorithm.message(),
            update=config.update_message(),
            optimizer=config.optimizer_message(learning_rate),
        )
        tokens = sum(
            trajectory.prompt_tokens + sum(trajectory.tokens_by_version.values())
            for group in batch.groups
            for trajectory in group.trajectories
        )
        timeout_s = context.settings.train_timeout_s + tokens * context.settings.train_token_timeout_s
        context.status.enter(coordinator_pb2.RUN_PHASE_TRAINING, config.update.minibatches)
        result: trainer_pb2.TrainResult | None = None
        async with self._weight_sync.trainers_turn(base):
            with self._timeline.phase("training"):
                # To the stream's end: until then the trainer is busy and refuses the checkpoint.
                async for response in context.peers.trainer.train(request, timeout_s=timeout_s):
                    context.status.done, context.status.total = response.step, response.steps
                    if response.HasField("result"):
                        result = response.result
        if result is None:
            raise InternalError("The trainer ended an iteration without a result: look at its log.")
        return result

    async def _close(self, batch: TrainingBatch, version: int, line: dict[str, Any]) -> None:
        """Commits and pushes at once, since both only need the checkpoint to be there; then records the line."""
        context, status = self._context, self._context.status
        counted = dict(self._timeline.phases)
        state = replace(
            self._committed.state,
            sampler=self._sampler.state(),
            next_group=self._next_group,
            elapsed_seconds=status.elapsed_seconds,
            totals=self._committed.state.totals.with_iteration(line, self._timeline),
            first_entropy=self._committed.state.first_entropy or line.get("train/entropy"),
            last_line=line,
            starts=self._groups.starts(batch.consumed),
            rollout_speed=self._rollout.speed,
        )
        # Before the commit: a committed iteration has its samples.
        samples = self._samples.chosen()
        for sample in samples:
            # A response may have taken tokens of new weights before the coordinator knew.
            sample.policy_versions = sorted(+self._groups.trajectory(sample.id).tokens_by_version)
        await asyncio.to_thread(context.log.add_samples, samples)
        status.enter(coordinator_pb2.RUN_PHASE_WEIGHTS)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._commit(batch, version, state))
                if version != self._committed.policy_version:
                    tasks.create_task(self._weight_sync.push(version))
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        self._ahead.close()
        self._committed.iteration, self._committed.policy_version = self._number, version
        self._committed.state = state
        self._groups.close_iteration(batch.consumed)
        for increment in batch.increments:
            self._sampler.record(increment.prompt_id, increment.trajectories, increment.correct)
        line |= time_metrics(self._timeline)
        for name, phase in self._timeline.phases.items():
            if phase is not counted.get(name):
                state.totals.add_seconds(name, phase.seconds)
        set_gauges(line)
        await asyncio.to_thread(context.log.add_iteration, line)
        status.policy_version = version
        status.uncounted = self._committed.uncounted(context.config.iterations)

    async def _commit(self, batch: TrainingBatch, version: int, state: CoordinatorState) -> None:
        context = self._context
        request = buffer_pb2.CommitIterationRequest(
            run_id=context.run_id,
            iteration=self._number,
            policy_version=version,
            consumed_group_ids=[group.id for group in batch.consumed],
            prompt_increments=batch.increments,
            coordinator_state=state.encode(),
        )
        with self._timeline.phase("commit"):
            response = await context.peers.buffer.commit_iteration(
                request, timeout_s=context.settings.control_timeout_s
            )
        context.status.count_store_restarts(response.store_restarts)

    def _progress(self) -> float:
        """Returns the fraction of the run that has passed, by iterations or by time, whichever is larger."""
        config, state = self._context.config, self._committed.state
        counted = self._committed.iteration - self._committed.uncounted(config.iterations)
        by_iterations = counted / max(1, config.iterations - 1)
        by_time = 0.0
        if config.time_limit_s is not None and state.started_seconds is not None:
            left = max(1e-9, config.time_limit_s - state.started_seconds)
            by_time = (self._context.status.elapsed_seconds - state.started_seconds) / left
        return min(1.0, max(by_iterations, by_time))


def unrecorded_events(status: RunStatus, last_line: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the events that no line has; the last line may be of an iteration that failed after its commit."""
    events = status.events_after(status.events_recorded)
    found = [{"seconds": round(event.elapsed_seconds, 1), "event": event.text} for event in events]
    return [event for event in found if event not in (last_line or {}).get("events", [])]


def learning_rate_at(first: float, final_ratio: float, progress: float) -> float:
    """Returns the learning rate at a fraction of the run: linear from `first` to its product with `final_ratio`."""
    return first * (1.0 - (1.0 - final_ratio) * progress)


def reward_metrics(batch: TrainingBatch, failures: int, weights: ShapingWeights) -> dict[str, Any]:
    """Returns the metrics of the verdicts on the responses of the complete groups."""
    judged = [trajectory for trajectory in batch.trajectories if trajectory.reward is not None]
    ungradable = sum(trajectory.verdict == buffer_pb2.VERDICT_UNGRADABLE for trajectory in judged)
    return {
        "reward/groups": len(batch.consumed),
        "reward/responses": len(judged),
        "reward/ungradable_rate": rate(ungradable, len(judged)),
        "reward/mean": mean([trajectory.reward or 0.0 for trajectory in judged]),
        **{f"reward/accuracy/{domain}": value for domain, value in accuracies(judged).items()},
        "reward/failures": failures,
        "reward/length_reward_weight": weights.length,
    }


def rollout_metrics(
    counts: RolloutCounts, batch: TrainingBatch, timeline: Timeline, weights: ShapingWeights
) -> dict[str, Any]:
    """Returns the metrics of the generation."""
    ended = Counter(map(reason_name, counts.ended.values()))
    seconds = timeline.phases["rollout"].seconds
    engine_seconds = counts.prefill_seconds + counts.decode_seconds
    complete = Counter(reason_name(trajectory.end_reason) for trajectory in batch.trajectories)
    lengths = [trajectory.tokens for trajectory in batch.trajectories]
    return {
        "rollout/tokens": counts.tokens,
        "rollout/ahead_tokens": counts.ahead_tokens,
        "rollout/ahead_share": rate(counts.ahead_tokens, counts.tokens),
        "rollout/cached_tokens": counts.cached_tokens,
        "rollout/prefilled_tokens": counts.prefilled_tokens,
        "rollout/prefill_share": rate(counts.prefilled_tokens, counts.prefilled_tokens + counts.tokens),
        # A call says them when it ends: nothing is known of one that was cut.
        "rollout/prefill_seconds": round(counts.prefill_seconds, 4) if engine_seconds else None,
        "rollout/decode_seconds": round(counts.decode_seconds, 4) if engine_seconds else None,
        "rollout/prefill_time_share": rate(counts.prefill_seconds, engine_seconds),
        "rollout/tokens_per_second": round(counts.timed_tokens / seconds, 1) if seconds else None,
        "rollout/token_budget/base": counts.base_budget,
        "rollout/token_budget/mean": mean(counts.budgets),
        "rollout/token_budget/max": max(counts.budgets, default=None),
        "rollout/planned_prefill_share": counts.planned_prefill_share,
        "rollout/finished": ended.total() - ended["budget"],
        "rollout/response_tokens/mean": mean(lengths),
        "rollout/response_tokens/p95": float(np.percentile(lengths, 95)) if lengths else None,
        "rollout/response_tokens/max": max(lengths, default=None),
        **{f"rollout/ended/{name}": ended[name] for name in END_NAMES},
        "rollout/partial_rate": rate(ended["budget"], ended.total()),
        "rollout/capped_rate": rate(complete["max_response_tokens"], len(lengths)),
        "rollout/repetition_rate": rate(complete["repetition"], len(lengths)),
        "rollout/overlong_rate": overlong_rate(lengths, weights),
        "rollout/failures": counts.failures,
    }


def train_metrics(batch: TrainingBatch, result: trainer_pb2.TrainResult | None, learning_rate: float) -> dict[str, Any]:
    """Returns the metrics of the update; `result` is None when nothing was trained."""
    result = result or trainer_pb2.TrainResult()
    return {
        "train/groups": len(batch.groups),
        "train/groups_uniform": batch.uniform,
        "train/uniform_rate": rate(batch.uniform, len(batch.consumed)),
        "train/groups_failed": batch.failed,
        "train/trajectories": result.trajectories,
        "train/trajectories_multi_version": result.trajectories_multi_version,
        "train/tokens": result.trained_tokens,
        **{f"train/tokens_by_version/{version}": n for version, n in sorted(batch.tokens_by_version.items())},
        "train/learning_rate": learning_rate,
        **{name: value if math.isfinite(value) else None for name, value in sorted(result.metrics.items())},
    }


def time_metrics(timeline: Timeline) -> dict[str, float]:
    """Returns the phases and the iteration's length so far."""
    phases = {
        f"time/{name}/{key}": round(value, 4)
        for name, phase in timeline.phases.items()
        for key, value in asdict(phase).items()
    }
    return {"time/iteration_seconds": round(timeline.seconds, 4), **phases}


def accuracies(judged: Sequence[Trajectory]) -> dict[str, float | None]:
    """Returns the fraction of correct responses, overall and by domain."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    for trajectory in judged:
        by_domain[trajectory.group.prompt.domain].append(float(trajectory.correct))
    every = [value for values in by_domain.values() for value in values]
    return {"overall": mean(every), **{domain: mean(by_domain[domain]) for domain in sorted(by_domain)}}


def overlong_rate(lengths: Sequence[int], weights: ShapingWeights) -> float | None:
    """Returns the fraction of responses that lose reward to the overlong penalty."""
    if not weights.overlong_penalty:
        return 0.0
    return rate(sum(tokens > weights.overlong_cap - weights.overlong_buffer for tokens in lengths), len(lengths))


def rate(count: float, total: float) -> float | None:
    """Returns a fraction; None of nothing."""
    return count / total if total else None


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean; None of nothing."""
    return round(sum(values) / len(values), 6) if values else None


def set_gauges(line: Mapping[str, Any]) -> None:
    """Sets the Prometheus metrics of a committed iteration."""
    GENERATED.inc(line["rollout/tokens"])
    PREFILLED.inc(line["rollout/prefilled_tokens"])
    TRAINED.inc(line["train/trajectories"])
    TOKEN_BUDGET.set(line["rollout/token_budget/base"])
    ITERATION.set(line["iteration"])
    POLICY_VERSION.set(line["policy_version"])
    if line["reward/mean"] is not None:
        REWARD.set(line["reward/mean"])
