"""Sampling settings: only those whose logprobs the trainer can use are accepted.

Truncating or penalizing the distribution makes the sampled one another than the policy's: the ratio between the two is
then wrong for every token, and no later correction knows which tokens were cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from perigee.errors import FieldViolation, InvalidArgumentError
from services.rollout.repetition import RepetitionRule

MAX_TEMPERATURE = 10.0
# Below this the engine takes a temperature for 0.
MIN_TEMPERATURE = 1e-2
MAX_PERIOD = 4096


@dataclass(frozen=True)
class Truncation:
    """Settings that change the distribution besides the temperature; None is unset."""

    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn: softmax(logits / temperature), greedy when temperature is 0."""

    temperature: float
    seed: int | None = None

    def seed_of(self, item_id: str, offset: int) -> int | None:
        """A seed of its own for each item and offset, so that the items of one call differ; None without a seed."""
        if self.seed is None:
            return None
        digest = hashlib.blake2b(f"{self.seed}/{item_id}/{offset}".encode(), digest_size=8).digest()
        # The engine takes signed 64-bit seeds.
        return int.from_bytes(digest) >> 1


NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


def check_sampling(settings: SamplingSettings, truncation: Truncation, *, trained_on: bool) -> None:
    """Refuses settings whose logprobs cannot be corrected; `trained_on` also refuses greedy decoding.

    Raises InvalidArgumentError with one violation per field.
    """
    violations = [
        FieldViolation(
            f"sampling.{name}",
            f"{getattr(truncation, name)} changes the sampled distribution, so its logprobs cannot be corrected; "
            f"leave it unset",
        )
        for name, neutral in NEUTRAL.items()
        if getattr(truncation, name) is not None and getattr(truncation, name) not in neutral
    ]
    greedy = settings.temperature == 0
    if greedy and trained_on:
        violations.append(
            FieldViolation("sampling.temperature", "0 is greedy decoding, whose logprobs are no policy's; use 1")
        )
    elif not greedy and not MIN_TEMPERATURE <= settings.temperature <= MAX_TEMPERATURE:
        allowed = f"between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}"
        violations.append(
            FieldViolation(
                "sampling.temperature", f"{settings.temperature} is not {allowed}{'' if trained_on else ', or 0'}"
            )
        )
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)


def repetition_rule(max_period: int, min_repeats: int) -> RepetitionRule | None:
    """The rule of a request; None when min_repeats is 0.

    Raises InvalidArgumentError with field violations.
    """
    if min_repeats == 0:
        return None
    if min_repeats < 2:
        raise InvalidArgumentError.of("repetition_stop.min_repeats", "1 would cut every response; use 2 or more")
    if not 1 <= max_period <= MAX_PERIOD:
        raise InvalidArgumentError.of("repetition_stop.max_period", f"{max_period} is not between 1 and {MAX_PERIOD}")
    return RepetitionRule(max_period, min_repeats)
