"""Qwen3-MoE: Hugging Face in and out, training and router replay over tensor, pipeline, expert and data ranks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from perigee.cli.check import count_activations, count_by_config
from perigee.errors import DataLossError, InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1.weights_pb2 import PullRequest
from services.rollout.model import open_policy
from services.trainer.architecture import check_divisible
from services.trainer.config import TrainerConfig
from services.trainer.data import unpack_experts
from services.trainer.hf import read_model_shape
from services.weights.config import WeightsConfig
from services.weights.lend import LentImage
from services.weights.pieces import Export, join_exports
from tests.fixtures.trainer import MadeTrajectory, make_groups, train_request, write_model
from tests.fixtures.trainer_ranks import (
    RunRanks,
    Sizes,
    check_slices,
    gather_gradients,
    make_batches,
    to_trajectories,
    train,
)
from tests.fixtures.weights import equal, local_receiver, local_source

if TYPE_CHECKING:
    from services.trainer.data import Trajectory
    from services.trainer.engine import Engine
    from services.trainer.packing import TokenSequence

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LAYOUTS = [
    Sizes(tensor=2),
    Sizes(tensor=2, expert=2),
    Sizes(context=2, expert=2),
    Sizes(pipeline=2, data=2, expert=2, recompute=True),
]


@pytest.fixture(scope="module")
def trainer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen3-MoE, which the ranks of this module hold."""
    return write_model(tmp_path_factory.mktemp("experts"), "Qwen3Moe", tied=False, norm_topk_prob=True, **EXPERTS)


def sequences() -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 48, n) for n in (2, 9, 30, 31)]


def evaluate(engine: Engine, folder: Path) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The weights of a folder once loaded, and the log-probabilities of the sequences."""
    from services.trainer.megatron.model import Policy

    policy = Policy(read_model_shape(folder), engine.dims, torch.float32, 128)
    policy.load(folder)
    found = policy.evaluate(make_batches(engine, sequences()), 1.0)
    logprobs = engine.everyone.gather([each.logprobs_T for each in found])
    return dict(policy.collect()), next(part for part in logprobs if part)


def train_twice(engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest) -> Any:
    """The metrics of a fine-tuning job and of an iteration, and the weights after them."""
    from services.trainer.fine_tuning import count_tokens, fine_tune
    from services.trainer.packing import TokenSequence

    generator = np.random.default_rng(0)
    # Three micro-batches, so that of two replicas one has a micro-batch more than the other.
    examples = [(TokenSequence(generator.integers(2, 48, n), np.arange(1, n) >= n // 2),) for n in (4, 27, 12)]
    tuning = pb.FineTuneRequest(
        steps=3, batch_size=3, max_tokens_per_microbatch=20, seed=1, optimizer=request.optimizer
    )
    context = engine.job_context()
    context.interval_s = math.inf
    first = fine_tune(
        engine.policy, context, tuning, count_tokens(examples), examples if engine.dims.rank == 0 else None
    )
    second = train(engine, groups, request)
    names = ("loss", "grad_norm", "entropy", "kl_k3")
    metrics = [first.loss, first.grad_norm, *(second.metrics[f"train/{name}"] for name in names)]
    check_slices(engine, engine.policy)
    return metrics, dict(engine.policy.collect())


@pytest.fixture(scope="module")
def trained(run_ranks: RunRanks) -> Any:
    """The job of `train_twice` on one rank."""
    return run_ranks(Sizes(), _job())


def _job() -> Any:
    groups = make_groups("experts", 6, groups=3, k=3, spans=[[(0, 7)], [(0, 12)], [(0, 3)]])
    optimizer = pb.Optimizer(learning_rate=2e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0)
    request = train_request(
        "r", groups, [1.0, 0.25, 0.0], optimizer=optimizer, minibatches=2, max_tokens_per_microbatch=24
    )
    return partial(train_twice, groups=groups, request=request)


@pytest.mark.parametrize("renormalized", [True, False])
def test_weights_round_trip_and_logits_agree(
    run_ranks: RunRanks, trainer_model: Path, tmp_path: Path, renormalized: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = trainer_model
    if not renormalized:
        folder = write_model(tmp_path, "Qwen3Moe", tied=True, seed=1, norm_topk_prob=False, **EXPERTS)
    original = load_file(folder / "model.safetensors")
    shapes = open_policy(str(folder), None).tensor_shapes
    assert shapes == {name: tuple(tensor.shape) for name, tensor in original.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for tokens in sequences():
        ids = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1], -1)
        expected.append(logprobs_TV.gather(1, ids[0, 1:, None])[:, 0])
    for sizes in (Sizes(), *LAYOUTS) if renormalized else (Sizes(),):
        weights, logprobs = run_ranks(sizes, partial(evaluate, folder=folder))
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original), sizes
        for expected_T, logprobs_T in zip(expected, logprobs, strict=True):
            assert (logprobs_T - expected_T).abs().max() < 1e-5, sizes


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_rank(run_ranks: RunRanks, trained: Any, sizes: Sizes) -> None:
    metrics, weights = run_ranks(sizes, _job())
    assert metrics == pytest.approx(trained[0], rel=1e-4, abs=1e-6)
    assert weights.keys() == trained[1].keys()
    for name, value in trained[1].items():
        assert (weights[name] - value).abs().max() < 2e-5, name


def lend(engine: Engine) -> list[Export]:
    """What each rank lends."""
    return engine._export()[0]


def end_lending(engine: Engine) -> None:
    engine._pieces.close()


@pytest.mark.parametrize("sizes", LAYOUTS[1:], ids=str)
async def test_pieces_that_ranks_lend_are_the_folder(run_ranks: RunRanks, trainer_model: Path, sizes: Sizes) -> None:
    """Tensor, pipeline and expert ranks; those that hold the same share it out."""
    exports = run_ranks(sizes, lend)
    manifest, holdings = join_exports("run", 1, exports)
    config = WeightsConfig()
    async with local_source(config, ranks=0) as source, local_receiver(config) as receiver:
        source.source.lend("image", LentImage(manifest, holdings))
        async with WeightReceiverClient.connect(receiver.address) as client:
            await client.pull(PullRequest(image_id="image", sources=[source.address]), timeout_s=60)
    assert equal(receiver.loaded, load_file(trainer_model / "model.safetensors"))
    run_ranks(sizes, end_lending)


COEFFICIENT = 0.5


def balance(engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
    """The gradient of a step whose policy has no loss of its own, with a micro-batch for each sequence."""
    from services.trainer.megatron.model import Policy

    policy = Policy(read_model_shape(folder), engine.dims, torch.float32, 128, router_aux_loss_coef=COEFFICIENT)
    policy.load(folder)
    policy.begin_job(pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0))
    batches = make_batches(engine, sequences())
    policy.step(batches, 1.0, lambda found: (found.logprobs_T.sum() * 0.0, None), 0.0)
    gather_gradients(policy.model)
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    return dict(policy.collect())


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tensor=2), Sizes(context=2, expert=2)], ids=str)
def test_the_load_balancing_loss_is_the_mean_over_tokens(
    run_ranks: RunRanks, trainer_model: Path, sizes: Sizes
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trainer_model, dtype=torch.float32)
    loss = torch.zeros(())
    for tokens in sequences():
        output = model(torch.from_numpy(tokens)[None, :-1], output_router_logits=True)
        for logits_TE in output.router_logits:
            probabilities_TE = logits_TE.softmax(-1)
            chosen_TK = probabilities_TE.topk(2, -1).indices
            shares_E = torch.bincount(chosen_TK.flatten(), minlength=4) / chosen_TK.numel()
            loss = loss + (len(tokens) - 1) * 4 * (shares_E * probabilities_TE.mean(0)).sum()
    loss = COEFFICIENT * loss / sum(len(tokens) - 1 for tokens in sequences())
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = run_ranks(sizes, partial(balance, folder=trainer_model))
    compared = [name for name, _ in model.named_parameters() if name in gradient and "lm_head" not in name]
    assert sum(name.endswith("mlp.gate.weight") for name in compared) == 2
    for name in compared:
        expected = model.get_parameter(name).grad
        if expected is not None:
            assert torch.allclose(gradient[name], expected, rtol=1e-3, atol=1e-6), name


def force(model: torch.nn.Module, experts_TLK: torch.Tensor) -> list[torch.Tensor]:
    """Has the routers of transformers take these experts, or their own where negative; returns their own, by layer."""
    found: list[torch.Tensor] = []
    for number, layer in enumerate(model.get_submodule("model.layers").children()):
        gate = layer.get_submodule("mlp.gate")

        def choose(
            hidden_TD: torch.Tensor, gate: Any = gate, wanted_TK: torch.Tensor = experts_TLK[:, number].long()
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits_TE = hidden_TD.flatten(0, -2) @ gate.weight.T
            found.append(logits_TE.topk(2, -1).indices)
            chosen_TK = torch.where(wanted_TK < 0, found[-1], wanted_TK)
            return logits_TE, logits_TE.gather(1, chosen_TK).softmax(-1), chosen_TK

        gate.forward = choose
    return found


def draw_experts(generator: np.random.Generator, tokens: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two distinct experts of four for each token and layer."""
    return generator.random((tokens, 2, 4)).argsort(-1)[:, :, :2].astype(np.uint8)


def replay(
    engine: Engine, replayed: list[TokenSequence]
) -> tuple[list[torch.Tensor], tuple[int, int], dict[str, torch.Tensor]]:
    """Log-probabilities of an evaluation and of a step, what the step replayed, and the gradient of their sum."""
    from services.trainer.packing import make_micro_batches

    policy = engine.policy
    batches = make_micro_batches([[sequence] for sequence in replayed], engine.dims.device)
    logprobs = [each.logprobs_T for each in policy.evaluate(batches, 1.0)]
    policy.take_replay_counts()
    policy.begin_job(pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0))
    _, reports = policy.step(batches, 1.0, lambda found: (found.logprobs_T.sum(), found.logprobs_T.detach()), 0.0)
    gather_gradients(policy.model)
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    return logprobs + reports, policy.take_replay_counts(), dict(policy.collect())


@dataclass(frozen=True)
class Replayed:
    """Sequences with experts to replay; on transformers, their log-probabilities and the gradient of the sum of these.

    `differing` are the replayed choices that the model would not have made.
    """

    sequences: list[TokenSequence]
    logprobs: list[torch.Tensor]
    gradient: dict[str, torch.Tensor]
    differing: int


@pytest.fixture(scope="module")
def replayed(trainer_model: Path) -> Replayed:
    """Sequences whose responses pass experts drawn at random."""
    from transformers import AutoModelForCausalLM

    from services.trainer.packing import TokenSequence

    generator = np.random.default_rng(1)
    model = AutoModelForCausalLM.from_pretrained(trainer_model, dtype=torch.float32)
    replayed, expected, differing = [], [], 0
    for tokens in sequences():
        trained_T = np.arange(len(tokens) - 1) >= len(tokens) // 3
        replayed.append(TokenSequence(tokens, trained_T, draw_experts(generator, len(trained_T))))
        # Prompts route themselves.
        wanted_TLK = torch.from_numpy(np.where(trained_T[:, None, None], replayed[-1].experts_TLK, np.int16(-1)))
        own = force(model, wanted_TLK)
        ids = torch.from_numpy(tokens)[None]
        logprobs_TV = torch.log_softmax(model(ids[:, :-1]).logits[0], -1)
        expected.append(logprobs_TV.gather(1, ids[0, 1:, None])[:, 0] * torch.from_numpy(trained_T))
        own_TLK = torch.stack(own, 1)
        chosen_TLK = torch.where(wanted_TLK < 0, own_TLK, wanted_TLK)
        differing += int((chosen_TLK[..., None] != own_TLK[..., None, :]).all(-1).sum())
    sum(each.sum() for each in expected).backward()
    gradient = {name: value.grad for name, value in model.named_parameters() if "lm_head" not in name}
    return Replayed(replayed, [each.detach() for each in expected], gradient, differing)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tensor=2, expert=2), Sizes(context=2, expert=2)], ids=str)
def test_replayed_experts_are_used_and_trained(run_ranks: RunRanks, replayed: Replayed, sizes: Sizes) -> None:
    logprobs, counts, gradient = run_ranks(sizes, partial(replay, replayed=replayed.sequences))
    for found_T, expected_T in zip(logprobs, replayed.logprobs * 2, strict=True):
        assert (found_T - expected_T).abs().max() < 1e-5
    assert counts == (4 * sum(int(each.trained_T.sum()) for each in replayed.sequences), replayed.differing)
    compared = {name: value for name, value in replayed.gradient.items() if name in gradient}
    assert sum(name.endswith("mlp.gate.weight") for name in compared) == 2
    for name, value in compared.items():
        assert torch.allclose(gradient[name], value, rtol=1e-3, atol=1e-5), name


def train_replayed(engine: Engine, trajectories: dict[str, Trajectory], request: pb.TrainRequest) -> Any:
    """The metrics of an iteration over the trajectories, and the weights after it."""
    from services.trainer.training import train_iteration

    result = train_iteration(
        engine.policy,
        engine.job_context(),
        request,
        0,
        lambda _, ids, tokens: {name: trajectories[name] for name in ids},
    )
    return dict(result.metrics), dict(engine.policy.collect())


def test_an_iteration_replays_the_rollout(run_ranks: RunRanks, trainer_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    generator = np.random.default_rng(2)
    model = AutoModelForCausalLM.from_pretrained(trainer_model, dtype=torch.float32)
    # The first trajectory of each group has stale tokens, the last one no choices.
    groups = make_groups("replay", 7, groups=3, k=3, spans=[[(0, 5), (1, 7)], [(1, 12)], [(1, 4)]])
    trajectories = to_trajectories(groups)
    for position, (name, trajectory) in enumerate(trajectories.items()):
        prompt, tokens = len(trajectory.prompt_tokens), len(trajectory.tokens_T)
        experts_TLK = draw_experts(generator, tokens)
        wanted_TLK = np.full((prompt + tokens - 1, 2, 2), -1, np.int16)
        if position % 3 < 2:
            trajectory = replace(trajectory, experts=experts_TLK.tobytes())
            wanted_TLK[prompt - 1 :][trajectory.versions_T == 1] = experts_TLK[trajectory.versions_T == 1]
        force(model, torch.from_numpy(wanted_TLK))
        ids = torch.from_numpy(np.concatenate([trajectory.prompt_tokens, trajectory.tokens_T]))[None]
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids[:, :-1]).logits[0], -1)
        logprobs_T = logprobs_TV.gather(1, ids[0, 1:, None])[prompt - 1 :, 0]
        trajectories[name] = replace(trajectory, rollout_logprobs_T=logprobs_T.numpy())
    optimizer = pb.Optimizer(learning_rate=2e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0)
    request = train_request(
        "r", groups, [1.0, 0.25, 0.0], base=1, optimizer=optimizer, minibatches=2, max_tokens_per_microbatch=24
    )
    job = partial(train_replayed, trajectories=trajectories, request=request)
    expected, weights = run_ranks(Sizes(), job)
    assert expected["train/replay_share"] == pytest.approx(19 / 23)
    assert 0.2 < expected["train/replay_diff_share"] < 0.8
    assert expected["train/train_infer_logprob_diff_max"] < 1e-5
    assert expected["train/unreplayed_logprob_diff_mean"] > 0.01
    names = ("loss", "grad_norm", "entropy", "kl_k3", "replay_share", "replay_diff_share")
    for sizes in LAYOUTS:
        metrics, trained = run_ranks(sizes, job)
        for name in names:
            assert metrics[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-4, abs=1e-6), sizes
        assert metrics["train/train_infer_logprob_diff_max"] < 1e-5
        assert all((trained[name] - value).abs().max() < 2e-5 for name, value in weights.items()), sizes
    name = next(iter(trajectories))
    trajectories[name] = replace(trajectories[name], experts=trajectories[name].experts[:-1])
    # The error would end the ranks of the module.
    with pytest.raises(DataLossError, match="not of 2 layers with 4 experts, of which a token passes 2"):
        unpack_experts(trajectories[name], read_model_shape(trainer_model))


def measure(engine: Engine) -> float:
    """The bytes of a token's activations."""
    return engine.policy.measure_activations()


def test_sizes_are_those_that_a_recipe_is_checked_by(run_ranks: RunRanks, trainer_model: Path) -> None:
    config = json.loads((trainer_model / "config.json").read_text())
    assert 4 * count_activations(config, recompute=False) == pytest.approx(run_ranks(Sizes(), measure), rel=0.25)
    matrices = {name: tensor.numel() for name, tensor in load_file(trainer_model / "model.safetensors").items()}
    counted = sum(size for name, size in matrices.items() if "norm" not in name and "mlp.gate." not in name)
    assert count_by_config(config) == counted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_only_layers": [0]}, r"has mlp_only_layers \[0\], of which only \[\] is supported"),
        ({"decoder_sparse_step": 2}, "has decoder_sparse_step 2, of which only 1 is supported"),
        ({"num_experts_per_tok": 1}, "has norm_topk_prob True, of which only False is supported"),
        ({"num_local_experts": None}, "has no num_local_experts"),
    ],
)
def test_an_unsupported_mixture_is_refused_by_field(
    trainer_model: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    config = json.loads((trainer_model / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match=message):
        read_model_shape(tmp_path)


def test_processes_that_cannot_share_experts_or_heads_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="expert_parallel must divide tensor_parallel x context_parallel x data_parallel, 2,"
    ):
        TrainerConfig(model="m", run_path="r", data_parallel=2, expert_parallel=4)
    model = {"heads": 4, "query_groups": 2, "feed_forward": 64, "vocabulary": 48, "layers": 2}
    for experts in (4, 0):
        with pytest.raises(InvalidArgumentError, match=rf"expert_parallel 3 does not .* experts \({experts}\)"):
            check_divisible(**model, experts=experts, tensor=1, context=1, pipeline=1, expert=3)
    with pytest.raises(InvalidArgumentError, match=r"2 x 4, does not divide the model's attention heads \(4\)"):
        check_divisible(**model, experts=0, tensor=2, context=4, pipeline=1, expert=1)
