"""From a problem to its test cases: generate candidates, run the known solutions on each, decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Plan, Problem, Program, candidate_seed, digest
from perigee.testgen.sandboxed import last_words, run_program, status_name
from perigee.testgen.store import Outcome, Store, sha256
from perigee.testgen.verdicts import Case, Drop, SolutionRun, Verdict, drop_duplicates, judge_candidate, judge_problem

# What is worked on, how much of it is done, how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workshop:
    """Where the work is done: the sandbox, the store, and the sandbox's wall-clock limits by language."""

    client: SandboxClient
    store: Store
    wall_seconds: Mapping[str, float]
    progress: Progress


@dataclass(frozen=True)
class _Candidate:
    name: str
    index: int
    seed: int
    key: str


async def make_cases(problem: Problem, plan: Plan, workshop: Workshop) -> Verdict:
    """Decides on every candidate and on the problem. What the store holds is not run again.

    Raises UnavailableError when the sandbox fails; what was computed until then is kept.
    """
    candidates = _candidates(problem.generator, plan)
    await _generate(problem.generator, candidates, plan, workshop)
    dropped, inputs = _sort_inputs(candidates, workshop.store)
    if len(inputs) < plan.minimum:
        idle = "not run, because too few inputs are left"
        cases = [Case(c.name, c.seed, inputs.get(c.name, ""), dropped.get(c.name, idle)) for c in candidates]
        reason = f"the generator made {len(inputs)} usable inputs of {plan.candidates}, {plan.minimum} must be"
        return Verdict(cases, Drop.TOO_FEW_CASES, reason)
    await _run_solutions(problem, inputs, plan, workshop)
    cases = []
    for candidate in candidates:
        if candidate.name in dropped:
            cases.append(Case(candidate.name, candidate.seed, dropped=dropped[candidate.name]))
            continue
        digest_of_input = inputs[candidate.name]
        runs = {known.name: _read_run(problem, known, digest_of_input, workshop.store) for known in problem.known}
        cases.append(judge_candidate(candidate.name, candidate.seed, digest_of_input, runs, problem.same, plan))
    return judge_problem(cases, [known.name for known in problem.known], plan)


def _candidates(generator: Program, plan: Plan) -> list[_Candidate]:
    candidates = []
    for index, name in enumerate(plan.names(), start=1):
        seed = candidate_seed(plan.seed, index)
        key = digest(b"candidate", generator.language.encode(), generator.source, b"%d" % index, b"%d" % seed)
        candidates.append(_Candidate(name, index, seed, key))
    return candidates


async def _generate(generator: Program, candidates: list[_Candidate], plan: Plan, workshop: Workshop) -> None:
    missing = [candidate for candidate in candidates if workshop.store.find(candidate.key) is None]
    count = _Count(workshop.progress, "inputs", len(candidates) - len(missing), len(candidates))

    async def generate(candidate: _Candidate) -> None:
        what = f"{generator.name} for candidate {candidate.name}"
        request = pb.ExecuteRequest(
            language=generator.language,
            source=generator.source,
            args=[str(candidate.index), str(candidate.seed)],
            stdin=b"%d %d\n" % (candidate.index, candidate.seed),
        )
        wall_s = workshop.wall_seconds[generator.language]
        first, again = [await run_program(workshop.client, request, what, wall_s) for _ in range(2)]
        outcome = _outcome(first)
        if outcome.status == "OK" and again.stdout != first.stdout:
            outcome = Outcome("UNSTABLE", reason="two runs with the same seed differ")
        elif outcome.status == "OK" and not first.stdout.strip():
            outcome = Outcome("EMPTY", reason="it printed nothing")
        await _keep(workshop.store, candidate.key, what, outcome, first.stdout)
        count.add()

    await _run_bounded((generate(candidate) for candidate in missing), plan.jobs)


def _sort_inputs(candidates: list[_Candidate], store: Store) -> tuple[dict[str, str], dict[str, str]]:
    """Why candidates are dropped before any solution runs, and the digests of the others' inputs."""
    dropped: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for candidate in candidates:
        outcome = store.find(candidate.key)
        assert outcome is not None
        if outcome.output:
            inputs[candidate.name] = outcome.output
        else:
            dropped[candidate.name] = f"the generator failed: {outcome.status}: {outcome.reason}"
    for name, earlier in drop_duplicates(inputs).items():
        dropped[name] = f"the same input as {earlier}"
        del inputs[name]
    return dropped, inputs


async def _run_solutions(problem: Problem, inputs: Mapping[str, str], plan: Plan, workshop: Workshop) -> None:
    store = workshop.store
    jobs = [
        (f"{known.name} on candidate {name}", known, digest_of_input, key)
        for name, digest_of_input in inputs.items()
        for known in problem.known
        if store.find(key := _run_key(problem, known, digest_of_input)) is None
    ]
    total = len(inputs) * len(problem.known)
    count = _Count(workshop.progress, "runs", total - len(jobs), total)

    async def run(what: str, known: Program, digest_of_input: str, key: str) -> None:
        request = pb.ExecuteRequest(
            language=known.language, source=known.source, stdin=store.read(digest_of_input), limits=problem.limits
        )
        limit_s = problem.limits.wall_ms / 1000 if problem.limits.HasField("wall_ms") else 0.0
        response = await run_program(workshop.client, request, what, limit_s or workshop.wall_seconds[known.language])
        await _keep(store, key, what, _outcome(response), response.stdout)
        count.add()

    await _run_bounded((run(*job) for job in jobs), plan.jobs)


def _run_key(problem: Problem, known: Program, digest_of_input: str) -> str:
    limits = problem.limits.SerializeToString(deterministic=True)
    return digest(b"run", known.language.encode(), known.source, limits, digest_of_input.encode())


def _read_run(problem: Problem, known: Program, digest_of_input: str, store: Store) -> SolutionRun:
    outcome = store.find(_run_key(problem, known, digest_of_input))
    assert outcome is not None
    return SolutionRun(outcome.status, store.read(outcome.output) if outcome.output else None)


def _outcome(response: pb.ExecuteResponse) -> Outcome:
    status = status_name(response)
    if status == "OK":
        return Outcome(status, output=sha256(response.stdout))
    return Outcome(status, reason=last_words(response))


async def _keep(store: Store, key: str, what: str, outcome: Outcome, output: bytes) -> None:
    """Adds a result to the store; being cancelled does not lose one that is there."""
    writing = asyncio.create_task(asyncio.to_thread(store.add, key, what, outcome, output))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


class _Count:
    """Tells the progress of one stage."""

    def __init__(self, progress: Progress, stage: str, done: int, total: int) -> None:
        self._progress, self._stage, self._done, self._total = progress, stage, done, total
        progress(stage, done, total)

    def add(self) -> None:
        """One more is done."""
        self._done += 1
        self._progress(self._stage, self._done, self._total)


async def _run_bounded(jobs: Iterable[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Runs all jobs, at most `at_once` at a time; the first failure cancels the others and is raised."""
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
