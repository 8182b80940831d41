"""What the two domains share: a problem, and an example of an answer to it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

# What follows the last marker of a response is the answer.
ANSWER_MARKER = "#"

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Problem:
    """A prompt with its ground truth: the expected answer of `math`, the hidden tests of `code`."""

    domain: str
    prompt: str
    difficulty: float
    verification: dict[str, Any] = field(compare=False)

    def to_line(self, problem_id: str) -> dict[str, Any]:
        """Returns the problem as a line of a prompt set."""
        return {
            "id": problem_id,
            "domain": self.domain,
            "prompt": self.prompt,
            "difficulty": self.difficulty,
            **self.verification,
            "answer_marker": ANSWER_MARKER,
        }


@dataclass(frozen=True)
class Example:
    """A prompt and a correct response, for the supervised stages."""

    prompt: str
    response: str


def draw_share(rng: random.Random, shares: Sequence[tuple[ValueT, float]]) -> ValueT:
    """Draws a value from (value, share) pairs; shares are relative."""
    values, weights = zip(*shares, strict=True)
    return cast(ValueT, rng.choices(values, weights)[0])
