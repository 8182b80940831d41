"""What docs/reward.md shows is run as it stands there."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from perigee.reward.client import RewardClient
from perigee.reward.items import VERIFIERS, read_item, read_prompt_line
from services.reward.cache import content_key
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "reward.md").read_text()


def blocks(language: str, heading: str) -> list[str]:
    """The code blocks below a heading."""
    section = re.split(r"^#+ ", DOCUMENT, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(heading + "\n")]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def verifier_module() -> ModuleType:
    """The module of the last section."""
    [source] = blocks("python", "A verifier in one file")
    module = ModuleType("services.reward.verifiers.tolerance")
    # Data classes look their module up.
    sys.modules[module.__name__] = module
    exec(compile(source, "docs/reward.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("response", "verdict", "reward"),
    [
        ("it is #3.15", Verdict.CORRECT, 1.0),
        ("it is #3.2", Verdict.WRONG, 0.0),
        ("it is #pi", Verdict.UNGRADABLE, 0.0),
        ("it is 3.14", Verdict.UNGRADABLE, 0.0),
    ],
)
async def test_the_verifier_judges(verifier_module: ModuleType, response: str, verdict: Verdict, reward: float) -> None:
    verifier = verifier_module.ToleranceVerifier()
    assert isinstance(verifier, Verifier)
    parameters = verifier_module.ToleranceParameters(reference=3.14, tolerance=0.02)
    assert verifier.find_violations(parameters) == []
    outcome = await verifier.judge(Item("a", response, "#", parameters))
    assert isinstance(outcome, Outcome)
    assert (outcome.verdict, outcome.reward) == (verdict, reward)


def test_the_verifier_names_wrong_fields_and_its_parameters_are_part_of_the_key(verifier_module: ModuleType) -> None:
    verifier, parameters = verifier_module.ToleranceVerifier(), verifier_module.ToleranceParameters
    [violation] = verifier.find_violations(parameters(3.14, -1.0))
    assert violation.field == "tolerance.tolerance"
    keys = {
        content_key(verifier, Item("a", response, "#", parameters(3.14, tolerance)))
        for response in ("x#3.1", "y#3.1", "x#3.2")
        for tolerance in (0.1, 0.2)
    }
    # Two answers and two tolerances; what stands before the marker does not matter.
    assert len(keys) == 4


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
    assert [item.id for item in items] == list("abcdefghijklm")
