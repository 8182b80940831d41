"""Responses of a model to problems, judged by the reward service, kept as they come in and resumed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.ending import Interrupt
from perigee.cli.eval.model import (
    REQUEST_ERRORS,
    Completion,
    Endpoint,
    find_model,
    fix_version,
    identify_weights,
    local_endpoint,
    serving_model,
)
from perigee.cli.eval.results import ANSWERS_FILE, FAILED, GREEDY, Answer
from perigee.cli.eval.suites import LoadedSuite, Problem, SamplingSettings
from perigee.cli.run_folder import RunFolder
from perigee.cli.stack import LocalStack, Report, plan_stack
from perigee.cli.view import ProgressView
from perigee.files import Journal, write_atomically
from perigee.image_sources import ImageStore
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoreJob, ScoringOptions, ScoringPipeline, failed, read_reward, scoring
from perigee.reward.v1 import reward_pb2
from perigee.rpc import ChannelOptions

# Of a request that the endpoint did not answer.
NO_COMPLETION = Completion("", None, truncated=False)


@dataclass(frozen=True)
class ModelOptions:
    """Model that is asked, and the services beside it; `target` is a model folder or a run, None with an endpoint.

    Prompt files are asked as a run of the settings `run` asks; as the target did where that is a run, unless given.
    """

    target: str | None
    endpoint: Endpoint | None
    chat: bool
    runs_path: Path
    concurrency: int
    dtype: str
    reward: str | None
    channel: ChannelOptions = field(default_factory=ChannelOptions)
    plain: bool = False
    run: Mapping[str, Any] | None = None
    images: ImageStore | None = None
    """Where the images of problems are."""


@dataclass(frozen=True)
class Target:
    """Model that is asked; `identity` tells its weights from others, `folder` is None behind an endpoint.

    `as_trained` asks prompt files as the run did that made the model.
    """

    name: str
    endpoint: Endpoint
    identity: str
    folder: Path | None = None
    as_trained: Endpoint | None = None

    def plan(self, suite: LoadedSuite, sampling: SamplingSettings) -> list[Attempt]:
        """Returns the responses that a suite asks for, greedy ones first."""
        endpoint = (self.as_trained if suite.is_prompt_file else None) or self.endpoint
        return make_attempts(suite, sampling, endpoint, self.identity)


async def open_target(options: ModelOptions) -> Target:
    """Returns the model; what is asked of a local one does not depend on where it will be served."""
    if options.endpoint is not None:
        endpoint = await fix_version(options.endpoint)
        return Target(endpoint.model, endpoint, f"{endpoint.url} {endpoint.model}")
    folder, run = find_model(str(options.target), options.runs_path)
    identity = f"{identify_weights(folder)} {options.dtype}"
    run = run if options.run is None else options.run
    as_trained = None if run is None else local_endpoint(folder, options.chat, run)
    return Target(str(options.target), local_endpoint(folder, options.chat), identity, folder, as_trained)


@dataclass(frozen=True)
class Attempt:
    """One response to generate; `digest` tells model, request and ground truth from others."""

    problem: Problem
    name: str
    body: dict[str, Any]
    digest: str
    prompt_tokens: int = 0
    """0 where the endpoint alone knows."""

    @property
    def key(self) -> str:
        """Id among all attempts."""
        return f"{self.problem.suite}/{self.problem.line.id}/{self.name}"


def make_attempts(suite: LoadedSuite, sampling: SamplingSettings, endpoint: Endpoint, identity: str) -> list[Attempt]:
    """Returns the responses that a suite asks for, greedy ones first."""
    settings: list[tuple[str, dict[str, Any]]] = [(GREEDY, {"temperature": 0.0})] if sampling.greedy else []
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    settings += [(f"sample-{number}", drawn) for number in range(sampling.samples)]
    places = [problem.line.place or problem.line.id for problem in suite.problems]
    images = [problem.line.images for problem in suite.problems]
    prompts = endpoint.write_prompts([problem.asked for problem in suite.problems], places, images)
    attempts = []
    for name, values in settings:
        for problem, prompt in zip(suite.problems, prompts, strict=True):
            asked = values | {"max_tokens": sampling.max_tokens}
            if name != GREEDY:
                asked["seed"] = _seed(sampling.seed, problem.line.id, name)
            body = endpoint.make_request(prompt, asked)
            truth = problem.line.item.SerializeToString(deterministic=True).hex()
            digest = hashlib.blake2b(json.dumps([identity, body, truth]).encode(), digest_size=12).hexdigest()
            attempts.append(Attempt(problem, name, body, digest, prompt.tokens))
    return attempts


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


class AnswerStore:
    """The answers in a results folder, those to these attempts in `answers`; a context manager.

    Another process cannot write them meanwhile. A response whose verdict could not be had stays to be judged again.
    """

    def __init__(self, folder: Path, attempts: Sequence[Attempt]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempts = {attempt.key: attempt for attempt in attempts}
        self._journal = Journal(folder / ANSWERS_FILE)
        wanted = {(attempt.key, attempt.digest) for attempt in attempts}
        kept = {
            (f"{line['suite']}/{line['id']}/{line['attempt']}", line["digest"]): line for line in self._journal.lines
        }
        self.answers = {key: line for (key, digest), line in kept.items() if (key, digest) in wanted}
        self._completions = {
            key: Completion(line["response"], line["tokens"], line["truncated"])
            for key, line in self.answers.items()
            if line["verdict"] == FAILED and (line["response"] or line["tokens"] is not None)
        }

    def missing(self) -> list[Attempt]:
        """Returns the attempts without a verdict."""
        answers = self.answers
        return [a for key, a in self.attempts.items() if answers.get(key, {"verdict": FAILED})["verdict"] == FAILED]

    def completion(self, key: str) -> Completion | None:
        """Returns the response that waits for its verdict, None where there is none."""
        return self._completions.get(key)

    def hold(self, key: str, completion: Completion) -> None:
        """Keeps a response until its verdict is known."""
        self._completions[key] = completion

    def add(self, outcomes: Sequence[reward_pb2.ScoreResponse]) -> None:
        """Writes answers; returns when they are on disk."""
        lines = [self._line(outcome) for outcome in outcomes]
        self._journal.append(lines)
        self.answers.update(zip((outcome.id for outcome in outcomes), lines, strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def _line(self, outcome: reward_pb2.ScoreResponse) -> dict[str, Any]:
        attempt, completion = self.attempts[outcome.id], self._completions.pop(outcome.id, NO_COMPLETION)
        return {
            "suite": attempt.problem.suite,
            "id": attempt.problem.line.id,
            "domain": attempt.problem.line.domain,
            "attempt": attempt.name,
            "digest": attempt.digest,
            "response": completion.text,
            "tokens": completion.tokens,
            "truncated": completion.truncated,
            "verdict": buffer_pb2.Verdict.Name(outcome.verdict).removeprefix("VERDICT_").lower(),
            "reward": read_reward(outcome),
            # Programs are not voted on.
            "answer": "" if outcome.verifier == "code" else outcome.extracted_answer,
            "reason": outcome.reason,
        }


def note(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


async def collect(
    attempts: Sequence[Attempt],
    target: Target,
    options: ModelOptions,
    out: Path,
    console: Console,
    interrupt: Interrupt,
) -> list[Answer]:
    """Returns the answers to the attempts, in order; those that the folder `out` does not have yet are asked for.

    Raises PerigeeError, with what to do, when a service does not start or stays away.
    """
    with AnswerStore(out, attempts) as store:
        missing = store.missing()
        if len(missing) < len(attempts):
            note(console, f"{len(attempts) - len(missing):,} of {len(attempts):,} answers are in {out}")
        if missing:
            report = partial(note, console)
            async with serving(options, target, store, out / "services", report, interrupt) as (endpoint, client):
                await answer_all(missing, endpoint, client, store, options, console)
        return [store.answers[attempt.key] for attempt in attempts]


@asynccontextmanager
async def serving(
    options: ModelOptions,
    target: Target,
    store: AnswerStore,
    path: Path,
    report: Report,
    interrupt: Interrupt,
) -> AsyncIterator[tuple[Endpoint, RewardClient]]:
    """Starts what is not running yet: the reward service, the sandbox where code is judged, a server of the model."""
    missing = store.missing()
    async with AsyncExitStack() as stack:
        reward, channel = options.reward, options.channel
        endpoint = replace(target.endpoint, images=options.images)
        if reward is None:
            local = plan_reward_stack(path, any(runs_code(each.problem.line.item) for each in missing), report)
            interrupt.end_at_once = local.kill
            await stack.enter_async_context(local)
            [(reward, channel)] = [(each.address, each.channel) for each in local.specs if each.service == "reward"]
        unanswered = [each for each in missing if store.completion(each.key) is None]
        if unanswered and target.folder is not None and endpoint.encoder is not None:
            longest = max(each.prompt_tokens + each.body["max_tokens"] for each in unanswered)
            length = min(longest, endpoint.encoder.model.context_tokens)
            log_path = path / "logs" / "vllm.log"
            server = serving_model(target.folder, log_path, options.concurrency, length, options.dtype, report)
            endpoint = replace(endpoint, url=await stack.enter_async_context(server))
        yield endpoint, await stack.enter_async_context(RewardClient(reward, channel))


def runs_code(item: reward_pb2.ScoreItem) -> bool:
    """Returns whether the item, or a part of it, is judged in the sandbox."""
    kinds = {item.WhichOneof("verifier"), *(part.verifier.WhichOneof("kind") for part in item.composite.parts)}
    return "code" in kinds


def plan_reward_stack(path: Path, needs_code: bool, report: Report) -> LocalStack:
    """Returns a reward service, and a sandbox where code is judged, to be started."""
    run = RunFolder(path.absolute())
    run.create()
    write_atomically(run.recipe_path, b"{}\n")
    services = ("sandbox", "reward") if needs_code else ("reward",)
    return LocalStack(run, plan_stack(run, {}, 0, services), report)


async def answer_all(
    attempts: Sequence[Attempt],
    endpoint: Endpoint,
    client: RewardClient,
    store: AnswerStore,
    options: ModelOptions,
    console: Console,
) -> None:
    """Generates and scores the responses, `concurrency` at once; a request that fails is an answer that failed."""
    with ProgressView(console, "answered", len(attempts), plain=options.plain) as progress:

        async def keep(outcomes: list[reward_pb2.ScoreResponse]) -> None:
            await asyncio.to_thread(store.add, outcomes)
            progress.advance(len(outcomes))

        async with (
            endpoint.make_client(options.concurrency) as http,
            scoring(client, ScoringOptions(), keep) as pipeline,
            asyncio.TaskGroup() as group,
        ):
            queue = iter(attempts)

            async def work(waiting: Iterator[Attempt], pipeline: ScoringPipeline) -> None:
                for attempt in waiting:
                    line = attempt.problem.line
                    try:
                        completion = store.completion(attempt.key) or await endpoint.complete(http, attempt.body)
                    except REQUEST_ERRORS as error:
                        await keep([failed(ScoreJob(attempt.key, "", line.item), error.message, retryable=True)])
                    else:
                        store.hold(attempt.key, completion)
                        job = ScoreJob(attempt.key, completion.text, line.item, line.judged_images, options.images)
                        await pipeline.submit(job)

            for _ in range(min(options.concurrency, len(attempts))):
                group.create_task(work(queue, pipeline))
