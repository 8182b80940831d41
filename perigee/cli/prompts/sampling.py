"""Stages of a curation, and the two that sample a model: how hard a prompt is, and whether its answer can be guessed.

Each finding is on disk before it counts. Samples come from rollout workers and verdicts on them from the reward
service; they are counted by prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import Field
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.chat import Asked, ChatMessage, change_text, text_of
from perigee.config import Model
from perigee.curation.findings import (
    Decision,
    Finding,
    Question,
    SampleCounts,
    decide_difficulty,
    decide_guessing,
    least_judged,
)
from perigee.errors import TRANSIENT, FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.files import Journal
from perigee.image_sources import ImageStore, split_images
from perigee.images import ImageInfo
from perigee.reward.items import PromptLine
from perigee.reward.scoring import ScoreClient, ScoreJob, ScoringOptions, scoring
from perigee.reward.v1 import reward_pb2
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from services.kit.chat import PromptEncoder

Find = Callable[[Sequence[Question]], Iterable[Finding]]
Produce = Callable[[Sequence[Question]], AsyncIterator[Sequence[Finding]]]
# Sequences and prompt tokens of one call; a message stays far below 4 MiB.
MAX_SEQUENCES = 64
MAX_PROMPT_TOKENS = 200_000
CALLS_PER_WORKER = 2
CALL_TIMEOUT_S = 3600.0
TOO_LONG = "too long for the model"
GUESS_TEMPLATE = "{prompt}\nGive the final answer at once, without any reasoning.\n{answer_marker}"


class SamplingSettings(Model):
    """Settings of the samples of a model."""

    samples: int = Field(10, ge=1)
    """Answers per prompt whose pass rate gives its difficulty."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the report's is a high one."""
    response_tokens: int = Field(1024, ge=1)
    """Tokens of an answer."""
    trivial_pass_rate: float | None = Field(1.0, gt=0, le=1)
    """Prompts solved at least this often are dropped; null keeps them."""
    guesses: int = Field(8, ge=0)
    """Guesses without reasoning per prompt; 0 asks for none."""
    guess_tokens: int = Field(32, ge=1)
    """Tokens of a guess."""
    guess_template: str = GUESS_TEMPLATE
    """How a guess is asked for, with {prompt} and, where the answer follows a marker, {answer_marker}."""
    min_judged: float = Field(0.8, gt=0, le=1)
    """Share of a prompt's samples that must have been judged; with less it is undecided."""


class CurationSettings(Model):
    """Settings of a curation: all that its result depends on, beside the prompts and the weights of the model."""

    near_duplicates: float = Field(0.7, ge=0, le=1)
    """Jaccard similarity of word n-grams from which two prompts are near duplicates; 0 looks for exact ones alone."""
    drop_question_kinds: bool = True
    """Drop multiple-choice, true-or-false and proof questions."""
    sampling: SamplingSettings | None = None
    """Null asks no model: difficulties are those of the input and nothing is dropped for them."""
    buckets: int = Field(5, ge=1)
    """Buckets of difficulty."""
    cap: int | None = Field(None, ge=1)
    """Prompts kept per domain and bucket; null keeps all."""
    seed: int = Field(0, ge=0)
    """Seed of samples and draws."""


def read_template(path: Path | None) -> dict[str, str]:
    """Returns the template of guesses in a file. Raises InvalidArgumentError when it has no place for the prompt."""
    if path is None:
        return {}
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field("--guess-template", f"{path} cannot be read: {error}") from error
    if "{prompt}" not in template:
        raise InvalidArgumentError.for_field("--guess-template", f"{path} has no {{prompt}}, where the prompt belongs")
    return {"guess_template": template}


@dataclass
class StageResult:
    """Prompts and findings of a stage; `skipped` says why it did not run."""

    name: str
    questions: Sequence[Question]
    findings: dict[str, Finding] = field(default_factory=dict)
    skipped: str = ""

    def survivors(self) -> list[Question]:
        """Returns the prompts that stay, with what the stage found out about them."""
        if self.skipped:
            return list(self.questions)
        return [
            learn(question, self.findings[question.id])
            for question in self.questions
            if self.findings[question.id].decision is Decision.KEEP
        ]


def learn(question: Question, finding: Finding) -> Question:
    """Returns the question with the domain and difficulty that were found."""
    known = {key: finding.details[key] for key in ("domain", "difficulty") if key in finding.details}
    return replace(question, **known)


async def run_stage(
    name: str,
    path: Path,
    questions: Sequence[Question],
    produce: Produce,
    advance: Callable[[int], object] = lambda count: None,
) -> StageResult:
    """Runs `produce` on the prompts without a finding at `path` and keeps what it finds there, group by group.

    `advance` is called with the number of prompts that have their findings since the call before.
    """
    result = StageResult(name, questions)
    with Journal(path) as journal:
        result.findings = {line["id"]: Finding.from_line(line) for line in journal.lines}
        missing = [question for question in questions if question.id not in result.findings]
        advance(len(questions) - len(missing))
        if missing:
            async for findings in produce(missing):
                journal.append(finding.to_line() for finding in findings)
                result.findings |= {finding.id: finding for finding in findings}
                advance(len(findings))
    return result


def whole(find: Find, questions: Sequence[Question]) -> Produce:
    """Returns a stage that looks at all prompts at once; it is quick, so it begins anew when it was cut short."""

    async def produce(missing: Sequence[Question]) -> AsyncIterator[Sequence[Finding]]:
        wanted = {question.id for question in missing}
        yield [finding for finding in find(questions) if finding.id in wanted]

    return produce


@dataclass(frozen=True)
class SampledModel:
    """Model to sample, how it is sampled, and the service that judges its answers."""

    workers: Sequence[RolloutClient]
    reward: ScoreClient
    encoder: PromptEncoder
    context_tokens: int
    policy_version: int
    """A worker that holds another version refuses, so that all answers are of one model."""
    temperature: float
    seed: int
    """With stage, prompt and the answer's number it decides an answer's seed."""
    unavailable_s: float
    images: ImageStore
    """Where the images of prompts are."""


@dataclass(frozen=True)
class ModelStage:
    """Texts to sample on each prompt, and what the answers decide."""

    name: str
    """Begins the ids of answers: the same prompt has other seeds in another stage."""
    samples: int
    max_tokens: int
    decide: Callable[[str, SampleCounts], Finding]
    template: str = "{prompt}"
    """What the user says, with {prompt} and perhaps {answer_marker}; a marker at its end begins the answer."""
    shows_images: bool = True
    """Whether the model sees the images of prompts."""

    def ask(self, line: PromptLine) -> Asked:
        """Returns what the model is asked, the marker that begins the answer left out."""
        asked = line.asked if self.template == "{prompt}" else self._fill(line)
        if self.shows_images or isinstance(asked, str):
            return asked
        return tuple(leave_images_out(message) for message in asked)

    def _fill(self, line: PromptLine) -> Asked:
        """Returns what is asked in the template's words."""
        template, item = self.template.removesuffix("{answer_marker}"), line.item
        text = template.replace("{answer_marker}", item.answer_marker).replace("{prompt}", item.prompt)
        if not line.messages:
            return text
        last = max(index for index, message in enumerate(line.messages) if message["role"] == "user")
        asked = change_text(line.messages[last], lambda _: text.strip())
        return (*line.messages[:last], asked, *line.messages[last + 1 :])

    def given(self, item: reward_pb2.ScoreItem) -> str:
        """Returns what of the answer the text holds already: a marker at its end leaves the answer to the model."""
        return item.answer_marker if self.template.endswith("{answer_marker}") else ""


def leave_images_out(message: ChatMessage) -> ChatMessage:
    """Returns a message with its text alone, one without images as it is."""
    if isinstance(message["content"], str):
        return message
    return ChatMessage(role=message["role"], content=text_of(message).strip())


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's line, the tokens of the text that the model continues, and the images that it sees."""

    line: PromptLine
    token_ids: Sequence[int]
    images: Sequence[ImageInfo] = ()


def difficulty_stage(settings: SamplingSettings) -> ModelStage:
    """Returns the stage of difficulty = 1 - pass rate."""
    least = least_judged(settings.samples, settings.min_judged)
    decide = partial(decide_difficulty, min_judged=least, trivial_pass_rate=settings.trivial_pass_rate)
    return ModelStage("difficulty", settings.samples, settings.response_tokens, decide)


def guessing_stage(settings: SamplingSettings) -> ModelStage:
    """Returns the stage in which a right guess without reasoning, and without the prompt's images, drops the prompt."""
    decide = partial(decide_guessing, min_judged=least_judged(settings.guesses, settings.min_judged))
    template = settings.guess_template.rstrip("\n")
    return ModelStage("guessing", settings.guesses, settings.guess_tokens, decide, template, shows_images=False)


def sample_model(stage: ModelStage, model: SampledModel, lines: Mapping[str, PromptLine]) -> Produce:
    """Returns the stage's findings, some prompts at a time."""

    async def produce(questions: Sequence[Question]) -> AsyncIterator[Sequence[Finding]]:
        prompts, too_long = encode_lines(stage, model, [lines[question.id] for question in questions])
        yield too_long
        async for counts in sample(stage, model, prompts):
            yield [stage.decide(question_id, found) for question_id, found in counts.items()]

    return produce


def encode_lines(
    stage: ModelStage, model: SampledModel, lines: Sequence[PromptLine]
) -> tuple[list[EncodedPrompt], list[Finding]]:
    """Returns the prompts as tokens, and findings of those that the model's context has no room for."""
    prompts: list[EncodedPrompt] = []
    too_long: list[Finding] = []
    for line in lines:
        images = line.images if stage.shows_images else ()
        asked = stage.ask(line)
        if isinstance(asked, str) and not stage.shows_images:
            asked = asked.replace(model.encoder.image_text, "").strip() if line.images else asked
        [token_ids] = model.encoder.encode([asked], [line.place], stage.given(line.item), [images])
        tokens = len(model.encoder.expand(token_ids, images, line.place))
        if 0 < tokens <= model.context_tokens - stage.max_tokens:
            prompts.append(EncodedPrompt(line, token_ids, images))
        else:
            too_long.append(Finding(line.id, Decision.UNDECIDED, TOO_LONG, {"prompt_tokens": tokens}))
    return prompts, too_long


async def read_policy_version(workers: Sequence[RolloutClient]) -> tuple[int, int]:
    """Returns the policy version that all workers hold, and the smallest context among them.

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


async def sample(
    stage: ModelStage, model: SampledModel, prompts: Iterable[EncodedPrompt]
) -> AsyncGenerator[dict[str, SampleCounts], None]:
    """Yields counts of verdicts by prompt, some prompts at a time, as they become known.

    Raises what a worker or the reward service fails with when trying again for `unavailable_s` does not help.
    """
    most = CALLS_PER_WORKER * len(model.workers)
    chunks = zip(_cut(prompts, stage.samples), itertools.cycle(model.workers), strict=False)
    pending: set[asyncio.Task[dict[str, SampleCounts]]] = set()
    try:
        while True:
            for chunk, worker in itertools.islice(chunks, most - len(pending)):
                pending.add(asyncio.create_task(_sample_chunk(worker, chunk, stage, model)))
            if not pending:
                return
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _cut(prompts: Iterable[EncodedPrompt], samples: int) -> Iterator[list[EncodedPrompt]]:
    """Yields the prompts in order, as many at once as a call takes."""
    chunk: list[EncodedPrompt] = []
    tokens = 0
    for prompt in prompts:
        more = samples * len(prompt.token_ids)
        if chunk and ((len(chunk) + 1) * samples > MAX_SEQUENCES or tokens + more > MAX_PROMPT_TOKENS):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(prompt)
        tokens += more
    if chunk:
        yield chunk


async def _sample_chunk(
    worker: RolloutClient, chunk: Sequence[EncodedPrompt], stage: ModelStage, model: SampledModel
) -> dict[str, SampleCounts]:
    """Samples some prompts on one worker and counts the verdicts."""
    sampled = {f"{stage.name}/{prompt.line.id}/{n}": prompt for prompt in chunk for n in range(stage.samples)}
    responses = await _generate(worker, sampled, stage, model)
    counts = {prompt.line.id: Counter[str]() for prompt in chunk}

    async def count(outcomes: list[reward_pb2.ScoreResponse]) -> None:
        # What FAILED was tried again; what stays FAILED is counted as such.
        for outcome in outcomes:
            verdict = buffer_pb2.Verdict.Name(outcome.verdict).removeprefix("VERDICT_").lower()
            counts[sampled[outcome.id].line.id][verdict] += 1
            counts[sampled[outcome.id].line.id]["unjudgeable"] += outcome.unjudgeable

    async with scoring(model.reward, ScoringOptions(unavailable_s=model.unavailable_s), count) as pipeline:
        for item_id, prompt in sampled.items():
            line = prompt.line
            text, left_out = stage.given(line.item) + responses[item_id].text, responses[item_id].left_out_bytes
            await pipeline.submit(ScoreJob(item_id, text, line.item, line.judged_images, model.images, left_out))
    return {question_id: SampleCounts(**found) for question_id, found in counts.items()}


async def _generate(
    worker: RolloutClient, sampled: Mapping[str, EncodedPrompt], stage: ModelStage, model: SampledModel
) -> dict[str, rollout_pb2.GenerateResponse]:
    """Returns the responses by id; what a worker left out is asked again."""
    responses: dict[str, rollout_pb2.GenerateResponse] = {}
    outage = _Outage(model.unavailable_s, responses)
    sampling = rollout_pb2.Sampling(temperature=model.temperature, seed=model.seed)
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(TRANSIENT),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        stop=outage.is_over,
        reraise=True,
    ):
        with attempt:
            call = rollout_pb2.GenerateRequest(sampling=sampling, text_only=True, policy_version=model.policy_version)
            for item_id, prompt in sampled.items():
                if item_id not in responses:
                    digests = [image.digest for image in prompt.images]
                    call.items.add(
                        id=item_id,
                        prompt_token_ids=pack_token_ids(prompt.token_ids),
                        max_tokens=stage.max_tokens,
                        image_digests=digests,
                    )
            shown = {image.digest: image for prompt in sampled.values() for image in prompt.images}
            for part in split_images(shown.values()):
                await worker.put_images(await asyncio.to_thread(model.images.read_all, part))
            async for response in worker.generate(call, timeout_s=CALL_TIMEOUT_S):
                if response.end_reason != buffer_pb2.END_REASON_UNSPECIFIED:
                    responses[response.id] = response
            if left_out := len(sampled) - len(responses):
                raise UnavailableError(f"the worker at {worker.target} left {left_out} prompts out")
    return responses


class _Outage:
    """Time in which a worker has given nothing: calls are long, so the time since the first of them says nothing."""

    def __init__(self, limit_s: float, responses: Sized) -> None:
        self._limit_s = limit_s
        self._responses = responses
        self._held = -1
        self._since = 0.0

    def is_over(self, _: RetryCallState) -> bool:
        """Returns whether the last answer came, or the first failure was, longer ago than the limit."""
        now = time.monotonic()
        if len(self._responses) > self._held:
            self._held, self._since = len(self._responses), now
        return now - self._since > self._limit_s
