"""Suites: those of the package on records in the form of their data, a user's own, and what is wrong with one."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from perigee.chat import read_question
from perigee.cli.eval.suites import (
    DATA_VARIABLE,
    SUITES_PATH,
    Problem,
    load_suite,
    read_private_cases,
    read_suite,
    suite_names,
)
from perigee.cli.recipe import load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.reward.sources import Columns, read_source
from tests.fixtures.data import find_data

OPTIONS = [f"option {number}" for number in range(10)]
LIVE = {"question_content": "Add.", "starter_code": "", "difficulty": "easy", "metadata": "{}"}
RECORDS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How many?", "answer": "2 + 2 = 4\n#### 1,004"},
    "math_500": {"problem": "What is $x$?", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 3},
    "aime_2024": {"problem": "Find n.", "answer": 204, "id": 60},
    "aime_2025": {"problem": "Find n.", "answer": "70"},
    "mbpp": {
        "task_id": 11,
        "text": "Write a function.",
        "code": "def f(x):\n  return x",
        "test_list": ["assert set(f(1)) == {1}"],
        "test_setup_code": "",
    },
    "livecodebench": LIVE
    | {
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "2 2\n", "output": "4\n", "testtype": "stdin"}])))
        ).decode(),
    },
    "mmlu_pro": {"question": "Which?", "options": OPTIONS, "answer": "J", "category": "law"},
    "gpqa": {
        "Question": "Which?",
        "Correct Answer": "right",
        **{f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)},
        "High-level domain": "Physics",
    },
}


def write_data(folder: Path, suite: str, *records: dict[str, Any]) -> Path:
    """The data file of a suite."""
    path = folder / read_suite(SUITES_PATH / f"{suite}.yaml").data[0]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        return path
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def ask(problem: Problem) -> str:
    """What the user says last."""
    assert not isinstance(problem.asked, str)
    return read_question(problem.asked)


@pytest.mark.parametrize("name", RECORDS)
def test_records_become_problems(tmp_path: Path, name: str) -> None:
    write_data(tmp_path, name, RECORDS[name])
    [problem] = load_suite(name, tmp_path).problems
    asked = ask(problem)
    assert "{" not in asked.replace(r"\boxed{}", "").replace("{1}", "")


def test_every_suite_states_source_and_licence() -> None:
    assert len(suite_names()) == 13
    for name in suite_names():
        suite = read_suite(SUITES_PATH / f"{name}.yaml")
        assert suite.source
        assert suite.licence


def test_ground_truths(tmp_path: Path) -> None:
    loaded = {}
    for name, record in RECORDS.items():
        write_data(tmp_path, name, record)
        [loaded[name]] = load_suite(name, tmp_path).problems
    assert loaded["gsm8k"].line.item.math.reference == "1,004"
    assert (loaded["math_500"].line.domain, loaded["math_500"].line.difficulty) == ("Algebra", 3.0)
    assert (loaded["aime_2024"].line.id, loaded["aime_2024"].line.item.math.reference) == ("60", "204")
    assert loaded["mbpp"].line.item.code.function_name == "f"
    tests = loaded["livecodebench"].line.item.code.tests
    assert [(test.stdio.stdin, test.stdio.expected_stdout) for test in tests] == [
        (b"1 2\n", b"3\n"),
        (b"2 2\n", b"4\n"),
    ]
    assert "J. option 9" in ask(loaded["mmlu_pro"])
    gpqa = loaded["gpqa"]
    assert f"{gpqa.line.item.choice.reference}. right" in ask(gpqa)


def test_functions_of_contest_problems(tmp_path: Path) -> None:
    case = {"input": '[1, 2]\n"a"', "output": "3", "testtype": "functional"}
    cases = {"public_test_cases": json.dumps([case]), "private_test_cases": "[]"}
    write_data(tmp_path, "livecodebench", LIVE | cases | {"metadata": '{"func_name": "f"}', "starter_code": "def f():"})
    [problem] = load_suite("livecodebench", tmp_path).problems
    [test] = problem.line.item.code.tests
    assert json.loads(test.function.arguments_json) == [[1, 2], "a"]
    assert "def f():" in ask(problem)


def test_a_class_in_hidden_tests_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="no plain value"):
        read_private_cases(base64.b64encode(zlib.compress(pickle.dumps(Path("x")))).decode())


def test_public_data() -> None:
    folder = find_data("gsm8k_test.jsonl").parent
    assert len(load_suite("gsm8k", folder).problems) == 1319
    assert len(load_suite("humaneval", folder, 5).problems) == 5


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=r"get openai/gsm8k .* put it at .*gsm8k_test\.jsonl"):
        load_suite("gsm8k", tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"is no suite: .* gsm8k"):
        load_suite("gsm9k", tmp_path)
    write_data(tmp_path, "gsm8k", {"question": "How many?"})
    with pytest.raises(InvalidArgumentError, match=r"gsm8k_test\.jsonl:1: has no column 'answer'"):
        load_suite("gsm8k", tmp_path)


def test_a_run_measures_by_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    write_data(tmp_path, "gsm8k", {"question": "How many?", "answer": "Two.\n#### 2"})
    (tmp_path / "brief.yaml").write_text(
        "{source: me, licence: MIT, data: [gsm8k_test.jsonl], system_prompt: Be brief., prompt: 'Q: {question}', "
        "answer_after: {answer: '####'}, line: {verifier: exact, answer: '{answer}'}}"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"run: {{prompts: p.jsonl, iterations: 1, heldout: [suite:gsm8k, {{path: 'suite:{tmp_path}/brief.yaml'}}]}}"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml").expand(RunFolder(tmp_path / "run"))
    first, second = recipe.values["run"]["heldout"]
    [gsm8k], [brief] = (read_source(Path(path), Columns(), "f") for path in (first, second["path"]))
    [problem] = load_suite("gsm8k", tmp_path).problems
    assert (gsm8k.id, gsm8k.item, gsm8k.asked) == (f"gsm8k-{problem.line.id}", problem.line.item, gsm8k.item.prompt)
    assert [message["content"] for message in brief.asked] == ["Be brief.", "Q: How many?"]
    assert brief.item.exact.reference == "2"


def test_suites_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"id": "a", "prompt": "1+1=", "verifier": "math", "answer": "2"}\n')
    assert load_suite(str(tmp_path / "sums.jsonl"), tmp_path).problems[0].asked == "1+1="
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "{source: me, licence: MIT, data: [rows.jsonl], system_prompt: Be brief., prompt: 'Q: {q}', "
        "line: {verifier: exact, answer: '{a}'}}"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "eins"}\n')
    [problem] = load_suite(str(suite), tmp_path / "elsewhere").problems
    assert problem.asked[0] == {"role": "system", "content": "Be brief."}
    assert ask(problem) == "Q: one"
    suite.write_text("{source: me, licence: MIT, data: [x], promt: y, line: {}}")
    with pytest.raises(InvalidArgumentError, match=r"promt: unknown key; did you mean prompt|prompt: is required"):
        load_suite(str(suite), tmp_path)
