"""What docs/reward.md shows is run as it stands there."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.message import Message
from grpc_tools import protoc

from perigee.json_codec import fill_message
from perigee.reward.client import RewardClient
from perigee.reward.items import VERIFIERS, read_item, read_prompt_line, spell_out
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.scorer import content_key
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "reward.md").read_text()


def blocks(language: str, heading: str) -> list[str]:
    """The code blocks below a heading."""
    section = re.split(r"^#+ ", DOCUMENT, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(heading + "\n")]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def message(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Message]]:
    """The message of the last section, compiled and put into the contract's module."""
    folder = tmp_path_factory.mktemp("protos")
    [source] = blocks("proto", "A verifier in one file")
    (folder / "tolerance.proto").write_text(f'syntax = "proto3";\npackage perigee.reward.documented;\n{source}')
    assert protoc.main(["", f"-I{folder}", f"--descriptor_set_out={folder / 'set'}", "tolerance.proto"]) == 0
    [file] = descriptor_pb2.FileDescriptorSet.FromString((folder / "set").read_bytes()).file
    [found] = message_factory.GetMessages([file]).values()
    pb.ToleranceVerifier = found  # type: ignore[attr-defined]
    yield found
    del pb.ToleranceVerifier  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def verifier(message: type[Message]) -> Verifier[Any]:
    """The verifier of the last section."""
    [source] = blocks("python", "A verifier in one file")
    module = ModuleType("services.reward.verifiers.tolerance")
    exec(compile(source, "docs/reward.md", "exec"), module.__dict__)
    made = module.ToleranceVerifier()
    assert isinstance(made, Verifier)
    return made


@pytest.mark.parametrize(
    ("response", "verdict", "reward"),
    [
        ("it is #3.15", Verdict.CORRECT, 1.0),
        ("it is #3.2", Verdict.WRONG, 0.0),
        ("it is #pi", Verdict.UNGRADABLE, 0.0),
        ("it is 3.14", Verdict.UNGRADABLE, 0.0),
    ],
)
async def test_the_verifier_judges(
    verifier: Verifier[Any], message: type[Message], response: str, verdict: Verdict, reward: float
) -> None:
    parameters = message(reference=3.14, tolerance=0.02)
    assert verifier.find_violations(parameters) == []
    outcome = await verifier.judge(Item("a", response, "#", parameters))
    assert isinstance(outcome, Outcome)
    assert (outcome.verdict, outcome.reward) == (verdict, reward)


def test_the_verifier_names_wrong_fields_and_its_parameters_are_part_of_the_key(
    verifier: Verifier[Any], message: type[Message]
) -> None:
    [violation] = verifier.find_violations(message(reference=3.14, tolerance=-1.0))
    assert violation.field == "tolerance.tolerance"
    keys = {
        content_key(verifier, Item("a", response, "#", message(reference=3.14, tolerance=tolerance)))
        for response in ("x#3.1", "y#3.1", "x#3.2")
        for tolerance in (0.1, 0.2)
    }
    # Two answers and two tolerances; what stands before the marker does not matter.
    assert len(keys) == 4


def test_short_names_need_no_line_for_a_new_verifier(message: type[Message]) -> None:
    spelled = spell_out(message.DESCRIPTOR, {"answer": 3.14, "tolerance": 0.02})
    found = message()
    assert fill_message(found, spelled) == []
    assert found == message(reference=3.14, tolerance=0.02)


async def test_the_client_prints_what_is_said(reward: RewardClient) -> None:
    [source] = blocks("python", "The reward service")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source.replace("127.0.0.1:50055", reward.target),
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    assert f"prints `{stdout.decode().strip()}`" in DOCUMENT


def test_every_documented_line_is_a_prompt_and_with_a_response_an_item() -> None:
    [text] = blocks("json", "Items as JSON")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {read_prompt_line(line, "line").item.WhichOneof("verifier") for line in lines} == set(VERIFIERS)
    items = [read_item(line | {"response": "#4"}, "line") for line in lines]
    assert items[0].math == items[1].math
    assert [item.id for item in items] == list("abcdefghijklmn")
