"""A whole run: supervised stages, iterations, evaluations, export; resumed from what the buffer has committed.

Components of the coordinator, each below its caller:

    service                  RPCs of workers and of callers
      runs                   starts, stops and finds the run of this process; run.json
        run                  this file: restores the committed state, then stages, iterations, evaluations, export
          iteration          rollout, training, checkpoint, weights, commit, and the line of metrics.jsonl
            rollout_phase    leases trajectories, has workers extend them, submits finished ones to scoring
              dispatcher     sequences to workers; evaluations use it, too
            rewards          scoring of responses, shaped rewards, the training batch
            sampling         draws prompts: curriculum and priorities
          evaluation         accuracy on held-out problems with its intervals
          weight_sync        trainer and workers at the run's policy version
            hybrid           trainer and workers take turns on devices that they share

    workers                  leases of rollout workers, which dispatcher and weight sync watch
    groups                   live groups and their trajectories, as the buffer has them
    prompts                  prompt files, tokenized
    run_status               phase and progress, and the event stream of watchers
    run_log                  files of the run: metrics, evaluations, summary, TensorBoard
    context                  inputs, peers, status and log of a run
"""

from __future__ import annotations

import asyncio
import platform
import tempfile
import time
from contextlib import aclosing, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from perigee import __version__
from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    UnavailableError,
)
from perigee.image_sources import embed_images
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.context import RunContext
from services.coordinator.evaluation import Evaluation, Kind, choose_problems
from services.coordinator.groups import LiveGroups
from services.coordinator.iteration import Committed, CoordinatorState, Iteration, decode_state
from services.coordinator.prompts import make_image_reader
from services.coordinator.rollout_phase import RolloutPhase
from services.coordinator.run_config import SftStage, config_digest, to_message
from services.coordinator.run_log import Timeline, numbers
from services.coordinator.sampling import Sampler, make_sampler
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import PeerLostError
from services.kit.storage import is_url
from services.kit.telemetry import get_logger
from services.kit.tracing import detached_span

log = get_logger(__name__)

# A peer went away, restarted, or lost its state: the run starts again from its committed state.
RECOVERABLE = (UnavailableError, DeadlineExceededError, AbortedError, FailedPreconditionError)
PEER_POLL_SECONDS = 1.0


class Run:
    """Run from start to end, in as many attempts as its peers need."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._run_id = context.run_id
        self._weight_sync = WeightSync(context)
        self._committed_iteration = -1
        # Whether the status has the age that the run had when this process resumed it.
        self._age_known = False

    async def execute(self) -> None:
        """Runs to the end. Raises the errors that the run cannot recover from."""
        status = self._context.status
        failures = 0
        while True:
            reached = self._committed_iteration
            try:
                await self._attempt()
                return
            except PeerLostError:
                raise
            except RECOVERABLE as error:
                failures = 0 if self._committed_iteration > reached else failures + 1
                if failures > self._context.settings.recoveries:
                    raise
                log.warning("the run is resumed from its committed state", error=error.message, failures=failures)
                status.set_waiting(True, "trainer and buffer to answer again")
                await self._wait_for_peers()
                status.set_waiting(False)

    async def _attempt(self) -> None:
        context, config = self._context, self._context.config
        committed, groups, sampler = await self._restore()
        checked = await context.peers.trainer.check_algorithm(
            config.algorithm_request(), timeout_s=context.settings.control_timeout_s
        )
        if committed.state.started_seconds is None:
            await self._evaluate(committed, "baseline")
            committed.state.started_seconds = context.status.elapsed_seconds
        every = config.evaluation.every
        async with aclosing(RolloutPhase(context, groups)) as rollout:
            while not self._is_over(committed):
                if every and committed.iteration and committed.iteration % every == 0:
                    await rollout.drain()
                    await self._evaluate(committed, "periodic")
                number, version = committed.iteration + 1, committed.policy_version
                with detached_span("iteration", run=self._run_id, iteration=number, version=version):
                    iteration = Iteration(
                        context,
                        committed,
                        groups,
                        sampler,
                        self._weight_sync,
                        rollout,
                        skips_zero_advantages=checked.skips_zero_advantages,
                    )
                    line = await iteration.run()
                    self._committed_iteration = committed.iteration
                    context.status.metrics = numbers(line)
                    log.info("iteration", metrics=numbers(line))
        baseline = await self._evaluate(committed, "baseline")
        final = await self._evaluate(committed, "final")
        await self._finish(committed, baseline, final)

    def _is_over(self, committed: Committed) -> bool:
        config = self._context.config
        if committed.iteration - committed.uncounted(config.iterations) >= config.iterations:
            return True
        return config.time_limit_s is not None and committed.state.elapsed_seconds >= config.time_limit_s

    async def _restore(self) -> tuple[Committed, LiveGroups, Sampler]:
        """Restores the committed state in trainer, workers and files, and reads the live groups from the buffer."""
        context = self._context
        run = await self._find_or_create()
        state = decode_state(run.coordinator_state)
        status = context.status
        status.iteration, status.policy_version = run.iteration, run.policy_version
        committed = Committed(run.iteration, run.policy_version, state)
        status.uncounted = committed.uncounted(context.config.iterations)
        last = await asyncio.to_thread(context.log.restore_iterations, run.iteration, state.last_line)
        status.metrics = numbers(last) if last is not None else {}
        self._weight_sync.begin(run.iteration + 1, Timeline())
        await self._weight_sync.ensure_version(run.policy_version)
        context.registry.invalidate()
        groups = LiveGroups(
            self._run_id, context.peers.buffer, context.settings.control_timeout_s, context.inputs.images
        )
        await groups.load(context.inputs.prompts, state.starts)
        sampler = await self._make_sampler(state)
        for group in groups:
            number = int(group.id.removeprefix("g"))
            if number >= state.next_group:
                # Created after the commit, by a process that died.
                sampler.count_draw(group.prompt.id)
        state.next_group = max([state.next_group, *(int(group.id.removeprefix("g")) + 1 for group in groups)])
        self._committed_iteration = run.iteration
        log.info("run restored", run=self._run_id, iteration=run.iteration, live_groups=len(groups))
        return committed, groups, sampler

    async def _find_or_create(self) -> buffer_pb2.RunState:
        context = self._context
        buffer, timeout_s = context.peers.buffer, context.settings.control_timeout_s
        digest = config_digest(context.config)
        try:
            response = await buffer.get_run(buffer_pb2.GetRunRequest(run_id=self._run_id), timeout_s=timeout_s)
        except NotFoundError:
            return await self._create(digest)
        if response.run.config_digest != digest:
            raise InvalidArgumentError(
                f"Run {self._run_id} was started with another configuration: use that one, or a new run id."
            )
        if not self._age_known:
            context.status.earlier_seconds = decode_state(response.run.coordinator_state).elapsed_seconds
            self._age_known = True
        return response.run

    async def _create(self, digest: str) -> buffer_pb2.RunState:
        """Does the supervised stages, then creates the run: a run in the buffer has its first policy version."""
        context = self._context
        if await asyncio.to_thread(context.log.iterations):
            raise DataLossError(
                f"The buffer does not know run {self._run_id}, but {context.log.path}/metrics.jsonl has its "
                "iterations: point the buffer at the store that it was started with."
            )
        if not self._age_known:
            context.status.earlier_seconds = await asyncio.to_thread(context.log.sft_seconds)
            self._age_known = True
        self._weight_sync.begin(1, Timeline())
        version = await fine_tune_base(context, self._weight_sync)
        config = context.config
        sampler = make_sampler(list(context.inputs.prompts.values()), config, {})
        state = CoordinatorState(sampler.state(), elapsed_seconds=context.status.elapsed_seconds, starts={})
        state.totals.add_seconds("sft", await asyncio.to_thread(context.log.sft_seconds))
        request = buffer_pb2.CreateRunRequest(
            run_id=self._run_id, config_digest=digest, policy_version=version, coordinator_state=state.encode()
        )
        response = await context.peers.buffer.create_run(request, timeout_s=context.settings.control_timeout_s)
        return response.run

    async def _make_sampler(self, state: CoordinatorState) -> Sampler:
        context, config = self._context, self._context.config
        statistics: dict[str, tuple[int, int]] = {}
        request = buffer_pb2.ListPromptStatisticsRequest(run_id=self._run_id)
        while True:
            page = await context.peers.buffer.list_prompt_statistics(
                request, timeout_s=context.settings.control_timeout_s
            )
            statistics.update((p.prompt_id, (p.trajectories, p.correct)) for p in page.prompts)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        sampler = make_sampler(list(context.inputs.prompts.values()), config, statistics)
        sampler.restore(state.sampler)
        return sampler

    async def _evaluate(self, committed: Committed, kind: Kind) -> dict[str, Any]:
        """Evaluates the committed version, unless the log has the evaluation; returns its line."""
        context = self._context
        iteration = 0 if kind == "baseline" else committed.iteration
        known = await asyncio.to_thread(context.log.evaluation, kind, iteration)
        if known is not None:
            return known
        if iteration != committed.iteration:
            raise DataLossError(
                f"{context.log.path}/evaluations.jsonl lacks the evaluation before the first iteration."
            )
        version = committed.policy_version
        problems = choose_problems(kind, list(context.inputs.heldout.values()), context.config.evaluation)
        # The same weights on the same problems: without an iteration the last model is the first one.
        known = await asyncio.to_thread(
            context.log.evaluation_of, version, len(problems), context.config.evaluation.samples
        )
        if known is not None:
            line = known | {"kind": kind, "iteration": iteration, "seconds": 0.0}
            await asyncio.to_thread(context.log.add_evaluation, line)
            return line
        if version and context.config.evaluation.keep_checkpoints:
            await self._weight_sync.ensure_version(version)
            await self._weight_sync.save(version, pinned=True)
        with detached_span("evaluation", run=self._run_id, kind=kind, iteration=iteration, version=version):
            evaluation = Evaluation(context, version)
            line = await evaluation.run(kind, iteration, self._weight_sync)
        await asyncio.to_thread(context.log.add_samples, evaluation.samples())
        await asyncio.to_thread(context.log.add_evaluation, line)
        committed.state.totals.add_seconds("evaluation", line["seconds"])
        log.info("evaluation", run=self._run_id, kind=kind, accuracy=numbers(line["accuracy"]))
        return line

    async def _finish(self, committed: Committed, baseline: dict[str, Any], final: dict[str, Any]) -> None:
        """Exports the model and writes the summary, last: a run with a summary has finished."""
        context = self._context
        async with self._weight_sync.trainers_turn(committed.policy_version):
            exported = await context.peers.trainer.export_model(
                trainer_pb2.ExportModelRequest(run_id=self._run_id, path=context.inputs.export_path),
                timeout_s=context.settings.checkpoint_timeout_s,
            )
        totals = committed.state.totals
        totals.seconds["total"] = context.status.elapsed_seconds
        summary = {
            "run_id": self._run_id,
            "iterations": committed.iteration,
            "policy_version": committed.policy_version,
            "problems": final["problems"],
            "samples_per_problem": final["samples"],
            "model": exported.path,
            "accuracy_baseline": baseline["accuracy"],
            "accuracy_final": final["accuracy"],
            "versions": software_versions(),
            **asdict(totals),
            "seconds": {phase: round(seconds, 3) for phase, seconds in totals.seconds.items()},
        }
        await asyncio.to_thread(context.log.write_summary, summary)

    async def _wait_for_peers(self) -> None:
        """Waits until buffer and trainer answer; raises PeerLostError after `recovery_wait_s`."""
        context = self._context
        deadline = time.monotonic() + context.settings.recovery_wait_s
        while True:
            try:
                await context.peers.trainer.get_state(trainer_pb2.GetStateRequest(), timeout_s=5.0)
                await context.peers.buffer.list_prompt_statistics(
                    buffer_pb2.ListPromptStatisticsRequest(run_id=self._run_id), timeout_s=5.0
                )
                return
            except NotFoundError:
                return
            except PerigeeError as error:
                if time.monotonic() > deadline:
                    raise PeerLostError(
                        f"{error.message} It stayed away for {context.settings.recovery_wait_s:g} s: look at its log."
                    ) from error
            await asyncio.sleep(PEER_POLL_SECONDS)


def software_versions() -> dict[str, str]:
    """Returns the versions of what matters for a run's results, as far as the coordinator's machine has it."""
    found = {"python": platform.python_version(), "perigee": __version__}
    for name in ("torch", "vllm", "megatron-core", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = package_version(name)
    return found


async def fine_tune_base(context: RunContext, weight_sync: WeightSync) -> int:
    """Does the supervised stages without a checkpoint, and returns the policy version that the first iteration uses.

    Version 0 is the base model, version i the result of stage i.
    """
    stages = context.config.sft
    state = await weight_sync.wait_until_free()
    done = max((version for version in state.checkpoints if version <= len(stages)), default=0)
    if done == len(stages):
        await weight_sync.ensure_version(done)
    for number, stage in enumerate(stages[done:], start=done + 1):
        context.status.policy_version = number - 1
        started = time.monotonic()
        async with weight_sync.trainers_turn(number - 1):
            with detached_span("supervised stage", run=context.run_id, stage=number):
                last = await run_sft_stage(context, stage, number)
                await weight_sync.save(number, pinned=number == len(stages))
        line = {
            "stage": number,
            "algorithm": stage.algorithm.name,
            "policy_version": number,
            "steps": last.steps,
            "tokens": last.tokens,
            "loss": last.loss,
            "seconds": round(time.monotonic() - started, 3),
            **stage_metrics(last),
        }
        await asyncio.to_thread(context.log.add_sft_stage, line)
    return len(stages)


def stage_metrics(response: trainer_pb2.FineTuneResponse) -> dict[str, float]:
    """Returns what the stage's algorithm reports."""
    return {f"sft/{name}": value for name, value in sorted(response.metrics.items())}


async def send_dataset(context: RunContext, name: str, field: str) -> str:
    """Sends a supervised set to the trainer, with its images in it; returns its path there."""
    read = make_image_reader(name, context.config.images)
    with tempfile.TemporaryDirectory() as folder:
        path = await asyncio.to_thread(embed_images, Path(name), read, field, Path(folder, "examples.jsonl"))
        return await context.peers.trainer.put_file(path, timeout_s=context.settings.control_timeout_s)


async def run_sft_stage(context: RunContext, stage: SftStage, number: int) -> trainer_pb2.FineTuneResponse:
    """Fine-tunes through one stage and returns the trainer's last message."""
    dataset = stage.dataset
    if not is_url(dataset):
        dataset = await send_dataset(context, dataset, f"run.sft.{number - 1}.dataset")
    request = to_message(
        stage,
        trainer_pb2.FineTuneRequest(),
        run_id=context.run_id,
        seed=context.config.seed + number,
        new_version=number,
        dataset_path=dataset,
        algorithm=stage.algorithm.fields,
    )
    request.chat.CopyFrom(context.config.chat_message())
    status = context.status
    status.enter(coordinator_pb2.RUN_PHASE_SFT, stage.steps)
    steps_before = sum(earlier.steps for earlier in context.config.sft[: number - 1])
    last: trainer_pb2.FineTuneResponse | None = None
    # To the stream's end: until then the trainer is busy and refuses the checkpoint.
    async for response in context.peers.trainer.fine_tune(request, timeout_s=context.settings.train_timeout_s):
        status.done, status.total = response.step, response.steps
        metrics = {"sft/loss": response.loss, "sft/grad_norm": response.grad_norm, **stage_metrics(response)}
        status.metrics = metrics | {"sft/stage": number}
        context.log.add_sft_step(steps_before + response.step, metrics)
        last = response
    if last is None or not last.done:
        raise InternalError(f"The trainer ended supervised stage {number} without a result: look at its log.")
    return last
