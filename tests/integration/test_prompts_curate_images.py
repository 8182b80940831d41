"""Curation of prompts with images on the real engine: difficulty with them, guesses without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from perigee.buffer.packing import pack_token_ids
from perigee.cli.prompts.curate import push_weights
from perigee.cli.prompts.sampling import (
    ModelStage,
    SampledModel,
    SamplingSettings,
    difficulty_stage,
    guessing_stage,
    read_policy_version,
    sample_model,
)
from perigee.curation.findings import Finding, Question
from perigee.image_sources import ImageReader, ImageStore
from perigee.reward.client import RewardClient
from perigee.reward.items import PromptLine
from perigee.reward.sources import Columns, read_source
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rpc import ChannelOptions
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from services.kit.chat import PromptEncoder, open_encoder
from services.kit.hf import open_model_folder
from services.kit.server import App
from services.rollout.config import RolloutConfig
from tests.fixtures.vision import make_picture

SETTINGS = SamplingSettings(
    samples=4, response_tokens=1, guesses=8, guess_tokens=1, trivial_pass_rate=None, guess_template="{prompt}"
)


def write_prompts(folder: Path) -> Path:
    """Questions about different pictures."""
    lines = []
    for number in range(4):
        (folder / f"{number}.png").write_bytes(make_picture(number))
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f"{number}+1="}]
        chat = [{"role": "user", "content": content}]
        lines.append({"id": f"p{number}", "messages": chat, "verifier": "exact", "answer": "7"})
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "in.jsonl"


async def ask(
    client: RolloutClient, encoder: PromptEncoder, line: PromptLine, name: str, count: int, shown: bool
) -> list[str]:
    """What the model says to a prompt, with its image or to its text alone, by the ids of a curation."""
    [message] = line.messages
    asked = line.messages if shown else ({"role": "user", "content": message["content"][1]["text"]},)  # type: ignore[index,typeddict-item]
    [token_ids] = encoder.encode([asked], [line.id])
    digests = [image.digest for image in line.images if shown]
    items = [
        pb.GenerateItem(
            id=f"{name}/{line.id}/{n}", prompt_token_ids=pack_token_ids(token_ids), max_tokens=1, image_digests=digests
        )
        for n in range(count)
    ]
    request = pb.GenerateRequest(items=items, sampling=pb.Sampling(temperature=1, seed=3), text_only=True)
    texts = {response.id: response.text async for response in client.generate(request, timeout_s=60)}
    return [texts[item.id] for item in items]


async def count_right(
    stage: ModelStage, model: SampledModel, lines: dict[str, PromptLine]
) -> tuple[dict[str, int], list[Finding]]:
    """How many answers to each prompt are right, and all findings."""
    questions = [Question(name, "", "exact") for name in lines]
    findings = [finding async for group in sample_model(stage, model, lines)(questions) for finding in group]
    return {finding.id: finding.details["correct"] for finding in findings}, findings


def most_frequent(texts: Sequence[str]) -> str:
    return max((text for text in texts if text.strip() == text != ""), key=texts.count)


async def test_difficulty_is_measured_with_the_image_and_guesses_are_made_without(
    tmp_path: Path,
    vision_app: App[RolloutConfig],
    vision_client: RolloutClient,
    vision_model: Path,
    reward: RewardClient,
) -> None:
    await push_weights(vision_model, [vision_app.address], ChannelOptions())
    version, context = await read_policy_version([vision_client])
    store = ImageStore(tmp_path / "images")
    path = write_prompts(tmp_path)
    found = read_source(path, Columns(), "IN", "", ImageReader(str(tmp_path), store=store))
    encoder = open_encoder(open_model_folder(vision_model, "--model"), ChatSettings(mode="auto"))
    model = SampledModel([vision_client], reward, encoder, context, version, 1.0, 3, 30.0, store)
    lines = {line.id: line for line in found}
    await vision_client.put_images({each.digest: store.read(each).data for line in found for each in line.images})
    with_image = {name: await ask(vision_client, encoder, line, "difficulty", 4, True) for name, line in lines.items()}
    without = {name: await ask(vision_client, encoder, line, "guessing", 8, False) for name, line in lines.items()}
    # The right answer is what the model likes to say with the image to some prompts, and without it to the others.
    for number, (name, line) in enumerate(lines.items()):
        line.item.exact.reference = most_frequent(with_image[name] if number % 2 else without[name])
    truths = {name: line.item.exact.reference for name, line in lines.items()}

    right, _ = await count_right(difficulty_stage(SETTINGS), model, lines)
    assert right == {name: with_image[name].count(truths[name]) for name in lines}
    right, findings = await count_right(guessing_stage(SETTINGS), model, lines)
    assert right == {name: without[name].count(truths[name]) for name in lines}
    assert {finding.id for finding in findings if finding.reason} >= {"p0", "p2"}
