"""The reward service over real HTTP: outcomes as lines and collected, and the same refusals as over gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest
import pytest_asyncio

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_UNGRADABLE, VERDICT_WRONG
from perigee.errors import InvalidArgumentError
from perigee.json_codec import read_message
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import MathConfig
from tests.fixtures.reward import running_gateway, score

ENDLESS = "9^{9^{9^{9}}}"
VERDICTS = {VERDICT_CORRECT: "correct", VERDICT_WRONG: "wrong", VERDICT_UNGRADABLE: "ungradable"}
Gateway = tuple[RewardClient, httpx.AsyncClient]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.1}) as clients:
        yield clients


def math(name: str, response: str, reference: str = "1/2") -> dict[str, Any]:
    return {"id": name, "response": response, "answer_marker": "#", "math": {"reference": reference}}


ITEMS = [
    math("plain", "#0.5"),
    math("algebra", "#2\\sqrt{2}", "\\sqrt{8}"),
    math("wrong", "#0.4"),
    math("none", "nothing"),
    {"id": "word", "response": "the eiffel tower.", "short_answer": {"references": ["Eiffel Tower"]}},
    {"id": "letter", "response": "(B)", "choice": {"reference": "B"}},
    {"id": "pattern", "response": "12 apples", "regex": {"pattern": "[0-9]+ apples"}},
    {"id": "value", "response": '{"a": 1.0}', "json": {"expected_json": '{"a": 1}'}},
    {
        "id": "parts",
        "response": "\\boxed{0.5}",
        "composite": {
            "parts": [
                {"name": "value", "weight": 3, "verifier": {"math": {"reference": "1/2", "extraction": "prose"}}},
                {"name": "form", "weight": 1, "verifier": {"exact": {"reference": "1/2"}}},
            ]
        },
    },
]
FAILING = {
    "id": "program",
    "response": "print(1)",
    "code": {"language": "python", "tests": [{"stdio": {"expected_stdout": "1"}}]},
}


async def test_outcomes_come_as_lines_and_say_what_grpc_says(gateway: Gateway) -> None:
    client, http = gateway
    response = await http.post("/v1/score", json={"items": ITEMS})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    reported = {line["id"]: line for line in map(json.loads, response.text.splitlines())}
    items = read_message(pb.ScoreRequest, {"items": ITEMS}).items
    same = {outcome.id: outcome for outcome in await score(client, items)}
    assert reported.keys() == same.keys() == {item["id"] for item in ITEMS}
    for name, outcome in same.items():
        line = reported[name]
        assert (line["verdict"], line["reward"]) == (VERDICTS[outcome.verdict], outcome.reward), name
        assert (line["verifier"], line["extracted_answer"]) == (outcome.verifier, outcome.extracted_answer)
    assert {name: line["verdict"] for name, line in reported.items() if line["verdict"] != "correct"} == {
        "wrong": "wrong",
        "none": "ungradable",
        "parts": "wrong",
    }
    assert [(part["name"], part["reward"]) for part in reported["parts"]["parts"]] == [("value", 1.0), ("form", 0.0)]


async def test_collected_outcomes_are_in_the_order_of_the_items(gateway: Gateway) -> None:
    _, http = gateway
    # The slowest stands first.
    response = await http.post("/v1/score/collected", json={"items": [FAILING, *ITEMS]})
    assert response.status_code == 200
    outcomes = response.json()["outcomes"]
    assert [outcome["id"] for outcome in outcomes] == ["program", *(item["id"] for item in ITEMS)]
    assert (outcomes[0]["verdict"], outcomes[0]["retryable"]) == ("failed", True)
    assert "reward" not in outcomes[0]
    assert outcomes[0]["retry_after_ms"] > 0
    assert (await http.post("/v1/score/collected", json={})).json() == {"outcomes": []}


NOT_AN_IMAGE = base64.b64encode(b"no image").decode()
WRONG: list[tuple[dict[str, Any], set[str]]] = [
    ({"id": "a", "response": "1"}, {"verifier"}),
    ({"id": "a", "response": "1", "math": {}}, {"math.reference"}),
    ({"id": "a", "response": "1", "code": {}}, {"code.language", "code.tests"}),
    ({"id": "a", "response": "1", "composite": {"parts": [{"name": "x"}]}}, {"composite.parts[0].verifier"}),
    ({"id": "a", "response": "1", "judge": {}}, {"judge.reference"}),
    ({"id": "a", "response": "1", "value_head": {"threshold": 2}}, {"value_head.threshold"}),
    ({"id": "", "response": "1", "exact": {"reference": "1"}}, {"id"}),
    (math("a", "x" * (10 << 20)), {"response"}),
    (math("a", "#1") | {"images": [{"data_base64": NOT_AN_IMAGE}]}, {"images[0].data"}),
    (math("a", "#1") | {"images": [{"url": "file:///a.png"}]}, {"images[0].url"}),
]


@pytest.mark.parametrize(("item", "fields"), WRONG)
async def test_both_protocols_refuse_the_same_fields(gateway: Gateway, item: dict[str, Any], fields: set[str]) -> None:
    client, http = gateway
    expected = {f"items[0].{field}" for field in fields}
    with pytest.raises(InvalidArgumentError) as refused:
        await score(client, read_message(pb.ScoreRequest, {"items": [item]}).items)
    assert {violation.field for violation in refused.value.violations} == expected
    for path in ("/v1/score", "/v1/score/collected"):
        response = await http.post(path, json={"items": [item]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "INVALID_ARGUMENT"
        assert {violation["field"] for violation in error["field_violations"]} == expected


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/collected"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"items": [{"id": "a", "response": "1", "vibes": {}}]}', "items[0].vibes"),
        (b'{"items": [{"id": "a", "response": "1", "exact": {}, "math": {}}]}', "items[0].math"),
        (b'{"items": [{"id": "a", "response": 1}]}', "items[0].response"),
        (b'{"items": [{"id": "a", "response": "\\ud800"}]}', "items[0].response"),
        (b'{"items": [{"id": "a", "response": "\xff"}]}', "body"),
        (b'{"items": [', "body"),
        (b"[]", "body"),
    ],
)
async def test_a_body_that_is_no_request_is_refused_by_its_field(
    gateway: Gateway, path: str, body: bytes, field: str
) -> None:
    response = await gateway[1].post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert [violation["field"] for violation in response.json()["error"]["field_violations"]] == [field]


async def test_verifiers_are_listed_with_what_they_need(gateway: Gateway) -> None:
    client, http = gateway
    listed = (await http.get("/v1/verifiers")).json()["verifiers"]
    over_grpc = (await client.list_verifiers(pb.ListVerifiersRequest())).verifiers
    assert [(each["name"], each["version"]) for each in listed] == [(each.name, each.version) for each in over_grpc]
    verifiers = {field.name for field in pb.ScoreItem.DESCRIPTOR.oneofs_by_name["verifier"].fields}
    assert {each["name"] for each in listed} == verifiers
    needs = {each["name"]: each["unavailable"] for each in listed}
    assert "reward.judge.judges" in needs["judge"]
    assert "reward.value_head.path" in needs["value_head"]
    assert needs["math"] == ""


async def test_what_is_not_configured_fails_without_a_reward(gateway: Gateway) -> None:
    items = [
        {"id": "judge", "response": "1", "judge": {"reference": "1"}},
        {"id": "value_head", "response": "1", "value_head": {"reference": "1"}},
    ]
    for outcome in (await gateway[1].post("/v1/score/collected", json={"items": items})).json()["outcomes"]:
        assert (outcome["verdict"], outcome["retryable"], "reward" in outcome) == ("failed", False, False)
        assert "configured" in outcome["reason"]


async def test_a_deadline_ends_the_call_and_frees_the_worker() -> None:
    async with running_gateway(math=MathConfig(workers=1, check_timeout_s=600)) as (_, http):
        items = [math("quick", "#0.5"), math("endless", f"#{ENDLESS}", "7")]
        late = await http.post("/v1/score/collected", json={"items": items}, headers={"X-Timeout-Seconds": "1"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
        streamed = await http.post("/v1/score", json={"items": items}, headers={"X-Timeout-Seconds": "1"})
        first, last = map(json.loads, streamed.text.splitlines())
        assert (first["id"], last["error"]["code"]) == ("quick", "DEADLINE_EXCEEDED")
        after = await http.post("/v1/score/collected", json={"items": [ITEMS[1]]})
        assert after.json()["outcomes"][0]["verdict"] == "correct"


async def test_a_call_that_exceeds_the_queue_is_refused_with_a_hint() -> None:
    async with running_gateway(max_queued_items=2) as (_, http):
        items = [math(str(number), "#0.5") for number in range(3)]
        full = await http.post("/v1/score", json={"items": items})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert int(full.headers["retry-after"]) >= 1
        answers = await asyncio.gather(*(http.post("/v1/score", json={"items": [each]}) for each in items[:2]))
        assert [answer.status_code for answer in answers] == [200, 200]


async def test_the_service_is_ready_and_documented(gateway: Gateway) -> None:
    _, http = gateway
    assert (await http.get("/readyz")).json() == {"ready": {"perigee.reward.v1.RewardService": True}}
    document = (await http.get("/openapi.json")).json()
    assert {"/v1/score", "/v1/score/collected", "/v1/verifiers", "/v1/compat/openrlhf"} <= document["paths"].keys()
    assert {"ScoreRequest", "ScoreResponse"} <= document["components"]["schemas"].keys()
    bodies = {
        "/v1/score": {"items": [ITEMS[0]]},
        "/v1/score/collected": {"items": ITEMS},
        "/v1/compat/openrlhf": {"query": ["2+2=4"], "prompts": ["2+2="], "labels": ["4"]},
    }
    for path, body in bodies.items():
        call = document["paths"][path]["post"]
        [asked] = call["requestBody"]["content"].values()
        [reported] = call["responses"]["200"]["content"].values()
        jsonschema.validate(body, document | asked["schema"])
        jsonschema.validate((await http.post(path, json=body)).json(), document | reported["schema"])
    metrics = (await http.get("/metrics")).text
    for name in ("outcomes_total", "cache_hits_total", "queued_items", "agreements_total", "judgement_seconds"):
        assert f"# TYPE perigee_reward_{name.removesuffix('_total')}" in metrics


async def test_a_token_is_asked_for() -> None:
    async with running_gateway(server={"token": "secret"}) as (_, http):
        assert (await http.post("/v1/score/collected", json={})).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert (await http.post("/v1/score/collected", json={}, headers=headers)).status_code == 200
        assert (await http.post("/v1/compat/openrlhf", json={})).json()["error"].startswith("The call carries no")
