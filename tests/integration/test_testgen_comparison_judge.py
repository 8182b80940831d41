"""The comparisons that decide on agreement are the sandbox's own: both say the same of the same outputs."""

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import SameOutput, compare_by

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
CASES: list[tuple[pb.Checker, SameOutput]] = [
    (pb.Checker(comparison=pb.COMPARISON_EXACT), compare_by(Comparison.EXACT)),
    (pb.Checker(comparison=pb.COMPARISON_TOKENS), compare_by(Comparison.TOKENS)),
    (pb.Checker(comparison=pb.COMPARISON_LINES), compare_by(Comparison.LINES)),
    (pb.Checker(comparison=pb.COMPARISON_UNORDERED_LINES), compare_by(Comparison.UNORDERED_LINES)),
    (pb.Checker(comparison=pb.COMPARISON_UNORDERED_TOKENS), compare_by(Comparison.UNORDERED_TOKENS)),
    (pb.Checker(floats=pb.FloatTolerance(absolute=1e-6)), compare_by(Tolerance(1e-6, 0))),
    (pb.Checker(floats=pb.FloatTolerance(relative=0.2)), compare_by(Tolerance(0, 0.2))),
]


@pytest.mark.parametrize(("checker", "same"), CASES, ids=[same.__name__ for _, same in CASES])
async def test_both_say_the_same(sandbox_address: str, checker: pb.Checker, same: SameOutput) -> None:
    tests = [pb.TestCase(stdio=pb.StdioTest(stdin=actual, expected_stdout=expected)) for actual, expected in PAIRS]
    request = pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=checker)
    async with SandboxClient.connect(sandbox_address) as sandbox:
        response = await sandbox.judge(request, timeout_s=100)
    reported = [result.verdict == pb.TEST_VERDICT_ACCEPTED for result in response.results]
    apart = [pair for pair, verdict in zip(PAIRS, reported, strict=True) if verdict != same(*pair)]
    assert apart == []
