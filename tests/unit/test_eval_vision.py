"""Suites with images on rows in the form of their data, and how a model is asked with them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perigee.buffer.images import digest_of
from perigee.chat import find_images
from perigee.cli.eval.model import Endpoint, local_endpoint
from perigee.cli.eval.responses import make_attempts
from perigee.cli.eval.suites import LoadedSuite, load_suite, write_prompt_file
from perigee.cli.eval.vision import read_list, show_images
from perigee.errors import InvalidArgumentError
from perigee.image_sources import ImageReader, ImageStore
from perigee.reward.sources import Columns, read_source
from services.reward.verifiers.math import round_decimal
from tests.fixtures.vision import make_picture

PICTURES = [make_picture(seed) for seed in range(3)]


def image(number: int) -> dict[str, Any]:
    """A picture as the feature Image of `datasets` has it."""
    return {"bytes": PICTURES[number], "path": f"{number}.png"}


def vista(pid: str, **fields: Any) -> dict[str, Any]:
    row = {"pid": pid, "question": "How long?", "image": "images/1.jpg", "decoded_image": image(0), "choices": None}
    row |= {"unit": None, "precision": None, "question_type": "free_form", "answer_type": "integer", "answer": "4"}
    row |= {"metadata": {"task": "figure question answering"}, "query": "Hint: give a number.\nQuestion: How long?"}
    return row | fields


def vision(name: str, **fields: Any) -> dict[str, Any]:
    row = {"id": name, "question": "How many dots are in <image1>?", "options": [], "image": "images/1.jpg"}
    row |= {"decoded_image": image(1), "answer": "7", "solution": None, "level": 3, "subject": "counting"}
    return row | fields


def mmmu(name: str, **fields: Any) -> dict[str, Any]:
    row = {"id": name, "question": "Which is <image 1>?", "options": "['left', 'right']", "explanation": ""}
    row |= {f"image_{number}": None for number in range(1, 8)}
    row |= {"image_1": image(0), "answer": "B", "question_type": "multiple-choice", "subfield": "Audit"}
    return row | fields


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The three suites' data, as the hub has them."""
    write(
        tmp_path / "mathvista" / "testmini-00000-of-00001.parquet",
        vista("1"),
        vista("2", question_type="multi_choice", answer_type="text", choices=["3 cm", "4 cm"], answer="4 cm"),
        vista("3", answer_type="float", precision=1.0, answer="1.2"),
        vista("4", answer_type="list", answer="[1, 2]"),
    )
    write(tmp_path / "mathvista" / "test-00000-of-00002.parquet", vista("9"))
    write(
        tmp_path / "mathvision" / "test-00000-of-00001.parquet",
        vision("1", answer=r"\frac{1}{2}", question="What part of <image1> and <image2> is red?"),
        vision("2", options=["A", "B", "C"], answer="C"),
        vision("3", options=["two", "three"], answer="B"),
    )
    write(tmp_path / "mathvision" / "testmini-00000-of-00001.parquet", vision("9"))
    options = "['<image 2>', '<image 3>']"
    write(
        tmp_path / "mmmu" / "Art_Theory" / "validation-00000-of-00001.parquet",
        mmmu("validation_Art_Theory_1", options=options, image_2=image(1), image_3=image(2)),
        mmmu("validation_Art_Theory_2", question="Who? <image 1> Look at <image 1>.", answer="A"),
    )
    write(
        tmp_path / "mmmu" / "Accounting" / "validation-00000-of-00001.parquet",
        mmmu("validation_Accounting_1", question_type="open", options="[]", answer="['1,204.5', '0.333']"),
        mmmu("validation_Accounting_2", question_type="open", options="[]", answer="['ROM', 'read-only memory']"),
        mmmu("validation_Accounting_3", question="No place for it.", answer="A"),
    )
    return tmp_path


def load(name: str, data: Path) -> dict[str, Any]:
    """The problems of a suite by id."""
    loaded = load_suite(name, data, images=ImageStore(data / "images"))
    return {problem.line.id: problem for problem in loaded.problems}


def shown(problem: Any) -> list[str]:
    """The parts of what the user says: texts, and the numbers of pictures."""
    [message] = problem.asked
    digests = [digest_of(picture) for picture in PICTURES]
    return [
        part["text"] if part["type"] == "text" else f"picture {digests.index(part['image'].digest)}"
        for part in message["content"]
    ]


def test_mathvista(data: Path) -> None:
    problems = load("mathvista", data)
    items = {name: problem.line.item for name, problem in problems.items()}
    assert set(items) == {"1", "2", "3", "4"}
    first, text = shown(problems["1"])
    assert first == "picture 0"
    assert text.startswith("Hint: give a number.\nQuestion: How long?\n\nPlease reason")
    assert problems["1"].line.domain == "figure question answering"
    assert (items["1"].math.reference, items["1"].math.HasField("decimals")) == ("4", False)
    assert (items["2"].choice.reference, list(items["2"].choice.options)) == ("B", ["3 cm", "4 cm"])
    assert (items["3"].math.reference, items["3"].math.decimals) == ("1.2", 1)
    assert items["4"].math.reference == "[1, 2]"
    assert ImageStore(data / "images").path(digest_of(PICTURES[0])).read_bytes() == PICTURES[0]


def test_mathvision(data: Path) -> None:
    problems = load("mathvision", data)
    assert set(problems) == {"1", "2", "3"}
    before, picture, after = shown(problems["1"])
    assert (before, picture) == ("What part of ", "picture 1")
    assert after.startswith(" and image 2 is red?\n")
    line = problems["1"].line
    assert (line.item.math.reference, line.domain, line.difficulty) == (r"\frac{1}{2}", "counting", 3.0)
    assert problems["2"].line.item.choice.reference == "C"
    assert "A. A" not in shown(problems["2"])[2]
    assert "A. two\nB. three" in shown(problems["3"])[2]


def test_mmmu(data: Path) -> None:
    problems = load("mmmu", data)
    assert len(problems) == 5
    assert shown(problems["validation_Art_Theory_1"])[:7] == [
        *("Which is ", "picture 0", "?\n\nA. ", "picture 1", "\nB. ", "picture 2"),
        shown(problems["validation_Art_Theory_1"])[6],
    ]
    assert shown(problems["validation_Art_Theory_2"])[1:4] == ["picture 0", " Look at ", "image 1"]
    assert shown(problems["validation_Accounting_3"])[0] == "picture 0"
    assert problems["validation_Art_Theory_1"].line.domain == "Art Theory"
    items = [problems[f"validation_Accounting_{number}"].line.item for number in (1, 2)]
    assert (items[0].math.reference, list(items[0].math.alternatives), items[0].math.decimals) == (
        *("1204.50", ["0.33"], 2),
    )
    assert list(items[1].short_answer.references) == ["ROM", "read-only memory"]


def test_options_that_are_letters_in_another_order(tmp_path: Path) -> None:
    """MathVision and MMMU name the right option by its letter, MathVista by its text."""
    write(tmp_path / "mathvision.parquet", vision("1", options=["B", "A", "C"], answer="A"))
    write(tmp_path / "mmmu.parquet", mmmu("validation_Art_1", options="['B', 'A', 'C']", answer="A"))
    choices = ["B", "A", "C"]
    write(
        tmp_path / "mathvista.parquet",
        vista("1", question_type="multi_choice", answer_type="text", choices=choices, answer="A"),
    )
    references = {
        name: problem.line.item.choice.reference
        for name in ("mathvision", "mmmu", "mathvista")
        for problem in load(name, tmp_path).values()
    }
    assert references == {"mathvision": "A", "mmmu": "A", "mathvista": "B"}


def test_records_that_contradict_themselves_are_named(tmp_path: Path) -> None:
    wrong = vista("2", question_type="multi_choice", choices=["3", "4"], answer="5")
    write(tmp_path / "mathvista.parquet", vista("1"), wrong)
    with pytest.raises(InvalidArgumentError, match=r"parquet:2: has the answer '5', which is none of its options"):
        load("mathvista", tmp_path)
    write(tmp_path / "mmmu.parquet", mmmu("validation_Art_1", question="<image 2>?"))
    with pytest.raises(InvalidArgumentError, match=r"has no image 2, which its prompt shows"):
        load("mmmu", tmp_path)
    write(tmp_path / "mathvision.parquet", vision("1", decoded_image={"bytes": b"GIF89a", "path": None}))
    with pytest.raises(InvalidArgumentError, match=r"content\[1\]: is GIF: it must be PNG"):
        load("mathvision", tmp_path)


def test_lists_as_python_writes_them() -> None:
    assert read_list("['a', \"b'c\"]") == ["a", "b'c"]
    assert read_list("[broken") == ["[broken"]
    assert read_list(["a", 1]) == ["a", "1"]
    assert show_images("no image", [None], "f:1") == []


def test_numbers_are_rounded_and_other_answers_are_not() -> None:
    answers = {"1.25001": "1.3", "$-0.96$": "-1.0", "1,204.44": "1204.4", "3": "3.0", r"\frac{1}{2}": r"\frac{1}{2}"}
    assert {answer: round_decimal(answer, 1) for answer in answers} == answers


def test_a_run_measures_by_a_suite_with_images(data: Path) -> None:
    path = write_prompt_file("mmmu", data, data / "suites")
    lines = {line.id: line for line in read_source(path, Columns(), "run.heldout")}
    problems = load("mmmu", data)
    assert {f"mmmu-{name}" for name in problems} == set(lines)
    for name, problem in problems.items():
        assert lines[f"mmmu-{name}"].messages == problem.asked
        assert lines[f"mmmu-{name}"].item == problem.line.item


def attempt(suite: LoadedSuite, endpoint: Endpoint) -> Any:
    [made] = make_attempts(suite, suite.sampling.model_copy(update={"samples": 0}), endpoint, "identity")
    return made


def test_images_travel_as_data_urls_and_count_in_the_context(vision_model: Path, tmp_path: Path) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": "one.png"}, {"type": "text", "text": "b"}]
    line = {"id": "x", "messages": [{"role": "user", "content": content}], "answer": "1", "verifier": "exact"}
    (tmp_path / "one.png").write_bytes(PICTURES[0])
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    store = ImageStore(tmp_path / "images")
    suite = load_suite(str(tmp_path / "one.jsonl"), tmp_path, images=store)
    remote = Endpoint("http://127.0.0.1:9/v1", "m", images=store)
    asked = attempt(suite, remote)
    assert "base64" not in json.dumps(asked.body)
    [message] = remote._show(asked.body)["messages"]
    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PICTURES[0]).decode()}"}},
        {"type": "text", "text": "b"},
    ]
    local = local_endpoint(vision_model, chat=True)
    assert local.encoder is not None
    found = attempt(suite, local)
    [image_info] = find_images(suite.problems[0].asked)
    [token_ids] = local.encoder.encode([suite.problems[0].asked], ["one"])
    assert found.prompt_tokens == len(local.encoder.expand(token_ids, [image_info], "one")) > len(token_ids)
    assert found.body["messages"] == asked.body["messages"]
    with pytest.raises(InvalidArgumentError, match="has images, which only a chat shows"):
        attempt(suite, Endpoint("http://127.0.0.1:9/v1", "m", chat=False))
    # Another picture is another request.
    (tmp_path / "one.png").write_bytes(PICTURES[1])
    again = load_suite(str(tmp_path / "one.jsonl"), tmp_path, images=store)
    assert attempt(again, remote).digest != asked.digest
    assert ImageReader(str(tmp_path)).load("one.png", "image").digest == digest_of(PICTURES[1])
