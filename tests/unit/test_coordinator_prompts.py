"""Prompt files: what is read, and the sentence that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_prompt_line
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2
from services.coordinator.prompts import Prompt, read_prompts
from services.coordinator.run_config import PromptSource
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder
from tests.fixtures.coordinator import code_line, math_line, write_lines, write_model_folder


def line(name: str, verifier: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "1+1=", "verifier": verifier} | fields


def part(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "judged_by": spec}


def read(folder: Path, path: Path, max_response_tokens: int, field: str = "run.prompts") -> dict[str, Prompt]:
    """Reads a prompt file with the model of `folder`, which is made where there is none."""
    if not (folder / "model").exists():
        write_model_folder(folder / "model")
    model = open_model_folder(folder / "model", "run.model")
    return read_prompts([PromptSource(path=str(path))], field, open_encoder(model), max_response_tokens)


def test_prompts_are_tokenized_and_found_by_id(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [math_line("m1", "1+2=", "3"), code_line("c1")])
    prompts = read(tmp_path, path, 16)
    assert [prompt.id for prompt in prompts.values()] == ["m1", "c1"]
    assert (
        open_model_folder(tmp_path / "model", "run.model").open_tokenizer().decode(list(prompts["m1"].token_ids))
        == "1+2="
    )
    assert prompts["c1"].line.item.WhichOneof("verifier") == "code"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: is not JSON"),
        ("[1]", ":2: must be a JSON object"),
        ({"id": "x", "prompt": "1+1="}, ":2: verifier: is required: one of math, code, choice, "),
        ({"id": "x", "prompt": "1+1=", "verifier": "vibes"}, "value_head, composite, patch, got 'vibes'"),
        ({"id": "x", "prompt": "1+1=", "verifier": "math"}, ":2: answer: is required"),
        (math_line("x", "1+1=", "2") | {"anwser": "2"}, ":2: anwser: unknown key; did you mean answer?"),
        (math_line("x", "1+1=", "2") | {"difficulty": "hard"}, ":2: difficulty: "),
        (code_line("x") | {"function": ""}, ":2: function: is required by tests with arguments"),
        (code_line("x") | {"tests": []}, ":2: tests: "),
        (line("x", "json"), ":2: json_schema: is required"),
        (line("x", "judge"), ":2: answer: is required"),
        (line("x", "value_head", threshold=2), ":2: threshold: "),
        (line("x", "composite", parts=[]), ":2: parts: "),
        (line("x", "composite", parts=[part("a", {"verifier": "vibes"})]), ":2: parts[0].verifier.vibes: unknown key"),
        (
            line("x", "composite", parts=[part("a", {"verifier": "judge"})]),
            ":2: parts[0].verifier.judge.answer: is required",
        ),
        (math_line("m1", "1+1=", "2"), ":2: id: 'm1' is that of "),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: dict[str, Any] | str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(math_line("m1", "1+2=", "3")) + "\n" + text + "\n")
    with pytest.raises(InvalidArgumentError) as caught:
        read(tmp_path, path, 16)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.violations


def test_a_prompt_longer_than_the_context_is_named(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", context=64)
    path = write_lines(tmp_path / "prompts.jsonl", [math_line("short", "1+2=", "3"), math_line("long", "1" * 49, "1")])
    assert read(tmp_path, path, 15)["long"]
    with pytest.raises(InvalidArgumentError, match=r"prompt long: has 49 tokens, .* context of 64"):
        read(tmp_path, path, 16)


def test_prompts_begin_with_the_bos_of_the_tokenizer_exactly_once(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    rendered = math_line("rendered", "<bos>1+2=", "3")
    path = write_lines(tmp_path / "prompts.jsonl", [math_line("plain", "1+2=", "3"), rendered])
    plain, with_template = read(tmp_path, path, 16).values()
    assert plain.token_ids == with_template.token_ids
    assert plain.token_ids.count(bos) == 1
    assert plain.token_ids[0] == bos


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"run\.heldout: .* cannot be read"):
        read(tmp_path, tmp_path / "none.jsonl", 16, "run.heldout")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidArgumentError, match="holds no prompts"):
        read(tmp_path, tmp_path / "empty.jsonl", 16, "run.heldout")


def test_prompts_carry_the_ground_truth(tmp_path: Path) -> None:
    stdio = code_line("c2") | {"tests": [{"stdin": "1\n", "expected_stdout": "2\n"}], "limits": {"wall_ms": 500}}
    path = write_lines(tmp_path / "p.jsonl", [math_line("m1", "1+2=", "3"), code_line("c1"), stdio])
    prompts = read(tmp_path, path, 16)
    math = prompts["m1"].line.item
    assert (math.id, math.response, math.answer_marker, math.math.reference) == ("", "", "#", "3")
    code = prompts["c1"].line.item.code
    assert (code.language, code.function_name) == ("python", "f")
    assert (code.tests[0].function.arguments_json, code.tests[0].function.expected_json) == ("[1]", "2")
    assert not code.limits.HasField("wall_ms")
    judged = prompts["c2"].line.item.code
    assert (judged.tests[0].stdio.stdin, judged.limits.wall_ms) == (b"1\n", 500)


@pytest.mark.parametrize(
    ("verifier", "fields", "expected"),
    [
        ("math", {"answer": "1", "alternatives": ["2"]}, pb.MathVerifier(reference="1", alternatives=["2"])),
        ("choice", {"answer": "B", "options": ["x", "y"]}, pb.ChoiceVerifier(reference="B", options=["x", "y"])),
        ("short_answer", {"answers": ["a", "b"]}, pb.ShortAnswerVerifier(references=["a", "b"])),
        ("exact", {"answer": "a"}, pb.ExactVerifier(reference="a")),
        ("regex", {"pattern": "a+", "search_response": True}, pb.RegexVerifier(pattern="a+", search_response=True)),
        ("json", {"json_schema": {"type": "null"}}, pb.JsonVerifier(schema_json='{"type": "null"}')),
        ("json", {"expected": None}, pb.JsonVerifier(expected_json="null")),
        ("judge", {"answer": "a", "votes": 3}, pb.JudgeVerifier(reference="a", votes=3)),
        ("judge", {"rubric": "be kind", "judge": "large"}, pb.JudgeVerifier(rubric="be kind", judge="large")),
        ("value_head", {"answer": "a", "threshold": 0.0}, pb.ValueHeadVerifier(reference="a", threshold=0.0)),
        (
            "code",
            {"function": "f", "tests": [{"code": "assert f(1)"}], "setup_code": "x = 1"},
            pb.CodeVerifier(
                language="python",
                function_name="f",
                setup_code="x = 1",
                tests=[sandbox_pb2.TestCase(code=sandbox_pb2.CodeTest(code="assert f(1)"))],
            ),
        ),
        (
            "composite",
            {
                "parts": [
                    {"name": "a", "weight": 3, "judged_by": {"verifier": "math", "answer": "1"}},
                    {"name": "b", "gate": True, "judged_by": {"verifier": "regex", "pattern": "x"}},
                ]
            },
            pb.CompositeVerifier(
                parts=[
                    pb.CompositePart(name="a", weight=3, verifier=pb.VerifierSpec(math=pb.MathVerifier(reference="1"))),
                    pb.CompositePart(
                        name="b", weight=1, gate=True, verifier=pb.VerifierSpec(regex=pb.RegexVerifier(pattern="x"))
                    ),
                ]
            ),
        ),
    ],
)
def test_every_verifier_gets_its_ground_truth(verifier: str, fields: dict[str, Any], expected: Any) -> None:
    item = read_prompt_line(line("x", verifier, **fields), "p:1").item
    assert item.WhichOneof("verifier") == verifier
    assert getattr(item, verifier) == expected
