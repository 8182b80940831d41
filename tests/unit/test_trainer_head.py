"""The head in chunks against the whole table of logits, and the count of what autograd holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.trainer.megatron.head import Head
from services.trainer.megatron.memory import SavedTensors, free_bytes, whole_bytes

T, D, V = 53, 16, 96


def make_tensors(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, targets, what is trained, and gradients from the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    return hidden_TD, weight_VD, targets_T, torch.arange(T) % 3 > 0, torch.randn(T, generator=generator, dtype=dtype)


def table_of(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(hidden_TD @ weight_VD.T / temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_values_and_gradients_are_those_of_the_whole_table(
    temperature: float, chunk_tokens: int, accumulated: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden_TD, weight_VD, targets_T, trained_T, upstream_T = make_tensors(dtype)
    table_TV = table_of(hidden_TD, weight_VD, temperature)
    expected_T = table_TV.gather(1, targets_T[:, None])[:, 0] * trained_T
    expected = torch.autograd.grad((expected_T * upstream_T).sum(), [hidden_TD, weight_VD])

    if accumulated:
        weight_VD.main_grad = torch.ones(V, D, dtype=dtype)  # type: ignore[attr-defined]
    head = Head(weight_VD, temperature, chunk_bytes=dtype.itemsize * V * chunk_tokens)
    logprobs_T, entropies_T = head.evaluate(hidden_TD, targets_T, trained_T, with_entropies=True)
    (logprobs_T * upstream_T).sum().backward()  # type: ignore[no-untyped-call]
    found_VD = weight_VD.main_grad - 1 if accumulated else weight_VD.grad  # type: ignore[attr-defined]
    assert (logprobs_T - expected_T).abs().max() < tolerance
    assert (hidden_TD.grad - expected[0]).abs().max() < tolerance  # type: ignore[operator]
    assert (found_VD - expected[1]).abs().max() < tolerance
    assert (weight_VD.grad is None) == accumulated

    again_T, zeros_T = head.evaluate(hidden_TD, targets_T, trained_T, with_entropies=False)
    assert torch.equal(again_T, logprobs_T)
    assert not zeros_T.any()
    assert not entropies_T.requires_grad
    assert (entropies_T + (table_TV.exp() * table_TV).sum(-1) * trained_T).abs().max() < tolerance


def test_bfloat16_accumulates_in_float32() -> None:
    hidden_TD, weight_VD, targets_T, trained_T, upstream_T = make_tensors()
    low_VD = weight_VD.detach().bfloat16().requires_grad_()
    low_VD.main_grad = torch.zeros(V, D)  # type: ignore[attr-defined]
    low_TD = hidden_TD.detach().bfloat16().float().requires_grad_()
    head = Head(low_VD, chunk_bytes=4 * V * 7)
    logprobs_T, _ = head.evaluate(low_TD, targets_T, trained_T, with_entropies=False)
    (logprobs_T * upstream_T).sum().backward()  # type: ignore[no-untyped-call]
    table_TV = table_of(hidden_TD, weight_VD, 1.0)
    whole = (table_TV.gather(1, targets_T[:, None])[:, 0] * trained_T * upstream_T).sum()
    expected_TD, expected_VD = torch.autograd.grad(whole, [hidden_TD, weight_VD])
    assert (low_TD.grad - expected_TD).norm() < 0.05 * expected_TD.norm()  # type: ignore[operator]
    assert (low_VD.main_grad - expected_VD).norm() < 0.05 * expected_VD.norm()  # type: ignore[attr-defined]


def test_no_trained_token_is_no_gradient() -> None:
    hidden_TD, weight_VD, targets_T, _, _ = make_tensors()
    nothing_T = torch.zeros(T, dtype=torch.bool)
    logprobs_T, _ = Head(weight_VD).evaluate(hidden_TD, targets_T, nothing_T, with_entropies=False)
    logprobs_T.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden_TD.grad is not None
    assert not hidden_TD.grad.any()


def test_a_storage_counts_once_and_until_its_backward_pass() -> None:
    weight_DD = torch.nn.Parameter(torch.ones(8, 8))
    saved = SavedTensors([weight_DD])
    with saved:
        for _ in range(2):
            # Both products save `x`, and the second its own input of 4 * 8 floats.
            x_4D = torch.ones(4, 8, requires_grad=True)
            (x_4D @ weight_DD + x_4D.exp()).sum().backward()  # type: ignore[no-untyped-call]
    assert saved.peak == 2 * 4 * 8 * 4


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    machine = free_bytes(torch.device("cpu"), 1, limit)
    limit.write_text("max\n", encoding="utf-8")
    assert free_bytes(torch.device("cpu"), 4, limit) < machine
    limit.write_text(f"{4 << 20}\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text(f"{3 << 20}\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text(f"active_file 7\ninactive_file {1 << 20}\n", encoding="utf-8")
    assert free_bytes(torch.device("cpu"), 2, limit) == 1 << 20
    assert whole_bytes(torch.device("cpu"), 2, limit) == 2 << 20
