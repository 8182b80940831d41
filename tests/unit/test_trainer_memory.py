"""Activations that leave a device until their backward pass: each once, and only those of the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from services.trainer.megatron.memory import OffloadedTensors, SavedTensors


def test_a_tensor_that_several_operations_save_is_moved_once() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    x = torch.linspace(1, 2, 8, requires_grad=True)
    saved, offloaded = SavedTensors([weight]), OffloadedTensors([weight], 0)
    for scope in (saved, offloaded):
        with scope:
            doubled = x * 2
            loss = (doubled.sin() + doubled * weight + doubled.view(2, 4).exp().flatten()).sum()
        x.grad = weight.grad = None
        loss.backward()
        assert x.grad is not None
        assert weight.grad is not None
        expected = 2 * ((2 * x).cos() + 1 + (2 * x).exp())
        assert torch.allclose(x.grad, expected)
        assert torch.allclose(weight.grad, 2 * x)
    # `doubled`, which two operations save, and the result of the third.
    assert offloaded.moved_bytes == saved.peak == 64


def test_a_tensor_that_was_changed_is_moved_again() -> None:
    x = torch.ones(8, requires_grad=True)
    offloaded = OffloadedTensors([], 0)
    with offloaded:
        factor = torch.full((8,), 3.0)
        first = x * factor
        factor.add_(2)
        second = first * factor
    second.sum().backward()
    assert x.grad is not None
    assert offloaded.moved_bytes == 64
    assert x.grad.tolist() == [15.0] * 8


def test_of_a_layer_that_is_computed_again_the_input_alone_is_moved() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    offloaded = OffloadedTensors(layer.parameters(), 0)
    with offloaded:
        checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert offloaded.moved_bytes == x.nbytes


@pytest.mark.parametrize("scope", [OffloadedTensors([]), SavedTensors([])], ids=["offloaded", "saved"])
def test_what_a_forward_pass_saved_goes_where_no_backward_pass_comes(scope: OffloadedTensors | SavedTensors) -> None:
    with scope:
        result = torch.ones(8, requires_grad=True).exp()
    storage = StorageWeakRef(result.untyped_storage())
    del result
    assert storage.expired()
