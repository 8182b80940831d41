"""What a verifier is, what it is given and what it answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, Self, TypeVar

from perigee.errors import FieldViolation

# Longer answers are told by their beginning.
MAX_EXTRACTED_CHARACTERS = 1000
# What is told of failures that may pass at any time.
RETRY_AFTER_S = 1.0


class Verdict(Enum):
    """CORRECT and WRONG are judgements; UNGRADABLE: the response offers nothing to grade; FAILED: nobody knows."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNGRADABLE = "ungradable"
    FAILED = "failed"


@dataclass(frozen=True)
class PartScore:
    """What one part of a composite, or one vote of a judge, found; without a reward when FAILED."""

    name: str
    verdict: Verdict
    reward: float | None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """A verdict, its reward (absent exactly when FAILED), the beginning of the answer found, and why.

    `retryable` says whether asking again may help when the verdict is FAILED, `retry_after_s` when.
    """

    verdict: Verdict
    reward: float | None
    extracted: str = ""
    reason: str = ""
    retryable: bool = False
    parts: tuple[PartScore, ...] = ()
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        if (self.reward is None) != (self.verdict is Verdict.FAILED):
            raise ValueError(f"a {self.verdict.value} outcome with reward {self.reward}")
        object.__setattr__(self, "extracted", self.extracted[:MAX_EXTRACTED_CHARACTERS])

    @classmethod
    def correct(cls, extracted: str) -> Self:
        """Reward 1."""
        return cls(Verdict.CORRECT, 1.0, extracted)

    @classmethod
    def wrong(cls, extracted: str, reason: str = "", reward: float = 0.0) -> Self:
        """Reward 0, or the partial credit that the prompt asks for."""
        return cls(Verdict.WRONG, reward, extracted, reason)

    @classmethod
    def ungradable(cls, reason: str, extracted: str = "") -> Self:
        """Reward 0: the response itself is at fault."""
        return cls(Verdict.UNGRADABLE, 0.0, extracted, reason)

    @classmethod
    def failed(cls, reason: str, *, retryable: bool, extracted: str = "", retry_after_s: float | None = None) -> Self:
        """No reward. A failure that may pass always says when to ask again."""
        if retryable and retry_after_s is None:
            retry_after_s = RETRY_AFTER_S
        return cls(Verdict.FAILED, None, extracted, reason, retryable, retry_after_s=retry_after_s)


@dataclass(frozen=True)
class Parameters:
    """Base of a verifier's parameters: immutable values whose representation names them for the cache."""


ParametersT = TypeVar("ParametersT", bound=Parameters)


@dataclass(frozen=True)
class ImagePart:
    """An image of the prompt: either its bytes and their media type, or its address."""

    data: bytes = b""
    media_type: str = ""
    url: str = ""


@dataclass(frozen=True)
class Item(Generic[ParametersT]):
    """One response to judge.

    The answer is what follows the last `answer_marker`; an empty marker leaves finding it to the verifier.
    """

    id: str
    response: str
    answer_marker: str
    parameters: ParametersT
    prompt: str = ""
    images: tuple[ImagePart, ...] = ()


class Verifier(ABC, Generic[ParametersT]):
    """Judges responses; one instance serves the whole process, many items at once."""

    name: ClassVar[str]
    # Part of the cache key: raise it when verdicts change.
    version: ClassVar[str]

    @property
    def unavailable(self) -> str:
        """What the verifier needs that is not there; empty when it is ready."""
        return ""

    @abstractmethod
    def find_violations(self, parameters: ParametersT) -> list[FieldViolation]:
        """What is wrong with the parameters, field by field."""

    @abstractmethod
    async def judge(self, item: Item[ParametersT]) -> Outcome:
        """The outcome of one item, within the verifier's own deadline; a failure is an outcome, not an exception."""

    def graded_text(self, item: Item[ParametersT]) -> str | None:
        """What of the item the outcome depends on beside the parameters, for the cache.

        A verifier that reads more than the answer overrides it: `graded_whole` covers everything there is.
        """
        return extract_answer(item.response, item.answer_marker)

    async def start(self) -> None:
        """Starts what the verifier needs to judge."""

    async def close(self) -> None:
        """Ends what `start` started."""


def graded_whole(item: Item[Any]) -> str:
    """Prompt, images and response, told apart by their lengths; images by their digests."""
    images = [image.url or hashlib.blake2b(image.data, digest_size=16).hexdigest() for image in item.images]
    parts = [item.prompt, *images, item.response]
    return "".join(f"{len(part)}:{part}" for part in parts)


def extract_answer(response: str, marker: str) -> str | None:
    """What follows the last marker, stripped; the whole response without a marker; None when it is not there."""
    if not marker:
        return response.strip()
    _, found, answer = response.rpartition(marker)
    return answer.strip() if found else None


def read_answer(item: Item[Any]) -> str | Outcome:
    """The item's answer; where its marker is not there, or nothing follows it, the outcome that says so."""
    answer = extract_answer(item.response, item.answer_marker)
    if answer is None:
        return Outcome.ungradable(f"the response has no answer marker {item.answer_marker!r}")
    return answer or Outcome.ungradable("the answer is empty")
