"""Programs: the response's source against hidden tests, in the sandbox service."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, TypeVar

from perigee.errors import (
    UNAVAILABLE,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    UnavailableError,
)
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as sandbox_pb
from services.kit.telemetry import get_logger
from services.reward.config import CodeConfig
from services.reward.verifiers.base import Item, Outcome, ParametersT, Verifier, read_answer

log = get_logger(__name__)

ResponseT = TypeVar("ResponseT")

MAX_REASON_CHARACTERS = 500
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 5.0
# Prompts whose tests are at fault are remembered, so that each is logged once.
MOST_LEFT_OUT = 100_000
# The sandbox's fault or a full queue, not the program's: worth another try within the deadline.
RETRIED = (*UNAVAILABLE, InternalError)
# What a program can be found to be; anything else is no judgement.
WRONG_VERDICTS = {
    sandbox_pb.TEST_VERDICT_WRONG_ANSWER: "wrong answer",
    sandbox_pb.TEST_VERDICT_TIME_LIMIT: "time limit",
    sandbox_pb.TEST_VERDICT_MEMORY_LIMIT: "memory limit",
    sandbox_pb.TEST_VERDICT_OUTPUT_LIMIT: "output limit",
    sandbox_pb.TEST_VERDICT_RUNTIME_ERROR: "runtime error",
    sandbox_pb.TEST_VERDICT_COMPILE_ERROR: "compile error",
}


FENCE = re.compile(r"^[ \t]*```[A-Za-z0-9_+#-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class SandboxVerifier(Verifier[ParametersT]):
    """Verifier that asks the sandbox, and asks again until the deadline where the sandbox did not judge."""

    def __init__(self, config: CodeConfig, sandbox: SandboxClient) -> None:
        self.config = config
        self.sandbox = sandbox
        self._slots = asyncio.Semaphore(config.concurrency)
        self._left_out: set[bytes] = set()

    async def ask(
        self,
        call: Callable[[float], Awaitable[ResponseT]],
        read: Callable[[ResponseT], Outcome | str],
        refused: Callable[[InvalidArgumentError], Outcome],
        extracted: str,
    ) -> Outcome:
        """Calls the sandbox with the time that is left; `read` returns an outcome, or why the sandbox did not judge."""
        async with self._slots:
            end = time.monotonic() + self.config.timeout_s
            backoff_s = FIRST_PAUSE_S
            reason = ""
            while True:
                hint_s: float | None = None
                try:
                    outcome = read(await call(max(0.01, end - time.monotonic())))
                    self.unavailable = ""
                    if isinstance(outcome, Outcome):
                        return outcome
                    reason = f"the sandbox could not judge: {outcome}"
                except DeadlineExceededError:
                    reason = reason or f"the sandbox did not answer within {self.config.timeout_s:g} s"
                except RETRIED as error:
                    reason, hint_s = error.message, error.retry_after_s
                    self._set_unavailable(error.message if isinstance(error, UnavailableError) else "")
                except InvalidArgumentError as error:
                    return refused(error)
                except PerigeeError as error:
                    return Outcome.failed(error.message, retryable=False, extracted=extracted)
                pause_s = max(min(backoff_s, LAST_PAUSE_S), hint_s or 0.0)
                if time.monotonic() + pause_s >= end:
                    return Outcome.failed(reason, retryable=True, extracted=extracted, retry_after_s=pause_s)
                await asyncio.sleep(pause_s)
                backoff_s *= 2

    def leave_out(self, item: Item[ParametersT], reason: str, extracted: str) -> Outcome:
        """Returns the outcome of a prompt that cannot be judged, which is logged once."""
        digest = hashlib.blake2b(item.parameters.SerializeToString(deterministic=True), digest_size=8).digest()
        if digest not in self._left_out and len(self._left_out) < MOST_LEFT_OUT:
            self._left_out.add(digest)
            prompt = item.prompt[:MAX_REASON_CHARACTERS]
            log.warning("tests cannot be judged", reason=reason, item=item.id, prompt=prompt)
        return Outcome.unjudgeable(f"the prompt's tests cannot be judged: {reason}", extracted)

    def _set_unavailable(self, reason: str) -> None:
        if reason and not self.unavailable:
            log.warning("the sandbox is waited for", reason=reason)
        self.unavailable = reason


class CodeVerifier(SandboxVerifier[pb.CodeVerifier]):
    """Correct when every test passes; with partial credit a wrong program earns its share of the tests' points.

    A program that does not compile is wrong and says so. A failure of the sandbox is tried again until the deadline;
    tests, a checker or an interactor that are at fault themselves are not. The program is what follows the marker, of
    text with fenced blocks the last block.
    """

    name: ClassVar[str] = "code"
    version: ClassVar[str] = "3"

    def find_violations(self, parameters: pb.CodeVerifier) -> list[FieldViolation]:
        violations = []
        if not parameters.language:
            violations.append(FieldViolation("code.language", 'is required: "python" for one'))
        if not parameters.tests:
            violations.append(FieldViolation("code.tests", "at least one test is required"))
        kinds = [test.WhichOneof("kind") for test in parameters.tests]
        for index, kind in enumerate(kinds):
            if kind is None:
                text = "must be stdio, function, code or interactive"
            elif kind != kinds[0]:
                text = f"is {kind} where the first test is {kinds[0]}: all tests must be of one kind"
            else:
                continue
            violations.append(FieldViolation(f"code.tests[{index}]", text))
        if any(kind in ("function", "code") for kind in kinds) and not parameters.function_name:
            violations.append(FieldViolation("code.function_name", "is required by function and code tests"))
        if "interactive" in kinds and not parameters.HasField("interactor"):
            violations.append(FieldViolation("code.interactor", "is required by interactive tests"))
        if parameters.partial_credit and parameters.tests and not sum(map(points_of, parameters.tests)) > 0:
            violations.append(FieldViolation("code.partial_credit", "needs tests that are worth points"))
        return violations

    async def judge(self, item: Item[pb.CodeVerifier]) -> Outcome:
        text = read_answer(item)
        if isinstance(text, Outcome):
            return text
        source = find_program(text)
        if not source:
            return Outcome.ungradable("the program is empty")
        parameters = item.parameters
        request = build_request(parameters, source)
        request.retry_starved = self.config.retry_starved

        def read(response: sandbox_pb.JudgeResponse) -> Outcome | str:
            if unjudgeable := find_unjudgeable(response):
                return self.leave_out(item, unjudgeable, source)
            if is_judgement(response, parameters):
                return read_judgement(response, parameters, source)
            return infrastructure_reason(response)

        return await self.ask(
            lambda timeout_s: self.sandbox.judge(request, timeout_s=timeout_s),
            read,
            lambda error: read_refusal(error, source),
            source,
        )


def find_program(text: str) -> str:
    """Returns the content of the last fenced block, also of one that does not end; the text when it has none."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]).strip("\n") if blocks else text


def points_of(test: sandbox_pb.TestCase) -> float:
    """Returns the points of passing a test."""
    return test.points if test.HasField("points") else 1.0


def build_request(parameters: pb.CodeVerifier, source: str) -> sandbox_pb.JudgeRequest:
    """Returns the sandbox's request; without partial credit the first failed test ends the run."""
    return sandbox_pb.JudgeRequest(
        language=parameters.language,
        source=source.encode(),
        function_name=parameters.function_name,
        function_signature=parameters.function_signature,
        tests=parameters.tests,
        limits=parameters.limits if parameters.HasField("limits") else None,
        stop_at_first_failure=not parameters.partial_credit,
        files=parameters.files,
        checker=parameters.checker if parameters.HasField("checker") else None,
        interactor=parameters.interactor if parameters.HasField("interactor") else None,
        setup_code=parameters.setup_code,
    )


def find_unjudgeable(response: sandbox_pb.JudgeResponse) -> str:
    """Returns why a test cannot be judged, whatever the program; empty when none says so."""
    found = (r.reason or "no reason" for r in response.results if r.verdict == sandbox_pb.TEST_VERDICT_UNJUDGEABLE)
    return next(found, "")[:MAX_REASON_CHARACTERS]


def is_judgement(response: sandbox_pb.JudgeResponse, parameters: pb.CodeVerifier) -> bool:
    """Returns whether the response speaks of the program, not of the sandbox.

    A share of the points needs every test to have been judged; a failed test alone makes a program wrong.
    """
    if parameters.partial_credit:
        judged = {sandbox_pb.TEST_VERDICT_ACCEPTED, *WRONG_VERDICTS}
        if any(result.verdict not in judged for result in response.results) and not is_compile_error(response):
            return False
    return response.verdict == sandbox_pb.TEST_VERDICT_ACCEPTED or response.verdict in WRONG_VERDICTS


def is_compile_error(response: sandbox_pb.JudgeResponse) -> bool:
    """Returns whether the program never ran, so that no test of it was judged."""
    return response.verdict == sandbox_pb.TEST_VERDICT_COMPILE_ERROR


def read_judgement(response: sandbox_pb.JudgeResponse, parameters: pb.CodeVerifier, extracted: str) -> Outcome:
    """Returns the outcome of a judged program."""
    if response.verdict == sandbox_pb.TEST_VERDICT_ACCEPTED:
        return Outcome.correct(extracted)
    share = response.points / response.max_points if parameters.partial_credit and response.max_points else 0.0
    known = sandbox_pb.TestResult()
    first = next((r for r in response.results if r.verdict == response.verdict and r.reason), known)
    detail = f"{first.reason}, {first.cpu_ms} ms of CPU time used" if first.wall_limited else first.reason
    if is_compile_error(response):
        detail = detail or explain_compiler(response.compile)
    reason = WRONG_VERDICTS[response.verdict] + (f": {detail}" if detail else "")
    return Outcome.wrong(extracted, reason[:MAX_REASON_CHARACTERS], reward=share)


def explain_compiler(compiled: sandbox_pb.CompileResult) -> str:
    """Returns the first line of what the compiler said that names an error, or its first line."""
    lines = [line.strip() for line in (compiled.stderr or compiled.stdout).decode(errors="replace").splitlines()]
    errors = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    return errors[0] if errors else f"exit code {compiled.exit_code}"


def read_refusal(error: InvalidArgumentError, extracted: str) -> Outcome:
    """A program that the sandbox does not take is the response's fault, anything else that it refuses the prompt's."""
    if error.violations and all(violation.field == "source" for violation in error.violations):
        return Outcome.ungradable(f"the sandbox refuses the program: {error.message}", extracted)
    return Outcome.failed(
        f"the sandbox refuses the prompt's tests: {error.message}", retryable=False, extracted=extracted
    )


def infrastructure_reason(response: sandbox_pb.JudgeResponse) -> str:
    """Returns why the sandbox could not judge, as far as it says."""
    judged = {sandbox_pb.TEST_VERDICT_ACCEPTED, sandbox_pb.TEST_VERDICT_SKIPPED, *WRONG_VERDICTS}
    reasons = [result.reason for result in response.results if result.verdict not in judged and result.reason]
    return reasons[0] if reasons else sandbox_pb.TestVerdict.Name(response.verdict)
