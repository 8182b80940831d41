"""Beyond a model's own context: engine, trainer and transformers read a changed rotary embedding alike."""

from __future__ import annotations

import json
import os
import random
import string
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.run_config import OptimizerConfig, SftStage, to_message
from services.kit.hf import fetch_model, open_model_folder
from services.kit.rope import RopeConfig, RopeScaling
from services.kit.server import serving
from services.kit.storage import CACHE_VARIABLE
from services.rollout.config import RolloutConfig
from services.rollout.engine import EngineRequest
from services.rollout.model import open_policy
from services.trainer.config import TrainerConfig
from services.trainer.service import lifespan
from services.weights.manifest import export_image
from tests.fixtures.trainer import VOCABULARY, write_model
from tests.fixtures.trainer_ranks import RunRanks, Sizes, make_batches

if TYPE_CHECKING:
    from services.trainer.engine import Engine

pytestmark = [
    pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long"),
    pytest.mark.timeout(900),
]

CONTEXT, ORIGINAL = 1024, 128
SHORT, LONG = 64, 1024
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, beta2=0.98, warmup_steps=20, min_lr_ratio=0.1)
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


def needle(generator: random.Random, length: int) -> dict[str, str]:
    """A text of letters and digits to which the right answer is the digit behind #, and that digit."""
    text = generator.choices(string.ascii_lowercase, k=length)
    for place in generator.sample(range(length), length // 16):
        text[place] = generator.choice(string.digits)
    place, answer = generator.randrange(length - 1), generator.choice(string.digits)
    text[place : place + 2] = ["#", answer]
    return {"prompt": "".join(text) + "=", "response": answer}


def needles(path: Path, count: int, shortest: int, longest: int, seed: int) -> str:
    """A supervised set of needles in texts of all lengths between two."""
    generator = random.Random(seed)
    lines = [needle(generator, generator.randint(shortest, longest)) for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def find_needles(folder: Path, length: int) -> float:
    """The share of 64 needles in texts of a length that the model of a folder finds, by its likeliest token."""
    from transformers import AutoModelForCausalLM

    generator = random.Random(99)
    lines = [needle(generator, length) for _ in range(64)]
    tokenizer = open_model_folder(folder, "model").open_tokenizer()
    ids = torch.tensor([tokenizer.encode(line["prompt"]).ids for line in lines])
    answers_N = torch.tensor([tokenizer.encode(line["response"]).ids[0] for line in lines])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found_N = torch.cat([model(part).logits[:, -1].argmax(-1) for part in ids.split(8)])
    return float((found_N == answers_N).float().mean())


async def test_a_model_answers_beyond_its_length_after_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages are those of a recipe: the base of 10,000 at the short length, then the recipe's at the long one."""
    for name, value in {CACHE_VARIABLE: str(tmp_path / "cache"), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    base = write_model(tmp_path / "model", max_position_embeddings=SHORT + 8, **shape)
    rope = RopeConfig(theta=1e6, max_position_embeddings=LONG + 8)
    config = TrainerConfig(model=fetch_model(str(base), "model", rope, weights=True), run_path=str(tmp_path), threads=1)
    stages = [
        SftStage(
            dataset=needles(tmp_path / "short.jsonl", 20_000, 8, SHORT, 1),
            steps=500,
            batch_size=64,
            max_sequence_length=SHORT + 8,
            optimizer=OPTIMIZER,
            rope=RopeConfig(theta=1e4, max_position_embeddings=SHORT + 8),
        ),
        SftStage(
            dataset=needles(tmp_path / "long.jsonl", 2_000, SHORT, LONG, 2),
            steps=100,
            batch_size=16,
            max_tokens_per_microbatch=16_384,
            optimizer=OPTIMIZER.model_copy(update={"learning_rate": 1e-3}),
        ),
    ]
    folders = []
    async with serving(config, lifespan) as app, TrainerClient.connect(app.address) as client:
        for number, stage in enumerate(stages, start=1):
            request = to_message(
                stage,
                pb.FineTuneRequest(),
                run_id="r",
                seed=number,
                new_version=number,
                algorithm=stage.algorithm.fields,
            )
            [_ async for _ in client.fine_tune(request, timeout_s=600)]
            saved = await client.save_checkpoint(pb.SaveCheckpointRequest(run_id="r", policy_version=number))
            folders.append(Path(saved.path))
    found = [[find_needles(folder, length) for length in (SHORT, LONG)] for folder in folders]
    print("needles found", found)
    (short_before, long_before), (short_after, long_after) = found
    assert min(short_before, short_after, long_after) > 0.7
    assert long_before < 0.3
