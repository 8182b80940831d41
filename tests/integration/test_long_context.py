"""Beyond a model's own context: engine, trainer and transformers read a changed rotary embedding alike."""

from __future__ import annotations

import os
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.kit.hf import fetch_model
from services.kit.rope import RopeConfig, RopeScaling
from services.kit.storage import CACHE_VARIABLE
from services.rollout.config import RolloutConfig
from services.rollout.engine import EngineRequest
from services.rollout.model import open_policy
from services.weights.manifest import export_image
from tests.fixtures.trainer import VOCABULARY, write_model
from tests.fixtures.trainer_ranks import RunRanks, Sizes, make_batches

if TYPE_CHECKING:
    from services.trainer.engine import Engine

pytestmark = pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")

CONTEXT, ORIGINAL = 1024, 128
FOUR = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "theta": RopeConfig(theta=1e6, max_position_embeddings=CONTEXT),
    "linear": RopeConfig(scaling=RopeScaling(type="linear", factor=4), max_position_embeddings=CONTEXT),
    "llama3": RopeConfig(
        scaling=RopeScaling(type="llama3", low_freq_factor=1, high_freq_factor=4, **FOUR),
        max_position_embeddings=CONTEXT,
    ),
    "yarn": RopeConfig(scaling=RopeScaling(type="yarn", **FOUR | {"factor": 8.0})),
    "attention factor": RopeConfig(theta=5e5, scaling=RopeScaling(type="yarn", attention_factor=0.8, **FOUR)),
}


def evaluate(engine: Engine, folder: Path, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
    """The log-probabilities of a sequence by the model of a folder."""
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy

    policy = Policy(read_model_shape(folder), engine.dims, torch.float32, CONTEXT)
    policy.load(folder)
    [found] = policy.evaluate(make_batches(engine, [tokens]), 1.0)
    return found.logprobs_T


async def score(folder: Path, tokens: list[int]) -> list[float]:
    """The same by vLLM."""
    from services.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(model=str(folder), kv_cache_bytes=64 << 20, max_num_seqs=8)
    engine = VllmEngine(config, open_policy(str(folder), None))
    request = EngineRequest("r", tuple(tokens), 1, 1.0, 0, (), 1, score_prompt=True)
    try:
        await engine.start()
        image = export_image("run", 0, load_file(folder / "model.safetensors").items(), 1 << 30)
        await engine.update_weights(image)
        image.close()
        async with aclosing(engine.generate(request)) as outputs:
            found = [each.logprob async for output in outputs for each in output.prompt_scores]
    finally:
        await engine.stop()
    return found


@pytest.mark.parametrize("name", ROPES)
async def test_trainer_engine_and_transformers_agree_beyond_the_original_context(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    shape = {"max_position_embeddings": ORIGINAL, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2}
    model = write_model(tmp_path / "model", **shape)
    folder = Path(fetch_model(str(model), "model", ROPES[name], weights=True))
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 4 * ORIGINAL - 2)
    with torch.no_grad():
        ids = torch.from_numpy(tokens)[None]
        logprobs_TV = torch.log_softmax(AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, :-1], -1)
        plain_TV = torch.log_softmax(AutoModelForCausalLM.from_pretrained(model)(ids).logits[0, :-1], -1)
    expected_T = logprobs_TV.gather(1, ids[0, 1:, None])[:, 0]
    # Of the model before the change they differ.
    assert (plain_TV.gather(1, ids[0, 1:, None])[:, 0] - expected_T).abs().max() > 0.1
    trained_T = run_ranks(Sizes(), partial(evaluate, folder=folder, tokens=tokens))
    engine_T = torch.tensor(await score(folder, tokens.tolist()))
    differences = [float((each - expected_T).abs().max()) for each in (trained_T, engine_T)]
    print(name, differences)
    assert max(differences) <= 1e-5
