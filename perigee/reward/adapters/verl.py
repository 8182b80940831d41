"""The reward service as verl's custom reward function.

    reward.custom_reward_function.path=pkg://perigee.reward.adapters.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.address=HOST:PORT

`compute_score` judges one response, `compute_score_async` one without a thread of verl's, `compute_scores` a batch
(verl's batch reward manager). verl has no value for an unknown reward: a response that could not be judged raises an
error, since any number would be taken for a reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions, make_item
from perigee.reward.v1 import reward_pb2 as pb

Verifier = str | Mapping[str, str]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    verifier: Verifier = "math",
    answer_marker: str = "",
    deadline_s: float = 600.0,
    **_: Any,
) -> dict[str, Any]:
    """Returns the score of one response, with `acc` and `pred` for verl's metrics.

    `verifier` is one for all, or one by data source. Raises UnavailableError or FailedPreconditionError when the
    response could not be judged.
    """
    item = _make_item("0", data_source, solution_str, ground_truth, extra_info, verifier, answer_marker)
    [outcome] = _scorer(address, deadline_s).score([item])
    return read_score(outcome)


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    verifier: Verifier = "math",
    answer_marker: str = "",
    deadline_s: float = 600.0,
    **_: Any,
) -> dict[str, Any]:
    """Returns `compute_score` as a coroutine, which verl's reward loop awaits, many at once."""
    item = _make_item("0", data_source, solution_str, ground_truth, extra_info, verifier, answer_marker)
    [outcome] = await _scorer(address, deadline_s).score_async([item])
    return read_score(outcome)


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    *,
    address: str | None = None,
    verifier: Verifier = "math",
    answer_marker: str = "",
    deadline_s: float = 600.0,
    **_: Any,
) -> list[dict[str, Any]]:
    """Returns the scores of a batch, in order."""
    items = [
        _make_item(str(number), source, solution, truth, extra, verifier, answer_marker)
        for number, (source, solution, truth, extra) in enumerate(
            zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
        )
    ]
    return [read_score(outcome) for outcome in _scorer(address, deadline_s).score(items)]


def read_score(outcome: pb.ScoreResponse) -> dict[str, Any]:
    """Returns the outcome as verl takes it; every one has the same keys.

    Raises UnavailableError, or FailedPreconditionError when asking again does not help, for an outcome without a
    reward.
    """
    if not outcome.HasField("reward"):
        error = UnavailableError if outcome.retryable else FailedPreconditionError
        raise error(f"a response could not be judged and has no score: {outcome.reason}")
    return {
        "score": outcome.reward,
        "acc": float(outcome.verdict == buffer_pb2.VERDICT_CORRECT),
        "pred": outcome.extracted_answer,
    }


def _make_item(
    item_id: str,
    data_source: str,
    solution: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None,
    verifier: Verifier,
    answer_marker: str,
) -> pb.ScoreItem:
    kind = verifier if isinstance(verifier, str) else verifier.get(data_source)
    if kind is None:
        raise InvalidArgumentError.for_field("verifier", f"names none for the data source {data_source!r}")
    prompt = str((extra_info or {}).get("question", ""))
    return make_item(item_id, prompt, solution, ground_truth, GroundTruthOptions(kind, answer_marker))


@lru_cache(maxsize=16)
def _scorer(address: str | None, deadline_s: float) -> BlockingScorer:
    return BlockingScorer(address, deadline_s=deadline_s)
