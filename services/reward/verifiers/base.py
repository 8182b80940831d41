"""Base of the verifiers, the items that they judge, their outcomes, and the metrics of both."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Generic, Self, TypeVar

from google.protobuf.message import Message
from prometheus_client import Counter, Gauge, Histogram

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb

# Of longer answers the beginning is reported.
MAX_EXTRACTED_CHARACTERS = 1000
# The hint of failures that may pass at any time.
RETRY_AFTER_S = 1.0

# Parts of composites count like items of their own.
# The rate of failures is that of verdict="failed" among these.
OUTCOMES = Counter("perigee_reward_outcomes_total", "Outcomes given", ["verifier", "verdict"])
CACHE_HITS = Counter("perigee_reward_cache_hits_total", "Items that another item's judgement answered", ["verifier"])
JUDGEMENT_SECONDS = Histogram(
    "perigee_reward_judgement_seconds",
    "Time from an item's arrival to its outcome",
    ["verifier"],
    buckets=(0.0005, 0.002, 0.01, 0.05, 0.2, 1, 5, 20, 60),
)
QUEUED_ITEMS = Gauge("perigee_reward_queued_items", "Items under way", ["verifier"])
AGREEMENTS = Counter(
    "perigee_reward_agreements_total",
    "Responses that two verifiers of a composite both judged, by whether they agreed",
    ["verifier", "other", "result"],
)
JUDGE_CALLS = Counter("perigee_reward_judge_calls_total", "Requests to judges by their end", ["judge", "end"])
JUDGE_TOKENS = Counter("perigee_reward_judge_tokens_total", "Tokens that judges read and wrote", ["judge", "kind"])


class Verdict(Enum):
    """CORRECT and WRONG are judgements; UNGRADABLE: the response offers nothing to grade; FAILED: it was not judged."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNGRADABLE = "ungradable"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """A verdict, its reward (absent exactly when FAILED), the beginning of the answer found, and why.

    `retryable` says whether asking again may help when the verdict is FAILED, `retry_after_s` when, `is_unjudgeable`
    whether the prompt is at fault, whatever the response. `parts` are the outcomes of a composite's parts, or of a
    judge's votes, by name.
    """

    verdict: Verdict
    reward: float | None
    extracted: str = ""
    reason: str = ""
    retryable: bool = False
    parts: Mapping[str, Outcome] = field(default_factory=dict)
    retry_after_s: float | None = None
    is_unjudgeable: bool = False

    def __post_init__(self) -> None:
        if (self.reward is None) != (self.verdict is Verdict.FAILED):
            raise ValueError(f"a {self.verdict.value} outcome with reward {self.reward}")
        object.__setattr__(self, "extracted", self.extracted[:MAX_EXTRACTED_CHARACTERS])

    @classmethod
    def correct(cls, extracted: str) -> Self:
        """Returns a correct outcome, with reward 1."""
        return cls(Verdict.CORRECT, 1.0, extracted)

    @classmethod
    def wrong(cls, extracted: str, reason: str = "", reward: float = 0.0) -> Self:
        """Returns a wrong outcome, with reward 0 or the partial credit that the prompt asks for."""
        return cls(Verdict.WRONG, reward, extracted, reason)

    @classmethod
    def ungradable(cls, reason: str, extracted: str = "") -> Self:
        """Returns an ungradable outcome, with reward 0: the response itself is at fault."""
        return cls(Verdict.UNGRADABLE, 0.0, extracted, reason)

    @classmethod
    def failed(cls, reason: str, *, retryable: bool, extracted: str = "", retry_after_s: float | None = None) -> Self:
        """Returns a failure, without a reward; one that may pass always says when to ask again."""
        if retryable and retry_after_s is None:
            retry_after_s = RETRY_AFTER_S
        return cls(Verdict.FAILED, None, extracted, reason, retryable, retry_after_s=retry_after_s)

    @classmethod
    def unjudgeable(cls, reason: str, extracted: str = "") -> Self:
        """Returns a failure that the prompt is at fault for."""
        return cls(Verdict.FAILED, None, extracted, reason, is_unjudgeable=True)

    @classmethod
    def failed_for(cls, failures: Collection[Outcome], reason: str, extracted: str) -> Self:
        """Returns the failure that others cause; one that fails for good makes asking again useless."""
        retryable = all(failure.retryable for failure in failures)
        hints = [failure.retry_after_s for failure in failures if failure.retry_after_s is not None]
        hint_s = max(hints, default=None) if retryable else None
        whole = cls.failed(reason, retryable=retryable, extracted=extracted, retry_after_s=hint_s)
        return replace(whole, is_unjudgeable=any(failure.is_unjudgeable for failure in failures))


ParametersT = TypeVar("ParametersT", bound=Message)

_NAMES: dict[Any, str] = {
    member.message_type: member.name for member in pb.ScoreItem.DESCRIPTOR.oneofs_by_name["verifier"].fields
}


@dataclass(frozen=True)
class ImagePart:
    """An image of the prompt: either its bytes and their media type, or its address."""

    data: bytes = b""
    media_type: str = ""
    url: str = ""


@dataclass(frozen=True)
class Item(Generic[ParametersT]):
    """One response to judge.

    The answer is what follows the last `answer_marker`; an empty marker leaves finding it to the verifier. `parameters`
    is the verifier's message of the request, which nobody changes.
    """

    id: str
    response: str
    answer_marker: str
    parameters: ParametersT
    prompt: str = ""
    images: tuple[ImagePart, ...] = ()

    @property
    def verifier(self) -> str:
        """Name of the verifier that takes the parameters."""
        return _NAMES[self.parameters.DESCRIPTOR]


class Verifier(ABC, Generic[ParametersT]):
    """Judges responses; one instance serves the whole process, many items at once."""

    # The contract's: a member of ScoreItem.verifier.
    name: ClassVar[str]
    # Part of the cache key: raise it when verdicts change.
    version: ClassVar[str]

    # What the verifier needs that is not there; empty when it is ready.
    unavailable: str = ""

    @abstractmethod
    def find_violations(self, parameters: ParametersT) -> list[FieldViolation]:
        """Returns what is wrong with the parameters, field by field."""

    @abstractmethod
    async def judge(self, item: Item[ParametersT]) -> Outcome:
        """Judges one item within the verifier's own deadline; a failure is an outcome, not an exception."""

    def graded_text(self, item: Item[ParametersT]) -> str | None:
        """Returns all of the item that the outcome depends on beside the parameters, for the cache.

        A verifier that reads more than the answer overrides it: `graded_whole` covers everything there is.
        """
        return extract_answer(item.response, item.answer_marker)

    async def start(self) -> None:
        """Starts processes and connections that the verifier needs."""

    async def close(self) -> None:
        """Ends them."""


def graded_whole(item: Item[Any]) -> str:
    """Returns prompt, images and response, kept apart by their lengths; images by their digests."""
    images = [image.url or hashlib.blake2b(image.data, digest_size=16).hexdigest() for image in item.images]
    parts = [item.prompt, *images, item.response]
    return "".join(f"{len(part)}:{part}" for part in parts)


def extract_answer(response: str, marker: str) -> str | None:
    """Returns what follows the last marker, stripped; all of it without a marker; None when the marker is not there."""
    if not marker:
        return response.strip()
    _, found, answer = response.rpartition(marker)
    return answer.strip() if found else None


def read_answer(item: Item[Any]) -> str | Outcome:
    """Returns the item's answer; where its marker is not there, or nothing follows it, the outcome that says so."""
    answer = extract_answer(item.response, item.answer_marker)
    if answer is None:
        return Outcome.ungradable(f"the response has no answer marker {item.answer_marker!r}")
    return answer or Outcome.ungradable("the answer is empty")
