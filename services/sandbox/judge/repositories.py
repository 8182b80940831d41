"""Repositories: patches judged by the tests that must pass, and assessments in stages.

Each step (patch, setup, tests, a stage) runs in a sandbox of its own. Between steps the service holds the repository as
a tar, so that nothing of a step runs on, and hidden files are nowhere before the step that they come for.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import math
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent import apply_patch
from services.sandbox.agent.protocol import Limits, RunResult
from services.sandbox.judge.results import limit_verdict
from services.sandbox.judge.suites import PROTECTED, Suite, SuiteResult, make_suite, pick, read_suite
from services.sandbox.languages.catalog import Runtime
from services.sandbox.runtime import metrics
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.jobs import Program, make_tar
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.programs import describe_exit, explain, memory_streams, open_program
from services.sandbox.runtime.worker_slots import SlotPair, WorkerSlot

_TAIL_BYTES = 16384
_REASON_CHARACTERS = 2000
_PATCH_MS = 60_000
_PATCH_BYTES = 256 << 20
_ANSWER_BYTES = 4 << 20
"""Of the program that applies patches: the files that one touches, or why it does not apply."""
_TAR_BYTES = 2048
"""Of a file in a tar, beside its contents."""
_TREES = 4
"""Most bytes of a repository between steps, in `max_file_bytes`."""
_MOST_BASES = 1000
_PROBLEM_S = 600.0
"""For which a repository is taken to judge nothing, before its tests run without a patch again."""
_MOST_OTHER_TESTS = 5000
_APPLY = Path(apply_patch.__file__).read_bytes()


@dataclass(frozen=True)
class PatchJob:
    """Patch to judge, with the limits of setup and tests."""

    runtime: Runtime
    limits: Limits
    request: pb.JudgePatchRequest


@dataclass(frozen=True)
class Assessment:
    """Repository to take through stages, with the limits of the patch and of each stage."""

    runtime: Runtime
    limits: Limits
    stage_limits: list[Limits]
    request: pb.AssessRequest


@dataclass(frozen=True)
class Step:
    """Command that has run; `problem` says why what it left, or was given, cannot be used."""

    result: RunResult
    stdout: bytes = b""
    stderr: bytes = b""
    files: Sequence[pb.OutputFile] = ()
    tree: bytes = b""
    problem: str = ""

    @property
    def limit_verdict(self) -> pb.TestVerdict.ValueType | None:
        """Verdict for the limit that it passed."""
        return limit_verdict(self.result)

    def failure(self, limits: Limits) -> str:
        """Returns why it did not end well; empty when it did."""
        if self.problem or self.limit_verdict is not None:
            return self.problem or explain(self.result, limits)
        return "" if self.result.exit_code == 0 else f"it ended with {describe_exit(self.result)}"


@dataclass(frozen=True)
class Applied:
    """Repository with patches applied; why the test patch is broken, or the patch failed; patterns of the test patch's
    files.
    """

    tree: bytes = b""
    broken: str = ""
    failed: str = ""
    touched: Sequence[str] = ()


@dataclass(frozen=True)
class Steps:
    """Slots and environment in which the steps of one repository run; patches are applied in the judge's slot."""

    pool: Pool
    slots: SlotPair
    runtime: Runtime
    environment: dict[str, str]
    loopback: bool

    async def run(
        self, command: Sequence[str], limits: Limits, trees: Sequence[bytes], report: str = "", keep: bool = False
    ) -> Step:
        """Runs a command in a folder with the contents of tars, later ones over earlier ones."""
        program = Program(
            runtime=self.runtime,
            source=b"",
            limits=limits,
            compile_limits=limits,
            environment=self.environment,
            archives=[pb.Archive(content=tree) for tree in trees],
            loopback=self.loopback,
            command=tuple(command),
            any_links=True,
        )
        try:
            return await self._run(program, self.slots.program, b"", report, "." if keep else "")
        except InvalidArgumentError as error:  # a file has no room, or lies below a link that the submission made
            return Step(RunResult(exit_code=None), problem=f"files cannot be placed: {error.message}")

    async def _run(self, program: Program, slot: WorkerSlot, stdin: bytes, report: str, kept: str) -> Step:
        limits = program.limits
        most_bytes = self.pool.config.max_output_file_bytes
        if kept:
            most_bytes = min(limits.file_bytes + limits.files * _TAR_BYTES, _TREES * self.pool.config.max_file_bytes)
        collect, pack = ([report], [report]) if report else ([], [])
        async with open_program(self.pool.factory, program, slot) as loaded:
            await loaded.load()
            with memory_streams(stdin) as streams:
                result, files = await loaded.run(streams, (), (), collect, most_bytes, [kept] if kept else pack)
                stdout, stderr = (os.pread(file, limits.output_bytes, 0) for file in (streams.stdout, streams.stderr))
        if not kept:
            return Step(result, stdout, stderr, files)
        problem = f"the repository cannot be kept: {files[0].error}" if files and files[0].error else ""
        tree = files[0].content if files else b""
        return Step(result, stdout, stderr, tree=tree, problem=problem)

    async def run_suite(self, suite: Suite, limits: Limits, trees: Sequence[bytes]) -> tuple[Step, SuiteResult]:
        """Runs tests and reads their report."""
        step = await self.run(suite.command, limits, [*trees, make_tar(suite.files)], suite.report)
        if step.problem or step.limit_verdict is not None:
            return step, SuiteResult([], step.failure(limits))
        return step, await asyncio.to_thread(read_suite, suite, step.result.exit_code, step.stdout, step.files)

    async def apply(
        self,
        archives: Sequence[pb.Archive],
        limits: Limits,
        patches: tuple[bytes, bytes] = (b"", b""),
        protected: Sequence[str] = (),
        base: bytes = b"",
    ) -> Applied:
        """Applies a patch, and a test patch over it.

        With `base`, protected files become those of that tar. Raises FailedPreconditionError where the machine has
        nothing that applies patches, InvalidArgumentError for an archive that is refused, unless there is a base: what
        a step has left is none of the request's.
        """
        python = self.pool.catalog.find("python")
        if python is None:
            raise FailedPreconditionError("repositories need the runtime python")
        inside = [pb.Archive() for _ in archives]
        for archive, each in zip(inside, archives, strict=True):
            archive.CopyFrom(each)
            archive.folder = f"{apply_patch.ROOT}/{each.folder}".rstrip("/")
        if base:
            inside.append(pb.Archive(content=base, folder=apply_patch.BASE))
        bounds = dataclasses.replace(
            limits,
            wall_ms=_PATCH_MS,
            cpu_ms=_PATCH_MS,
            memory_bytes=limits.memory_bytes + _PATCH_BYTES,
            file_bytes=limits.file_bytes * 2,
            files=limits.files * 3,
            output_bytes=max(limits.output_bytes, _ANSWER_BYTES),
        )
        job = {
            "test_patch": base64.b64encode(patches[0]).decode(),
            "patch": base64.b64encode(patches[1]).decode(),
            "protected": list(protected),
        }
        program = Program(python, _APPLY, bounds, bounds, archives=inside, any_links=bool(base))
        try:
            step = await self._run(program, self.slots.judge, json.dumps(job).encode(), "", apply_patch.ROOT)
        except InvalidArgumentError as refused:
            if not base:
                raise
            return Applied(broken=f"its files cannot be placed: {refused.message}")
        if failure := step.failure(bounds):
            error = step.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return Applied(failed=error or failure) if patches[1].strip() else Applied(broken=error or failure)
        found = json.loads(step.stdout)
        broken, failed = found.get("test_patch", ""), found.get("patch", "")
        if apply_patch.NO_COMMAND in (broken, failed):
            raise FailedPreconditionError(f"{apply_patch.NO_COMMAND}: install git")
        return Applied(step.tree, broken, failed, found.get("touched", []))


@dataclass(frozen=True)
class Trial:
    """Verdict on the tests of a repository with one patch."""

    verdict: pb.TestVerdict.ValueType
    reason: str = ""
    step: Step | None = None
    suite: SuiteResult = field(default_factory=lambda: SuiteResult([]))


async def try_patch(steps: Steps, job: PatchJob, patch: bytes) -> Trial:
    """Applies a patch, runs setup and the tests, and says whether those that must pass do."""
    request = job.request
    required = [*request.fail_to_pass, *request.pass_to_pass]
    targets = list(dict.fromkeys(each.split("::")[0] for each in required))
    suite = make_suite(request.tests, job.runtime.python_path, targets)
    protected = [*request.protected_paths, *PROTECTED.get(request.tests.framework, ()), *suite.protected(targets)]
    applied = await steps.apply(request.archives, job.limits, (request.test_patch, patch), protected)
    if applied.broken:
        return Trial(pb.TEST_VERDICT_UNJUDGEABLE, f"test_patch does not apply: {applied.broken}")
    if applied.failed:
        return Trial(pb.TEST_VERDICT_WRONG_ANSWER, f"the patch does not apply: {applied.failed}")
    tree = applied.tree
    if request.setup:
        step = await steps.run(request.setup, job.limits, [tree], keep=True)
        if failure := step.failure(job.limits):
            return Trial(pb.TEST_VERDICT_COMPILE_ERROR, f"setup: {failure}", step)
        built, kept = [pb.Archive(content=step.tree)], [*protected, *applied.touched]
        restored = await steps.apply(built, job.limits, protected=kept, base=tree)
        if restored.broken:
            return Trial(pb.TEST_VERDICT_COMPILE_ERROR, f"setup: {restored.broken}", step)
        tree = restored.tree
    step, result = await steps.run_suite(suite, job.limits, [tree, make_tar(request.test_files)])
    if result.problem:
        return Trial(step.limit_verdict or pb.TEST_VERDICT_WRONG_ANSWER, result.problem, step, result)
    failing = [test for test in pick(result, required) if test.outcome != pb.TEST_OUTCOME_PASSED]
    if failing:
        reason = f"{len(failing)} of {len(required)} tests that must pass do not, the first is {failing[0].id}"
        return Trial(pb.TEST_VERDICT_WRONG_ANSWER, reason, step, result)
    return Trial(pb.TEST_VERDICT_ACCEPTED, "", step, result)


async def find_base_problem(steps: Steps, job: PatchJob) -> str:
    """Returns why the tests of a repository judge no patch; empty when they do without a patch what they should."""
    base = await try_patch(steps, job, b"")
    if base.verdict in (pb.TEST_VERDICT_UNJUDGEABLE, pb.TEST_VERDICT_COMPILE_ERROR):
        return f"without the patch, too: {base.reason}"
    if base.suite.problem:  # a limit may be passed by what the patch is to mend
        limited = base.step is not None and base.step.limit_verdict is not None
        return "" if limited else f"without the patch, too: {base.suite.problem}"
    required = list(job.request.pass_to_pass)
    failing = [test for test in pick(base.suite, required) if test.outcome != pb.TEST_OUTCOME_PASSED]
    if not failing:
        return ""
    return f"{len(failing)} tests of pass_to_pass do not pass without the patch, the first is {failing[0].id}"


class BaseProblems:
    """Problems of repositories without a patch, by digest; the oldest make room.

    A problem is one that is found twice, since a test may fail now and then, and is looked for anew after a while.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    async def get(self, key: bytes, find: Callable[[], Awaitable[str]]) -> str:
        """Returns the problem of a repository, empty when it has none."""
        problem, until = self._kept.get(key, ("", 0.0))
        if self._clock() < until:
            return problem
        problem = await find() and await find()
        self._kept[key] = problem, self._clock() + _PROBLEM_S if problem else math.inf
        if len(self._kept) > _MOST_BASES:
            self._kept.popitem(last=False)
        return problem


class Repositories:
    """Judges patches and assesses repositories; what the tests of a repository do without a patch is kept."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._base_problems = BaseProblems()

    async def judge_patch(self, job: PatchJob, remaining_s: float | None = None) -> pb.JudgePatchResponse:
        """Judges a patch; failures of the sandbox come back as INFRA_ERROR.

        Raises ResourceExhaustedError when no slot is free in time, InvalidArgumentError for an archive that is refused.
        """
        request = job.request
        cost_s = (2 * job.limits.wall_ms + _PATCH_MS) / 1000
        async with self._pool.lease(cost_s, remaining_s) as pair:
            started = time.monotonic()
            steps = Steps(self._pool, pair, job.runtime, dict(request.env), request.loopback)
            try:
                trial = await self._judge(steps, job)
            except SandboxFailedError as error:
                trial = Trial(pb.TEST_VERDICT_INFRA_ERROR, error.message)
        response = describe_trial(request, trial)
        response.wall_ms = math.ceil((time.monotonic() - started) * 1000)
        metrics.count("patch", pb.TestVerdict.Name(response.verdict).removeprefix("TEST_VERDICT_"), started)
        return response

    async def _judge(self, steps: Steps, job: PatchJob) -> Trial:
        trial = await try_patch(steps, job, job.request.patch)
        if trial.verdict in (pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_UNJUDGEABLE):
            return trial
        key = await asyncio.to_thread(digest_of_base, job)  # archives may be large
        problem = await self._base_problems.get(key, lambda: find_base_problem(steps, job))
        return dataclasses.replace(trial, verdict=pb.TEST_VERDICT_UNJUDGEABLE, reason=problem) if problem else trial

    async def assess(self, job: Assessment, remaining_s: float | None = None) -> pb.AssessResponse:
        """Takes a repository through its stages; errors as for `judge_patch`."""
        request = job.request
        cost_s = (_PATCH_MS + sum(limits.wall_ms for limits in job.stage_limits)) / 1000
        async with self._pool.lease(cost_s, remaining_s) as pair:
            started = time.monotonic()
            steps = Steps(self._pool, pair, job.runtime, dict(request.env), request.loopback)
            try:
                response = await assess(steps, job)
            except SandboxFailedError as error:
                response = pb.AssessResponse(verdict=pb.TEST_VERDICT_INFRA_ERROR, reason=error.message)
        metrics.count("assess", pb.TestVerdict.Name(response.verdict).removeprefix("TEST_VERDICT_"), started)
        return response


def digest_of_base(job: PatchJob) -> bytes:
    """Returns a digest of all that decides what the tests of a repository do without a patch."""
    base = pb.JudgePatchRequest()
    base.CopyFrom(job.request)
    base.ClearField("patch")
    base.ClearField("idempotency_key")
    state = json.dumps(job.runtime.root_state()).encode()
    return hashlib.sha256(base.SerializeToString(deterministic=True) + state).digest()


def describe_trial(request: pb.JudgePatchRequest, trial: Trial) -> pb.JudgePatchResponse:
    """Returns the response for a trial."""
    response = pb.JudgePatchResponse(verdict=trial.verdict, reason=trial.reason[:_REASON_CHARACTERS])
    if trial.step is not None:
        response.stdout, response.stderr = trial.step.stdout[-_TAIL_BYTES:], trial.step.stderr[-_TAIL_BYTES:]
        response.cpu_ms, response.peak_memory_bytes = trial.step.result.cpu_ms, trial.step.result.peak_bytes or 0
    ended = pick(trial.suite, request.fail_to_pass), pick(trial.suite, request.pass_to_pass)
    passed = [sum(test.outcome == pb.TEST_OUTCOME_PASSED for test in tests) for tests in ended]
    response.fail_to_pass_passed, response.pass_to_pass_passed = passed
    required = {*request.fail_to_pass, *request.pass_to_pass}
    others = [test for test in trial.suite.tests if test.id not in required]
    response.tests.extend([*ended[0], *ended[1], *others[:_MOST_OTHER_TESTS]])
    return response


async def assess(steps: Steps, job: Assessment) -> pb.AssessResponse:
    """Runs the stages one after another; one whose needs have not their full score is skipped."""
    request = job.request
    placed = pb.Archive(content=make_tar(request.files))
    applied = await steps.apply([*request.archives, placed], job.limits, (b"", request.patch))
    if applied.broken or applied.failed:
        reason = f"the patch does not apply: {applied.failed}" if applied.failed else applied.broken
        return pb.AssessResponse(verdict=pb.TEST_VERDICT_WRONG_ANSWER, reason=reason[:_REASON_CHARACTERS])
    tree = applied.tree
    results: dict[str, pb.StageResult] = {}
    for stage, limits in zip(request.stages, job.stage_limits, strict=True):
        if any(results[name].score < 1 for name in stage.needs):
            results[stage.name] = pb.StageResult(name=stage.name, verdict=pb.TEST_VERDICT_SKIPPED)
            continue
        results[stage.name], tree = await run_stage(steps, job.runtime, stage, limits, tree)
    weights = [stage.weight if stage.HasField("weight") else 1.0 for stage in request.stages]
    scores = [result.score for result in results.values()]
    verdicts = [result.verdict for result in results.values()]
    failures = [each for each in verdicts if each not in (pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_SKIPPED)]
    return pb.AssessResponse(
        verdict=failures[0] if failures else pb.TEST_VERDICT_ACCEPTED,
        score=sum(map(math.prod, zip(scores, weights, strict=True))) / sum(weights),
        stages=results.values(),
    )


async def run_stage(
    steps: Steps, runtime: Runtime, stage: pb.Stage, limits: Limits, tree: bytes
) -> tuple[pb.StageResult, bytes]:
    """Runs one stage; returns its result, and the repository for the stages after it."""
    response = pb.StageResult(name=stage.name)
    trees = [tree, make_tar(stage.files)]
    if stage.HasField("tests"):
        suite = make_suite(stage.tests, runtime.python_path)
        step, result = await steps.run_suite(suite, limits, trees)
        response.tests.extend(pick(result, stage.expected) if stage.expected else result.tests)
        counted = [test for test in response.tests if stage.expected or test.outcome != pb.TEST_OUTCOME_SKIPPED]
        passed = sum(test.outcome == pb.TEST_OUTCOME_PASSED for test in counted)
        if counted and not result.problem:
            response.score = passed / len(counted)
        response.reason = result.problem or ("" if response.score == 1 else f"{passed} of {len(counted)} tests pass")
    else:
        step = await steps.run(stage.command, limits, trees, keep=stage.keep)
        response.reason = step.failure(limits)
        response.score = float(not response.reason)
        tree = step.tree if stage.keep and not response.reason else tree
    failure = step.limit_verdict or pb.TEST_VERDICT_WRONG_ANSWER
    response.verdict = pb.TEST_VERDICT_ACCEPTED if response.score == 1 else failure
    response.exit_code = -1 if step.result.exit_code is None else step.result.exit_code
    response.stdout, response.stderr = step.stdout[-_TAIL_BYTES:], step.stderr[-_TAIL_BYTES:]
    response.wall_ms, response.cpu_ms = step.result.wall_ms, step.result.cpu_ms
    response.peak_memory_bytes = step.result.peak_bytes or 0
    return response, tree
