"""What both programs ask, where, and how they print it."""

import os

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.v1 import reward_pb2
from perigee.rpc import ChannelOptions
from perigee.sandbox.v1 import sandbox_pb2

REWARD = os.environ["PERIGEE_REWARD_ADDRESS"]
SANDBOX = os.environ["PERIGEE_SANDBOX_ADDRESS"]
# Token and certificates: PERIGEE_TOKEN or PERIGEE_TOKEN_FILE, PERIGEE_CA_FILE, and, where the services ask for one,
# PERIGEE_CERT_FILE and PERIGEE_KEY_FILE.
OPTIONS = ChannelOptions.from_environment()

ANSWERS = [
    reward_pb2.ScoreItem(id=name, response=response, math=reward_pb2.MathVerifier(reference="5/6"))
    for name, response in (("a", r"1/2 + 1/3 is \boxed{5/6}"), ("b", r"1/2 + 1/3 is \boxed{2/5}"))
]
SQUARE = sandbox_pb2.JudgeRequest(
    language="python",
    source=b"n = int(input())\nprint(n * n)",
    tests=[
        sandbox_pb2.TestCase(stdio=sandbox_pb2.StdioTest(stdin=stdin, expected_stdout=expected))
        for stdin, expected in ((b"2", b"4"), (b"3", b"9"))
    ],
)


def show_outcome(outcome: reward_pb2.ScoreResponse) -> None:
    """Prints a verdict; a response that was not judged has no reward, which is not 0."""
    reward = f"{outcome.reward:g}" if outcome.HasField("reward") else f"none: {outcome.reason}"
    print(outcome.id, buffer_pb2.Verdict.Name(outcome.verdict), reward)


def show_judged(judged: sandbox_pb2.JudgeResponse) -> None:
    """Prints a verdict on a program."""
    verdict = sandbox_pb2.TestVerdict.Name(judged.verdict)
    print("square", verdict, f"{judged.passed} of {len(judged.results)} tests")
