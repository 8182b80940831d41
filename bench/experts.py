"""Qwen3-MoE from the trainer's tensors into an engine: log-probabilities of responses against transformers' own.

Two models of random weights are pushed in turn, so that every update replaces another model's experts.

    python -m bench.experts [--width 32]
    python -m bench.experts --replay [--width 64]

Takes a minute. Exit status 1 when a log-probability is off by more than 1e-4. With `--replay` a trainer takes responses
of an engine instead: how far its log-probabilities are from the engine's, with the experts that the engine chose and
with its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures.rollout import policy_logprobs
from tests.fixtures.trainer import MadeTrajectory, train_request, write_model
from tests.fixtures.trainer_ranks import to_trajectories

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


async def generate_responses(folder: Path, dtype: str, responses: int) -> list[tuple[list[int], list[float], bytes]]:
    """Returns tokens, log-probabilities and packed expert choices of responses to one prompt."""
    from services.rollout.config import RolloutConfig
    from services.rollout.engine import EngineRequest
    from services.rollout.model import open_policy
    from services.rollout.vllm_engine import VllmEngine
    from services.weights.manifest import export_image

    config = RolloutConfig.model_validate(
        {"model": str(folder), "dtype": dtype, "kv_cache_bytes": 64 << 20, "router_replay": True}
    )
    engine = VllmEngine(config, open_policy(str(folder), None))

    async def generate(seed: int) -> tuple[list[int], list[float], bytes]:
        request = EngineRequest(f"r{seed}", PROMPT, 100, 1.0, seed, (), stride_tokens=100)
        [output] = [output async for output in engine.generate(request)]
        return list(output.token_ids), list(output.logprobs), b"".join(output.experts)

    await engine.start()
    image = export_image("run", 0, load_file(folder / "model.safetensors").items(), 1 << 30)
    await engine.update_weights(image)
    image.close()
    found = await asyncio.gather(*(generate(seed) for seed in range(responses)))
    await engine.stop()
    return found


def measure_replay(folder: Path, dtype: str) -> None:
    """Trains an iteration on responses of an engine and prints how far the two are apart."""
    from services.trainer.config import TrainerConfig
    from services.trainer.engine import Engine

    responses = asyncio.run(generate_responses(folder, dtype, 16))
    made = [
        MadeTrajectory(f"t{i}", list(PROMPT), tokens, logprobs, [(0, len(tokens))])
        for i, (tokens, logprobs, _) in enumerate(responses)
    ]
    trajectories = to_trajectories({"g": made})
    for each, (_, _, experts) in zip(made, responses, strict=True):
        trajectories[each.trajectory_id] = replace(trajectories[each.trajectory_id], experts=experts)
    config = TrainerConfig.model_validate({"model": str(folder), "run_path": str(folder), "dtype": dtype})
    engine = Engine(config, lambda _, ids: {name: trajectories[name] for name in ids})
    request = train_request("r", {"g": made}, [i % 2 for i in range(16)], max_tokens_per_microbatch=4096)
    metrics = engine.run(request).metrics
    engine.close()
    print(
        f"{dtype}: {metrics['train/replay_diff_share']:.2%} of choices differ; mean difference of log-probabilities "
        f"{metrics['train/train_infer_logprob_diff_mean']:.1e} with replay, "
        f"{metrics['train/unreplayed_logprob_diff_mean']:.1e} without; largest with replay "
        f"{metrics['train/train_infer_logprob_diff_max']:.1e}",
        flush=True,
    )


def main() -> None:
    """Makes the models, pushes each twice, and prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=32, help="of an expert")
    parser.add_argument("--replay", action="store_true", help="compare a trainer with an engine instead")
    arguments = parser.parse_args()
    width = arguments.width
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "hidden_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": width,
            "head_dim": 32,
        }
        if arguments.replay:
            sizes |= {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4}
            for dtype in ("float32", "bfloat16"):
                measure_replay(
                    write_model(Path(folder) / dtype, "Qwen3Moe", False, norm_topk_prob=True, **sizes), dtype
                )
            return
        folders = [
            write_model(Path(folder) / f"model-{seed}", "Qwen3Moe", False, seed, norm_topk_prob=True, **sizes)
            for seed in range(2)
        ]
        largest = asyncio.run(push_in_turn(folders, versions=4))
    sys.exit(largest > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    main()
