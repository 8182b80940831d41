"""Arithmetic of merging: each tensor of the result, block by block, from the same tensor of every model.

With weights w_i, models x_i, the base b, lambda l, and task vectors d_i = x_i - b:

    linear           sum w_i x_i / sum w_i
    slerp            sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, with t = w_2 / (w_1 + w_2) and a the angle
                     between x_1 and x_2; linear where |cos a| > 0.9995, or a tensor is all zeros
    task_arithmetic  b + l sum w_i d_i (arXiv 2212.04089)
    ties             b + l sum w_i m_i d_i / sum w_i m_i, where m_i is 1 for elements of d_i that are among its
                     `density` largest and have the sign of sum w_i d_i over those (arXiv 2306.01708)

Names and defaults are mergekit's, but for the density, which is the paper's. Angle, norms and the largest elements are
those of each tensor. All is computed in float32 on blocks, angles in float64, so that memory does not grow with the
tensors; models of weight 0 are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from perigee.errors import InvalidArgumentError

Method = Literal["linear", "slerp", "ties", "task_arithmetic"]
METHODS: tuple[Method, ...] = ("linear", "slerp", "ties", "task_arithmetic")
# Those that add to a base what models have learned since.
BASED: tuple[Method, ...] = ("ties", "task_arithmetic")
# Tensors nearer to one line than this cosine have no angle to go along.
COLLINEAR = 0.9995
# Halves of the bits of a float32.
_HALF_BITS, _LOW_BITS = 16, (1 << 16) - 1

# Reads a tensor from its beginning, as float32 blocks [N] of the same sizes for every model.
Blocks = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class MergeSettings:
    """A method and its numbers: a weight for each model, the base left out."""

    method: Method
    weights: tuple[float, ...]
    scale: float = 1.0
    """Lambda: factor of what is added to the base."""
    density: float = 0.2
    """Fraction of a task vector's elements that TIES keeps, the largest ones."""

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for numbers with which the method has no result."""
        if self.method not in METHODS:
            raise InvalidArgumentError.for_field("--method", f"{self.method} is none of {', '.join(METHODS)}")
        if not all(map(math.isfinite, (*self.weights, self.scale))):
            raise InvalidArgumentError.for_field("--weight", "and --lambda must be finite numbers")
        if not any(self.weights):
            raise InvalidArgumentError.for_field("--weight", "is 0 for every model: give one of them another")
        if self.method != "task_arithmetic" and min(self.weights) < 0:
            raise InvalidArgumentError.for_field("--weight", f"must not be negative for {self.method}")
        if self.method == "slerp" and len(self.weights) != 2:
            raise InvalidArgumentError.for_field(
                "--method", f"slerp merges two models, and {len(self.weights)} are given"
            )
        if not 0 < self.density <= 1:
            raise InvalidArgumentError.for_field("--density", f"must be above 0 and at most 1, is {self.density:g}")


def merge_tensor(settings: MergeSettings, models: Sequence[Blocks], base: Blocks | None) -> Iterator[torch.Tensor]:
    """Yields the merged tensor as float32 blocks; `base` is there for the methods of BASED."""
    used = [(weight, blocks) for weight, blocks in zip(settings.weights, models, strict=True) if weight]
    weights, sources = [weight for weight, _ in used], [blocks for _, blocks in used]
    if settings.method == "ties":
        assert base is not None
        return _merge_ties(weights, sources, base, settings)
    if settings.method == "task_arithmetic":
        assert base is not None
        scaled = [settings.scale * weight for weight in weights]
        return _add(_without_zeros([*scaled, 1 - math.fsum(scaled)], [*sources, base]))
    total = math.fsum(weights)
    if settings.method == "slerp" and len(used) == 2:
        return _add(_without_zeros(slerp_weights(sources[0], sources[1], weights[1] / total), sources))
    return _add(_without_zeros([weight / total for weight in weights], sources))


def slerp_weights(first: Blocks, second: Blocks, t: float) -> list[float]:
    """Returns the weights of two tensors on the great circle between them, at the fraction `t` of their angle."""
    dot = first_square = second_square = 0.0
    for a_N, b_N in zip(first(), second(), strict=True):
        a_N, b_N = a_N.double(), b_N.double()
        dot += float(a_N @ b_N)
        first_square += float(a_N @ a_N)
        second_square += float(b_N @ b_N)
    norms = math.sqrt(first_square) * math.sqrt(second_square)
    cosine = dot / norms if norms else 1.0
    if not abs(cosine) <= COLLINEAR:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def find_threshold(model: Blocks, base: Blocks, density: float) -> float:
    """Returns the magnitude that the `density` largest elements of a task vector have at least, exactly.

    The bits of non-negative floats are ordered as the floats are: two histograms, of their upper and of their lower
    half, find the element without sorting. Elements as large as the smallest that is kept are all kept.
    """

    def bits() -> Iterator[torch.Tensor]:
        for x_N, b_N in zip(model(), base(), strict=True):
            yield (x_N - b_N).abs().view(torch.int32)

    counts = torch.zeros(1 << _HALF_BITS, dtype=torch.int64)
    for bits_N in bits():
        counts += torch.bincount(bits_N >> _HALF_BITS, minlength=len(counts))
    kept = max(1, int(density * int(counts.sum())))
    upper, above = _find_bin(counts, kept)
    counts.zero_()
    for bits_N in bits():
        lower_N = bits_N[bits_N >> _HALF_BITS == upper] & _LOW_BITS
        counts += torch.bincount(lower_N, minlength=len(counts))
    lower, _ = _find_bin(counts, kept - above)
    return float(torch.tensor(upper << _HALF_BITS | lower, dtype=torch.int32).view(torch.float32))


def _find_bin(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """Returns the bin of the element with this rank from the top, and how many are in the bins above."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


def _merge_ties(
    weights: Sequence[float], models: Sequence[Blocks], base: Blocks, settings: MergeSettings
) -> Iterator[torch.Tensor]:
    """Yields the merged blocks: the mean of the elements that were elected, the base's where none was."""
    thresholds = [find_threshold(model, base, settings.density) for model in models]
    w_M1 = torch.tensor(weights).unsqueeze(1)
    for b_N, *xs in zip(base(), *(model() for model in models), strict=True):
        x_MN = torch.stack(xs)
        delta_MN = x_MN - b_N
        for delta_N, threshold in zip(delta_MN, thresholds, strict=True):
            delta_N[delta_N.abs() < threshold] = 0
        sign_MN = delta_MN.sign()
        elected_N = torch.where((w_M1 * delta_MN).sum(0) >= 0, 1.0, -1.0)
        kept_MN = w_M1 * (sign_MN == elected_N)
        total_N = kept_MN.sum(0)
        # Of the models' own elements: the base and a rounded difference would not give one that stands alone exactly.
        mean_N = x_MN.mul_(kept_MN.div_(total_N)).sum(0)
        merged_N = torch.where(total_N > 0, mean_N, b_N)
        yield merged_N if settings.scale == 1 else b_N + settings.scale * (merged_N - b_N)


def _without_zeros(weights: Sequence[float], models: Sequence[Blocks]) -> list[tuple[float, Blocks]]:
    return [(weight, blocks) for weight, blocks in zip(weights, models, strict=True) if weight]


def _add(terms: Sequence[tuple[float, Blocks]]) -> Iterator[torch.Tensor]:
    """Yields the weighted sum of tensors. One alone of weight 1 keeps all of its bits, as nothing is added to it."""
    weights = [weight for weight, _ in terms]
    for blocks in zip(*(blocks() for _, blocks in terms), strict=True):
        sum_N = blocks[0] * weights[0]
        for weight, block_N in zip(weights[1:], blocks[1:], strict=True):
            sum_N.add_(block_N, alpha=weight)
        yield sum_N
