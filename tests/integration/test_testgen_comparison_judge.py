"""The comparisons that decide on agreement are the sandbox's own: both say the same of the same outputs."""

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import (
    Comparison,
    same_bytes,
    same_floats,
    same_lines,
    same_tokens,
    same_unordered_lines,
    same_unordered_tokens,
)

# A program that prints its input, so that inputs are the outputs to be compared.
ECHO = b"import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())"
# Outputs and what each is compared with, in both directions.
OUTPUTS = {
    b"1 2\n3\n": [
        *(b"", b"1 2\n3\n", b"1 2\n3", b"1  2\n3\n", b"1 2 \n3 \n\n", b"1 2\n\n3\n", b" 1 2\n3\n", b"3\n1 2\n"),
        *(b"1 3\n2\n", b"1 2\r\n3\r\n", b"1.0 2.0000001\n3\n", b"1.1 2\n3\n", b"1 2 3 3\n"),
    ],
    b"x 100\n": [b"x 100.0\n", b"y 100\n", b"x 1e2\n", b"x 0x64\n", b"x 110\n", b"x 83\n", b"x nan\n", b"x inf\n"],
    b"nan\n": [b"nan\n", b"NaN\n", b"inf\n", b"0\n"],
    b"-inf\n": [b"-inf\n", b"-Infinity\n", b"inf\n"],
}
PAIRS = [pair for one, others in OUTPUTS.items() for other in others for pair in ((one, other), (other, one))]
CASES: list[tuple[pb.Checker, Comparison]] = [
    (pb.Checker(comparison=pb.COMPARISON_EXACT), same_bytes),
    (pb.Checker(comparison=pb.COMPARISON_TOKENS), same_tokens),
    (pb.Checker(comparison=pb.COMPARISON_LINES), same_lines),
    (pb.Checker(comparison=pb.COMPARISON_UNORDERED_LINES), same_unordered_lines),
    (pb.Checker(comparison=pb.COMPARISON_UNORDERED_TOKENS), same_unordered_tokens),
    (pb.Checker(floats=pb.FloatTolerance(absolute=1e-6)), same_floats(1e-6, 0)),
    (pb.Checker(floats=pb.FloatTolerance(relative=0.2)), same_floats(0, 0.2)),
]


@pytest.mark.parametrize(("checker", "same"), CASES, ids=[same.__name__ for _, same in CASES])
async def test_both_say_the_same(sandbox_address: str, checker: pb.Checker, same: Comparison) -> None:
    tests = [pb.TestCase(stdio=pb.StdioTest(stdin=actual, expected_stdout=expected)) for actual, expected in PAIRS]
    request = pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=checker)
    async with SandboxClient.connect(sandbox_address) as sandbox:
        response = await sandbox.judge(request, timeout_s=100)
    reported = [result.verdict == pb.TEST_VERDICT_ACCEPTED for result in response.results]
    apart = [pair for pair, verdict in zip(PAIRS, reported, strict=True) if verdict != same(*pair)]
    assert apart == []
