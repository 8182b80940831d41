"""Prompts with images in a run: refused before anything starts, or stored once, asked, judged and kept to be read."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import uuid
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytest_asyncio
import yaml
from PIL import Image

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import InvalidArgumentError, NotFoundError
from perigee.image_sources import ImageStore
from perigee.images import ImageLimits, read_image
from perigee.report.page import write_report
from perigee.report.samples import read_samples, text_lines
from perigee.reward.client import RewardClient
from perigee.reward.scoring import MAX_BATCH_BYTES, ScoreJob, ScoringOptions, scoring
from perigee.reward.v1 import reward_pb2
from services.coordinator.context import RunInputs
from services.coordinator.groups import LiveGroups
from services.coordinator.prompts import Prompt, read_prompts
from services.coordinator.run_config import ImagesConfig, PromptSource
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder, open_tokenizer
from services.kit.server import serving
from services.reward.__main__ import lifespan as reward_lifespan
from services.reward.config import JudgeConfig, JudgeEndpointConfig, RewardConfig
from tests.fixtures.coordinator import math_line, write_lines, write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, worker_in_service
from tests.fixtures.judge import FakeJudge, verdict
from tests.fixtures.vision import make_picture
from tests.integration.test_coordinator_run import coordinator, finish, read_json_lines

PICTURES = [make_picture(number) for number in range(3)]
DIGESTS = [hashlib.sha256(data).hexdigest() for data in PICTURES]
IMAGE_TOKEN = 5


def ask(prompt_id: str, question: str, *pictures: bytes, **fields: Any) -> dict[str, Any]:
    """A line that shows pictures and asks for a sum."""
    names = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in pictures]
    parts = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": question}]
    line = math_line(prompt_id, "", "", **fields) | {"messages": [{"role": "user", "content": parts}]}
    del line["prompt"]
    return line | {"answer": str(sum(map(int, question.split("+"))))}


def write_gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("P", (8, 8), color) for color in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def write_bomb() -> bytes:
    """100 megapixels in less than 40 kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000 * 1_251))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BAD = {
    "no image": ([b"hello"], "is no image: it must be PNG, JPEG, WEBP"),
    "bomb": ([write_bomb()], "has 10000 x 10000 pixels, more than 40,000,000"),
    "animated": ([write_gif()], "is GIF: it must be PNG, JPEG, WEBP"),
    # Each takes seven tokens of a context of 256.
    "more than the context": (PICTURES * 13, "has 277 tokens (273 of them of 39 images), which with a response of 24"),
    "more than allowed": (PICTURES * 20, "images: are 60, more than the 50 of run.images.max_per_prompt"),
}


async def test_bad_images_are_field_violations_before_anything_starts(
    buffer_address: str, vision_model: Path, tmp_path: Path
) -> None:
    run_path = tmp_path / "run"
    values = yaml.safe_load(write_run_section(tmp_path)) | {"images": {"max_per_prompt": 50}}
    async with fake_peers(buffer_address) as peers, coordinator(peers) as client:
        for name, (pictures, said) in BAD.items():
            lines = [ask("good", "1+1", PICTURES[0]), ask("bad", "1+2", *pictures)]
            path = write_lines(tmp_path / f"{name}.jsonl", lines)
            section = values | {"model": str(vision_model), "prompts": str(path), "heldout": str(path)}
            request = pb.StartRunRequest(run_id="r", config_yaml=yaml.safe_dump(section), run_path=str(run_path))
            with pytest.raises(InvalidArgumentError) as caught:
                await client.start_run(request)
            [violation] = caught.value.violations
            assert violation.field.startswith(f"{path}:2: ")
            assert said in f"{violation.field}: {violation.description}"
        text_model = values | {"prompts": str(write_lines(tmp_path / "p.jsonl", [ask("a", "1+1", PICTURES[0])]))}
        request = pb.StartRunRequest(run_id="r", config_yaml=yaml.safe_dump(text_model), run_path=str(run_path))
        with pytest.raises(InvalidArgumentError, match=r"p.jsonl:1: images: the model of .* takes no images"):
            await client.start_run(request)
    assert not run_path.exists()


async def test_a_run_shows_images_and_goes_on_with_the_same(
    buffer_address: str, vision_model: Path, tmp_path: Path
) -> None:
    """Each prompt shows one of three pictures. The run is stopped, and its coordinator starts anew in between."""
    run_id, run_path = f"run-{uuid.uuid4().hex}", tmp_path / "run"
    lines = [ask(f"p{n}", f"{n % 10}+{n // 10}", PICTURES[n % 3]) for n in range(24)]
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    dataset = write_lines(
        tmp_path / "sft.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}
                ],
                "response": "1",
            }
        ],
    )
    values = yaml.safe_load(
        write_run_section(tmp_path, iterations=3, max_live_groups=8, sft=[{"dataset": str(dataset), "steps": 1}])
    )
    values |= {"model": str(vision_model), "prompts": str(write_lines(tmp_path / "p.jsonl", lines))}
    values |= {"heldout": {"count": 4}, "evaluation": {"samples": 1}}
    request = pb.StartRunRequest(run_id=run_id, config_yaml=yaml.safe_dump(values), run_path=str(run_path))
    tokenizer = open_tokenizer(vision_model, "run.model")
    async with fake_peers(buffer_address) as peers:
        worker = peers.add_worker("a", tokenizer)
        sent: list[str] = []
        is_stopped = False
        peers.trainer.is_done = lambda version: version <= 1 or is_stopped
        async with coordinator(peers) as client, worker_in_service(worker, client.target):
            await client.start_run(request)
            async with aclosing(client.watch_run(pb.WatchRunRequest(run_id=run_id))) as events:  # type: ignore[type-var]
                async for response in events:
                    if response.run.metrics.get("iteration", 0) >= 1:
                        break
            await client.stop_run(pb.StopRunRequest(run_id=run_id))
            live = buffer_pb2.ListGroupsRequest(run_id=run_id)
            groups = [group async for page in peers.buffer.list_groups(live) for group in page.groups]
            ids = [trajectory.trajectory_id for group in groups for trajectory in group.trajectories]
            stored = [each async for each in peers.buffer.read_trajectories(run_id, ids)]
            for each in stored:
                assert list(unpack_token_ids(each.prompt_token_ids)).count(IMAGE_TOKEN) == 1
                sent += each.image_digests
            assert dict([each async for each in peers.buffer.read_images(run_id, sorted(set(sent)))]) == {
                digest: data for digest, data in zip(DIGESTS, PICTURES, strict=True) if digest in sent
            }
        is_stopped = True
        async with coordinator(peers) as client, worker_in_service(worker, client.target):
            assert (await client.start_run(request)).resumed
            last = (await finish(client, run_id))[-1]
            assert (last.phase, last.error) == (pb.RUN_PHASE_FINISHED, "")
    # Evaluations sent the worker what its problems show, once.
    assert {hashlib.sha256(data).hexdigest() for data in worker.images.values()} == set(worker.images) <= set(DIGESTS)
    # "1+2=" after an image of four tokens and three around them.
    members = [m for r in peers.trainer.trained for group in r.groups for m in group.trajectories]
    assert {member.prompt_tokens for member in members} == {7 + 4}
    assert [line["iteration"] for line in read_json_lines(run_path / "metrics.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in (run_path / "images").iterdir()) == sorted(DIGESTS)
    samples = read_samples(run_path)
    assert all(len(sample.images) == 1 and "<image>" in sample.prompt for sample in samples)
    assert f"  images/{samples[0].images[0]}" in text_lines(samples[0])
    page = write_report(run_path).path.read_text()
    assert page.count("<img class='picture'") == len({sample.kind for sample in samples})
    (run_path / "images" / samples[-1].images[0]).unlink()
    assert "is not in this folder" in write_report(run_path).path.read_text()


@pytest_asyncio.fixture
async def buffer(buffer_address: str) -> AsyncIterator[BufferClient]:
    async with BufferClient.connect(buffer_address) as client:
        yield client


def read_one(folder: Path, model: Path, *lines: dict[str, Any], **images: Any) -> tuple[dict[str, Prompt], ImageStore]:
    encoder = open_encoder(open_model_folder(model, "run.model"))
    path, store = write_lines(folder / "p.jsonl", lines), ImageStore(folder / "images")
    source = [PromptSource(path=str(path))]
    return read_prompts(source, "run.prompts", encoder, 16, ImagesConfig(**images), store), store


async def test_an_image_is_put_once_while_a_group_needs_it(
    buffer: BufferClient, vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, store = read_one(
        tmp_path, vision_model, *(ask(f"p{n}", "1+1", PICTURES[n % 2]) for n in range(4)), ask("both", "1", *PICTURES)
    )
    run_id = f"images-{uuid.uuid4().hex}"
    await buffer.create_run(buffer_pb2.CreateRunRequest(run_id=run_id, config_digest="d"))
    put: list[list[str]] = []
    put_images = buffer.put_images

    async def count(run_id: str, images: dict[str, bytes], *, timeout_s: float) -> None:
        put.append(list(images))
        await put_images(run_id, images, timeout_s=timeout_s)

    monkeypatch.setattr(buffer, "put_images", count)
    groups = LiveGroups(run_id, buffer, 60.0, store)
    await groups.create([("g0", prompts["p0"]), ("g1", prompts["p1"]), ("g2", prompts["p2"])], 1, 2)
    await groups.create([("g3", prompts["p3"]), ("g4", prompts["both"])], 1, 2)
    assert put == [[DIGESTS[0], DIGESTS[1]], [DIGESTS[2]]]
    # One who believes that all are there, as after a restart of the buffer's side, is told and puts them.
    other = f"images-{uuid.uuid4().hex}"
    await buffer.create_run(buffer_pb2.CreateRunRequest(run_id=other, config_digest="d"))
    with pytest.raises(NotFoundError):
        [each async for each in buffer.read_images(other, DIGESTS)]
    stranger = LiveGroups(other, buffer, 60.0, store)
    for group in groups:
        stranger._add(group, [])
    put.clear()
    await stranger.create([("h", prompts["both"])], 1, 2)
    assert sorted(put[-1]) == sorted(DIGESTS)
    assert len([each async for each in buffer.read_images(other, DIGESTS)]) == 3


def write_large() -> bytes:
    """Noise, which no format makes smaller: more than a message to the reward service may have."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


async def test_a_judge_sees_the_images_and_others_do_not(
    fake_judge: FakeJudge, vision_model: Path, tmp_path: Path
) -> None:
    judge = {"verifier": "judge", "answer": "2"}
    prompts, store = read_one(
        tmp_path,
        vision_model,
        ask("judged", "1+1", PICTURES[0], PICTURES[1]) | judge,
        ask("counted", "1+1", PICTURES[0]),
    )
    fake_judge.otherwise = verdict("correct", "It is.")
    endpoint = JudgeEndpointConfig(base_url=fake_judge.url, model="tiny")
    outcomes: dict[str, reward_pb2.ScoreResponse] = {}

    async def take(some: list[reward_pb2.ScoreResponse]) -> None:
        outcomes.update({outcome.id: outcome for outcome in some})

    config = RewardConfig(judge=JudgeConfig(judges={"main": endpoint}))
    large = read_image(write_large(), ImageLimits(), "large")
    assert large.size_bytes > MAX_BATCH_BYTES
    inputs = RunInputs("r", tmp_path, "", cast(Any, None), cast(Any, None), prompts, {}, store)
    async with (
        serving(config, reward_lifespan) as app,
        RewardClient.connect(app.address) as reward,
        scoring(reward, ScoringOptions(batch=2), take) as pipeline,
    ):
        for prompt in prompts.values():
            await pipeline.submit(inputs.score_job(prompt.id, prompt, "#2"))
        await pipeline.submit(ScoreJob("large", "2", prompts["judged"].line.item, [large], store))
    assert {key: outcome.verdict for key, outcome in outcomes.items()} == {
        "judged": buffer_pb2.VERDICT_CORRECT,
        "counted": buffer_pb2.VERDICT_CORRECT,
        "large": buffer_pb2.VERDICT_FAILED,
    }
    assert f"{large.size_bytes} of them of image {large.digest}" in outcomes["large"].reason
    [request] = fake_judge.requests
    _, *parts = request["messages"][-1]["content"]
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in PICTURES[:2]]
    assert [part["image_url"]["url"] for part in parts] == urls
    with pytest.raises(InvalidArgumentError, match="bytes, and a judge is sent 3,145,728 at most"):
        read_one(tmp_path, vision_model, ask("judged", "1+1", large.data) | judge)
    with pytest.raises(InvalidArgumentError, match="verifier: value_head reads text alone, and the question has"):
        read_one(tmp_path, vision_model, ask("a", "1+1", PICTURES[0]) | {"verifier": "value_head"})
