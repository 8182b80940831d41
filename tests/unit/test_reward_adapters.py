"""What adapters make of ground truths, prompts and outcomes, without a service."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, InternalError, InvalidArgumentError, UnavailableError
from perigee.reward.adapters import verl
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions, make_item
from perigee.reward.adapters.trl import PerigeeReward, read_text
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.http_routes import ROUTES, OpenRlhfCall, build_answer, collect, read_request, split_response

MATH4 = pb.ScoreItem(id="i", prompt="2+2", response="#4", answer_marker="#", math=pb.MathVerifier(reference="4"))


def item(ground_truth: Any, verifier: str = "math") -> pb.ScoreItem:
    return make_item("i", "2+2", "#4", ground_truth, GroundTruthOptions(verifier, "#"))


@pytest.mark.parametrize(
    "ground_truth",
    [
        "4", 4, {"math": {"reference": "4"}}, {"verifier": "math", "answer": "4"},
        json.dumps({"math": {"reference": "4"}}), json.dumps({"verifier": "math", "reference": "4"}), ["4"],
        np.array(["4"]),
    ],
)  # fmt: skip
def test_forms_of_one_ground_truth(ground_truth: Any) -> None:
    assert item(ground_truth) == MATH4


def test_several_values_are_as_good() -> None:
    assert item(["4", "IV"]).math == pb.MathVerifier(reference="4", alternatives=["IV"])
    assert item(["Rome", "Roma"], "short_answer").short_answer.references == ["Rome", "Roma"]


def test_a_ground_truth_may_name_its_own_marker() -> None:
    assert item({"verifier": "exact", "reference": "x", "answer_marker": "Answer:"}).answer_marker == "Answer:"


def test_braces_alone_are_text() -> None:
    assert item("{1, 2}", "exact").exact.reference == "{1, 2}"
    assert item('{"a": 1}', "exact").exact.reference == '{"a": 1}'


@pytest.mark.parametrize(
    ("ground_truth", "verifier", "message"),
    [
        (None, "math", "ground_truth: is neither"),
        ([], "math", "ground_truth: is neither"),
        ("f", "code", r"the fields of the code verifier \(language"),
        (["a", "b"], "exact", "the fields of the exact verifier"),
        ("4", "maths", "verifier: must be one of math"),
        ({"math": {"refrence": "4"}}, "math", "did you mean reference"),
    ],
)
def test_a_ground_truth_that_is_none_is_refused(ground_truth: Any, verifier: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        item(ground_truth, verifier)


def test_texts_of_conversations() -> None:
    assert read_text("2+2") == "2+2"
    assert (
        read_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}]) == "Be brief.\n2+2"
    )
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert read_text([{"role": "user", "content": parts}]) == "What is it?"


def outcome(name: str, verdict: int, reward: float | None = None, **fields: Any) -> pb.ScoreResponse:
    return pb.ScoreResponse(id=name, verdict=buffer_pb2.Verdict.ValueType(verdict), reward=reward, **fields)


CORRECT = outcome("0", buffer_pb2.VERDICT_CORRECT, 1.0, extracted_answer="4")
UNGRADABLE = outcome("1", buffer_pb2.VERDICT_UNGRADABLE, 0.0)
PASSING = outcome("1", buffer_pb2.VERDICT_FAILED, retryable=True, reason="the sandbox is away")
LASTING = outcome("1", buffer_pb2.VERDICT_FAILED, reason="refused")


def test_verl_gets_the_same_keys_and_no_number_for_a_failure() -> None:
    assert verl.read_score(CORRECT) == {"score": 1.0, "acc": 1.0, "pred": "4"}
    assert verl.read_score(UNGRADABLE) == {"score": 0.0, "acc": 0.0, "pred": ""}
    with pytest.raises(UnavailableError, match="the sandbox is away"):
        verl.read_score(PASSING)
    with pytest.raises(FailedPreconditionError, match="refused"):
        verl.read_score(LASTING)


def test_a_data_source_without_a_verifier_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="names none for the data source 'apps'"):
        verl.compute_score("apps", "x", "4", verifier={"gsm8k": "math"})


def test_adapters_travel_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_REWARD_ADDRESS", "reward:1")
    assert BlockingScorer().address == "reward:1"
    assert BlockingScorer("other:2").address == "other:2"
    reward = pickle.loads(pickle.dumps(PerigeeReward("other:2", column="truth")))
    assert reward._scorer.address == "other:2"


def openrlhf(*queries: str, prompt: str = "2+2=", label: Any = "4", **options: Any) -> pb.ScoreRequest:
    call = OpenRlhfCall(query=list(queries), prompts=[prompt] * len(queries), labels=[label] * len(queries))
    return read_request(call, GroundTruthOptions(**options), ["<eos>"])


def test_openrlhf_queries_become_items() -> None:
    request = openrlhf("<s>2+2=#4<eos>\n<eos>", "2+2=3", answer_marker="#")
    assert list(request.items) == [
        pb.ScoreItem(id="0", prompt="2+2=", response="#4", answer_marker="#", math=pb.MathVerifier(reference="4")),
        pb.ScoreItem(id="1", prompt="2+2=", response="3", answer_marker="#", math=pb.MathVerifier(reference="4")),
    ]
    assert openrlhf("2+2=x", label={"exact": {"reference": "x"}}).items[0].exact.reference == "x"
    assert list(openrlhf().items) == []
    assert split_response("the answer", "", ()) == "the answer"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"query": ["a"], "prompts": ["a"], "labels": []},
            "query: query, prompts and labels differ in length: 1, 1, 0",
        ),
        ({"query": ["b"], "prompts": ["a"], "labels": ["4"]}, r"\[0\].query: does not begin with its prompt"),
        ({"query": ["a"], "prompts": ["a"], "labels": [None]}, r"\[0\].ground_truth: is neither"),
    ],
)
def test_openrlhf_calls_that_are_wrong_name_the_field(body: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_request(OpenRlhfCall(**body), GroundTruthOptions())


def test_openrlhf_gets_rewards_in_order_and_no_number_for_a_failure() -> None:
    answer = build_answer([CORRECT, UNGRADABLE])
    assert (answer.status_code, json.loads(bytes(answer.body))) == (
        200,
        {"rewards": [1.0, 0.0], "scores": [1.0, 0.0],
         "extra_logs": {"correct": [1.0, 0.0], "ungradable": [0.0, 1.0]}},
    )  # fmt: skip
    failed = build_answer([CORRECT, PASSING])
    assert (failed.status_code, failed.headers["retry-after"]) == (503, "1")
    assert json.loads(bytes(failed.body)) == {"error": "1 of 2 responses could not be judged: the sandbox is away"}
    assert build_answer([CORRECT, LASTING]).status_code == 422
    assert json.loads(bytes(build_answer([]).body))["rewards"] == []


def test_outcomes_are_collected_in_the_order_of_the_items() -> None:
    request = openrlhf("2+2=4", "2+2=")
    assert collect(request, [PASSING, CORRECT]) == [CORRECT, PASSING]
    with pytest.raises(InternalError, match="1 items have no outcome, 1 for one"):
        collect(request, [CORRECT])


def test_routes_are_those_of_the_contract() -> None:
    methods = pb.DESCRIPTOR.services_by_name["RewardService"].methods_by_name
    assert {route.rpc for route in ROUTES} == set(methods)
    for route in ROUTES:
        method = methods[route.rpc]
        assert route.request.DESCRIPTOR is method.input_type
        assert route.response.DESCRIPTOR is method.output_type
        assert route.streaming is method.server_streaming
