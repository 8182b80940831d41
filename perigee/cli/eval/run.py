"""`perigee eval`: responses of a model to suites, judged by the reward service, kept as they come in and resumed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.ending import Interrupt
from perigee.cli.eval.model import (
    NEUTRAL,
    SERVED_NAME,
    Completion,
    Endpoint,
    find_model,
    has_chat_template,
    identify_weights,
    serving_model,
)
from perigee.cli.eval.results import ANSWERS_FILE, GREEDY, RESULTS_FILE, by_suite, show, summarize, to_json
from perigee.cli.eval.suites import LoadedSuite, Problem, SamplingSettings, load_suite
from perigee.cli.run_folder import RunFolder
from perigee.cli.stack import LocalStack, plan_stack
from perigee.cli.view import ProgressView
from perigee.errors import InvalidArgumentError
from perigee.files import Journal, write_atomically
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoreJob, ScoringOptions, ScoringPipeline, scoring
from perigee.reward.v1 import reward_pb2
from perigee.rpc import ChannelOptions


@dataclass(frozen=True)
class EvalOptions:
    """Arguments of `perigee eval`; `target` is a model folder or a run, None with an endpoint."""

    target: str | None
    suites: Sequence[str]
    endpoint: Endpoint | None
    data_path: Path
    runs_path: Path
    out: Path | None
    limit: int | None
    sampling: dict[str, Any]
    """Sampling settings in place of the suites' own."""
    concurrency: int
    dtype: str
    reward: str | None
    channel: ChannelOptions = field(default_factory=ChannelOptions)
    plain: bool = False


@dataclass(frozen=True)
class Attempt:
    """One response to generate; `digest` tells model, request and ground truth from others."""

    problem: Problem
    name: str
    body: dict[str, Any]
    digest: str

    @property
    def key(self) -> str:
        """Id among all attempts."""
        return f"{self.problem.suite}/{self.problem.line.id}/{self.name}"


def make_attempts(suite: LoadedSuite, sampling: SamplingSettings, endpoint: Endpoint, identity: str) -> list[Attempt]:
    """Returns the responses that a suite asks for, greedy ones first."""
    settings: list[tuple[str, dict[str, Any]]] = [(GREEDY, {"temperature": 0.0})] if sampling.greedy else []
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    settings += [(f"sample-{number}", drawn) for number in range(sampling.samples)]
    attempts = []
    for name, values in settings:
        for problem in suite.problems:
            asked = values | {"max_tokens": sampling.max_tokens}
            if name != GREEDY:
                asked["seed"] = _seed(sampling.seed, problem.line.id, name)
            body = endpoint.make_request(problem.messages, asked)
            truth = problem.line.item.SerializeToString(deterministic=True).hex()
            digest = hashlib.blake2b(json.dumps([identity, body, truth]).encode(), digest_size=12).hexdigest()
            attempts.append(Attempt(problem, name, body, digest))
    return attempts


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


class AnswerStore:
    """The answers in a results folder; another process cannot write it meanwhile."""

    def __init__(self, folder: Path, attempts: Sequence[Attempt]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempts = {attempt.key: attempt for attempt in attempts}
        self._journal = Journal(folder / ANSWERS_FILE)
        wanted = {(attempt.key, attempt.digest) for attempt in attempts}
        kept = {
            (f"{line['suite']}/{line['id']}/{line['attempt']}", line["digest"]): line for line in self._journal.lines
        }
        self.answers = {key: line for (key, digest), line in kept.items() if (key, digest) in wanted}
        self._completions: dict[str, Completion] = {}

    def missing(self) -> list[Attempt]:
        """Returns the attempts without a verdict."""
        answers = self.answers
        return [a for key, a in self.attempts.items() if answers.get(key, {"verdict": "failed"})["verdict"] == "failed"]

    def hold(self, key: str, completion: Completion) -> None:
        """Keeps a response until its verdict is known."""
        self._completions[key] = completion

    def add(self, outcomes: Sequence[reward_pb2.ScoreResponse]) -> None:
        """Writes answers; returns when they are on disk."""
        lines = [self._line(outcome) for outcome in outcomes]
        self._journal.append(lines)
        self.answers.update(zip((outcome.id for outcome in outcomes), lines, strict=True))

    def close(self) -> None:
        """Closes the folder's file."""
        self._journal.close()

    def _line(self, outcome: reward_pb2.ScoreResponse) -> dict[str, Any]:
        attempt, completion = self.attempts[outcome.id], self._completions.pop(outcome.id)
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
            # Programs are not voted on.
            "answer": "" if outcome.verifier == "code" else outcome.extracted_answer,
            "reason": outcome.reason,
        }


def choose_sampling(suite: LoadedSuite, changes: dict[str, Any]) -> SamplingSettings:
    """Returns a suite's sampling with changes. Raises InvalidArgumentError when no response is asked for."""
    sampling = suite.sampling.model_copy(update=changes)
    if not sampling.greedy and not sampling.samples:
        raise InvalidArgumentError.for_field("--samples", "is 0, and --no-greedy leaves no response to ask for")
    return sampling


async def evaluate(options: EvalOptions, console: Console, interrupt: Interrupt) -> None:
    """Evaluates the suites, prints the figures and writes results.json.

    Raises PerigeeError, with what to do, when data is absent or a service does not start.
    """
    suites = [load_suite(name, options.data_path, options.limit) for name in options.suites]
    samplings = {suite.name: choose_sampling(suite, options.sampling) for suite in suites}
    if len(samplings) < len(suites):
        raise InvalidArgumentError.for_field("SUITE", f"two suites have the same name: {', '.join(samplings)}")
    folder = find_model(options.target, options.runs_path) if options.target else None
    name = options.endpoint.model if options.endpoint else str(options.target)
    out = options.out or Path("evals") / re.sub(r"[^\w.-]+", "-", name).strip("-")

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    # What is asked does not depend on where a local model is served, so that an evaluation goes on at another port.
    if folder is not None:
        asked = Endpoint("", SERVED_NAME, has_chat_template(folder), extra=NEUTRAL)
        identity = f"{identify_weights(folder)} {options.dtype}"
    else:
        assert options.endpoint is not None
        asked = options.endpoint
        identity = f"{asked.url} {asked.model}"
    async with AsyncExitStack() as stack:
        attempts = [
            attempt for suite in suites for attempt in make_attempts(suite, samplings[suite.name], asked, identity)
        ]
        store = AnswerStore(out, attempts)
        stack.callback(store.close)
        missing = store.missing()
        if len(missing) < len(attempts):
            note(f"{len(attempts) - len(missing):,} of {len(attempts):,} answers are in {out}")
        if missing:
            reward, channel = options.reward, options.channel
            if reward is None:
                needs_code = any(attempt.problem.line.item.WhichOneof("verifier") == "code" for attempt in missing)
                local = plan_reward_stack(out / "services", needs_code, note)
                interrupt.end_at_once = local.kill
                await stack.enter_async_context(local)
                [(reward, channel)] = [(each.address, each.channel) for each in local.specs if each.service == "reward"]
            if folder is not None:
                log_path = out / "services" / "logs" / "vllm.log"
                serving = serving_model(folder, log_path, options.concurrency, options.dtype, note)
                asked = await stack.enter_async_context(serving)
            client = await stack.enter_async_context(RewardClient(reward, channel))
            await answer_all(missing, asked, client, store, options, console)
    figures = {suite: summarize(answers) for suite, answers in by_suite(store.answers.values()).items()}
    results = {
        "model": name,
        "endpoint": options.endpoint.url if options.endpoint else None,
        "sampling": {suite: sampling.model_dump() for suite, sampling in samplings.items()},
        "suites": to_json(figures),
    }
    write_atomically(out / RESULTS_FILE, f"{json.dumps(results, indent=2)}\n".encode())
    show(figures, console)
    note(f"results: {out / RESULTS_FILE}, answers: {out / ANSWERS_FILE}")


def plan_reward_stack(path: Path, needs_code: bool, note: Any) -> LocalStack:
    """Returns a reward service, and a sandbox where code is judged, to be started."""
    run = RunFolder(path.absolute())
    run.create()
    write_atomically(run.recipe_path, b"{}\n")
    services = ("sandbox", "reward") if needs_code else ("reward",)
    return LocalStack(run, plan_stack(run, {}, 0, services), note)


async def answer_all(
    attempts: Sequence[Attempt],
    endpoint: Endpoint,
    client: RewardClient,
    store: AnswerStore,
    options: EvalOptions,
    console: Console,
) -> None:
    """Generates and scores the responses, `concurrency` at once."""
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
                    completion = await endpoint.complete(http, attempt.body)
                    store.hold(attempt.key, completion)
                    await pipeline.submit(ScoreJob(attempt.key, completion.text, attempt.problem.line.item))

            for _ in range(min(options.concurrency, len(attempts))):
                group.create_task(work(queue, pipeline))
