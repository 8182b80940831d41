"""The schemas of messages hold for what the codec writes and takes, and name what the protos say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from perigee.json_codec import dump_json, write_message
from perigee.reward.v1 import reward_pb2
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer
from services.kit.http import HttpRoute
from services.sandbox.service import ROUTES
from tests.fixtures.messages import messages_of
from tools.openapi import describe_routes, descriptor_of, documents, dump

SCORE = HttpRoute("POST", "/v1/score", "Score", reward_pb2.ScoreRequest, reward_pb2.ScoreResponse, streaming=True)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    paths, schemas = describe_routes(ROUTES, SandboxServiceServicer)
    return {"paths": paths, "components": {"schemas": schemas}}


def find_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from find_references(part)


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})


def test_every_reference_leads_to_a_schema(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = set(find_references(document))
    assert references
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= schemas.keys()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "message_class", [pb.JudgeRequest, pb.ExecuteResponse, pb.ExecuteBatchResponse, pb.ListRuntimesResponse]
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_is_valid(data: st.DataObject, document: dict[str, Any], message_class: type[Message]) -> None:
    message = data.draw(messages_of(descriptor_of(message_class)))
    validator(document, message_class.DESCRIPTOR.name).validate(json.loads(dump_json(write_message(message))))


def test_what_is_wrong_is_invalid(document: dict[str, Any]) -> None:
    checker = validator(document, "JudgeRequest")
    for wrong in (
        {"langage": "python"},
        {"tests": {}},
        {"limits": {"wall_ms": -1}},
        {"checker": {"comparison": "exct"}},
        {"env": {"A": 1}},
    ):
        assert not checker.is_valid(wrong)
    assert not validator(document, "ExecuteResponse").is_valid({"status": "ok"})


def test_comments_of_the_protos_are_descriptions(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["File"]["description"] == "A file of the working folder."
    assert schemas["OutputFile"]["properties"]["truncated"]["description"] == (
        "The file is larger than what is returned of it."
    )
    assert schemas["ExecuteRequest"]["properties"]["source"]["description"] == (
        "In any encoding that its interpreter or compiler takes. Bytes, as UTF-8."
    )
    assert (
        "skipped: Not run, because an earlier test or a group that is needed failed."
        in schemas["TestVerdict"]["description"]
    )
    assert "At most one of stdio, function, code, interactive is set." in schemas["TestCase"]["description"]
    execute = document["paths"]["/v1/execute"]["post"]
    assert execute["summary"] == "Compiles a program if its language needs it, and runs it once."


def test_a_field_that_the_path_fills_is_not_of_the_body(document: dict[str, Any]) -> None:
    cells = document["paths"]["/v1/sessions/{session_id}/cells"]["post"]
    assert [parameter["name"] for parameter in cells["parameters"]] == ["session_id", "X-Timeout-Seconds"]
    assert cells["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RunCellBody")
    assert "session_id" not in document["components"]["schemas"]["RunCellBody"]["properties"]
    assert "requestBody" not in document["paths"]["/v1/runtimes"]["get"]


def test_a_stream_is_documented_as_lines_that_may_be_errors(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/judge/batch"]["post"]["responses"]["200"]["content"]
    references = list(find_references(content["application/x-ndjson"]))
    assert references == ["#/components/schemas/JudgeBatchResponse", "#/components/schemas/Error"]


def test_messages_of_several_packages_share_a_document() -> None:
    _, schemas = describe_routes([SCORE], RewardServiceServicer)
    assert schemas["Verdict"]["enum"][:2] == ["unspecified", "correct"]
    assert schemas["CodeVerifier"]["properties"]["tests"]["items"] == {"$ref": "#/components/schemas/TestCase"}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.parent.name)
def test_a_committed_document_is_current(path: Path) -> None:
    assert path.read_text() == dump(documents()[path]), "make protos writes it"
