"""Qwen3-MoE from the trainer's tensors into an engine: log-probabilities of responses against transformers' own.

Two models of random weights are pushed in turn, so that every update replaces another model's experts.

    python -m bench.experts [--width 32]

Takes a minute. Exit status 1 when a log-probability is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures.rollout import policy_logprobs
from tests.fixtures.trainer import write_model

LARGEST_DIFFERENCE = 1e-4
PROMPT = (5, 6, 7, 8)


async def push_in_turn(folders: list[Path], versions: int) -> float:
    """Pushes the models in turn and returns the largest difference of a response token's log-probability."""
    from services.rollout.config import RolloutConfig
    from services.rollout.engine import EngineOutput, EngineRequest
    from services.rollout.model import open_policy
    from services.rollout.vllm_engine import VllmEngine
    from services.weights.manifest import export_image

    model = open_policy(str(folders[0]), None)
    engine = VllmEngine(RolloutConfig(model=str(folders[0]), kv_cache_bytes=64 << 20), model)
    await engine.start()
    largest = 0.0
    for version in range(versions):
        folder = folders[version % len(folders)]
        image = export_image("run", version, load_file(folder / "model.safetensors").items(), 1 << 30)
        model.check_image(image)
        await engine.update_weights(image)
        image.close()
        request = EngineRequest(
            f"r{version}", PROMPT, max_tokens=60, temperature=1.0, seed=version, stop_token_ids=(), stride_tokens=60
        )
        found: list[EngineOutput] = [output async for output in engine.generate(request)]
        difference = compare(folder, list(found[-1].token_ids), list(found[-1].logprobs))
        print(f"version {version} of {folder.name}: largest difference {difference:.1e}", flush=True)
        largest = max(largest, difference)
    await engine.stop()
    return largest


def compare(folder: Path, tokens: list[int], logprobs: list[float]) -> float:
    """Returns the largest difference of the log-probabilities from those of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = policy_logprobs(model, PROMPT, tokens)
    return max(abs(a - b) for a, b in zip(expected, logprobs, strict=True))


def main() -> None:
    """Makes the models, pushes each twice, and prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=32, help="of an expert")
    width = parser.parse_args().width
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "hidden_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": width,
            "head_dim": 32,
        }
        folders = [
            write_model(Path(folder) / f"model-{seed}", "Qwen3Moe", False, seed, norm_topk_prob=True, **sizes)
            for seed in range(2)
        ]
        largest = asyncio.run(push_in_turn(folders, versions=4))
    sys.exit(largest > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    main()
