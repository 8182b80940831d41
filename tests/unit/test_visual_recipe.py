"""The visual recipe: its model folder loads, and its problems have the answers that they claim."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import visual_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from visual_model import EOS_ID, IMAGE_ID, Shape, write_model
from visual_tasks import charts, scenes, sums
from visual_tasks.problem import SIZE, Problem, to_png
from visual_tasks.sets import draw_problems

from perigee.cli.recipe import load_recipe
from perigee.cli.run_folder import RunFolder
from tests.fixtures.vision import make_picture

RECIPE = Path(__file__).parents[2] / "examples" / "visual"
# With small sets, which take a tenth of the time.
SMALL = (
    "import prepare; prepare.HELDOUT_SIZE, prepare.POOL_SIZE, prepare.LOOK_SIZE, prepare.MIXED_SIZE = 40, 60, 60, 40;"
    "prepare.main()"
)
seeds = st.integers(0, 2**32)


def test_transformers_loads_the_model_and_its_processor(vision_model: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(vision_model, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.AutoProcessor.from_pretrained(vision_model)
    content = [{"type": "image"}, {"type": "text", "text": "count red"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<image>count red="
    images = [Image.open(io.BytesIO(make_picture(seed=0)))]
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist()[0].count(IMAGE_ID) == 4
    assert model(**inputs).logits.shape == (1, 4 + 3 + len("count red="), model.config.text_config.vocab_size)
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id == EOS_ID


def test_the_same_seed_draws_the_same_weights_and_the_recipe_has_a_million_of_them(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        write_model(tmp_path / name, seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert again == first != other
    weights = load_file(tmp_path / "first" / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == 1_039_968
    assert weights["model.vision_model.embeddings.position_embedding.weight"].shape[0] == Shape().image_tokens == 16


@given(seeds)
def test_what_is_seen_in_a_scene_is_there_and_leads_to_the_answer(seed: int) -> None:
    problem = scenes.make_problem(random.Random(seed))
    places = problem.key.split(" ")
    seen, _, counts = problem.thought.partition(";")
    colours_or_shapes = {letter for letter in seen if letter != "."}
    of_shapes = problem.question.split()[-1] in scenes.SHAPES
    assert seen == "".join(
        place[of_shapes] if place != "-" and place[of_shapes] in asked_letters(problem.question) else "."
        for place in places
    )
    assert colours_or_shapes <= asked_letters(problem.question)
    if problem.question.startswith("count"):
        assert int(problem.answer) == len(seen) - seen.count(".")
    else:
        first, second = (word for word in problem.question.split() if word in scenes.COLOURS)
        numbers = {word: seen.count(word[0]) for word in (first, second)}
        assert counts == f"{numbers[first]},{numbers[second]}"
        most = [word for word, number in numbers.items() if number == max(numbers.values())]
        assert problem.answer == (most[0] if len(most) == 1 else "same")


def asked_letters(question: str) -> set[str]:
    """First letters of the colours or shapes that a question names."""
    return {word[0] for word in question.split() if word in (*scenes.COLOURS, *scenes.SHAPES)}


@given(seeds)
def test_a_scene_shows_its_colours_where_they_are_seen(seed: int) -> None:
    problem = scenes.make_problem(random.Random(seed))
    assert problem.image is not None
    inks = {colour[0]: ink for colour, ink in scenes.COLOURS.items()} | {"-": (255, 255, 255)}
    for place, kind in enumerate(problem.key.split(" ")):
        centre = 14 * (place % 4) + 7, 14 * (place // 4) + 7
        assert problem.image.getpixel(centre) == inks[kind[0]]


@given(seeds)
def test_a_chart_is_as_high_as_it_is_read(seed: int) -> None:
    problem = charts.make_problem(random.Random(seed))
    assert problem.image is not None
    values = {name: int(value) for name, value in zip(problem.key[::2], problem.key[1::2], strict=True)}
    for index, value in enumerate(values.values()):
        column = [problem.image.getpixel((14 * index + 7, y)) != (255, 255, 255) for y in range(SIZE - charts.FOOT)]
        assert sum(column) == charts.UNIT * value + 1
    expected = {"highest": max(values, key=values.__getitem__), "lowest": min(values, key=values.__getitem__)}
    first, last = problem.question[0], problem.question[-1]
    assert problem.thought.startswith(problem.key)
    assert problem.answer == (expected.get(problem.question) or str(values[first] + values[last]))


@given(seeds, st.sampled_from([sums.make_printed_problem, sums.make_text_problem]))
def test_a_sum_is_worth_its_answer_and_its_values_come_in_order(seed: int, make_problem: Any) -> None:
    problem = make_problem(random.Random(seed))
    values = [eval(problem.key[:end]) for end in range(3, len(problem.key) + 1, 2)]
    assert min(values) >= 0
    assert problem.thought.removeprefix(f"{problem.key};") == ",".join(map(str, values))
    assert problem.answer == str(values[-1])
    assert (problem.image is None) == (problem.question == problem.key)


def test_every_character_of_a_sum_is_visible_in_every_font() -> None:
    for font in sums.FONTS:
        sums_drawn = {character: draw_character(font, character) for character in "0123456789+-"}
        assert len(set(sums_drawn.values())) == len(sums_drawn)
        assert all(len(set(Image.open(io.BytesIO(png)).tobytes())) > 1 for png in sums_drawn.values())


def draw_character(font: str, character: str) -> bytes:
    """The file of a picture of one character."""
    return to_png(sums.draw_text(character, font, ink=(0, 0, 0), paper=(255, 255, 255)))


def test_what_is_held_out_is_held_out_in_every_form() -> None:
    rng = random.Random(1)
    heldout = {problem.key for problem in draw_problems(rng, 100, held_out=True)}
    pool = list(draw_problems(rng, 400, held_out=False))
    assert not heldout & {problem.key for problem in pool}
    assert {problem.domain for problem in pool} == {"scene", "chart", "print", "text"}
    assert len({identify(problem) for problem in pool}) == len(pool)


def identify(problem: Problem) -> tuple[str, bytes]:
    """What no two problems of a set share."""
    return problem.question, problem.image.tobytes() if problem.image else b""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_prepare(tmp_path_factory.mktemp("prepared") / "data")


def run_prepare(out: Path) -> Path:
    """Runs prepare.py as the command line does, with small sets."""
    arguments = ["-c", SMALL, "--out", str(out), "--seed", "7"]
    done = subprocess.run([sys.executable, *arguments], cwd=RECIPE, check=True, timeout=60, stdout=subprocess.PIPE)
    assert 0.05 < float(done.stdout.split()[-1]) < 0.6
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_seed_prepares_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    again = run_prepare(tmp_path / "again")
    files = sorted(path.relative_to(prepared) for path in prepared.rglob("*") if path.is_file())
    assert len(files) > 100
    assert all((again / file).read_bytes() == (prepared / file).read_bytes() for file in files)


def test_noise_asks_the_held_out_questions_about_pictures_of_nothing(prepared: Path) -> None:
    heldout = [line for line in read_lines(prepared / "heldout.jsonl") if "messages" in line]
    noise = read_lines(prepared / "noise.jsonl")
    for line, other in zip(heldout, noise, strict=True):
        (picture, text), (other_picture, other_text) = (each["messages"][0]["content"] for each in (line, other))
        assert (text, line["answer"]) == (other_text, other["answer"])
        colours = Image.open(prepared / other_picture["image"]).convert("RGB").getcolors(SIZE * SIZE)
        assert colours is not None
        assert len(colours) > SIZE * SIZE * 0.99
        assert picture["image"] != other_picture["image"]


def test_texts_are_made_of_known_characters(prepared: Path) -> None:
    tokenizer = visual_model.make_tokenizer()
    for line in [*read_lines(prepared / "sft_look.jsonl"), *read_lines(prepared / "sft_mixed.jsonl")]:
        asked = line.get("prompt") or line["messages"][0]["content"][1]["text"]
        ids = tokenizer.encode(asked + line["response"]).ids
        assert tokenizer.token_to_id(visual_model.UNKNOWN) not in ids
        assert len(ids) + 19 < visual_model.CONTEXT


def test_the_recipe_names_the_files_that_prepare_writes(prepared: Path, tmp_path: Path) -> None:
    run = load_recipe(RECIPE / "recipe.yaml").expand(RunFolder(tmp_path)).values["run"]
    for name in [run["model"], run["prompts"], run["heldout"], *(stage["dataset"] for stage in run["sft"])]:
        assert (prepared / Path(name).relative_to(tmp_path / "data")).exists()
    longest = max(len(line["response"]) for line in read_lines(prepared / "sft_look.jsonl"))
    assert longest < run["rollout"]["max_response_tokens"]
