"""Base of the generation engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from perigee.buffer.v1.buffer_pb2 import VersionSpan
from perigee.weights.v1.weights_pb2 import Manifest
from services.weights.manifest import WeightImage
from services.weights.pieces import Slices

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class EngineDiedError(Exception):
    """Raised when the engine's process is gone or no longer answers; requests in flight are lost."""


class RequestAbortedError(EngineDiedError):
    """Raised when a request ended early, after the tokens that it had."""


@dataclass(frozen=True)
class PromptImage:
    """Image of a prompt."""

    digest: str
    """SHA-256 of its file, hexadecimal."""
    picture: Picture
    """In RGB."""


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to continue."""

    request_id: str
    token_ids: Sequence[int]
    """Prompt and earlier response tokens."""
    max_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int | None
    stop_token_ids: tuple[int, ...]
    stride_tokens: int
    """Tokens are handed over at least this often; larger strides cost less."""
    score_prompt: bool = False
    """Whether the last output has the log-probabilities of the prompt."""
    images: Sequence[PromptImage] = ()
    """Those of the prompt, in the order of their placeholders."""
    cache_salt: str = ""
    """What is cached of prefixes with another one is not taken."""
    expanded_ids: Sequence[int] = ()
    """`token_ids` with the tokens of the images, which the engine must read them as; none without images."""


@dataclass(frozen=True)
class PromptScore:
    """Log-probabilities at one place of a prompt at temperature 1, nats."""

    logprob: float
    """Of the token that stands there."""
    best_token_id: int
    best_logprob: float


@dataclass(frozen=True)
class EngineOutput:
    """Tokens since the last output of a request."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Log-probability of each token under the distribution that it was sampled from, nats."""
    versions: Sequence[VersionSpan]
    """Spans over these tokens, in order."""
    cached_tokens: int
    """Tokens of the request served from the prefix cache."""
    finish: Literal["stop", "length", "abort"] | None
    """Set on the last output: a stop token was sampled, max_tokens are there, or the request was interrupted."""
    prompt_scores: Sequence[PromptScore] = ()
    """Those of the tokens after the first, where the request asks for them."""
    experts: Sequence[bytes] = ()
    """Packed expert choices of each token; none where they are not recorded."""


class Engine(ABC):
    """Generation engine in a process of its own, started without weights."""

    can_sleep: bool = True
    """Whether `sleep` gives memory back."""

    @abstractmethod
    async def start(self) -> None:
        """Starts the engine with meaningless weights."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends all requests with EngineDiedError and leaves no process behind; may be called at any time."""

    @abstractmethod
    async def wait_dead(self) -> None:
        """Returns once the engine has died or stalled."""

    @abstractmethod
    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Continues a sequence; closing the iterator aborts the request.

        Raises EngineDiedError when the engine dies, InvalidArgumentError for what it cannot take, and InternalError
        when it makes other tokens of the images than `expanded_ids`.
        """

    @abstractmethod
    async def interrupt(self, request_ids: Iterable[str]) -> None:
        """Ends requests with the tokens that they have: their last outputs say `abort`. Unknown ids are no error."""

    async def take_seconds(self) -> tuple[float, float]:
        """Returns the seconds of prefill and of decoding since the last call; zeros where nobody knows."""
        return 0.0, 0.0

    async def find_slices(self, manifest: Manifest) -> Slices | None:
        """Returns what the engine takes of a checkpoint's tensors, all of it when None.

        Raises EngineDiedError when no engine runs that could tell.
        """
        return None

    @abstractmethod
    async def update_weights(self, image: WeightImage, *, keep_prefixes: bool = False) -> float:
        """Replaces all weights between two forward passes and forgets every cached prefix, unless these are kept.

        Returns the seconds in which nothing was generated.

        Requests in flight continue with the new weights, and with new keys and values unless prefixes are kept. When it
        fails, the engine holds no usable weights and must be stopped. Raises EngineDiedError when the engine dies
        meanwhile.
        """

    @abstractmethod
    async def sleep(self) -> None:
        """Gives the memory of weights and KV cache back; requests in flight wait, and others must not come."""

    @abstractmethod
    async def wake_up(self, image: WeightImage) -> None:
        """Takes the memory again, loads the weights, and goes on with the requests in flight."""

    @abstractmethod
    def count_memory(self) -> int:
        """Returns the bytes that the engine's processes have for themselves; 0 without any."""
