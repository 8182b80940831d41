"""A whole run: supervised stages, iterations, evaluations, export; resumed from what the buffer has committed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    UnavailableError,
)
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.context import RunContext
from services.coordinator.evaluation import Evaluation
from services.coordinator.groups import LiveGroups
from services.coordinator.iteration import Committed, Iteration
from services.coordinator.records import flatten
from services.coordinator.run_config import config_digest
from services.coordinator.run_errors import PeerLostError
from services.coordinator.run_state import CoordinatorState, decode_state
from services.coordinator.sampling import Sampler, make_sampler
from services.coordinator.sft import fine_tune_base
from services.coordinator.trainer_state import hold_version
from services.coordinator.weight_pushes import WeightKeeper
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# A peer went away, restarted, or lost what it held: the run takes up the committed state again.
RECOVERABLE = (UnavailableError, DeadlineExceededError, AbortedError, FailedPreconditionError)
PEER_POLL_SECONDS = 1.0


class Run:
    """One run from start to end, in as many attempts as its peers need."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._run_id = context.run_id
        self._keeper = WeightKeeper(
            context.run_id,
            context.peers.trainer,
            context.registry,
            context.settings,
            context.board.set_waiting,
            lambda version: hold_version(context, version),
        )
        self._committed_iteration = -1
        # Whether the board knows how old the run was when this process took it up.
        self._age_known = False

    async def execute(self) -> None:
        """Runs to the end. Raises what the run cannot recover from."""
        board = self._context.board
        failures = 0
        while True:
            reached = self._committed_iteration
            try:
                await self._go_on()
                return
            except PeerLostError:
                raise
            except RECOVERABLE as error:
                failures = 0 if self._committed_iteration > reached else failures + 1
                if failures > self._context.settings.recoveries:
                    raise
                log.warning("the run goes on from its committed state", error=error.message, failures=failures)
                board.set_waiting(True)
                await self._wait_for_peers()
                board.set_waiting(False)

    async def _go_on(self) -> None:
        context, config = self._context, self._context.config
        committed, groups, sampler = await self._restore()
        if committed.state.started_seconds is None:
            await self._evaluate(committed, "before")
            committed.state.started_seconds = context.board.elapsed_seconds
        every = config.evaluation.every
        while not self._is_over(committed):
            if every and committed.iteration and committed.iteration % every == 0:
                await self._evaluate(committed, "during")
            line = await Iteration(context, committed, groups, sampler, self._keeper).run()
            self._committed_iteration = committed.iteration
            context.board.metrics = flatten(line)
            log.info("iteration", run=self._run_id, metrics=flatten(line))
        before = await self._evaluate(committed, "before")
        after = await self._evaluate(committed, "after")
        await self._finish(committed, before, after)

    def _is_over(self, committed: Committed) -> bool:
        config = self._context.config
        if committed.iteration >= config.iterations:
            return True
        return config.time_limit_s is not None and committed.state.elapsed_seconds >= config.time_limit_s

    async def _restore(self) -> tuple[Committed, LiveGroups, Sampler]:
        """Takes up the committed state: buffer, trainer, workers and files are brought to it."""
        context = self._context
        run = await self._find_or_create()
        state = decode_state(run.coordinator_state)
        board = context.board
        board.iteration, board.policy_version = run.iteration, run.policy_version
        last = await asyncio.to_thread(context.records.restore_iterations, run.iteration, state.last_line)
        board.metrics = flatten(last) if last is not None else {}
        await hold_version(context, run.policy_version)
        context.registry.distrust()
        groups = LiveGroups(self._run_id, context.peers.buffer, context.settings.control_timeout_s)
        await groups.load(context.inputs.prompts.by_id)
        sampler = await self._make_sampler(state)
        for group in groups:
            number = int(group.id.removeprefix("g"))
            if number >= state.next_group:
                # Created after the commit, by a process that died.
                sampler.count_draw(group.prompt.id)
        state.next_group = max([state.next_group, *(int(group.id.removeprefix("g")) + 1 for group in groups)])
        self._committed_iteration = run.iteration
        log.info("run taken up", run=self._run_id, iteration=run.iteration, live_groups=len(groups))
        return Committed(run.iteration, run.policy_version, state), groups, sampler

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
            context.board.earlier_seconds = decode_state(response.run.coordinator_state).elapsed_seconds
            self._age_known = True
        return response.run

    async def _create(self, digest: str) -> buffer_pb2.RunState:
        """Does the supervised stages, then creates the run: a run in the buffer has its first policy version."""
        context = self._context
        if await asyncio.to_thread(context.records.has_iterations):
            raise DataLossError(
                f"The buffer does not know run {self._run_id}, but {context.records.path}/metrics.jsonl holds its "
                "iterations: point the buffer at the store that it was started with."
            )
        if not self._age_known:
            context.board.earlier_seconds = await asyncio.to_thread(context.records.sft_seconds)
            self._age_known = True
        version = await fine_tune_base(context)
        config = context.config
        sampler = make_sampler(context.inputs.prompts.prompts, config.curriculum, config.prioritized, config.seed, {})
        state = CoordinatorState(sampler.state(), elapsed_seconds=context.board.elapsed_seconds)
        state.totals.add_seconds("sft", await asyncio.to_thread(context.records.sft_seconds))
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
        prompts = context.inputs.prompts.prompts
        sampler = make_sampler(prompts, config.curriculum, config.prioritized, config.seed, statistics)
        sampler.restore(state.sampler)
        return sampler

    async def _evaluate(self, committed: Committed, moment: str) -> dict[str, Any]:
        """The evaluation of the version that the commit names, made once."""
        context = self._context
        iteration = 0 if moment == "before" else committed.iteration
        known = await asyncio.to_thread(context.records.evaluation, moment, iteration)
        if known is not None:
            return known
        if iteration != committed.iteration:
            raise DataLossError(
                f"{context.records.path}/evaluations.jsonl lacks the evaluation before the first iteration."
            )
        line = await Evaluation(context, committed.policy_version).run(moment, iteration, self._keeper)
        await asyncio.to_thread(context.records.add_evaluation, line)
        committed.state.totals.add_seconds("evaluation", line["seconds"])
        log.info("evaluation", run=self._run_id, moment=moment, accuracy=flatten(line["accuracy"]))
        return line

    async def _finish(self, committed: Committed, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Exports the model and writes the summary, last: a summary means that the run has finished."""
        context = self._context
        path = context.inputs.run_path / "model"
        await hold_version(context, committed.policy_version)
        await context.peers.trainer.export_model(
            trainer_pb2.ExportModelRequest(run_id=self._run_id, path=str(path)),
            timeout_s=context.settings.checkpoint_timeout_s,
        )
        totals = committed.state.totals
        totals.seconds["total"] = context.board.elapsed_seconds
        facts = {
            "run_id": self._run_id,
            "iterations": committed.iteration,
            "policy_version": committed.policy_version,
            "problems": after["problems"],
            "samples_per_problem": after["samples"],
            "model": str(path),
        }
        await asyncio.to_thread(context.records.write_summary, before, after, totals, facts)

    async def _wait_for_peers(self) -> None:
        """Until buffer and trainer answer; raises PeerLostError after `recovery_wait_s`."""
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
