"""Context parallelism alone and with tensor, pipeline and data ranks, against one rank, on ragged packs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from perigee.trainer.v1 import trainer_pb2 as pb
from tests.fixtures.trainer import MadeTrajectory, make_groups, train_request, write_model
from tests.fixtures.trainer_ranks import RunRanks, Sizes, check_alike, check_slices, differentiate, in_float64, train

if TYPE_CHECKING:
    from services.trainer.engine import Engine

pytestmark = pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")

LAYOUTS = [
    Sizes(context=2),
    Sizes(context=4),
    Sizes(context=8),
    Sizes(tensor=2, context=2),
    Sizes(pipeline=2, context=2),
    Sizes(tensor=2, pipeline=2),
    Sizes(context=2, data=2),
    Sizes(tensor=2, context=2, recompute=True),
]
LENGTHS = [[211, 96, 96, 40, 7, 1], [333], [1], [64, 64, 64]]
DIFFERENTIATE = partial(differentiate, lengths=LENGTHS)
# Of losses and of gradients, in float32 and in float64.
BOUNDS = {False: (5e-5, 1e-5), True: (1e-9, 1e-9)}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "policy_mirror_descent": {"tau": 0.5},
    "rest": {},
    "grpo": {"kl_coef": 0.1, "ratio": "sequence", "aggregation": "sequence_mean"},
}


@pytest.fixture(scope="module")
def trainer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen3 of 8 heads and 2 of keys and values, so that 4 and 8 ranks repeat these."""
    sizes = {"num_attention_heads": 8, "hidden_size": 64, "max_position_embeddings": 512}
    return write_model(tmp_path_factory.mktemp("context"), "Qwen3", tied=False, **sizes)


def in_precision(job: Callable[[Engine], Any], exact: bool) -> Callable[[Engine], Any]:
    """The job on the ranks' own policy, in float32, or on one in float64."""
    return partial(in_float64, job=job) if exact else job


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks) -> dict[bool, Any]:
    """The loss and the gradient on one rank, in float32 and in float64."""
    return {exact: run_ranks(Sizes(), in_precision(DIFFERENTIATE, exact)) for exact in (False, True)}


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_loss_and_gradient_are_those_of_one_rank(
    run_ranks: RunRanks, alone: dict[bool, Any], sizes: Sizes, exact: bool
) -> None:
    check_alike(run_ranks(sizes, in_precision(DIFFERENTIATE, exact)), alone[exact], *BOUNDS[exact])


@pytest.mark.parametrize("sizes", [LAYOUTS[0], *LAYOUTS[3:5]], ids=str)
def test_layers_computed_again_and_activations_moved_away_change_nothing(
    run_ranks: RunRanks, alone: dict[bool, Any], sizes: Sizes
) -> None:
    job = partial(in_float64, job=DIFFERENTIATE, recompute_layers=1, offload_activations=True)
    check_alike(run_ranks(sizes, job), alone[True], *BOUNDS[True])


def run_jobs(engine: Engine, groups: dict[str, list[MadeTrajectory]], requests: Sequence[pb.TrainRequest]) -> Any:
    """The metrics of supervised jobs and of an iteration of each algorithm, and the weights after all."""
    from services.trainer.fine_tuning import count_tokens, fine_tune
    from services.trainer.packing import TokenSequence

    found: list[dict[str, float]] = []
    generator = np.random.default_rng(0)
    for name, responses in (("sft", 1), ("dpo", 2)):
        examples = [
            tuple(
                TokenSequence(generator.integers(2, 48, n), np.arange(1, n) >= n // 3)
                for n in generator.integers(4, 90, responses)
            )
            for _ in range(12)
        ]
        tuning = pb.FineTuneRequest(steps=3, batch_size=4, max_tokens_per_microbatch=64, seed=1)
        tuning.optimizer.CopyFrom(requests[0].optimizer)
        tuning.algorithm.name = name
        context = engine.job_context()
        context.interval_s = math.inf
        own = examples if engine.dims.rank == 0 else None
        last = fine_tune(engine.policy, context, engine._bound(tuning), count_tokens(examples), own)
        # The margins of the first step's pairs are 0 but for rounding, which decides about their signs.
        metrics = {each: value for each, value in last.metrics.items() if each != "accuracy"}
        found.append({"loss": last.loss, "grad_norm": last.grad_norm, **metrics})
    for request in requests:
        result = train(engine, groups, engine._bound(request))
        measured = ("seconds", "bytes", "per_second")
        found.append({name: value for name, value in result.metrics.items() if not name.endswith(measured)})
    check_slices(engine, engine.policy)
    return found, dict(engine.policy.collect())


@pytest.fixture(scope="module")
def trained(run_ranks: RunRanks) -> dict[bool, Any]:
    """The jobs on one rank, in float32 and in float64."""
    return {exact: run_ranks(Sizes(), in_precision(make_jobs(), exact)) for exact in (False, True)}


def make_jobs() -> Any:
    groups = make_groups("context", 6, groups=4, k=3, spans=[[(0, 70)], [(0, 31), (1, 90)], [(1, 3)]])
    optimizer = pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95, max_grad_norm=1.0, min_lr_ratio=1.0)
    options: dict[str, Any] = {"base": 1, "max_staleness": 0, "tis_cap": 1.5, "max_tokens_per_microbatch": 64}
    requests = []
    for name, settings in ALGORITHMS.items():
        request = train_request("r", groups, [1.0, 0.25, 0.6], optimizer=optimizer, minibatches=2, **options)
        request.algorithm.Clear()
        request.algorithm.name = name
        request.algorithm.settings.update(settings)
        requests.append(request)
    return partial(run_jobs, groups=groups, requests=requests)


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", [LAYOUTS[1], *LAYOUTS[3:6]], ids=str)
def test_every_algorithm_learns_as_on_one_rank(
    run_ranks: RunRanks, trained: dict[bool, Any], sizes: Sizes, exact: bool
) -> None:
    metrics, weights = run_ranks(sizes, in_precision(make_jobs(), exact))
    expected_metrics, expected_weights = trained[exact]
    bounds = {"rel": 1e-9, "abs": 1e-12} if exact else {"rel": 2e-4, "abs": 2e-6}
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found == pytest.approx(expected, nan_ok=True, **bounds)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert (weights[name] - value).abs().max() < (1e-12 if exact else 5e-5), name


def round_off(engine: Engine, folder: Path) -> tuple[float, float]:
    """The mean difference of a bfloat16 model's log-probabilities from those in float32, and a step's gradient norm."""
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy
    from services.trainer.packing import TokenSequence, make_micro_batches

    policy = Policy(read_model_shape(folder), engine.dims, torch.bfloat16, 512)
    policy.load(folder)
    policy.begin_job(pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0))
    tokens = np.random.default_rng(0).integers(0, 48, 300)
    batches = make_micro_batches([[TokenSequence(tokens, np.ones(299, np.bool_))]], engine.dims.device)
    [exact] = engine.policy.evaluate(batches, 1.0)
    norm, [logprobs_T] = policy.step(
        batches, 1.0, lambda found: (-found.logprobs_T.mean(), found.logprobs_T.detach()), 0.0
    )
    return float((logprobs_T - exact.logprobs_T).abs().mean()), norm


def test_bfloat16_rounds_as_on_one_rank(run_ranks: RunRanks, trainer_model: Path) -> None:
    job = partial(round_off, folder=trainer_model)
    difference, norm = run_ranks(Sizes(), job)
    for sizes in (Sizes(context=2), Sizes(tensor=2, context=2)):
        found = run_ranks(sizes, job)
        assert found[0] < 2 * difference
        assert found[1] == pytest.approx(norm, rel=0.05)


def attend(engine: Engine) -> tuple[float, float]:
    """The largest errors of attention over the ranks in float64, of its output and of the gradient of its input."""
    from types import SimpleNamespace

    from services.trainer.megatron.attention import PackedAttention
    from services.trainer.packing import TokenSequence, make_micro_batches, take_share

    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS[0]
    tokens, dims = sum(lengths), engine.dims
    config = engine.policy.core.config
    [batch] = make_micro_batches(
        [[TokenSequence(np.zeros(n + 1, np.int64), np.ones(n, np.bool_)) for n in lengths]], dims.device
    )
    share = take_share(batch, dims.context_rank, dims.context)
    size = len(share.inputs_T)
    filled = size * dims.context
    whole = [torch.randn(filled, 1, heads, 8, generator=generator, dtype=torch.float64) for heads in (8, 2, 2)]
    upstream_T1D = torch.randn(filled, 1, 64, generator=generator, dtype=torch.float64)

    def run(packed: Any, part: slice, ranks: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        inputs = [each[part].clone().requires_grad_() for each in whole]
        options = vars(config) | {"context_parallel_size": ranks}
        attention = PackedAttention(SimpleNamespace(**options), 1, None, "self")  # type: ignore[arg-type]
        output_T1D = attention(*inputs, None, packed_seq_params=packed)
        return output_T1D.detach(), list(torch.autograd.grad((output_T1D * upstream_T1D[part]).sum(), inputs))

    expected_T1D, expected = run(batch.packed, slice(tokens), 1)
    own = slice(dims.context_rank * size, (dims.context_rank + 1) * size)
    found_T1D, found = run(share.packed, own, dims.context)
    real = max(0, min(size, tokens - own.start))
    errors = [
        max([float((a[:real] - b[own][:real]).abs().max()) for a, b in pairs if real] or [0.0])
        for pairs in ([(found_T1D, expected_T1D)], list(zip(found, expected, strict=True)))
    ]
    output, gradient = (max(each) for each in zip(*engine.everyone.gather(errors), strict=True))
    return output, gradient


@pytest.mark.parametrize("sizes", LAYOUTS[:3], ids=str)
def test_attention_over_ranks_is_exact_in_float64(run_ranks: RunRanks, sizes: Sizes) -> None:
    output, gradient = run_ranks(sizes, attend)
    assert output <= 1e-12
    assert gradient <= 1e-9
