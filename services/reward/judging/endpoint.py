"""One judge: asks its endpoint for judgements, within a deadline and a budget."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, cast

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from services.kit.telemetry import get_logger
from services.reward.config import JudgeEndpointConfig
from services.reward.judging.budget import Budget
from services.reward.judging.chat import Completion, RefusedError, build_body, read_answer, read_completion
from services.reward.judging.judgement import Judgement, read_judgement, read_signed_judgement
from services.reward.judging.prompts import Quoted, build_messages
from services.reward.judging.votes import RubbishError, TransientError, VoteError
from services.reward.metrics import JUDGE_CALLS, JUDGE_TOKENS

log = get_logger(__name__)

RUBBISH_ATTEMPTS = 2
BACKOFF = wait_exponential_jitter(initial=0.25, max=10, jitter=0.25)
# For estimates before a call: few tokenizers make more tokens of a text than this.
CHARACTERS_PER_TOKEN = 2
TOKENS_PER_IMAGE = 1500


@dataclass
class _Asking:
    """One vote under way; its time runs from the first request that the budget admits."""

    quoted: Quoted
    timeout_s: float
    end: float | None = None
    rubbish: int = 0

    def left_s(self) -> float:
        return self.timeout_s if self.end is None else self.end - time.monotonic()

    def is_worth_another(self, error: BaseException) -> bool:
        if isinstance(error, RubbishError):
            self.rubbish += 1
            return self.rubbish < RUBBISH_ATTEMPTS
        return isinstance(error, TransientError)

    def is_over(self, state: RetryCallState) -> bool:
        return state.upcoming_sleep >= self.left_s()


class Endpoint:
    """A configured judge; `start` and `close` frame its use."""

    def __init__(self, name: str, config: JudgeEndpointConfig, max_response_characters: int) -> None:
        self.name = name
        self.config = config
        self.budget = Budget(config)
        # Until the endpoint has refused it.
        self.by_schema = config.structured_output
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._max_response_characters = max_response_characters
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Opens the client; nothing is sent."""
        key = self.config.api_key
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            timeout=None,  # each request has a deadline as a whole
            limits=httpx.Limits(max_connections=self.config.concurrency),
        )

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def vote(self, quoted: Quoted) -> Judgement:
        """One judgement: waits its turn, then takes at most the judge's `timeout_s`.

        What fails for a while is tried again, an answer that is no judgement once. Raises VoteError.
        """
        asking = _Asking(quoted, self.config.timeout_s)
        retrying = AsyncRetrying(
            retry=retry_if_exception(asking.is_worth_another), wait=_pause_s, stop=asking.is_over, reraise=True
        )
        async with self._slots:
            try:
                return cast(Judgement, await retrying(self._ask, asking))
            except VoteError as error:
                error.reason = f"judge {self.name}: {self._mask(error.reason)}"
                raise

    async def _ask(self, asking: _Asking) -> Judgement:
        by_schema = self.by_schema
        try:
            completion = await self._call(asking, by_schema)
        except RefusedError as refusal:
            if not by_schema:
                raise
            by_schema = False
            completion = await self._call(asking, by_schema)
            # The same request without the schema was taken: it was the schema that was refused.
            self.by_schema = False
            log.warning("judge takes no JSON schema", judge=self.name, reason=self._mask(refusal.reason))
        answer = read_answer(completion)
        return read_judgement(answer) if by_schema else read_signed_judgement(answer, asking.quoted.fence.nonce)

    async def _call(self, asking: _Asking, by_schema: bool) -> Completion:
        messages = build_messages(asking.quoted, by_schema, self._max_response_characters)
        body = build_body(self.config, messages, by_schema)
        reservation = await self.budget.reserve(
            estimate_tokens(body, self.config.max_tokens), None if asking.end is None else asking.left_s()
        )
        if asking.end is None:
            asking.end = time.monotonic() + asking.timeout_s
        tokens: int | None = None  # of a request that broke off nobody knows
        end = "failed"
        try:
            response = await self._post(body, min(self.config.attempt_timeout_s, asking.left_s()))
            tokens = 0
            completion = read_completion(response)
            if (usage := completion.usage) is not None:
                tokens = usage.prompt_tokens + usage.completion_tokens
                JUDGE_TOKENS.labels(self.name, "prompt").inc(usage.prompt_tokens)
                JUDGE_TOKENS.labels(self.name, "completion").inc(usage.completion_tokens)
            else:
                tokens = None
            end = "answered"
            return completion
        finally:
            self.budget.settle(reservation, tokens)
            JUDGE_CALLS.labels(self.name, end).inc()

    async def _post(self, body: dict[str, Any], timeout_s: float) -> httpx.Response:
        assert self._client is not None
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.post(self._url, json=body)
        except TimeoutError as error:
            raise TransientError(f"{self._url} did not answer within {timeout_s:.3g} s") from error
        except httpx.TransportError as error:
            raise TransientError(f"{self._url} cannot be reached: {error or type(error).__name__}") from error

    def _mask(self, text: str) -> str:
        """Without the key, which a server may repeat."""
        key = self.config.api_key
        return text.replace(key.get_secret_value(), "***") if key and key.get_secret_value() else text


def estimate_tokens(body: dict[str, Any], max_tokens: int) -> int:
    """At most how many tokens a request and its answer take."""
    characters = images = 0
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        characters += sum(len(part.get("text", "")) for part in parts)
        images += sum("image_url" in part for part in parts)
    answer = body.get("max_completion_tokens", body.get("max_tokens", max_tokens))
    return characters // CHARACTERS_PER_TOKEN + images * TOKENS_PER_IMAGE + int(answer)


def _pause_s(state: RetryCallState) -> float:
    """Exponential, but never shorter than the server asks for; rubbish needs no pause."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, TransientError):
        return max(BACKOFF(state), error.retry_after_s or 0.0)
    return 0.0
