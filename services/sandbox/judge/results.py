"""Results of tests, before and after the program that judges has decided."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import RunResult
from services.sandbox.judge.decisions import Decision, failure
from services.sandbox.runtime.programs import status_of_run

CUT_BYTES = 4096

# Results of the tests in their order, with points from 0 to 1, and the compilation, if there was one. Tests that were
# not run are SKIPPED.
Results = tuple[list[pb.TestResult], pb.CompileResult | None]

UNDECIDED = Decision(pb.TEST_VERDICT_UNSPECIFIED, None, "")


def verdict_of(status: pb.Status.ValueType) -> pb.TestVerdict.ValueType:
    """Returns the verdict on a program of which nothing is expected but that it ends well."""
    if status == pb.STATUS_OK:
        return pb.TEST_VERDICT_ACCEPTED
    return pb.TestVerdict.Value(f"TEST_VERDICT_{pb.Status.Name(status).removeprefix('STATUS_')}")


def limit_verdict(run: RunResult) -> pb.TestVerdict.ValueType | None:
    """Returns the verdict for the limit that a run has passed; None where it has passed none."""
    verdict = verdict_of(status_of_run(run))
    return None if run.stop is None or verdict == pb.TEST_VERDICT_RUNTIME_ERROR else verdict


def unjudged_result(execution: pb.ExecuteResponse) -> pb.TestResult:
    """Returns the result of a test before its output is compared."""
    reason = execution.reason
    if execution.status == pb.STATUS_RUNTIME_ERROR and not reason:
        last_line = execution.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        end = f"signal {execution.signal}" if execution.signal else f"exit code {execution.exit_code}"
        reason = last_line or end
    return pb.TestResult(
        verdict=verdict_of(execution.status),
        wall_ms=execution.wall_ms,
        output=execution.stdout[:CUT_BYTES],
        reason=reason,
        cpu_ms=execution.cpu_ms,
        peak_memory_bytes=execution.peak_memory_bytes,
        exit_code=execution.exit_code,
        signal=execution.signal,
        stderr=execution.stderr[:CUT_BYTES],
        output_truncated=execution.stdout_truncated or len(execution.stdout) > CUT_BYTES,
        wall_limited=execution.wall_limited,
    )


def decide(result: pb.TestResult, decision: Decision) -> pb.TestResult:
    """Sets what a checker or an interactor decided, and returns the result."""
    result.verdict, result.points, result.reason = decision.verdict, decision.fraction or 0.0, decision.message
    return result


def cut_output(result: pb.TestResult) -> None:
    """Leaves as much of the output as a response holds."""
    if len(result.output) > CUT_BYTES:
        result.output, result.output_truncated = result.output[:CUT_BYTES], True


Pass = Callable[[bytes, pb.TestCase], Awaitable[tuple[pb.TestResult, Decision]]]


async def run_passes(run: Pass, test: pb.TestCase, first_input: bytes, passes: int) -> pb.TestResult:
    """Runs the passes of a test, one unless its judge asks for more; times are those of all of them together."""
    result, decision = await run(first_input, test)
    for _ in range(1, passes):
        if decision.next_input is None:
            break
        earlier = result
        result, decision = await run(decision.next_input, test)
        result.wall_ms += earlier.wall_ms
        result.cpu_ms += earlier.cpu_ms
        result.peak_memory_bytes = max(result.peak_memory_bytes, earlier.peak_memory_bytes)
    if decision.next_input is not None:
        return decide(result, failure(f"asked for more than {passes} passes", decision.message))
    return result
