"""The trainer's loss and gradient against the report's equation (3), written out anew in float64 on transformers."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import xxhash

from perigee.buffer.client import BufferClient
from perigee.cli.check import count_activations
from perigee.errors import InternalError, InvalidArgumentError, PerigeeError, UnavailableError
from perigee.trainer.v1 import trainer_pb2 as pb
from tests.fixtures.hosts import Network
from tests.fixtures.trainer import MadeTrajectory, make_groups, store_groups, train_request
from tests.fixtures.trainer_ranks import (
    Ranks,
    RunRanks,
    Sizes,
    check_alike,
    differentiate,
    gather_gradients,
    in_float64,
    to_trajectories,
    train,
)

if TYPE_CHECKING:
    from services.trainer.engine import Engine

REWARDS = [1.0, 0.25, 0.0, 0.6]
# Base version 3: spans of versions 1 and 2 lie behind it.
SPANS = [[(3, 7)], [(1, 4), (2, 3), (3, 5)], [(2, 6), (3, 2)], [(2, 5)]]
# Factor by which the weights move after the reference was taken.
MOVE = 1.05


def make_request(groups: dict[str, list[MadeTrajectory]], baseline: str = "mean", **fields: Any) -> pb.TrainRequest:
    """An iteration with every part of the loss away from its neutral value."""
    values = {"max_tokens_per_microbatch": 40, "max_staleness": 1, "token_scale": 3.0, "temperature": 0.8} | fields
    tau = values.pop("tau", 0.5)
    optimizer = pb.Optimizer(learning_rate=2e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0)
    algorithm = {"tau": tau, "baseline": baseline}
    return train_request("r", groups, REWARDS, base=3, algorithm=algorithm, optimizer=optimizer, **values)


def loss_and_gradient(
    engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest
) -> tuple[float, dict[str, torch.Tensor]]:
    """The trainer's own: the mean loss of an iteration whose steps see moved weights, and the last step's gradient.

    The first step is its own reference; those of later ones are taken before the move.
    """
    result, gradient = move_and_run(engine, lambda: train(engine, groups, request))
    return result.metrics["train/loss"], gradient


def move_and_run(engine: Engine, job: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result of a job whose weights move between reference and steps, and the last step's gradient.

    A loss may be flat at the reference itself, so the gradient is taken a step away from it.
    """
    begin_job = engine.policy.begin_job

    def move_then_begin(optimizer: pb.Optimizer) -> None:
        with torch.no_grad():
            for _, parameter in sorted(engine.policy.core.named_parameters()):
                parameter.mul_(MOVE)
        begin_job(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.policy, "begin_job", move_then_begin)
        result = job()
    gather_gradients(engine.policy.model)
    with torch.no_grad():
        for parameter in engine.policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    return result, dict(engine.policy.collect())


def equation_3(
    model_path: Path, made: dict[str, list[MadeTrajectory]], request: pb.TrainRequest, reference_scale: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss (the surrogate with the sign turned) and gradient, trajectory by trajectory, in float64.

    The reference is the model's weights times `reference_scale`.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), reference.parameters(), strict=True):
            parameter.mul_(MOVE)
            before.mul_(reference_scale)
    settings, update = dict(request.algorithm.settings), request.update
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    baseline = rewards.mean()
    if settings["baseline"] == "log_mean_exp":
        baseline = settings["tau"] * torch.log(torch.exp(rewards / settings["tau"]).mean())

    def logprobs(policy: Any, item: MadeTrajectory) -> torch.Tensor:
        ids = torch.tensor([item.prompt + item.tokens])
        table = torch.log_softmax(policy(ids).logits[0] / update.temperature, dim=-1)
        first = len(item.prompt)
        picked: torch.Tensor = torch.stack([table[first + t - 1, token] for t, token in enumerate(item.tokens)])
        return picked

    objective = torch.zeros((), dtype=torch.float64)
    for items in made.values():
        for item, reward in zip(items, rewards, strict=True):
            versions = [version for version, count in item.versions for _ in range(count)]
            fresh = torch.tensor([3 - version <= update.max_staleness for version in versions])
            with torch.no_grad():
                before = logprobs(reference, item)
            now = logprobs(model, item)
            weight = torch.ones_like(before)
            if update.tis_cap:
                engine = torch.tensor(item.logprobs, dtype=torch.float64)
                weight = torch.exp(before - engine).clamp(max=update.tis_cap)
            scale = update.token_scale
            gain = (reward - baseline) * (now * weight)[fresh].sum() / scale
            penalty = settings["tau"] / 2 * ((now - before)[fresh].sum() / scale) ** 2
            objective = objective + (gain - penalty) / len(items)
    objective = objective / len(made)
    objective.backward()  # type: ignore[no-untyped-call]
    gradient = {name: -p.grad for name, p in model.named_parameters() if p.grad is not None}
    return -objective.item(), gradient


@cache
def find_equation_3(
    model_path: Path, baseline: str, cap: float, steps: int
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The equation's loss and gradient of each step of a job, which are the same on every layout."""
    from services.trainer.training import split_groups

    made, request = make_job(baseline, cap, steps)
    shares = [{key: made[key] for key in np.array(list(made))[share]} for share in split_groups(2, steps, 0)]
    return [equation_3(model_path, share, request, 1.0 if step else MOVE) for step, share in enumerate(shares)]


def make_job(baseline: str, cap: float, steps: int) -> tuple[dict[str, list[MadeTrajectory]], pb.TrainRequest]:
    """Two groups, and a request to train on them whose steps have the same weights."""
    made = make_groups("eq", 5, groups=2, k=4, spans=SPANS)
    request = make_request(made, baseline, tis_cap=cap, minibatches=steps)
    # So small that the second step has the weights of the first.
    request.optimizer.learning_rate = 1e-30
    return made, request


@pytest.mark.parametrize(
    ("baseline", "cap", "sizes", "steps"),
    [
        ("mean", 0.0, Sizes(), 2),
        ("log_mean_exp", 0.0, Sizes(), 2),
        ("mean", 1.5, Sizes(), 2),
        ("mean", 1.5, Sizes(), 1),
        ("mean", 0.0, Sizes(tensor=2), 2),
        ("mean", 0.0, Sizes(pipeline=2), 2),
        ("mean", 1.5, Sizes(context=2), 2),
    ],
)
def test_loss_and_gradient_are_equation_3(
    run_ranks: RunRanks, trainer_model: Path, baseline: str, cap: float, sizes: Sizes, steps: int
) -> None:
    made, request = make_job(baseline, cap, steps)
    loss, gradient = run_ranks(sizes, partial(loss_and_gradient, groups=made, request=request))
    found = find_equation_3(trainer_model, baseline, cap, steps)
    assert loss == pytest.approx(np.mean([each for each, _ in found]), rel=1e-5)
    _, expected = found[-1]
    assert gradient.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (gradient[name].double() - value).abs().max() < 1e-5 * largest, name


# Prompt, chosen and rejected tokens of each pair.
PAIRS = [(3, 4, 9), (5, 2, 2), (2, 11, 3), (4, 6, 8), (1, 5, 1)]


def make_pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """The tokens of the prompt, of chosen and of rejected, for each of PAIRS."""
    generator = np.random.default_rng(8)
    return [tuple(generator.integers(2, 48, n).tolist() for n in lengths) for lengths in PAIRS]  # type: ignore[misc]


def prefer(engine: Engine, request: pb.FineTuneRequest) -> tuple[pb.FineTuneResponse, dict[str, torch.Tensor]]:
    """A DPO job's last report, and the gradient of its last step."""
    from services.trainer.fine_tuning import count_tokens, fine_tune
    from services.trainer.packing import TokenSequence

    examples = [
        tuple(
            TokenSequence(np.array([*prompt, *response]), np.arange(1, len(prompt) + len(response)) >= len(prompt))
            for response in responses
        )
        for prompt, *responses in make_pairs()
    ]
    context = engine.job_context()
    context.interval_s = math.inf
    own = examples if engine.dims.rank == 0 else None
    return move_and_run(engine, lambda: fine_tune(engine.policy, context, request, count_tokens(examples), own))


@cache
def dpo_in_float64(model_path: Path, beta: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradient of one step on all pairs, on transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(MOVE)

    def logprob(policy: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
        table = torch.log_softmax(policy(torch.tensor([prompt + response])).logits[0], dim=-1)
        picked = [table[len(prompt) + t - 1, token] for t, token in enumerate(response)]
        return torch.stack(picked).sum()

    losses, metrics = [], {"margin": 0.0, "accuracy": 0.0, "chosen_logprob": 0.0, "rejected_logprob": 0.0}
    for prompt, chosen, rejected in make_pairs():
        now = [logprob(model, prompt, response) for response in (chosen, rejected)]
        with torch.no_grad():
            before = [logprob(reference, prompt, response) for response in (chosen, rejected)]
        margin = beta * (now[0] - before[0] - now[1] + before[1])
        losses.append(torch.log(1 + torch.exp(-margin)))
        for name, value in zip(metrics, (margin, margin > 0, *now), strict=True):
            metrics[name] += float(value) / len(PAIRS)
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return metrics | {"loss": loss.item()}, gradient


@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(tensor=2), Sizes(pipeline=2), Sizes(context=2), Sizes(data=2)], ids=str
)
def test_preferences_are_learned_by_the_equation_on_every_layout(
    run_ranks: RunRanks, trainer_model: Path, sizes: Sizes
) -> None:
    optimizer = pb.Optimizer(learning_rate=1e-30, beta1=0.9, beta2=0.95, min_lr_ratio=1.0)
    # Two epochs to a step, shuffled and packed otherwise in each: every pair counts as often as the others.
    request = pb.FineTuneRequest(steps=2, batch_size=10, max_tokens_per_microbatch=30, optimizer=optimizer)
    request.algorithm.name = "dpo"
    request.algorithm.settings["beta"] = 0.7
    response, gradient = run_ranks(sizes, partial(prefer, request=request))
    metrics, expected = dpo_in_float64(trainer_model, 0.7)
    assert {"loss": response.loss, **response.metrics} == pytest.approx(metrics, rel=1e-4)
    assert response.grad_norm == pytest.approx(math.hypot(*map(torch.linalg.vector_norm, expected.values())), rel=1e-4)
    assert gradient.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (gradient[name].double() - value).abs().max() < 1e-4 * largest, name


METRICS = (
    "loss",
    "grad_norm",
    "entropy",
    "kl_k1",
    "kl_k3",
    "train_infer_kl",
    "train_infer_logprob_diff_max",
    "mask_share",
)


def train_twice(engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest) -> Any:
    """A fine-tuning job and an iteration; their metrics and the weights after them."""
    from services.trainer.fine_tuning import count_tokens, fine_tune
    from services.trainer.packing import TokenSequence

    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 30, 20)
    examples = [(TokenSequence(generator.integers(2, 48, n), np.arange(1, n) >= n // 2),) for n in lengths]
    tuning = pb.FineTuneRequest(
        steps=4, batch_size=5, max_tokens_per_microbatch=40, seed=1, optimizer=request.optimizer
    )
    context = engine.job_context()
    # Progress covers the steps since the last report: with none in between, all of them.
    context.interval_s = math.inf
    first = fine_tune(
        engine.policy, context, tuning, count_tokens(examples), examples if engine.dims.rank == 0 else None
    )
    second = train(engine, groups, request)
    metrics = [first.loss, first.grad_norm, *(second.metrics[f"train/{name}"] for name in METRICS)]
    return metrics, second.trained_tokens, dict(engine.policy.collect())


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks) -> Any:
    """The job of `train_twice` on one rank."""
    return run_ranks(Sizes(), _job())


def _job() -> Any:
    made = make_groups("equal", 6, groups=5, k=4, spans=SPANS)
    return partial(train_twice, groups=made, request=make_request(made, minibatches=2))


@pytest.mark.parametrize(
    "sizes",
    [Sizes(tensor=2), Sizes(pipeline=2), Sizes(context=2), Sizes(data=2), Sizes(recompute=True)],
    ids=str,
)
def test_every_layout_trains_as_one_rank(run_ranks: RunRanks, alone: Any, sizes: Sizes) -> None:
    metrics, trained, weights = run_ranks(sizes, _job())
    assert trained == alone[1]
    assert metrics == pytest.approx(alone[0], rel=1e-4, abs=1e-6)
    assert weights.keys() == alone[2].keys()
    for name, value in alone[2].items():
        assert (weights[name] - value).abs().max() < 2e-5, name


def test_a_sequence_of_4096_tokens_on_two_ranks_is_that_on_one(run_ranks: RunRanks) -> None:
    """In float64, in which nothing is left to rounding; of the last pack one rank has no token."""
    job = partial(in_float64, job=partial(differentiate, lengths=[[4096, 700, 33], [1]]))
    check_alike(run_ranks(Sizes(context=2), job), run_ranks(Sizes(), job), 1e-9, 1e-9)


def test_token_scale_one_is_the_report_itself(run_ranks: RunRanks, trainer_model: Path) -> None:
    """With one token per trajectory and no scale the loss is worked out by hand."""
    made = make_groups("one", 7, groups=1, k=4, spans=[[(3, 1)]])
    request = make_request(made, token_scale=1.0, tau=0.0)
    loss, _ = run_ranks(Sizes(), partial(loss_and_gradient, groups=made, request=request))
    assert loss == pytest.approx(equation_3(trainer_model, made, request)[0], rel=1e-5)


def read_ids(engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest) -> list[list[str]]:
    """The trajectories that each rank read."""
    from services.trainer.training import train_iteration

    found, read = to_trajectories(groups), list[str]()

    def reader(run_id: str, ids: Sequence[str], tokens: int) -> dict[str, Any]:
        read.extend(ids)
        return {name: found[name] for name in ids}

    train_iteration(engine.policy, engine.job_context(), request, 0, reader)
    return engine.everyone.gather(read)


@pytest.mark.parametrize("sizes", [Sizes(data=2), Sizes(tensor=2)], ids=str)
def test_a_rank_reads_what_it_trains_and_nothing_else(run_ranks: RunRanks, sizes: Sizes) -> None:
    """The trajectories of version 2 alone are stale, so that no rank has a use for them."""
    groups = make_groups("own", 8, groups=5, k=4, spans=SPANS)
    request = make_request(groups, minibatches=2, max_staleness=0)
    first, second = run_ranks(sizes, partial(read_ids, groups=groups, request=request))
    trained = [item.trajectory_id for items in groups.values() for item in items if (2, 5) not in item.versions]
    assert sorted(first + second) == sorted(trained)
    if sizes.data == 2:
        tokens = {item.trajectory_id: len(item.tokens) for items in groups.values() for item in items}
        shares = [sum(tokens[name] for name in ids) for ids in (first, second)]
        assert abs(shares[0] - shares[1]) < 0.3 * sum(shares)
    else:
        assert second == []


def train_and_describe(
    engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest
) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """The trajectories that each rank read for an iteration, and the weights after it."""
    return read_ids(engine, groups, request), dict(engine.policy.collect())


def lend_to_neighbours(engine: Engine) -> list[str]:
    """The host at which each rank lends its pieces; each has read the first piece of the next one."""
    from services.weights.transport import wait_for_transfers

    exports = engine.everyone.gather(engine._pieces.fill(engine.policy.slices))
    other = exports[(engine.dims.rank + 1) % len(exports)]
    piece, transport = other.pieces[0], engine._pieces.open()
    sizes = [high - low for low, high in zip(piece.lower, piece.upper, strict=True)]
    found = torch.empty(sizes, dtype=torch.float32)
    transport.register(found.data_ptr(), found.nbytes)
    read = transport.submit_read(other.session, other.addresses[0], found.data_ptr(), found.nbytes)
    assert wait_for_transfers(transport, [read])
    assert xxhash.xxh3_128_digest(found.numpy()) == piece.checksum
    engine.everyone.gather(None)
    engine._pieces.close()
    return [export.session.rpartition(":")[0] for export in exports]


@pytest.mark.parametrize("sizes", [Sizes(data=2), Sizes(tensor=2)], ids=str)
def test_two_machines_train_as_one_does_and_end_together(
    run_ranks: RunRanks, make_network: Callable[..., Network], trainer_model: Path, tmp_path: Path, sizes: Sizes
) -> None:
    groups = make_groups("machines", 11, groups=5, k=4, spans=SPANS)
    job = partial(train_and_describe, groups=groups, request=make_request(groups, minibatches=2))
    network = make_network("machine-0", "machine-1")
    ranks = Ranks(sizes, trainer_model, tmp_path, network)
    try:
        ids, weights = ranks.run(job)
        expected_ids, expected = run_ranks(sizes, job)
        assert ids == expected_ids
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert ranks.run(lend_to_neighbours) == [network.address(name) for name in network.names]
        # No connection is closed, and nobody waits for the other.
        network.connect("machine-1", up=False)
        assert ranks.wait() == [-signal.SIGTERM, 1]
    finally:
        ranks.close()


def scatter(engine: Engine, request: pb.FineTuneRequest) -> list[set[int]]:
    """The examples that each rank received, of 12."""
    from services.trainer.fine_tuning import count_tokens, scatter_examples
    from services.trainer.packing import TokenSequence

    examples = [(TokenSequence(np.arange(2, 6 + n), np.ones(3 + n, np.bool_)),) for n in range(12)]
    own = scatter_examples(
        engine.policy,
        engine.job_context(),
        request,
        count_tokens(examples),
        examples if engine.dims.rank == 0 else None,
    )
    assert all(own[i][0].tokens.tolist() == examples[i][0].tokens.tolist() for i in own)
    return engine.everyone.gather(set(own))


def test_a_rank_receives_the_examples_that_it_trains(run_ranks: RunRanks) -> None:
    request = pb.FineTuneRequest(steps=1, batch_size=12, max_tokens_per_microbatch=40)
    first, second = run_ranks(Sizes(data=2), partial(scatter, request=request))
    assert first | second == set(range(12))
    assert not first & second


def fail_to_read(engine: Engine, groups: dict[str, list[MadeTrajectory]], request: pb.TrainRequest) -> list[list[str]]:
    """The errors that each rank raises when rank 1 cannot read, or reads what the request does not describe."""
    from services.trainer.training import train_iteration

    found, errors = to_trajectories(groups), list[str]()

    def away(run_id: str, ids: Sequence[str], tokens: int) -> dict[str, Any]:
        if engine.dims.rank == 1:
            raise UnavailableError("the buffer is away")
        return {name: found[name] for name in ids}

    def cut(run_id: str, ids: Sequence[str], tokens: int) -> dict[str, Any]:
        whole = {name: found[name] for name in ids}
        if engine.dims.rank == 1:
            whole[ids[0]] = replace(whole[ids[0]], tokens_T=whole[ids[0]].tokens_T[:-1])
        return whole

    for reader in (away, cut):
        with pytest.raises(PerigeeError) as caught:
            train_iteration(engine.policy, engine.job_context(), request, 0, reader)
        errors.append(caught.value.message)
    return engine.everyone.gather(errors)


def test_every_rank_fails_when_one_cannot_read(run_ranks: RunRanks) -> None:
    groups = make_groups("away", 9, groups=2, k=4, spans=SPANS)
    job = partial(fail_to_read, groups=groups, request=make_request(groups))
    first, second = run_ranks(Sizes(data=2), job)
    assert first == second
    assert first[0] == "the buffer is away"
    assert "the buffer holds" in first[1]


def train_from_buffer(engine: Engine, buffer_address: str, request: pb.TrainRequest) -> pb.TrainResult:
    """An iteration in which every replica reads from the buffer as a rank other than 0 does."""
    from services.trainer.config import TrainerConfig
    from services.trainer.engine import read_over_own_channel
    from services.trainer.training import train_iteration

    config = TrainerConfig(model="", run_path="", buffer_address=buffer_address)
    return train_iteration(
        engine.policy,
        engine.job_context(),
        request,
        0,
        lambda run_id, ids, tokens: asyncio.run(read_over_own_channel(config, run_id, ids, tokens)),
    )


async def test_ranks_read_from_the_buffer_by_themselves(
    run_ranks: RunRanks, buffer_client: BufferClient, buffer_address: str
) -> None:
    groups = make_groups("shared", 10, groups=4, k=4, spans=SPANS)
    request = make_request(groups, minibatches=2)
    await store_groups(buffer_client, "r", groups)
    expected = await asyncio.to_thread(run_ranks, Sizes(), partial(train, groups=groups, request=request))
    job = partial(train_from_buffer, buffer_address=buffer_address, request=request)
    result = await asyncio.to_thread(run_ranks, Sizes(data=2), job)
    assert result.trained_tokens == expected.trained_tokens
    assert result.metrics["train/loss"] == pytest.approx(expected.metrics["train/loss"], rel=1e-4)
    assert result.metrics["train/train_infer_kl"] == pytest.approx(expected.metrics["train/train_infer_kl"], rel=1e-4)


def head_of_shares(engine: Engine) -> list[float]:
    """The largest errors of a head whose vocabulary is shared by the ranks: log-probabilities, entropies, gradients."""
    from megatron.core import parallel_state

    from services.trainer.megatron.head import Head

    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = (
        torch.randn(*size, generator=generator, requires_grad=True) for size in ((37, 16), (96, 16))
    )
    targets_T = torch.randint(0, 96, (37,), generator=generator)
    upstream_T = torch.randn(37, generator=generator)
    table_TV = torch.log_softmax(hidden_TD @ weight_VD.T / 0.7, -1)
    expected_T = table_TV.gather(1, targets_T[:, None])[:, 0]
    (expected_T * upstream_T).sum().backward()  # type: ignore[no-untyped-call]

    rank, group = engine.dims.tensor_rank, parallel_state.get_tensor_model_parallel_group()
    own_TD = hidden_TD.detach().clone().requires_grad_()
    own_VD = weight_VD.detach().chunk(2)[rank].clone().requires_grad_()
    head = Head(own_VD, 0.7, group, chunk_bytes=4 * 48 * 10)
    everything_T = torch.ones(37, dtype=torch.bool)
    logprobs_T, entropies_T = head.evaluate(own_TD, targets_T, everything_T, with_entropies=True)
    (logprobs_T * upstream_T).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    assert own_TD.grad is not None
    assert own_VD.grad is not None
    errors = [
        logprobs_T - expected_T,
        entropies_T + (table_TV.exp() * table_TV).sum(-1),
        own_TD.grad - hidden_TD.grad,
        own_VD.grad - weight_VD.grad.chunk(2)[rank],
    ]
    return [max(each) for each in zip(*engine.everyone.gather([float(e.abs().max()) for e in errors]), strict=True)]


def test_a_head_shared_by_ranks_is_the_whole_one(run_ranks: RunRanks) -> None:
    assert max(run_ranks(Sizes(tensor=2), head_of_shares)) < 1e-5


def fail_a_job(engine: Engine, saved: Path | None, *, remove: bool = False) -> tuple[bool, int, bool]:
    """Whether the weights are back after a failed job, the bytes of the copy, and whether the trainer has to end."""
    engine.saved = saved
    before = dict(engine.policy.collect())

    def job() -> None:
        with torch.no_grad():
            for parameter in engine.policy.core.parameters():
                parameter.zero_()
        if remove:
            shutil.rmtree(saved or "")
        raise InternalError("the job failed")

    with pytest.raises(InvalidArgumentError if remove else InternalError):
        engine._or_restore(job)
    broken, engine.broken = engine.broken, False
    after = dict(engine.policy.collect())
    return all(torch.equal(after[name], before[name]) for name in before), engine._snapshot_bytes, broken


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tensor=2)], ids=str)
def test_a_failed_job_goes_back_to_the_folder_or_to_a_copy(
    run_ranks: RunRanks, trainer_model: Path, sizes: Sizes
) -> None:
    assert run_ranks(sizes, partial(fail_a_job, saved=trainer_model)) == (True, 0, False)
    undone, copied, broken = run_ranks(sizes, partial(fail_a_job, saved=None))
    assert undone
    assert copied > 0
    assert not broken


def test_a_trainer_whose_folder_is_gone_ends(run_ranks: RunRanks, trainer_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trainer_model, tmp_path / "model")
    assert run_ranks(Sizes(), partial(fail_a_job, saved=folder, remove=True)) == (False, 0, True)


def refuse_lengths(engine: Engine) -> list[str]:
    """What is said of lengths that fit, that pass the model's limit, and that pass the memory."""
    engine.check_length("field", 128)
    found, own = [], engine._longest
    for tokens, engine._longest in ((129, own), (100, 99)):
        with pytest.raises(InvalidArgumentError) as caught:
            engine.check_length("field", tokens)
        found.append(caught.value.message)
    engine._longest = own
    return found


def test_a_sequence_that_fits_no_process_is_refused_by_one_sentence(run_ranks: RunRanks) -> None:
    context, memory = run_ranks(Sizes(), refuse_lengths)
    assert "129 tokens of prompt and response are more than the 128 that the trainer takes" in context
    assert "whose memory takes the activations of 99: lower it, raise trainer.context_parallel" in memory


def bound_by_memory(engine: Engine, model: str) -> tuple[int, float, int, int, int]:
    """The bound in 1 MiB, the measured bytes of a token, the bound in a copy of a request, and the bound by default.

    And the bytes that a micro-batch of the bound's size takes.
    """
    from services.trainer.config import TrainerConfig
    from services.trainer.megatron.memory import SavedTensors
    from services.trainer.packing import TokenSequence, make_micro_batches, pack_sequences

    own, engine._max_tokens = engine._max_tokens, engine._bound_tokens(1 << 20, 1)
    token_bytes = max(engine.everyone.gather(engine.policy.measure_activations()))
    request = pb.TrainRequest(update=pb.UpdateSettings(max_tokens_per_microbatch=1 << 20))
    bounded = engine._bound(request).update.max_tokens_per_microbatch
    config = TrainerConfig(model="m", run_path="r", max_sequence_length=engine._max_tokens)
    engine._check_longest(config)
    with pytest.raises(InvalidArgumentError, match=r"trainer\.max_sequence_length: \d+ tokens take [\d,]+ bytes"):
        engine._check_longest(config.model_copy(update={"max_sequence_length": engine._max_tokens + 1}))
    engine.check_examples([(engine._max_tokens + 1, 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_is_bounded", True)
        with pytest.raises(InvalidArgumentError, match="and an example has 5000"):
            engine.check_examples([(20, 1), (5000, 1)])
    with pytest.raises(InvalidArgumentError, match=r"trainer\.offload_activations: has nothing to free without a GPU"):
        type(engine)(TrainerConfig(model=model, run_path="r", offload_activations=True), lambda *_: {})
    found, engine._max_tokens = engine._max_tokens, own
    assert request.update.max_tokens_per_microbatch == 1 << 20
    # Sequences of unlike lengths, as they are packed: padded to their longest they are within the bound.
    [[indices, *_]] = pack_sequences(lengths := [*range(20, 100, 3)] * 20, found)
    pack = [TokenSequence(np.zeros(n + 1, np.int64), np.ones(n, np.bool_)) for n in (lengths[i] for i in indices)]
    saved = SavedTensors(engine.policy.core.parameters())
    with saved:
        engine.policy.begin_job(pb.Optimizer(learning_rate=1.0))
        batches = make_micro_batches([pack], engine.dims.device)
        engine.policy.step(batches, 1.0, lambda found: (found.logprobs_T.sum(), None), 0.0)
    return found, token_bytes, bounded, own, max(engine.everyone.gather(saved.peak))


def test_micro_batches_are_bounded_by_what_a_token_takes(run_ranks: RunRanks, trainer_model: Path) -> None:
    job = partial(bound_by_memory, model=str(trainer_model))
    found = {sizes: run_ranks(sizes, job) for sizes in (Sizes(), Sizes(recompute=True), Sizes(tensor=2))}
    for bound, token_bytes, bounded, own, peak in found.values():
        assert bound == bounded == int((1 << 20) / token_bytes)
        assert 0.5 * (1 << 20) < peak <= 1 << 20
        # Without a limit the machine's memory is one, and more than 1 MiB of it is free.
        assert bound < own
    assert found[Sizes(tensor=2)][1] < found[Sizes()][1]
    config = json.loads((trainer_model / "config.json").read_text())
    for recompute in (False, True):
        # What `perigee check` estimates.
        token_bytes = found[Sizes(recompute=recompute)][1]
        assert 4 * count_activations(config, recompute) == pytest.approx(token_bytes, rel=0.25)
