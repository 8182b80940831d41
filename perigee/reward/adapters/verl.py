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
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions, make_item
from perigee.reward.v1 import reward_pb2 as pb


@dataclass(frozen=True)
class Options:
    """Keywords of `reward_kwargs`."""

    address: str | None = None
    """Address of the reward service; that of PERIGEE_REWARD_ADDRESS unless set."""
    verifier: str | Mapping[str, str] = "math"
    """The verifier of all responses, or one by data source."""
    answer_marker: str = ""
    deadline_s: float = 600.0

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Options:
        """Returns the options among a call's keywords; verl adds others of its own."""
        return cls(**{name: keywords[name] for name in cls.__match_args__ if name in keywords})

    def make_item(
        self, item_id: str, data_source: str, solution: str, ground_truth: Any, extra_info: Mapping[str, Any] | None
    ) -> pb.ScoreItem:
        """Returns the item of a response. Raises InvalidArgumentError naming the field."""
        kind = self.verifier if isinstance(self.verifier, str) else self.verifier.get(data_source)
        if kind is None:
            raise InvalidArgumentError.for_field("verifier", f"names none for the data source {data_source!r}")
        prompt = str((extra_info or {}).get("question", ""))
        return make_item(item_id, prompt, solution, ground_truth, GroundTruthOptions(kind, self.answer_marker))

    @property
    def scorer(self) -> BlockingScorer:
        """Scorer of all calls with this address and deadline."""
        return _scorer(self.address, self.deadline_s)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Returns the score of one response, with `acc` and `pred` for verl's metrics; keywords are those of `Options`.

    Raises UnavailableError or FailedPreconditionError when the response could not be judged.
    """
    [score] = compute_scores([data_source], [solution_str], [ground_truth], [extra_info], **keywords)
    return score


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Returns `compute_score` as a coroutine, which verl's reward loop awaits, many at once."""
    options = Options.from_keywords(keywords)
    item = options.make_item("0", data_source, solution_str, ground_truth, extra_info)
    [outcome] = await options.scorer.score_async([item])
    return read_score(outcome)


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    **keywords: Any,
) -> list[dict[str, Any]]:
    """Returns the scores of a batch, in order."""
    options = Options.from_keywords(keywords)
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    items = [options.make_item(str(number), *row) for number, row in enumerate(rows)]
    return [read_score(outcome) for outcome in options.scorer.score(items)]


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


@lru_cache(maxsize=16)
def _scorer(address: str | None, deadline_s: float) -> BlockingScorer:
    return BlockingScorer(address, deadline_s=deadline_s)
