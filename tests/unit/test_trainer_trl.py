"""GRPO and DPO against TRL's own losses, on the same tensors."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.algorithms import make_algorithm, make_supervised
from services.trainer.algorithms.base import ExampleBatch, LossBatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")

LENGTHS = torch.tensor([5, 2, 4, 3])


def trl_loss(module: str) -> Callable[..., torch.Tensor]:
    """The method `_compute_loss` of a trainer of TRL by its source: importing the module would import vLLM."""
    file = Path(str(importlib.metadata.distribution("trl").locate_file(f"trl/trainer/{module}.py")))
    methods = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss"
    ]
    [method] = methods
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": math}
    names |= {"nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module([method], []), file, "exec"), names)
    return names["_compute_loss"]  # type: ignore[no-any-return]


ACCELERATOR = SimpleNamespace(
    gather=lambda value: value,
    gather_for_metrics=lambda value: value,
    reduce=lambda value, reduction: value,
    num_processes=1,
    device="cpu",
)
COMMON = {"model": SimpleNamespace(training=False), "accelerator": ACCELERATOR, "aux_loss_enabled": False}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


GENERATOR = torch.Generator().manual_seed(1)
MASK = torch.arange(5) < LENGTHS[:, None]
LOGPROBS = -random(4, 5).abs() * MASK
REFERENCE = (LOGPROBS + 0.8 * random(4, 5)) * MASK
IMPORTANCE = random(4, 5).abs()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"aggregation": "sequence_mean", "clip_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}),
        ({"aggregation": "constant", "clip_low": 0.5}, {"loss_type": "dr_grpo", "epsilon_low": 0.5}),
        ({"kl_coef": 0.3}, {"beta": 0.3}),
        ({"dual_clip": 1.4, "kl_coef": 0.1}, {"delta": 1.4, "beta": 0.1}),
        (
            {"ratio": "sequence", "aggregation": "sequence_mean"},
            {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        ),
        ({"ratio": "sequence", "kl_coef": 0.2}, {"importance_sampling_level": "sequence", "beta": 0.2}),
    ],
    ids=str,
)
def test_grpo_is_that_of_trl(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    options = {
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "delta": None,
        "beta": 0.0,
        "importance_sampling_level": "token",
    } | theirs
    advantages_N = torch.tensor([1.0, -0.6, 0.3, -1.1], dtype=torch.float64)
    their_NT, our_NT = (LOGPROBS.clone().requires_grad_() for _ in range(2))
    trainer = SimpleNamespace(
        **COMMON,
        **options,
        args=SimpleNamespace(delta=options["delta"], use_bias_correction_kl=False),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        max_completion_length=9,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (their_NT, torch.zeros_like(LOGPROBS), None),
    )
    tokens = torch.zeros(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": tokens[:, :1],
        "completion_ids": tokens,
        "completion_mask": MASK.long(),
        "advantages": advantages_N,
        "old_per_token_logps": REFERENCE,
        "ref_per_token_logps": REFERENCE,
        "importance_sampling_ratio": IMPORTANCE,
        "num_items_in_batch": MASK.sum(),
    }
    expected = trl_loss("grpo_trainer")(trainer, None, inputs)
    expected.backward()  # type: ignore[no-untyped-call]

    message = pb.Algorithm(name="grpo")
    message.settings.update(ours)
    loss, _ = make_algorithm(message).loss(
        LossBatch(
            logprobs_T=our_NT[MASK],
            reference_logprobs_T=REFERENCE[MASK],
            trained_T=torch.ones(int(MASK.sum()), dtype=torch.bool),
            importance_T=IMPORTANCE[MASK],
            sequence_T=torch.arange(4).repeat_interleave(LENGTHS),
            advantages_N=advantages_N,
            weights_N=torch.full((4,), 1 / 4, dtype=torch.float64),
            trained_tokens=int(MASK.sum()),
            token_scale=9.0,
        )
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert their_NT.grad is not None
    assert their_NT.grad.abs().sum() > 0
    assert torch.allclose(our_NT.grad, their_NT.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours", "loss_type"),
    [({"beta": 0.3}, "sigmoid"), ({"beta": 5.0, "length_normalized": True}, "sigmoid_norm")],
    ids=str,
)
def test_dpo_is_that_of_trl(ours: dict[str, Any], loss_type: str) -> None:
    """The sequences are two chosen and then two rejected responses, in both."""
    their_NT, our_NT = (LOGPROBS.clone().requires_grad_() for _ in range(2))
    nothing = torch.zeros_like(LOGPROBS)
    outputs = SimpleNamespace(log_probs=their_NT, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        **COMMON,
        beta=ours["beta"],
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    chosen, rejected = REFERENCE.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(4, 6, dtype=torch.long),
        # Of all tokens, the prompt's first.
        "completion_mask": torch.cat([torch.zeros(4, 1, dtype=torch.long), MASK.long()], dim=1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    expected = trl_loss("dpo_trainer")(trainer, lambda **_: outputs, inputs, return_outputs=False)
    expected.backward()  # type: ignore[no-untyped-call]

    message = pb.Algorithm(name="dpo")
    message.settings.update(ours)
    loss, sums = make_supervised(message).loss(
        ExampleBatch(
            logprobs_T=our_NT[MASK],
            trained_T=torch.ones(int(MASK.sum()), dtype=torch.bool),
            sequence_T=torch.arange(4).repeat_interleave(LENGTHS),
            responses=2,
            reference_KP=torch.stack([chosen, rejected]),
            examples=2,
            trained_tokens=int(MASK.sum()),
        )
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert their_NT.grad is not None
    # TRL's model masks log-probabilities, which this one does not.
    assert torch.allclose(our_NT.grad, their_NT.grad * MASK, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
    metrics = trainer._metrics["eval"]
    assert float(sums["chosen_logprob"]) / 2 == pytest.approx(metrics["logps/chosen"][0], rel=1e-12)
    assert float(sums["rejected_logprob"]) / 2 == pytest.approx(metrics["logps/rejected"][0], rel=1e-12)
    if loss_type == "sigmoid":
        assert float(sums["margin"]) / 2 == pytest.approx(metrics["rewards/margins"][0], rel=1e-12)
        assert float(sums["accuracy"]) / 2 == metrics["rewards/accuracies"][0]
