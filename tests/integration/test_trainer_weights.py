"""Hugging Face in and out: every architecture, tied and untied, over every split; log-probabilities agree."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perigee.cli.merge.folders import plan_merge, write_merged
from perigee.cli.merge.methods import MergeSettings
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import fetch_model
from services.kit.rope import RopeConfig, RopeScaling
from services.kit.storage import CACHE_VARIABLE
from tests.fixtures.trainer import VOCABULARY, write_model
from tests.fixtures.trainer_ranks import RunRanks, Sizes, check_slices, make_batches

if TYPE_CHECKING:
    from services.trainer.engine import Engine

TEMPERATURE = 0.6


def sequences() -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCABULARY, n) for n in (1 + 1, 9, 30, 31, 100)]


def load_and_evaluate(engine: Engine, folders: list[Path]) -> list[tuple[dict[str, torch.Tensor], dict[int, Any]]]:
    """The weights of each folder once loaded, and log-probabilities and entropies of the sequences by index."""
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy
    from services.trainer.packing import TokenSequence, make_micro_batches, pack_sequences

    items = [TokenSequence(tokens, np.ones(len(tokens) - 1, np.bool_)) for tokens in sequences()]
    (packs,) = pack_sequences([len(item.tokens) - 1 for item in items], 64)
    batches = make_micro_batches([[items[i] for i in pack] for pack in packs], engine.dims.device)
    found = []
    for folder in folders:
        policy = Policy(read_model_shape(folder), engine.dims, torch.float32, 128)
        policy.load(folder)
        logprobs: dict[int, Any] = {}
        for each in policy.evaluate(batches, TEMPERATURE):
            values_2T = torch.stack([each.logprobs_T, each.entropies_T])
            sequence_T = each.batch.packed.sequence_T
            logprobs |= {i: values_2T[:, sequence_T == n] for n, i in enumerate(packs[each.batch.index])}
        logprobs = {i: v for part in engine.everyone.gather(logprobs) for i, v in part.items()}
        check_slices(engine, policy)
        found.append((dict(policy.collect()), logprobs))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One folder of each architecture, tied and untied, a merged one, and two beyond the positions they had."""
    kinds = [("Qwen2", True), ("Qwen2", False), ("Qwen3", True), ("Qwen3", False), ("Llama", True), ("Llama", False)]
    folders = [write_model(tmp_path_factory.mktemp(kind), kind, tied, seed) for seed, (kind, tied) in enumerate(kinds)]
    other, merged = write_model(tmp_path_factory.mktemp("other"), seed=9), tmp_path_factory.mktemp("merged") / "model"
    write_merged(plan_merge([str(folders[0]), str(other)], None, MergeSettings("slerp", (1.0, 1.0))), merged, print)
    original = {"original_max_position_embeddings": 16}
    ropes = [
        RopeConfig(scaling=RopeScaling(type="yarn", factor=8, **original)),
        RopeConfig(theta=5e5, scaling=RopeScaling(type="yarn", factor=8, attention_factor=0.7, **original)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        longer = [fetch_model(str(folder), "model", rope) for folder, rope in zip(folders[:2], ropes, strict=True)]
    return [*folders, merged, *map(Path, longer)]


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Log-probabilities and entropies of each sequence on transformers, for each folder."""
    from transformers import AutoModelForCausalLM

    found = []
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        values = []
        for tokens in sequences():
            ids = torch.from_numpy(tokens)[None]
            with torch.no_grad():
                logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1] / TEMPERATURE, -1)
            values.append((logprobs_TV.gather(1, ids[0, 1:, None])[:, 0], -(logprobs_TV.exp() * logprobs_TV).sum(-1)))
        found.append(values)
    return found


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tensor=2), Sizes(pipeline=2)], ids=str)
def test_weights_round_trip_and_logits_agree(
    run_ranks: RunRanks, models: list[Path], expected: list[list[tuple[torch.Tensor, torch.Tensor]]], sizes: Sizes
) -> None:
    found = run_ranks(sizes, partial(load_and_evaluate, folders=models))
    for folder, (weights, values), wanted in zip(models, found, expected, strict=True):
        original = load_file(folder / "model.safetensors")
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)
        assert values.keys() == set(range(len(wanted)))
        for i, (wanted_logprobs_T, wanted_entropies_T) in enumerate(wanted):
            logprobs_T, entropies_T = values[i]
            assert (logprobs_T - wanted_logprobs_T).abs().max() < 1e-5
            assert (entropies_T - wanted_entropies_T).abs().max() < 2e-5


def save_less(engine: Engine, folder: Path, experts: int) -> tuple[list[dict[str, torch.Tensor]], list[float], int]:
    """The gradients of a step as it is, with what is saved moved away, and with one layer or both computed again.

    And the bytes of a token's activations in the last three, and the bytes moved. With experts the choices of a rollout
    are replayed.
    """
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.memory import OffloadedTensors
    from services.trainer.megatron.model import Policy
    from services.trainer.packing import TokenSequence, make_micro_batches

    generator, packs, gradients, sizes = np.random.default_rng(1), [], [], []
    for tokens in sequences():
        first_TL1 = generator.integers(0, max(experts, 1), (len(tokens) - 1, 2, 1), np.uint8)
        chosen_TLK = np.concatenate([first_TL1, (first_TL1 + 1) % max(experts, 1)], -1) if experts else None
        packs.append([TokenSequence(tokens, np.ones(len(tokens) - 1, np.bool_), chosen_TLK)])
    batches = make_micro_batches(packs, engine.dims.device)
    moved = 0
    for layers in (None, 0, 1, 2):
        policy = Policy(read_model_shape(folder), engine.dims, torch.float32, 128, layers or 0)
        policy.load(folder)
        sizes.append(policy.measure_activations())
        offload = OffloadedTensors(policy.core.parameters(), 0)
        with nullcontext() if layers is None else offload:
            policy.begin_job(pb.Optimizer(learning_rate=1.0, beta1=0.9, beta2=0.9))
            policy.step(batches, 1.0, lambda found: (found.logprobs_T.sum(), None), 0.0)
        gradients.append({name: each.main_grad.clone() for name, each in policy.core.named_parameters()})
        moved = max(moved, offload.moved_bytes)
    return gradients, sizes[1:], moved


@pytest.mark.parametrize("experts", [0, 4])
def test_a_step_that_saves_less_has_the_same_gradient(
    run_ranks: RunRanks, trainer_model: Path, tmp_path: Path, experts: int
) -> None:
    folder = trainer_model
    if experts:
        shape = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        folder = write_model(tmp_path, "Qwen3Moe", tied=False, **shape)
    gradients, sizes, moved = run_ranks(Sizes(), partial(save_less, folder=folder, experts=experts))
    plain = gradients[0]
    for other in gradients[1:]:
        errors = {name: float((other[name] - plain[name]).norm() / plain[name].norm()) for name in plain}
        assert max(errors.values()) < 1e-6, errors
    assert sizes[0] > sizes[1] > sizes[2]
    assert moved > 0


def train_beside_the_shelf(engine: Engine, folder: Path, disk: Path) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """The weights of a bfloat16 model after two jobs, without the shelf and with it in between.

    And bytes: weights and main weights, those on the shelf, and the weights that PyTorch still had when it was asked
    for its cache.
    """
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy
    from services.trainer.megatron.shelf import list_moments

    policy = Policy(read_model_shape(folder), engine.dims, torch.bfloat16, 128)
    batches = make_batches(engine, sequences())
    copies = policy.count_copies()
    sizes = [copies["weights"] + copies["main_weights"]]

    def count_left() -> None:
        left = sum(parameter.untyped_storage().nbytes() for parameter in policy.core.parameters())
        sizes.append(left + sum(each.nbytes for moment in moments if (each := moment()) is not None))

    found = []
    for is_shelved in (False, True):
        policy.load(folder)
        for job in range(2):
            if job and is_shelved:
                moments = [weakref.ref(each) for each in list_moments(policy.optimizer)]
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch.cuda, "empty_cache", count_left)
                    shelf = policy.offload(disk)
                sizes.append(shelf.shelved)
                shelf.close()
            policy.begin_job(pb.Optimizer(beta1=0.9, beta2=0.95))
            # Most updates are too small for bfloat16: the main weights have them.
            policy.step(batches, 1.0, lambda each: (-each.logprobs_T.sum(), None), 1e-4)
        found.append({name: tensor.clone() for name, tensor in policy.collect()})
    return found, sizes


def test_a_bfloat16_model_trains_as_if_it_had_not_been_on_the_shelf(
    run_ranks: RunRanks, models: list[Path], tmp_path: Path
) -> None:
    job = partial(train_beside_the_shelf, folder=models[1], disk=tmp_path)
    (undisturbed, shelved), (size, left, on_shelf) = run_ranks(Sizes(), job)
    assert all(torch.equal(undisturbed[name], shelved[name]) for name in undisturbed)
    assert on_shelf == size
    assert left == 0
