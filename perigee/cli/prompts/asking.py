"""Asks a model about prompts: samples from rollout workers, verdicts from the reward service, counted by prompt."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.curation.pass_rates import SampleCounts
from perigee.errors import TRANSIENT, FailedPreconditionError, UnavailableError
from perigee.reward.scoring import ScoreClient, ScoreJob, ScoringOptions, scoring
from perigee.reward.v1 import reward_pb2
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2

# Sequences and prompt tokens of one call; a message stays far below 4 MiB.
MAX_SEQUENCES = 64
MAX_PROMPT_TOKENS = 200_000
CALLS_PER_WORKER = 2
FIELDS = {
    buffer_pb2.VERDICT_CORRECT: "correct",
    buffer_pb2.VERDICT_WRONG: "wrong",
    buffer_pb2.VERDICT_UNGRADABLE: "ungradable",
    buffer_pb2.VERDICT_FAILED: "failed",
}


@dataclass(frozen=True)
class Inquiry:
    """What a model is asked about one prompt: `samples` answers to the same tokens."""

    id: str
    """The prompt's id."""
    token_ids: Sequence[int]
    samples: int
    max_tokens: int
    item: reward_pb2.ScoreItem
    """The item of any answer, but for id and response."""
    given: str = ""
    """What of the answer the prompt ends with; the response is judged with it."""


@dataclass(frozen=True)
class AskOptions:
    """How the model is asked."""

    policy_version: int
    """A worker that holds another version refuses, so that all answers are of one model."""
    temperature: float
    seed: int
    """With an inquiry's id and an answer's number it decides the answer's seed."""
    stage: str
    """Begins the ids of answers: the same prompt has other seeds in another stage."""
    call_timeout_s: float = 3600.0
    unavailable_s: float = 60.0


async def read_policy_version(workers: Sequence[RolloutClient]) -> tuple[int, int]:
    """The policy version that all workers hold, and the smallest context among them.

    Raises FailedPreconditionError when one holds no weights, or not all hold the same version.
    """
    states = await asyncio.gather(*(worker.get_state(rollout_pb2.GetStateRequest()) for worker in workers))
    for worker, state in zip(workers, states, strict=True):
        if state.status != rollout_pb2.WORKER_STATUS_READY:
            name = rollout_pb2.WorkerStatus.Name(state.status).removeprefix("WORKER_STATUS_").lower()
            raise FailedPreconditionError(
                f"the worker at {worker.target} is {name} and answers nothing: --push gives it the weights of --model"
            )
    versions = {state.policy_version for state in states}
    if len(versions) > 1:
        raise FailedPreconditionError(f"the workers hold different policy versions: {sorted(versions)}")
    return versions.pop(), min(state.max_model_len for state in states)


async def ask(
    workers: Sequence[RolloutClient], reward: ScoreClient, inquiries: Iterable[Inquiry], options: AskOptions
) -> AsyncGenerator[dict[str, SampleCounts], None]:
    """Counts of verdicts by prompt, some prompts at a time, as they become known.

    Raises what a worker or the reward service fails with when trying again for `unavailable_s` does not help.
    """
    chunks = zip(_cut(inquiries), itertools.cycle(workers), strict=False)
    pending: set[asyncio.Task[dict[str, SampleCounts]]] = set()
    try:
        for chunk, worker in chunks:
            pending.add(asyncio.create_task(_ask_chunk(worker, reward, chunk, options)))
            if len(pending) >= CALLS_PER_WORKER * len(workers):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _cut(inquiries: Iterable[Inquiry]) -> Iterator[list[Inquiry]]:
    """The inquiries in order, as many at once as a call takes."""
    chunk: list[Inquiry] = []
    sequences = tokens = 0
    for inquiry in inquiries:
        more_tokens = inquiry.samples * len(inquiry.token_ids)
        if chunk and (sequences + inquiry.samples > MAX_SEQUENCES or tokens + more_tokens > MAX_PROMPT_TOKENS):
            yield chunk
            chunk, sequences, tokens = [], 0, 0
        chunk.append(inquiry)
        sequences += inquiry.samples
        tokens += more_tokens
    if chunk:
        yield chunk


async def _ask_chunk(
    worker: RolloutClient, reward: ScoreClient, chunk: Sequence[Inquiry], options: AskOptions
) -> dict[str, SampleCounts]:
    asked = {f"{options.stage}/{inquiry.id}/{n}": inquiry for inquiry in chunk for n in range(inquiry.samples)}
    texts = await _generate(worker, asked, options)
    counts = {inquiry.id: Counter[str]() for inquiry in chunk}

    async def count(outcomes: list[reward_pb2.ScoreResponse]) -> None:
        # What FAILED was tried again; what stays FAILED is counted as such.
        for outcome in outcomes:
            counts[asked[outcome.id].id][FIELDS[outcome.verdict]] += 1

    async with scoring(reward, ScoringOptions(unavailable_s=options.unavailable_s), count) as pipeline:
        for item_id, inquiry in asked.items():
            await pipeline.submit(ScoreJob(item_id, inquiry.given + texts[item_id], inquiry.item))
    return {question_id: SampleCounts(**found) for question_id, found in counts.items()}


async def _generate(worker: RolloutClient, asked: Mapping[str, Inquiry], options: AskOptions) -> dict[str, str]:
    texts: dict[str, str] = {}
    outage = _Outage(options.unavailable_s, texts)
    sampling = rollout_pb2.Sampling(temperature=options.temperature, seed=options.seed)
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(TRANSIENT),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        stop=outage.is_over,
        reraise=True,
    ):
        with attempt:
            request = rollout_pb2.GenerateRequest(
                sampling=sampling, text_only=True, policy_version=options.policy_version
            )
            for item_id, inquiry in asked.items():
                if item_id not in texts:
                    prompt = pack_token_ids(inquiry.token_ids)
                    request.items.add(id=item_id, prompt_token_ids=prompt, max_tokens=inquiry.max_tokens)
            async for response in worker.generate(request, timeout_s=options.call_timeout_s):
                if response.end_reason != buffer_pb2.END_REASON_UNSPECIFIED:
                    texts[response.id] = response.text
            if left_out := len(asked) - len(texts):
                raise UnavailableError(f"the worker at {worker.target} left {left_out} prompts out")
    return texts


class _Outage:
    """How long a worker has given nothing: calls are long, so the time since the first of them tells nothing."""

    def __init__(self, limit_s: float, texts: Mapping[str, str]) -> None:
        self._limit_s = limit_s
        self._texts = texts
        self._held = -1
        self._since = 0.0

    def is_over(self, _: RetryCallState) -> bool:
        """Whether the last answer came, or the first failure was, longer ago than the limit."""
        now = time.monotonic()
        if len(self._texts) > self._held:
            self._held, self._since = len(self._texts), now
        return now - self._since > self._limit_s
