"""Makes test cases: generates candidates in the sandbox, runs the known solutions on each, and selects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from perigee.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Plan, Problem, Program, candidate_seed, digest
from perigee.testgen.selection import Case, Drop, Selection, SolutionRun, drop_duplicates, select_case, select_problem
from perigee.testgen.store import RunRecord, Store, sha256

# Pauses between the attempts at one run.
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
# A call's deadline beyond the program's own limits: the wait in the queue, and the compiler.
QUEUE_S = 120.0
COMPILE_S = 60.0
_TRANSIENT = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)


async def run_program(
    client: SandboxClient, request: pb.ExecuteRequest, what: str, wall_s: float
) -> pb.ExecuteResponse:
    """Runs a program and returns the response, whatever its status; a failure of the sandbox is tried again.

    `what` names the run in errors; `wall_s` is the program's wall-clock limit. Raises InvalidArgumentError when the
    sandbox refuses the program, UnavailableError when every attempt failed.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            response = await client.execute(request, timeout_s=QUEUE_S + COMPILE_S + 2 * wall_s)
            if response.status not in (pb.STATUS_INFRA_ERROR, pb.STATUS_UNSPECIFIED):
                return response
            failure: PerigeeError = InternalError(response.reason or "no reason given")
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{what}: {error.message}", violations=error.violations) from error
        except _TRANSIENT as error:
            failure = error
        if pause_s is None:
            break
        await asyncio.sleep(max(pause_s, failure.retry_after_s or 0.0))
    raise UnavailableError(f"{what}: the sandbox failed {len(PAUSES_S) + 1} times: {failure.message}") from failure


def status_name(response: pb.ExecuteResponse) -> str:
    """Returns the status: OK, TIME_LIMIT, ...; output that was cut is OUTPUT_LIMIT."""
    if response.status == pb.STATUS_OK and response.stdout_truncated:
        return "OUTPUT_LIMIT"
    return pb.Status.Name(response.status).removeprefix("STATUS_")


def describe_end(response: pb.ExecuteResponse) -> str:
    """Describes the end of a program in one line of 200 characters at most."""
    output = response.compile.stderr if response.status == pb.STATUS_COMPILE_ERROR else response.stderr
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    if response.status == pb.STATUS_COMPILE_ERROR:
        return (lines[0] if lines else response.reason)[:200]
    if response.status == pb.STATUS_RUNTIME_ERROR and lines:
        return lines[-1].strip()[:200]
    ending = f"signal {response.signal}" if response.signal else f"exit code {response.exit_code}"
    return (response.reason or ending)[:200]


# Called with the stage, and ending much of it is done of ending much.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GenerationContext:
    """Sandbox, store, and the sandbox's wall-clock limits by language."""

    client: SandboxClient
    store: Store
    wall_seconds: Mapping[str, float]
    progress: OnProgress


@dataclass(frozen=True)
class _Candidate:
    name: str
    index: int
    seed: int
    key: str


async def make_cases(problem: Problem, plan: Plan, context: GenerationContext) -> Selection:
    """Makes the test cases of a problem. Runs that the store holds are not repeated.

    Raises UnavailableError when the sandbox fails; finished runs are kept.
    """
    candidates = _candidates(problem.generator, plan)
    await _generate(problem.generator, candidates, plan, context)
    dropped, inputs = _sort_inputs(candidates, context.store)
    if len(inputs) < plan.minimum:
        idle = "not run, because too few inputs are left"
        cases = [Case(c.name, c.seed, inputs.get(c.name, ""), dropped.get(c.name, idle)) for c in candidates]
        reason = f"the generator made {len(inputs)} usable inputs of {plan.candidates}, {plan.minimum} must be"
        return Selection(cases, Drop.TOO_FEW_CASES, reason)
    await _run_solutions(problem, inputs, plan, context)
    cases = []
    for candidate in candidates:
        if candidate.name in dropped:
            cases.append(Case(candidate.name, candidate.seed, dropped=dropped[candidate.name]))
            continue
        digest_of_input = inputs[candidate.name]
        runs = {known.name: _read_run(problem, known, digest_of_input, context.store) for known in problem.known}
        cases.append(select_case(candidate.name, candidate.seed, digest_of_input, runs, problem.same, plan))
    return select_problem(cases, [known.name for known in problem.known], plan)


def _candidates(generator: Program, plan: Plan) -> list[_Candidate]:
    candidates = []
    for index, name in enumerate(plan.names(), start=1):
        seed = candidate_seed(plan.seed, index)
        key = digest(b"candidate", generator.language.encode(), generator.source, b"%d" % index, b"%d" % seed)
        candidates.append(_Candidate(name, index, seed, key))
    return candidates


async def _generate(generator: Program, candidates: list[_Candidate], plan: Plan, context: GenerationContext) -> None:
    missing = [candidate for candidate in candidates if context.store.find(candidate.key) is None]
    done = count(len(candidates) - len(missing))
    context.progress("inputs", next(done), len(candidates))

    async def generate(candidate: _Candidate) -> None:
        what = f"{generator.name} for candidate {candidate.name}"
        request = pb.ExecuteRequest(
            language=generator.language,
            source=generator.source,
            args=[str(candidate.index), str(candidate.seed)],
            stdin=b"%d %d\n" % (candidate.index, candidate.seed),
        )
        wall_s = context.wall_seconds[generator.language]
        first, again = [await run_program(context.client, request, what, wall_s) for _ in range(2)]
        record = _record(first)
        if record.status == "OK" and again.stdout != first.stdout:
            record = RunRecord("UNSTABLE", reason="two runs with the same seed differ")
        elif record.status == "OK" and not first.stdout.strip():
            record = RunRecord("EMPTY", reason="it printed nothing")
        await _keep(context.store, candidate.key, what, record, first.stdout)
        context.progress("inputs", next(done), len(candidates))

    await _run_bounded((generate(candidate) for candidate in missing), plan.jobs)


def _sort_inputs(candidates: list[_Candidate], store: Store) -> tuple[dict[str, str], dict[str, str]]:
    """Returns why candidates are dropped before any solution runs, and the digests of the others' inputs."""
    dropped: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for candidate in candidates:
        record = store.find(candidate.key)
        assert record is not None
        if record.output:
            inputs[candidate.name] = record.output
        else:
            dropped[candidate.name] = f"the generator failed: {record.status}: {record.reason}"
    for name, earlier in drop_duplicates(inputs).items():
        dropped[name] = f"the same input as {earlier}"
        del inputs[name]
    return dropped, inputs


async def _run_solutions(problem: Problem, inputs: Mapping[str, str], plan: Plan, context: GenerationContext) -> None:
    store = context.store
    jobs = [
        (f"{known.name} on candidate {name}", known, digest_of_input, key)
        for name, digest_of_input in inputs.items()
        for known in problem.known
        if store.find(key := _run_key(problem, known, digest_of_input)) is None
    ]
    total = len(inputs) * len(problem.known)
    done = count(total - len(jobs))
    context.progress("runs", next(done), total)

    async def run(what: str, known: Program, digest_of_input: str, key: str) -> None:
        request = pb.ExecuteRequest(
            language=known.language, source=known.source, stdin=store.read(digest_of_input), limits=problem.limits
        )
        limit_s = problem.limits.wall_ms / 1000 if problem.limits.HasField("wall_ms") else 0.0
        response = await run_program(context.client, request, what, limit_s or context.wall_seconds[known.language])
        await _keep(store, key, what, _record(response), response.stdout)
        context.progress("runs", next(done), total)

    await _run_bounded((run(*job) for job in jobs), plan.jobs)


def _run_key(problem: Problem, known: Program, digest_of_input: str) -> str:
    limits = problem.limits.SerializeToString(deterministic=True)
    return digest(b"run", known.language.encode(), known.source, limits, digest_of_input.encode())


def _read_run(problem: Problem, known: Program, digest_of_input: str, store: Store) -> SolutionRun:
    record = store.find(_run_key(problem, known, digest_of_input))
    assert record is not None
    return SolutionRun(record.status, store.read(record.output) if record.output else None)


def _record(response: pb.ExecuteResponse) -> RunRecord:
    status = status_name(response)
    if status == "OK":
        return RunRecord(status, output=sha256(response.stdout))
    return RunRecord(status, reason=describe_end(response))


async def _keep(store: Store, key: str, what: str, record: RunRecord, output: bytes) -> None:
    """Adds a record to the store, also when the caller is cancelled meanwhile."""
    writing = asyncio.create_task(asyncio.to_thread(store.add, key, what, record, output))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


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
