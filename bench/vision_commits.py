"""Memory of a rollout worker over rounds of new weights and new images, and its answers against a fresh engine's.

`python -m bench.vision_commits` (two minutes): a tiny Idefics3 that cuts images into tiles, pictures of all sizes. Each
round commits weights whose tower alone differs, puts 8 new pictures, and samples 64 responses to prompts with one of
them; vLLM's count of image tokens is compared with the folder's for each. At the end another engine is started and
filled with the last weights: its greedy answers have to be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from safetensors.torch import load_file

from perigee.buffer.images import digest_of
from perigee.buffer.packing import pack_token_ids, unpack_token_ids
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.trainer.v1.trainer_pb2 import PushTarget
from services.kit.server import serving
from services.rollout.config import RolloutConfig
from services.rollout.service import lifespan
from services.rollout.vllm_engine import count_own_bytes
from services.weights.config import WeightsConfig
from services.weights.manifest import export_image
from services.weights.send import WeightSender

IMAGE = 5
PICTURES, SEQUENCES = 8, 64
# Small enough that both are full after a few rounds.
LIMITS = {"store_bytes": 4 << 20, "cache_bytes": 16 << 20}


def make_model(folder: Path) -> None:
    """Writes the model of examples/visual, with a processor that cuts images into tiles of 56 pixels."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "visual"))
    from visual_model import Shape, write_model

    write_model(folder, seed=0, shape=Shape(std=0.1))
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"do_image_splitting": True, "size": {"longest_edge": 112}}
    file.write_text(json.dumps(settings))


def draw(rng: np.random.Generator) -> bytes:
    """Returns a PNG of noise with sides of 40 to 400 pixels."""
    pixels = rng.integers(0, 256, (*rng.integers(40, 400, 2), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def answer(client: RolloutClient, digests: list[str], temperature: float) -> list[list[int]]:
    """Returns the responses to SEQUENCES prompts with one of the images each."""
    items = [
        pb.GenerateItem(
            id=str(n),
            prompt_token_ids=pack_token_ids([IMAGE, 7 + n % 8, 9]),
            max_tokens=16,
            image_digests=[digests[n % len(digests)]],
        )
        for n in range(SEQUENCES)
    ]
    found: dict[str, list[int]] = {item.id: [] for item in items}
    request = pb.GenerateRequest(items=items, sampling=pb.Sampling(temperature=temperature))
    async for response in client.generate(request):
        found[response.id] += unpack_token_ids(response.token_ids)
    return list(found.values())


async def push(sender: WeightSender, tensors: Mapping[str, object], version: int, address: str) -> None:
    """Commits weights."""
    image = export_image("run-bench", version, tensors.items(), 1 << 20)  # type: ignore[arg-type]
    try:
        [outcome] = await sender.push(image, [PushTarget(worker_id="w", address=address)])
    finally:
        image.close()
    if outcome.reason:
        raise SystemExit(outcome.reason)


async def run(folder: Path, rounds: int) -> bool:
    """Prints the memory of each tenth round; returns whether a fresh engine answers as the old one does."""
    rng, sender = np.random.default_rng(0), WeightSender(WeightsConfig())
    tensors = load_file(folder / "model.safetensors")
    config = RolloutConfig(
        model=str(folder),
        coordinator_address=None,
        kv_cache_bytes=64 << 20,
        max_num_seqs=32,
        commit_wait_seconds=1800,
        images=LIMITS,
    )
    async with serving(config, lifespan) as app, RolloutClient.connect(app.address) as client:
        for version in range(1, rounds + 1):
            tensors = {name: 1.01 * each if "vision_model" in name else each for name, each in tensors.items()}
            await push(sender, tensors, version, app.address)
            pictures = {digest_of(picture): picture for picture in (draw(rng) for _ in range(PICTURES))}
            await client.put_images(pictures)
            await answer(client, list(pictures), 1.0)
            if version % 10 == 0 or version == 1:
                own, engine = (psutil.Process().memory_full_info().pss, count_engine_bytes())
                print(f"round {version:3}: service {own >> 20} MiB, engine {engine >> 20} MiB (PSS)", flush=True)
        before = await answer(client, list(pictures), 0.0)
        await client.leave(pb.LeaveRequest(run_id="run-bench", residence=pb.RESIDENCE_RESTART))
        await client.come_back(pb.ComeBackRequest(run_id="run-bench"))
        after = await answer(client, list(pictures), 0.0)
    await sender.close()
    return before == after


def count_engine_bytes() -> int:
    """Returns the memory of the processes below this one."""
    return sum(count_own_bytes(each.pid) for each in psutil.Process().children())


def main() -> None:
    """Runs in a temporary folder; exit status 1 where the engines' answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        same = asyncio.run(run(Path(folder) / "model", arguments.rounds))
    print("a fresh engine gives", "the same answers" if same else "OTHER ANSWERS")
    sys.exit(not same)


if __name__ == "__main__":
    main()
