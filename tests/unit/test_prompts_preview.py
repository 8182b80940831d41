"""`perigee prompts preview`: prompts token by token, and the verdict on a stated answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from perigee.cli.main import app
from tests.fixtures.chat import write_chat_model

LINES = [
    {"prompt": "1+1=?", "answer": 2, "messages": None},
    {"messages": [{"role": "user", "content": "b?"}], "answer": "B", "verifier": "choice", "answer_marker": "#"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_chat_model(tmp_path / "model")
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def preview(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prompts", "preview", *map(str, arguments)], env={"COLUMNS": "400"})
    return result.exit_code, result.output


def test_a_file_is_shown_token_by_token_and_its_references_are_judged(data: Path) -> None:
    code, text = preview(data, "--model", data.parent / "model")
    assert code == 0, text
    assert "2 prompts, " in text
    assert "a response ends with '<eos>':1 '<end>':4" in text
    assert "p-000001 (default), 6 tokens, without the chat template" in text
    assert "'<bos>':2 '1':6 '+':67" in text
    assert "'<turn>':3 'u':35 's':33" in text
    assert "judged by math: '\\\\boxed{2}' is correct" in text
    assert "judged by choice: '#B' is correct" in text
    assert "chat: always applies it" in text


def test_a_recipe_is_shown_and_a_response_is_judged(data: Path) -> None:
    """The recipe's script makes the prompts, as it does for a run."""
    script = f"import shutil, sys; shutil.copytree({str(data.parent)!r}, sys.argv[2], dirs_exist_ok=True)"
    (data.parent / "prepare.py").write_text(script)
    run = {"prompts": "{data}/p.jsonl", "heldout": "{recipe}/p.jsonl", "iterations": 1}
    run |= {"chat": "always", "rollout": {"max_response_tokens": 8}}
    recipe = {"name": "r", "prepare": "prepare.py", "model": "{data}/model", "run": run}
    path = data.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code, text = preview(path, "--response", "It is 3.", "--count", 1)
    assert code == 0, text
    assert "with the chat template" in text
    assert "judged by math: 'It is 3.' is wrong" in text or "is ungradable" in text


def test_what_cannot_be_shown_is_named(data: Path) -> None:
    path = data.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "run": {"prompts": "{recipe}/q", "heldout": "h", "iterations": 1}}))
    assert f"run.prompts: {data.parent}/q cannot be read" in preview(path, "--model", data.parent / "model")[1]
    assert "--model: is required" in preview(data)[1]
    assert "instruction: stands in the recipe: --set changes it there" in preview(path, "--instruction", "x")[1]
    assert f"--set: changes keys of a recipe, and {data} is none" in preview(data, "--set", "run.chat=always")[1]
    path.write_text("name: r")
    assert "run: is required to show prompts" in preview(path)[1]
