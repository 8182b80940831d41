"""Prompts with pictures: which look the same, which prompts are duplicates, and what a curation keeps of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Image as Picture

from perigee.cli.prompts.candidates import make_columns
from perigee.cli.prompts.curate import CurateCommand, ModelAccess, run_curate
from perigee.cli.prompts.duplicates import find_duplicates
from perigee.cli.prompts.sampling import (
    CurationSettings,
    SampledModel,
    SamplingSettings,
    difficulty_stage,
    encode_lines,
    guessing_stage,
)
from perigee.curation.findings import Decision, Question
from perigee.curation.pictures import find_same, look_at, looks_same
from perigee.errors import InvalidArgumentError
from perigee.image_sources import ImageReader, ImageStore
from perigee.images import decode_image
from perigee.reward.items import read_prompt_line
from perigee.reward.scoring import ScoreClient
from perigee.reward.sources import Columns, read_source
from perigee.rpc import ChannelOptions
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder
from tests.fixtures.vision import make_picture


def picture(seed: int) -> Picture:
    """Twelve blocks of colour, 35 pixels wide and high."""
    blocks = Image.open(io.BytesIO(make_picture(seed, 28, 21))).convert("RGB")
    return blocks.resize((140, 105), Image.Resampling.NEAREST)


def encode(shown: Picture, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    shown.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda shown: Image.open(io.BytesIO(encode(shown, quality=60))).convert("RGB"),
        lambda shown: Image.open(io.BytesIO(encode(shown, "WEBP", quality=80))).convert("RGB"),
        lambda shown: shown.resize((280, 210)),
        lambda shown: shown.resize((105, 79)),
    ],
)
def test_another_encoding_or_size_looks_the_same(change: Callable[[Picture], Picture]) -> None:
    shown = [picture(seed) for seed in range(5)]
    looks = [look_at(each) for each in shown] + [look_at(change(each)) for each in shown]
    assert find_same(looks) == [0, 1, 2, 3, 4] * 2


def test_one_place_and_another_shape_make_another_picture() -> None:
    shown = picture(1)
    painted = shown.copy()
    before = np.asarray(shown)[50, 70].astype(int)
    painted.paste(tuple(int(value) for value in (before + 128) % 256), (63, 42, 77, 56))
    assert not looks_same(look_at(shown), look_at(painted))
    assert not looks_same(look_at(shown), look_at(shown.resize((140, 140))))
    assert find_same([look_at(picture(seed)) for seed in range(20)]) == list(range(20))


def test_duplicates_have_the_same_text_and_the_same_pictures() -> None:
    pictures = {"a": picture(0), "a, smaller": picture(0).resize((70, 53)), "b": picture(1)}
    story = "How many red blocks are there in this picture of many blocks of many colours, if you count all of them?"
    asked = [
        (story, ["a"]),
        (story, ["b"]),
        (story.upper(), ["a"]),
        (story, ["a, smaller"]),
        (story.replace("all of them", "all of these"), ["a, smaller"]),
        (story.replace("red", "blue") + " Leave out those that touch the rim.", ["a"]),
        (story, []),
        (story, ["a", "b"]),
        (story, ["b", "a"]),
    ]
    questions = [Question(str(n), text, "math", images=tuple(images)) for n, (text, images) in enumerate(asked)]

    def find(threshold: float) -> dict[str, tuple[str, str]]:
        found = find_duplicates(questions, threshold, lambda digest: look_at(pictures[digest]))
        return {
            each.id: (each.reason, each.details["duplicate_of"]) for each in found if each.decision is Decision.DROP
        }

    near = {"3": ("near duplicate", "0"), "4": ("near duplicate", "0")}
    assert find(0.7) == {"2": ("exact duplicate", "0")} | near
    assert find(0.0) == {"2": ("exact duplicate", "0")}


def curate(source: Path, out: Path) -> None:
    """Runs the stages that ask no model."""
    access = ModelAccess([], "", None, False, ChannelOptions(), 1.0, ChatSettings())
    settings = CurationSettings(drop_question_kinds=True)
    columns = make_columns([], [], "", None)
    assert run_curate(CurateCommand(source, out, columns, settings, access, restart=False, plain=True)) == 0


def test_what_a_curation_keeps_has_its_images_beside_it(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(encode(picture(0), "PNG"))
    (tmp_path / "figures" / "again.jpg").write_bytes(encode(picture(0), quality=80))
    (tmp_path / "figures" / "two.png").write_bytes(encode(picture(1), "PNG"))

    def line(name: str, image: str, text: str) -> dict[str, Any]:
        content = [{"type": "image", "image": f"figures/{image}"}, {"type": "text", "text": text}]
        return {"id": name, "messages": [{"role": "user", "content": content}], "answer": "7", "verifier": "math"}

    lines = [
        line("a", "one.png", "How many are red?"),
        line("b", "again.jpg", "How many are red?"),
        line("c", "two.png", "How many are red?"),
        line("d", "again.jpg", "How many are blue?"),
        line("e", "two.png", "Prove that there are 7."),
        {"id": "f", "prompt": "<image> How many are red?", "images": ["figures/two.png"], "answer": "4"},
        {"id": "g", "prompt": "What is 3+4?", "answer": "7"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    out = tmp_path / "out"
    curate(tmp_path / "in.jsonl", out)
    kept = {each.id: each for each in read_source(out / "prompts.jsonl", Columns(), "run.prompts")}
    assert set(kept) == {"a", "c", "d", "f", "g"}
    dropped = {each["id"]: each["reason"] for each in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}
    assert dropped == {"b": "near duplicate", "e": "proof"}
    assert {path.name for path in (out / "images").iterdir()} == {
        image.digest for each in kept.values() for image in each.images
    }
    for name, seed in (("a", 0), ("c", 1), ("f", 1)):
        [image] = kept[name].images
        shown = decode_image(ImageReader(str(out / "images")).load(image.digest, "image"))
        assert shown.tobytes() == picture(seed).tobytes()
    assert kept["a"].messages[0]["content"][1] == {"type": "text", "text": "How many are red?"}
    # The same folder again is the same curation.
    before = (out / "prompts.jsonl").read_bytes()
    curate(tmp_path / "in.jsonl", out)
    assert (out / "prompts.jsonl").read_bytes() == before


def test_a_wrong_image_and_a_folder_of_other_files_are_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": "a", "prompt": "<image> 7?", "images": ["none.png"], "answer": "7"}) + "\n")
    with pytest.raises(InvalidArgumentError, match=r"in\.jsonl:1: images\[0\]: none.png does not exist"):
        curate(source, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="holds other files; name an empty folder"):
        curate(source, tmp_path)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("template", ["{prompt}", "{prompt} at once:"])
def test_guesses_leave_the_images_out_and_other_answers_do_not(
    vision_model: Path, tmp_path: Path, template: str
) -> None:
    (tmp_path / "one.png").write_bytes(make_picture(0))
    content = [{"type": "image", "image": "one.png"}, {"type": "text", "text": "how many?"}]
    lines = [
        {"id": "chat", "messages": [{"role": "user", "content": content}]},
        {"id": "text", "prompt": "<image> how many?", "images": ["one.png"]},
        {"id": "plain", "prompt": "how many?"},
    ]
    read_image = ImageReader(str(tmp_path), store=ImageStore(tmp_path / "images"))
    read = [
        read_prompt_line(line | {"answer": "7", "verifier": "exact"}, str(line["id"]), read_image) for line in lines
    ]
    encoder = open_encoder(open_model_folder(vision_model, "--model"), ChatSettings())
    model = SampledModel([], cast(ScoreClient, None), encoder, 64, 0, 1.0, 0, 1.0, ImageStore(tmp_path / "images"))
    settings = SamplingSettings(response_tokens=8, guess_tokens=8, guess_template=template)
    prompts, too_long = encode_lines(difficulty_stage(settings), model, read)
    image_token = encoder.vision.image_token_id if encoder.vision else -1
    shown = {each.line.id: (list(each.token_ids).count(image_token), len(each.images)) for each in prompts}
    assert (shown, too_long) == ({"chat": (1, 1), "text": (1, 1), "plain": (0, 0)}, [])
    guesses, _ = encode_lines(guessing_stage(settings), model, read)
    assert [(list(each.token_ids).count(image_token), len(each.images)) for each in guesses] == [(0, 0)] * 3
    # The rest of the question is asked as it is.
    texts = {each.line.id: encoder.tokenizer.decode(list(each.token_ids)) for each in guesses}
    assert texts["text"] == texts["plain"]
    # What counts against the context is what an image becomes.
    room = max(len(each.token_ids) for each in prompts if each.images) + 8
    _, too_long = encode_lines(difficulty_stage(settings), replace(model, context_tokens=room), read[:1])
    assert [finding.id for finding in too_long] == ["chat"]
