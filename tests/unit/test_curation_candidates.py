"""Prompts to curate from JSON Lines, saved datasets, parquet and folders of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perigee.cli.prompts.candidates import read_candidates
from perigee.errors import InvalidArgumentError
from perigee.reward.sources import Columns

ROWS = [
    {"id": "a", "prompt": "1+1=", "verifier": "math", "answer": "2", "domain": "sums", "difficulty": 1.0},
    {"prompt": "2+2=", "verifier": "math", "answer": "4", "answer_marker": "#"},
]
GSM = [
    {"question": "Tom has 3 pens and buys 4.", "answer": "3 + 4 = 7\n#### 7", "subject": "shopping", "url": "x"},
    {"question": "Half of 10?", "answer": "#### 5", "subject": None, "url": "y"},
]
GSM_COLUMNS = Columns(
    renames={"question": "prompt", "subject": "domain"}, defaults={"verifier": "math"}, answer_after="####"
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_json_lines_in_the_recipe_format(tmp_path: Path) -> None:
    found = read_candidates(write_jsonl(tmp_path / "set.jsonl", ROWS), Columns())
    one, two = (candidate.question for candidate in found.candidates)
    assert (one.id, one.text, one.kind, one.reference, one.domain, one.difficulty) == (
        "a", "1+1=", "math", "2", "sums", 1.0
    )  # fmt: skip
    assert (two.id, two.domain, two.difficulty) == ("set-000002", "", None)
    assert found.candidates[1].line["answer_marker"] == "#"
    assert found.left_out == []


def test_columns_become_fields(tmp_path: Path) -> None:
    found = read_candidates(write_jsonl(tmp_path / "gsm.jsonl", GSM), GSM_COLUMNS)
    assert [dict(candidate.line) for candidate in found.candidates] == [
        {"id": "gsm-000001", "verifier": "math", "prompt": GSM[0]["question"], "answer": "7", "domain": "shopping"},
        {"id": "gsm-000002", "verifier": "math", "prompt": "Half of 10?", "answer": "5"},
    ]
    assert found.left_out == ["url"]


def test_saved_datasets_parquet_and_folders_hold_the_same(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict  # not for every process of the tests: loading it takes a second

    saved = Dataset.from_list(GSM)
    saved.save_to_disk(str(tmp_path / "gsm"))
    DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "splits" / "gsm"))
    (tmp_path / "parquet" / "gsm" / "data").mkdir(parents=True)
    saved.to_parquet(str(tmp_path / "parquet" / "gsm" / "data" / "train-0.parquet"))
    (tmp_path / "lines" / "gsm").mkdir(parents=True)
    write_jsonl(tmp_path / "lines" / "gsm" / "part.jsonl", GSM)
    expected = read_candidates(write_jsonl(tmp_path / "gsm.jsonl", GSM), GSM_COLUMNS).digest
    split = Columns(GSM_COLUMNS.renames, GSM_COLUMNS.defaults, "####", "train")
    assert read_candidates(tmp_path / "gsm", GSM_COLUMNS).digest == expected
    assert read_candidates(tmp_path / "splits" / "gsm", split).digest == expected
    assert read_candidates(tmp_path / "parquet" / "gsm", GSM_COLUMNS).digest == expected
    assert read_candidates(tmp_path / "lines" / "gsm", GSM_COLUMNS).digest == expected
    with pytest.raises(InvalidArgumentError, match="split: must be one of train, test"):
        read_candidates(tmp_path / "splits" / "gsm", GSM_COLUMNS)
    with pytest.raises(InvalidArgumentError, match="neither a saved dataset nor"):
        read_candidates(tmp_path / "splits", GSM_COLUMNS)


def test_a_question_of_a_kind_to_drop_needs_no_verifier_of_the_recipe(tmp_path: Path) -> None:
    found = read_candidates(
        write_jsonl(tmp_path / "set.jsonl", [{"prompt": "Prove it.", "verifier": "proof"}]), Columns()
    )
    assert found.candidates[0].question.kind == "proof"


def test_bad_lines_are_reported_all_at_once(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "set.jsonl",
        [
            ROWS[0],
            {"prompt": "x", "verifier": "maths", "answer": "1"},
            {"prompt": "", "verifier": "math", "answer": "1"},
            {"prompt": "x", "verifier": "math", "anwser": "1"},
            {"prompt": "x", "verifier": "code", "tests": [{"arguments": [1], "expected": 1}]},
            ROWS[0],
        ],
    )
    with pytest.raises(InvalidArgumentError) as caught:
        read_candidates(path, Columns())
    for part in (
        f"{path}:2: verifier: must be one of math, code, ",
        f"{path}:3: prompt: is required",
        "did you mean answer?",
        f"{path}:5: function: is required by tests with arguments",
        f"{path}:6: id: 'a' is that of {path}:1, too",
    ):
        assert part in caught.value.message
    assert len(caught.value.violations) == 5
