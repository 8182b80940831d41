"""The reward service as a reward function of TRL's trainers (`GRPOTrainer(reward_funcs=...)`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perigee.errors import InvalidArgumentError
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions, make_item
from perigee.reward.scoring import read_reward


class PerigeeReward:
    """Rewards of completions, by the ground truth in a column of the data set.

    A completion that could not be judged has the reward None, which TRL leaves out of the baseline and of the loss; it
    is never 0. A service that stays away is an error, since training without any reward is not training.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        column: str = "answer",
        options: GroundTruthOptions = GroundTruthOptions(),
        scorer: BlockingScorer | None = None,
    ) -> None:
        """`column` holds the ground truths; `scorer` sets deadlines, batches and the token."""
        self._column = column
        self._options = options
        self._scorer = scorer or BlockingScorer(address)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """A reward per completion, or None where it was not judged."""
        truths = columns.get(self._column)
        if truths is None:
            raise InvalidArgumentError.for_field(
                "column", f"the data set has no column {self._column!r} of ground truths"
            )
        items = [
            make_item(str(number), read_text(prompt), read_text(completion), truth, self._options)
            for number, (prompt, completion, truth) in enumerate(zip(prompts, completions, truths, strict=True))
        ]
        rewards = [read_reward(outcome) for outcome in self._scorer.score(items)]
        if log_metric is not None and rewards:
            log_metric("perigee/failed", sum(reward is None for reward in rewards) / len(rewards))
        return rewards


def read_text(value: Any) -> str:
    """Returns the text of a prompt or completion: itself, or the contents of its messages."""
    if isinstance(value, str):
        return value
    return "\n".join(_read_content(message["content"]) for message in value)


def _read_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    # Parts of a message: images are not text.
    parts: list[Mapping[str, Any]] = list(content)
    return "".join(str(part["text"]) for part in parts if part.get("type") == "text")
