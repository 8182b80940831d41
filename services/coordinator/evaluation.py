"""Accuracy on held-out problems: greedy decoding, and several samples per problem at temperature 1.

A line of evaluations.jsonl has iteration, policy_version, kind (baseline, periodic, final), problems, samples, seconds,
elapsed_seconds, accuracy, response_tokens and failures. `accuracy` is {overall, <domain>: {greedy, sampled: {mean, low,
high}}} with 95% intervals: Wilson's for greedy, and one clustered by problem for sampled. A response whose judging
failed is left out and counted in `failures`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.v1 import coordinator_pb2
from perigee.report.samples import Sample
from perigee.reward.v1 import reward_pb2
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.statistics import Interval, clustered_interval, wilson_interval
from services.coordinator.context import RunContext
from services.coordinator.dispatcher import Dispatcher, Progress
from services.coordinator.prompts import Prompt
from services.coordinator.rewards import score_responses
from services.coordinator.run_config import EvaluationConfig
from services.coordinator.run_log import number_or_none
from services.coordinator.samples import SampleCollector
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import Worker

# Prompt tokens per call: a message stays far below 4 MiB. Bytes of images, which are in memory while they are sent.
MAX_PROMPT_TOKENS = 200_000
MAX_IMAGE_BYTES = 32 << 20

Kind = Literal["baseline", "periodic", "final"]


@dataclass(slots=True)
class Attempt:
    """One response to one problem; `correct` is None before it has a verdict, and when judging failed."""

    prompt: Prompt
    greedy: bool
    tokens: int = 0
    correct: bool | None = None


@dataclass
class Evaluation:
    """One evaluation of one policy version."""

    context: RunContext
    policy_version: int
    attempts: dict[str, Attempt] = field(default_factory=dict)

    async def run(self, kind: Kind, iteration: int, weights: WeightSync) -> dict[str, Any]:
        """Evaluates the version and returns the line of evaluations.jsonl."""
        context, config = self.context, self.context.config.evaluation
        problems = choose_problems(kind, list(context.inputs.heldout.values()), config)
        with_greedy = kind != "periodic" or config.greedy
        inputs = context.inputs
        self._samples = SampleCollector(inputs.heldout, inputs.tokenizer, inputs.config, iteration, kind)
        self.attempts = make_attempts(problems, with_greedy, config.samples)
        started = time.monotonic()
        await self._evaluate(weights)
        return {
            "iteration": iteration,
            "policy_version": self.policy_version,
            "kind": kind,
            "problems": len(problems),
            "samples": config.samples,
            "seconds": round(time.monotonic() - started, 3),
            "elapsed_seconds": round(context.status.elapsed_seconds, 3),
            "accuracy": summarize(self.attempts.values()),
            "response_tokens": {
                "greedy": mean_tokens(attempt for attempt in self.attempts.values() if attempt.greedy),
                "sampled": mean_tokens(attempt for attempt in self.attempts.values() if not attempt.greedy),
            },
            "failures": sum(attempt.correct is None for attempt in self.attempts.values()),
        }

    async def _evaluate(self, weights: WeightSync) -> None:
        """Generates and scores the response of every attempt."""
        context = self.context
        context.status.enter(coordinator_pb2.RUN_PHASE_EVALUATION, len(self.attempts))
        await weights.ensure(self.policy_version)
        dispatcher = Dispatcher(
            context.registry,
            self.policy_version,
            context.settings.dispatch,
            self._generate,
            context.status.set_waiting,
        )
        async with (
            score_responses(context.peers.reward, context.settings.scoring, self._record) as self._scoring,
            weights.run(self.policy_version),
        ):
            await dispatcher.run(self.attempts)

    async def _generate(self, worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        for greedy in (True, False):
            some = [key for key in keys if self.attempts[key].greedy is greedy]
            for part in bounded_parts(some, [self.attempts[key].prompt for key in some]):
                await self._put_images(worker, [self.attempts[key].prompt for key in part])
                async for response in worker.client.generate(
                    self._request(part, greedy), timeout_s=self._deadline_s(part)
                ):
                    if response.end_reason != buffer_pb2.END_REASON_UNSPECIFIED:
                        await self._submit(response)
                        yield Progress(ended=[response.id])

    async def _put_images(self, worker: Worker, prompts: Iterable[Prompt]) -> None:
        """Sends the worker those images of prompts that it does not have."""
        images = {image.digest: image for prompt in prompts for image in prompt.line.images}
        if images:
            found = await asyncio.to_thread(self.context.inputs.images.read_all, images.values())
            await worker.client.put_images(found, timeout_s=self.context.settings.control_timeout_s)

    @property
    def _cap(self) -> int:
        config = self.context.config
        return config.evaluation.max_response_tokens or config.rollout.max_response_tokens

    def _deadline_s(self, keys: Sequence[str]) -> float:
        longest = max(self.attempts[key].prompt.tokens for key in keys) + self._cap
        return self.context.settings.dispatch.deadline_s(longest)

    def _request(self, keys: Sequence[str], greedy: bool) -> pb.GenerateRequest:
        config = self.context.config
        request = pb.GenerateRequest(
            run_id=self.context.run_id,
            sampling=pb.Sampling(temperature=0.0 if greedy else 1.0),
            text_only=True,
            policy_version=self.policy_version,
            repetition_stop=config.rollout.repetition_stop.message(),
        )
        for key in keys:
            token_ids = pack_token_ids(self.attempts[key].prompt.token_ids)
            digests = [image.digest for image in self.attempts[key].prompt.line.images]
            request.items.add(id=key, prompt_token_ids=token_ids, max_tokens=self._cap, image_digests=digests)
        return request

    async def _submit(self, response: pb.GenerateResponse) -> None:
        attempt = self.attempts[response.id]
        attempt.tokens = response.tokens
        versions = [self.policy_version]
        self._samples.add(response.id, attempt.prompt, response.text, attempt.tokens, versions, response.end_reason)
        job = self.context.inputs.score_job(response.id, attempt.prompt, response.text, response.left_out_bytes)
        await self._scoring.submit(job)

    def samples(self) -> list[Sample]:
        """Returns the samples of the evaluation that has been made."""
        return self._samples.chosen()

    async def _record(self, outcomes: list[reward_pb2.ScoreResponse]) -> None:
        self._samples.judge(outcomes)
        for outcome in outcomes:
            if outcome.verdict != buffer_pb2.VERDICT_FAILED:
                self.attempts[outcome.id].correct = outcome.verdict == buffer_pb2.VERDICT_CORRECT
        self.context.status.done += len(outcomes)


def make_attempts(problems: Iterable[Prompt], greedy: bool, samples: int) -> dict[str, Attempt]:
    """Returns the responses to generate, greedy ones first."""
    problems = list(problems)
    attempts = {f"greedy/{prompt.id}": Attempt(prompt, greedy=True) for prompt in problems} if greedy else {}
    for number in range(samples):
        attempts.update({f"sample-{number}/{prompt.id}": Attempt(prompt, greedy=False) for prompt in problems})
    return attempts


def choose_problems(kind: Kind, problems: Sequence[Prompt], config: EvaluationConfig) -> Sequence[Prompt]:
    """Returns the problems of an evaluation of this kind."""
    return spread(problems, (config.problems if kind == "periodic" else config.end_problems) or len(problems))


def spread(problems: Sequence[Prompt], count: int) -> Sequence[Prompt]:
    """Returns `count` problems at even distances, so that every domain of a sorted file is there."""
    count = min(count, len(problems))
    return [problems[index * len(problems) // count] for index in range(count)]


def bounded_parts(keys: Sequence[str], prompts: Sequence[Prompt]) -> list[list[str]]:
    """Splits the keys in order, so that no part has more than MAX_PROMPT_TOKENS or MAX_IMAGE_BYTES."""
    parts: list[list[str]] = []
    tokens, size = MAX_PROMPT_TOKENS, 0
    for key, prompt in zip(keys, prompts, strict=True):
        tokens += len(prompt.token_ids)
        size += sum(image.size_bytes for image in prompt.line.images)
        if tokens > MAX_PROMPT_TOKENS or size > MAX_IMAGE_BYTES:
            parts.append([])
            tokens, size = len(prompt.token_ids), sum(image.size_bytes for image in prompt.line.images)
        parts[-1].append(key)
    return parts


def summarize(attempts: Iterable[Attempt]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns accuracies with intervals, overall and by domain; without greedy ones where there are no attempts."""
    by_scope: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_scope["overall"].append(attempt)
        by_scope[attempt.prompt.domain].append(attempt)
    return {scope: _summarize_scope(some) for scope, some in by_scope.items()}


def mean_tokens(attempts: Iterable[Attempt]) -> float | None:
    """Returns the mean response length; None without attempts."""
    lengths = [attempt.tokens for attempt in attempts]
    return round(sum(lengths) / len(lengths), 2) if lengths else None


def _summarize_scope(attempts: Sequence[Attempt]) -> dict[str, dict[str, float | None]]:
    accuracy: dict[str, dict[str, float | None]] = {}
    greedy = [attempt.correct for attempt in attempts if attempt.greedy and attempt.correct is not None]
    if any(attempt.greedy for attempt in attempts):
        accuracy["greedy"] = _as_numbers(wilson_interval(sum(greedy), len(greedy)))
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for attempt in attempts:
        if not attempt.greedy and attempt.correct is not None:
            by_problem[attempt.prompt.id].append(attempt.correct)
    accuracy["sampled"] = _as_numbers(clustered_interval(list(by_problem.values())))
    return accuracy


def _as_numbers(interval: Interval) -> dict[str, float | None]:
    return {name: number_or_none(value) for name, value in asdict(interval).items()}
