"""The other verifiers through the real service, and how it refuses what is wrong with a request."""

from __future__ import annotations

import json

import grpc
import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED, VERDICT_UNGRADABLE, VERDICT_WRONG
from perigee.errors import FieldViolation, InvalidArgumentError, from_rpc_error
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2 as sandbox_pb
from services.reward.config import PatternConfig
from tests.fixtures.reward import math_item, running_reward, score, score_one

# Exponential for every engine that tries one way after the other.
CATASTROPHIC = "(x+x+)+[yz]"
MANY_X = "x" * 50_000


async def test_regex_finds_in_the_response_what_it_says(reward: RewardClient) -> None:
    verifier = pb.RegexVerifier(pattern="[0-9]+ apples", search_response=True)
    item = pb.ScoreItem(id="a", response="I have 12 apples and 3 pears.", regex=verifier)
    outcome = await score_one(reward, item)
    assert (outcome.verdict, outcome.reward, outcome.extracted_answer) == (VERDICT_CORRECT, 1.0, "12 apples")
    assert (outcome.verifier, outcome.verifier_version) == ("regex", "1")


async def test_patterns_that_hang_fail_by_their_deadline_and_harm_no_other() -> None:
    schema = json.dumps({"type": "string", "pattern": CATASTROPHIC})
    items = [
        pb.ScoreItem(id="regex", response=MANY_X, regex=pb.RegexVerifier(pattern=CATASTROPHIC)),
        pb.ScoreItem(id="json", response=json.dumps(MANY_X), json=pb.JsonVerifier(schema_json=schema)),
        *(pb.ScoreItem(id=str(i), response="xxy", regex=pb.RegexVerifier(pattern="x+y")) for i in range(20)),
    ]
    async with running_reward(pattern=PatternConfig(workers=1, check_timeout_s=1)) as client:
        outcomes = {outcome.id: outcome for outcome in await score(client, items)}
    for name in ("regex", "json"):
        assert (outcomes[name].verdict, outcomes[name].HasField("reward")) == (VERDICT_FAILED, False)
        assert "did not end within" in outcomes[name].reason
    assert {outcomes[str(i)].verdict for i in range(20)} == {VERDICT_CORRECT}


async def test_a_schema_fetches_nothing(reward: RewardClient) -> None:
    schema = json.dumps({"$ref": "http://127.0.0.1:9/schema.json"})
    item = pb.ScoreItem(id="a", response="{}", json=pb.JsonVerifier(schema_json=schema))
    outcome = await score_one(reward, item)
    assert (outcome.verdict, outcome.HasField("reward"), outcome.retryable) == (VERDICT_FAILED, False, False)
    assert "Unresolvable" in outcome.reason


async def test_a_composite_reports_its_parts(reward: RewardClient) -> None:
    composite = pb.CompositeVerifier(
        parts=[
            pb.CompositePart(name="value", weight=3, verifier=pb.VerifierSpec(math=pb.MathVerifier(reference="1/2"))),
            pb.CompositePart(
                name="form", weight=1, verifier=pb.VerifierSpec(regex=pb.RegexVerifier(pattern=r"0\.\d+"))
            ),
        ]
    )
    items = [
        pb.ScoreItem(id=response, response=f"#{response}", answer_marker="#", composite=composite)
        for response in ("0.5", "1/2", "0.7", "1/3")
    ]
    outcomes = {outcome.id: outcome for outcome in await score(reward, items)}
    assert {name: (outcome.verdict, outcome.reward) for name, outcome in outcomes.items()} == {
        "0.5": (VERDICT_CORRECT, 1.0),
        "1/2": (VERDICT_WRONG, 0.75),
        "0.7": (VERDICT_WRONG, 0.25),
        "1/3": (VERDICT_WRONG, 0.0),
    }
    assert [(p.name, p.verdict, p.reward) for p in outcomes["1/2"].parts] == [
        ("value", VERDICT_CORRECT, 1.0),
        ("form", VERDICT_WRONG, 0.0),
    ]
    assert outcomes["0.5"].verifier == "composite"


async def test_a_part_that_fails_makes_the_whole_failed_unless_a_gate_closed(reward: RewardClient) -> None:
    tests = [sandbox_pb.TestCase(stdio=sandbox_pb.StdioTest(stdin=b"", expected_stdout=b"1"))]
    code = pb.VerifierSpec(code=pb.CodeVerifier(language="python", tests=tests))
    parts = [
        pb.CompositePart(name="form", gate=True, verifier=pb.VerifierSpec(regex=pb.RegexVerifier(pattern="print.*"))),
        pb.CompositePart(name="run", weight=1, verifier=code),
    ]
    composite = pb.CompositeVerifier(parts=parts)
    async with running_reward(sandbox_address="127.0.0.1:9", code={"timeout_s": 1}) as client:
        closed = await score_one(client, pb.ScoreItem(id="a", response="no program", composite=composite))
        assert (closed.verdict, closed.reward) == (VERDICT_WRONG, 0.0)
        failed = await score_one(client, pb.ScoreItem(id="b", response="print(1)", composite=composite))
        assert (failed.verdict, failed.HasField("reward"), failed.retryable) == (VERDICT_FAILED, False, True)
        assert failed.retry_after_ms > 0
        [form, run] = failed.parts
        assert (form.verdict, form.HasField("reward")) == (VERDICT_CORRECT, True)
        assert (run.verdict, run.HasField("reward")) == (VERDICT_FAILED, False)


async def test_alternatives_are_as_good_as_the_reference(reward: RewardClient) -> None:
    verifier = pb.MathVerifier(reference="\\sqrt{2}", alternatives=["-\\sqrt{2}"])
    items = [
        pb.ScoreItem(id=answer, response=f"\\boxed{{{answer}}}", math=verifier)
        for answer in ("2^{1/2}", "-2^{1/2}", "2", "\\sqrt{2}")
    ]
    outcomes = {outcome.id: outcome.verdict for outcome in await score(reward, items)}
    assert outcomes == {
        "2^{1/2}": VERDICT_CORRECT,
        "-2^{1/2}": VERDICT_CORRECT,
        "\\sqrt{2}": VERDICT_CORRECT,
        "2": VERDICT_WRONG,
    }


async def test_an_answer_of_endless_length_is_no_answer(reward: RewardClient) -> None:
    outcome = await score_one(reward, math_item("a", "7", "#" + "1+" * 50_000 + "1"))
    assert (outcome.verdict, outcome.reward) == (VERDICT_UNGRADABLE, 0.0)
    assert "characters" in outcome.reason


async def test_a_reference_that_is_no_mathematics_fails_and_is_no_zero(reward: RewardClient) -> None:
    outcome = await score_one(reward, math_item("a", "\\bigstar((", "#7"))
    assert (outcome.verdict, outcome.HasField("reward"), outcome.retryable) == (VERDICT_FAILED, False, False)
    assert "reference" in outcome.reason


WRONG_ITEMS: list[tuple[pb.ScoreItem, set[str]]] = [
    (pb.ScoreItem(), {"verifier"}),
    (pb.ScoreItem(math=pb.MathVerifier(reference="1", alternatives=["2", " "])), {"math.alternatives[1]"}),
    (pb.ScoreItem(choice=pb.ChoiceVerifier()), {"choice.reference"}),
    (pb.ScoreItem(choice=pb.ChoiceVerifier(reference="D", options=["x", "y"])), {"choice.reference"}),
    (pb.ScoreItem(short_answer=pb.ShortAnswerVerifier()), {"short_answer.references"}),
    (pb.ScoreItem(short_answer=pb.ShortAnswerVerifier(references=["a", "?"])), {"short_answer.references[1]"}),
    (pb.ScoreItem(exact=pb.ExactVerifier()), {"exact.reference"}),
    (pb.ScoreItem(regex=pb.RegexVerifier()), {"regex.pattern"}),
    (pb.ScoreItem(regex=pb.RegexVerifier(pattern="(")), {"regex.pattern"}),
    (pb.ScoreItem(regex=pb.RegexVerifier(pattern="x" * 3000)), {"regex.pattern"}),
    (pb.ScoreItem(json=pb.JsonVerifier()), {"json.schema_json"}),
    (pb.ScoreItem(json=pb.JsonVerifier(schema_json="{")), {"json.schema_json"}),
    (pb.ScoreItem(json=pb.JsonVerifier(schema_json='{"type": 5}')), {"json.schema_json"}),
    (pb.ScoreItem(json=pb.JsonVerifier(expected_json="NaN")), {"json.expected_json"}),
    (pb.ScoreItem(code=pb.CodeVerifier()), {"code.language", "code.tests"}),
    (pb.ScoreItem(composite=pb.CompositeVerifier()), {"composite.parts"}),
    (
        pb.ScoreItem(composite=pb.CompositeVerifier(parts=[pb.CompositePart(name="a", weight=1)])),
        {"composite.parts[0].verifier"},
    ),
    (pb.ScoreItem(math=pb.MathVerifier(reference="1"), images=[pb.Image(data=b"no")]), {"images[0].data"}),
    (pb.ScoreItem(math=pb.MathVerifier(reference="1"), images=[pb.Image(url="file:///a")]), {"images[0].url"}),
    (pb.ScoreItem(math=pb.MathVerifier(reference="1"), prompt="x" * (1 << 20) + "x"), {"prompt"}),
]


@pytest.mark.parametrize(("item", "fields"), WRONG_ITEMS)
async def test_wrong_items_are_refused_by_their_fields(
    reward: RewardClient, item: pb.ScoreItem, fields: set[str]
) -> None:
    whole = pb.ScoreItem(id="a", response="r")
    whole.MergeFrom(item)
    with pytest.raises(InvalidArgumentError) as error:
        await score(reward, [whole])
    assert {violation.field for violation in error.value.violations} == {f"items[0].{field}" for field in fields}


MIXED = [
    sandbox_pb.TestCase(stdio=sandbox_pb.StdioTest()),
    sandbox_pb.TestCase(function=sandbox_pb.FunctionTest()),
    sandbox_pb.TestCase(),
]
DIALOGUE = [sandbox_pb.TestCase(interactive=sandbox_pb.InteractiveTest())]
WORTHLESS = [sandbox_pb.TestCase(stdio=sandbox_pb.StdioTest(), points=0)]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"tests": MIXED}, {"code.tests[1]", "code.tests[2]", "code.function_name"}),
        ({"tests": DIALOGUE}, {"code.interactor"}),
        ({"tests": WORTHLESS, "partial_credit": True}, {"code.partial_credit"}),
    ],
)
async def test_wrong_tests_are_refused_by_their_fields(
    reward: RewardClient, fields: dict[str, object], wrong: set[str]
) -> None:
    verifier = pb.CodeVerifier(language="python", **fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError) as error:
        await score(reward, [pb.ScoreItem(id="a", response="r", code=verifier)])
    assert {violation.field for violation in error.value.violations} == {f"items[0].{field}" for field in wrong}


async def test_a_response_of_ten_megabytes_is_refused_by_its_field(reward: RewardClient) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        await score(reward, [math_item("a", "1", "x" * (10 << 20))])
    [violation] = error.value.violations
    assert violation.field == "items[0].response"
    assert "10485760 bytes" in violation.description


async def refuse_bytes(reward: RewardClient, item: bytes) -> list[FieldViolation]:
    """What the service has against an item that no client of this version would send."""
    method = reward.channel.unary_stream("/perigee.reward.v1.RewardService/Score")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in method(b"\x0a" + bytes([len(item)]) + item):
            pass
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    refused = from_rpc_error(error.value, "the reward service")
    assert isinstance(refused, InvalidArgumentError)
    return list(refused.violations)


async def test_text_that_is_no_utf8_is_refused_by_its_field(reward: RewardClient) -> None:
    item = math_item("a", "1", "#1").SerializeToString().replace(b"#1", b"\xff\xfe")
    [violation] = await refuse_bytes(reward, item)
    assert violation.field == "request"
    assert "is not of the method's message" in violation.description


async def test_a_verifier_that_the_service_does_not_know_is_refused_by_its_field(reward: RewardClient) -> None:
    # Field 99 with a message in it, as a client of a later version may send.
    item = pb.ScoreItem(id="a", response="r").SerializeToString() + b"\x9a\x06\x03\x0a\x01x"
    [violation] = await refuse_bytes(reward, item)
    assert violation.field == "items[0].verifier"
    assert "one of math, code, patch, choice" in violation.description
