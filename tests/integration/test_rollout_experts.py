"""Expert choices that a real engine records, against the routers of transformers, and what is replaced in vLLM."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perigee.errors import InvalidArgumentError
from services.kit.server import serving
from services.rollout.config import RolloutConfig
from services.rollout.engine import EngineOutput, EngineRequest
from services.rollout.model import open_policy
from services.rollout.service import lifespan
from services.weights.manifest import export_image
from tests.fixtures.rollout import rollout_config
from tests.fixtures.trainer import write_model

SIZES = {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
# The second one is read in two parts.
PROMPTS = [(5, 6, 7, 8), tuple(range(2, 45))]
TOKENS = 40
CONTEXT = 1024


def own_choices(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Whether the routers of transformers choose each expert for each token, [T, layers, experts]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_TLE = torch.stack(model(torch.tensor([tokens]), output_router_logits=True).router_logits, 1)
    return torch.zeros_like(logits_TLE).scatter(2, logits_TLE.topk(2, -1).indices, 1).bool()


async def test_choices_are_the_routers_own_over_a_change_of_weights(tmp_path: Path) -> None:
    from services.rollout.vllm_engine import VllmEngine

    folders = [
        write_model(
            tmp_path / str(seed),
            "Qwen3Moe",
            tied=False,
            seed=seed,
            norm_topk_prob=True,
            max_position_embeddings=CONTEXT,
            **SIZES,
        )
        for seed in range(2)
    ]
    model = open_policy(str(folders[0]), None)
    assert model.expert_bytes == 4
    config = RolloutConfig(
        model=str(folders[0]), kv_cache_bytes=64 << 20, max_num_seqs=8, max_num_batched_tokens=32, router_replay=True
    )
    engine = VllmEngine(config, model)
    started = asyncio.Event()

    async def generate(prompt: tuple[int, ...], tokens: int, stride: int) -> list[EngineOutput]:
        """Generates until the tokens are there, or until an output that begins with version 1."""
        request = EngineRequest(f"r{len(prompt)}", prompt, tokens, 1.0, len(prompt), (), stride)
        found: list[EngineOutput] = []
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                found.append(output)
                started.set()
                if output.versions[0].policy_version == 1:
                    break
        return found

    async def update(version: int) -> None:
        image = export_image("run", version, load_file(folders[version] / "model.safetensors").items(), 1 << 30)
        await engine.update_weights(image)
        image.close()

    try:
        await engine.start()
        await update(0)
        async with asyncio.TaskGroup() as group:
            # One is handed over in strides, the other one at its end.
            in_strides = group.create_task(generate(PROMPTS[0], CONTEXT - 100, 4))
            at_once = group.create_task(generate(PROMPTS[1], TOKENS, TOKENS))
            await started.wait()
            await update(1)
    finally:
        await engine.stop()
    for prompt, found in zip(PROMPTS, (in_strides.result(), at_once.result()), strict=True):
        tokens = [token for output in found for token in output.token_ids]
        versions = [span.policy_version for output in found for span in output.versions for _ in range(span.tokens)]
        packed = b"".join(row for output in found for row in output.experts)
        experts_TLK = torch.from_numpy(np.frombuffer(packed, np.uint8).reshape(len(tokens), 2, 2).astype(np.int64))
        assert prompt == PROMPTS[1] or set(versions) == {0, 1}
        for version in set(versions):
            chosen_TLE = own_choices(folders[version], [*prompt, *tokens])[len(prompt) - 1 : -1]
            assert chosen_TLE.gather(2, experts_TLK)[torch.tensor(versions) == version].all()


async def test_a_dense_model_has_no_choices_to_record(policy_folder: Path, buffer_address: str) -> None:
    config = rollout_config(policy_folder, buffer_address, router_replay=True)
    with pytest.raises(InvalidArgumentError, match=r"rollout\.router_replay.* is no mixture of experts"):
        async with serving(config, lifespan):
            pass


def test_vllm_calls_what_is_replaced_in_it() -> None:
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    replaced = [(registry, "_run_in_subprocess"), (utils, "get_mp_context"), (multiproc_executor, "get_mp_context")]
    for module, name in replaced:
        assert re.search(rf"(?<!def ){name}\(", inspect.getsource(module))
