"""How well scores tell right from wrong, and the threshold that does it best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out responses; `accuracy` is that at `threshold`, which was fitted on the same responses."""

    responses: int
    pairs: int
    loss: float
    auc: float
    threshold: float
    accuracy: float
    accuracy_at_half: float
    # Share of pairs whose right response has the higher score; None without pairs.
    pair_accuracy: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return self.auc, -self.loss


def evaluate_scores(
    scores_N: NDArray[np.float64], correct_N: NDArray[np.bool_], pairs: list[tuple[int, int]], loss: float
) -> Evaluation:
    """The figures of scores, given the training loss on them; needs right and wrong responses."""
    probabilities_N = sigmoid(scores_N)
    threshold, accuracy = fit_threshold(probabilities_N, correct_N)
    higher = [float(scores_N[right] > scores_N[wrong]) for right, wrong in pairs]
    return Evaluation(
        responses=len(scores_N),
        pairs=len(pairs),
        loss=loss,
        auc=area_under_curve(scores_N, correct_N),
        threshold=threshold,
        accuracy=accuracy,
        accuracy_at_half=float(np.mean((probabilities_N >= 0.5) == correct_N)),
        pair_accuracy=float(np.mean(higher)) if higher else None,
    )


def area_under_curve(scores_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a right response scores higher than a wrong one, ties counted half."""
    _, inverse_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    # Mean rank of each tie.
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]
    right = int(correct_N.sum())
    wrong = len(correct_N) - right
    return float((ranks_N[correct_N].sum() - right * (right + 1) / 2) / (right * wrong))


def fit_threshold(probabilities_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> tuple[float, float]:
    """The probability from which on calling a response right is right most often, and how often.

    Half-way between two probabilities; of several that are as good, the one nearest to a half.
    """
    values, inverse_N = np.unique(probabilities_N, return_inverse=True)
    right_V = np.bincount(inverse_N, weights=correct_N, minlength=len(values))
    wrong_V = np.bincount(inverse_N, weights=~correct_N, minlength=len(values))
    # With the threshold below value v: wrong ones below v and right ones from v on are called as they are.
    hits = np.concatenate([[0], np.cumsum(wrong_V)]) + np.concatenate([np.cumsum(right_V[::-1])[::-1], [0]])
    between = np.concatenate([[values[0] / 2], (values[:-1] + values[1:]) / 2, [(values[-1] + 1) / 2]])
    best = np.flatnonzero(hits == hits.max())
    chosen = best[np.argmin(np.abs(between[best] - 0.5))]
    return float(between[chosen]), float(hits[chosen] / len(correct_N))


def sigmoid(scores_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of log-odds, without overflow."""
    probabilities_N: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -scores_N))
    return probabilities_N
