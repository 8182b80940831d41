"""`perigee eval` and `perigee sample` with images: an endpoint gets them, and training data names them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from perigee.buffer.images import digest_of
from perigee.chat import read_example
from perigee.cli.ending import Interrupt
from perigee.cli.eval.model import Endpoint
from perigee.cli.eval.responses import ModelOptions
from perigee.cli.eval.run import EvalOptions, evaluate
from perigee.cli.eval.suites import SamplingSettings
from perigee.cli.prompts.candidates import make_columns
from perigee.cli.sample.run import SampleOptions, sample
from perigee.cli.sample.selection import PairRules
from perigee.files import read_lines
from perigee.image_sources import ImageReader
from perigee.reward.client import RewardClient
from tests.fixtures.judge import FakeJudge, Reply
from tests.fixtures.vision import make_picture

PICTURES = [make_picture(seed) for seed in range(2)]
URLS = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in PICTURES]


def write_prompts(folder: Path) -> Path:
    """Two questions, one with two pictures and one about a text."""
    for number, picture in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(picture)
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "or"}, {"type": "image", "image": "1.png"}]
    lines = [
        {"id": "a", "messages": [{"role": "user", "content": parts}], "verifier": "exact", "answer": "left"},
        {"id": "b", "messages": [{"role": "user", "content": "2+2="}], "verifier": "exact", "answer": "4"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "prompts.jsonl"


def answer_left(body: dict[str, Any]) -> Reply:
    """A response that is right where pictures are shown."""
    choice = {"message": {"role": "assistant", "content": "left"}, "finish_reason": "stop"}
    return Reply(body=json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}}))


def interrupt() -> Interrupt:
    task = asyncio.current_task()
    assert task is not None
    return Interrupt(task)


def model_options(judge: FakeJudge, reward: RewardClient, folder: Path) -> ModelOptions:
    return ModelOptions(None, Endpoint(judge.url, "m"), True, folder, 4, "auto", reward.target, plain=True)


async def test_an_endpoint_is_shown_the_images_of_a_prompt_file(
    tmp_path: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.choose = answer_left
    prompts, out = write_prompts(tmp_path), tmp_path / "out"
    options = EvalOptions(
        model_options(fake_judge, reward, tmp_path), [str(prompts)], tmp_path, out, None, {"samples": 0}
    )
    for _ in range(2):
        await evaluate(options, Console(file=io.StringIO()), interrupt())
    # The second time everything is there.
    contents = [body["messages"][0]["content"] for body in fake_judge.requests]
    assert len(contents) == 2
    assert "2+2=" in contents
    [shown] = [content for content in contents if content != "2+2="]
    assert shown == [
        {"type": "image_url", "image_url": {"url": URLS[0]}},
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": {"url": URLS[1]}},
    ]
    assert {line["id"]: line["verdict"] for line in read_lines(out / "answers.jsonl")} == {"a": "correct", "b": "wrong"}


async def test_selected_samples_name_the_images_beside_them(
    tmp_path: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.choose = answer_left
    out = tmp_path / "out"
    options = SampleOptions(
        prompts=write_prompts(tmp_path),
        columns=make_columns([], [], "", None),
        out=out,
        select=["all"],
        rules=PairRules(),
        sampling=SamplingSettings(greedy=False, samples=2),
        model=model_options(fake_judge, reward, tmp_path),
    )
    await sample(options, Console(file=io.StringIO()), interrupt())
    [line] = read_lines(out / "all.jsonl")
    example = read_example(line, read_image=ImageReader(str(out)))
    assert [image.digest for image in example.images] == [digest_of(picture) for picture in PICTURES]
    assert example.responses == ("left",)
