"""A judge behind the chat-completions API of an endpoint: asked within a deadline and a budget, its answers read.

The budget limits calls and tokens: in any minute, for which calls wait, and in total, after which votes fail.

The judgement that is asked for is JSON. With structured output the whole answer is the JSON object. Asked in words, a
model may write before it; then the object has to end the answer and to begin with the request's random id, which no
quoted text can hold. A vote that failed decides nothing.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import httpx
from opentelemetry.trace import SpanKind
from pydantic import BaseModel, ConfigDict, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from services.kit.telemetry import get_logger
from services.kit.tracing import span
from services.reward.config import JudgeEndpointConfig
from services.reward.judges.prompts import Message, Quoted, build_messages
from services.reward.verifiers.base import JUDGE_CALLS, JUDGE_TOKENS

log = get_logger(__name__)

MALFORMED_ATTEMPTS = 2
BACKOFF = wait_exponential_jitter(initial=0.25, max=10, jitter=0.25)
# For estimates before a call: few tokenizers make more tokens of a text than this.
CHARACTERS_PER_TOKEN = 2
TOKENS_PER_IMAGE = 1500
MAX_SERVER_WORDS = 300
SHOWN_CHARACTERS = 80
CODE_BLOCK = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
# Timeout, conflict, too early, too many requests, and whatever is the server's own fault.
TRANSIENT_STATUSES = {408, 409, 425, 429}
REFUSED_STATUSES = {400, 422, 501}
PERIOD_S = 60.0


class VoteError(Exception):
    """A vote that came to nothing; `retryable` says whether asking again may help, `retry_after_s` when."""

    retryable = False

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class TransientError(VoteError):
    """The endpoint is down, slow or busy: worth another try within the deadline."""

    retryable = True


class MalformedResponseError(VoteError):
    """The endpoint answered, but not with a judgement: worth one more try."""

    retryable = True


class Judgement(BaseModel):
    """Decision of a judge; the reasoning comes first, so that it is written first."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reasoning: str
    verdict: Literal["correct", "wrong", "ungradable"]


class SignedJudgement(Judgement):
    """A judgement with the id of the request that it answers."""

    id: str


# "title" and "description" left out: strict servers know few keywords.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "verdict": {"type": "string", "enum": ["correct", "wrong", "ungradable"]},
    },
    "required": ["reasoning", "verdict"],
    "additionalProperties": False,
}


class RefusedError(VoteError):
    """The endpoint does not take the request as it is."""


class Usage(BaseModel):
    """Tokens of one call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _AnswerMessage(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _AnswerMessage
    finish_reason: str | None = None


class Completion(BaseModel):
    """Answer of the API, as far as it matters here."""

    choices: list[_Choice]
    usage: Usage | None = None


class BudgetSpentError(VoteError):
    """The process's total is spent."""


@dataclass(eq=False)
class Reservation:
    """Share of a call in the budget: tokens are an estimate until the call ends."""

    start: float
    tokens: int


class Budget:
    """Admits calls first come, first served, such that no limit is ever exceeded by what they may use.

    A call whose estimate alone exceeds the tokens of a minute is admitted when there is no other in that minute.
    """

    def __init__(self, config: JudgeEndpointConfig, period_s: float = PERIOD_S) -> None:
        self.used_calls = 0
        self.used_tokens = 0
        self._config = config
        self._period_s = period_s
        self._recent: deque[Reservation] = deque()
        self._in_flight: set[Reservation] = set()
        self._admission = asyncio.Lock()
        self._finished = asyncio.Event()

    async def reserve(self, tokens: int, wait_s: float | None = None) -> Reservation:
        """Waits until a call of at most that many tokens is within the limits; `wait_s` bounds the wait.

        Raises BudgetSpentError, and TransientError when the wait is over.
        """
        try:
            async with asyncio.timeout(wait_s), self._admission:
                while True:
                    pause_s = self._pause_s(tokens)
                    if pause_s == 0:
                        break
                    self._finished.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._finished.wait()
        except TimeoutError as error:
            raise TransientError(
                "the judge's calls_per_minute or tokens_per_minute is used up", retry_after_s=self._period_s
            ) from error
        reservation = Reservation(time.monotonic(), tokens)
        self._recent.append(reservation)
        self._in_flight.add(reservation)
        self.used_calls += 1
        return reservation

    def finish(self, reservation: Reservation, tokens: int | None) -> None:
        """Ends a call that took that many tokens; None when that is unknown, which counts as the estimate."""
        if tokens is not None:
            reservation.tokens = tokens
        self.used_tokens += reservation.tokens
        self._in_flight.discard(reservation)
        self._finished.set()

    def _pause_s(self, tokens: int) -> float | None:
        """Returns how long to wait before looking again: 0 when the call fits, None for until another call ends."""
        config, now = self._config, time.monotonic()
        reserved = sum(reservation.tokens for reservation in self._in_flight)
        if config.total_calls is not None and self.used_calls >= config.total_calls:
            raise BudgetSpentError(f"the judge's total_calls = {config.total_calls} are spent")
        if config.total_tokens is not None and self.used_tokens + reserved + tokens > config.total_tokens:
            if self._in_flight:  # they may take less than they reserve
                return None
            raise BudgetSpentError(
                f"the judge's total_tokens = {config.total_tokens} are spent: {self.used_tokens} are used and a call "
                f"may take {tokens}"
            )
        while self._recent and self._recent[0].start + self._period_s <= now:
            self._recent.popleft()
        if not self._recent:
            return 0
        until_next_s = self._recent[0].start + self._period_s - now
        if config.calls_per_minute is not None and len(self._recent) >= config.calls_per_minute:
            return until_next_s
        recent_tokens = sum(reservation.tokens for reservation in self._recent)
        if config.tokens_per_minute is not None and recent_tokens + tokens > config.tokens_per_minute:
            return until_next_s
        return 0


@dataclass
class _VoteRequest:
    """One vote under way; its time runs from the first request that the budget admits."""

    quoted: Quoted
    timeout_s: float
    end: float | None = None
    malformed: int = 0
    failure: BaseException | None = None

    def left_s(self) -> float:
        return self.timeout_s if self.end is None else self.end - time.monotonic()

    def is_retryable(self, error: BaseException) -> bool:
        self.failure = error
        if isinstance(error, MalformedResponseError):
            self.malformed += 1
            return self.malformed < MALFORMED_ATTEMPTS
        return isinstance(error, TransientError)

    def is_over(self, state: RetryCallState) -> bool:
        return state.upcoming_sleep >= self.left_s()


class Endpoint:
    """A configured judge; nothing is sent before the first vote, and `close` ends its use."""

    def __init__(self, name: str, config: JudgeEndpointConfig, max_response_characters: int) -> None:
        self.name = name
        self.config = config
        self.budget = Budget(config)
        # Until the endpoint has refused it.
        self.by_schema = config.structured_output
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._max_response_characters = max_response_characters
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {config.api_key.get_secret_value()}"} if config.api_key else {},
            timeout=None,  # each request has a deadline as a whole
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def vote(self, quoted: Quoted) -> Judgement:
        """Returns one judgement: waits for a slot, then takes at most the judge's `timeout_s`.

        What fails for a while is tried again, an answer that is no judgement once. Raises VoteError.
        """
        vote = _VoteRequest(quoted, self.config.timeout_s)
        retrying = AsyncRetrying(
            retry=retry_if_exception(vote.is_retryable), wait=_pause_s, stop=vote.is_over, reraise=True
        )
        async with self._slots:
            try:
                return cast(Judgement, await retrying(self._ask, vote))
            except VoteError as error:
                error.reason = f"judge {self.name}: {self._mask(error.reason)}"
                raise

    async def _ask(self, vote: _VoteRequest) -> Judgement:
        by_schema = self.by_schema
        try:
            completion = await self._call(vote, by_schema)
        except RefusedError as refusal:
            if not by_schema:
                raise
            by_schema = False
            completion = await self._call(vote, by_schema)
            # The same request without the schema was taken: it was the schema that was refused.
            self.by_schema = False
            log.warning("judge takes no JSON schema", judge=self.name, reason=self._mask(refusal.reason))
        answer = read_answer(completion)
        return read_judgement(answer) if by_schema else read_signed_judgement(answer, vote.quoted.fence.nonce)

    async def _call(self, vote: _VoteRequest, by_schema: bool) -> Completion:
        if vote.left_s() <= 0:  # it went by during the pause: what failed before says more
            raise vote.failure or TransientError(f"{self._url} used up its {vote.timeout_s:.3g} s")
        messages = build_messages(vote.quoted, by_schema, self._max_response_characters)
        body = build_body(self.config, messages, by_schema)
        reservation = await self.budget.reserve(
            estimate_tokens(body, self.config.max_tokens), None if vote.end is None else vote.left_s()
        )
        if vote.end is None:
            vote.end = time.monotonic() + vote.timeout_s
        tokens: int | None = None  # of a request that broke off they are unknown
        end = "failed"
        try:
            with span("call judge", SpanKind.CLIENT, judge=self.name, model=self.config.model):
                response = await self._post(body, min(self.config.attempt_timeout_s, vote.left_s()))
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
            self.budget.finish(reservation, tokens)
            JUDGE_CALLS.labels(self.name, end).inc()

    async def _post(self, body: dict[str, Any], timeout_s: float) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.post(self._url, json=body)
        except TimeoutError as error:
            raise TransientError(f"{self._url} did not answer within {timeout_s:.3g} s") from error
        except httpx.TransportError as error:
            raise TransientError(f"{self._url} cannot be reached: {error or type(error).__name__}") from error

    def _mask(self, text: str) -> str:
        """Returns the text without the key, which a server may repeat."""
        key = self.config.api_key
        return text.replace(key.get_secret_value(), "***") if key and key.get_secret_value() else text


def build_body(config: JudgeEndpointConfig, messages: list[Message], by_schema: bool) -> dict[str, Any]:
    """Returns the request; fields that are null are left out."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    if by_schema:
        schema = {"name": "judgement", "strict": True, "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {key: value for key, value in (body | config.extra_body).items() if value is not None}


def read_completion(response: httpx.Response) -> Completion:
    """Returns the completion that an HTTP response carries.

    Raises TransientError, RefusedError, MalformedResponseError when it is none, and VoteError for other statuses.
    """
    status = response.status_code
    if status in TRANSIENT_STATUSES or (status >= 500 and status not in REFUSED_STATUSES):
        raise TransientError(f"the endpoint answered {status}{_words(response)}", read_retry_after(response.headers))
    if status in REFUSED_STATUSES:
        raise RefusedError(f"the endpoint refused the request with {status}{_words(response)}")
    if status != 200:
        raise VoteError(f"the endpoint answered {status}{_words(response)}")
    try:
        return Completion.model_validate_json(response.content)
    except ValidationError as error:
        raise MalformedResponseError("the endpoint's answer is no chat completion") from error


def read_answer(completion: Completion) -> str:
    """Returns the text of the assistant's message.

    Raises MalformedResponseError when there is none or it is not whole.
    """
    if not completion.choices:
        raise MalformedResponseError("the completion has no choice")
    choice = completion.choices[0]
    if choice.finish_reason == "length":
        raise MalformedResponseError("the answer was cut off at max_tokens")
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        raise MalformedResponseError(f"the judge declined to answer: {choice.message.refusal or choice.finish_reason}")
    if not choice.message.content:
        raise MalformedResponseError("the answer is empty")
    return choice.message.content


def read_retry_after(headers: httpx.Headers) -> float | None:
    """Returns the seconds of Retry-After, a number or a date; None without one that can be read."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def read_judgement(answer: str) -> Judgement:
    """Returns the judgement that the whole answer is, a code block around it aside.

    Raises MalformedResponseError.
    """
    text = answer.strip()
    if match := CODE_BLOCK.fullmatch(text):
        text = match[1]
    return _validate(Judgement, text)


def read_signed_judgement(answer: str, request_id: str) -> Judgement:
    """Returns the judgement that ends the answer and begins with `request_id`.

    Raises MalformedResponseError.
    """
    text = answer.strip().removesuffix("```").rstrip()
    starts = [match.start() for match in re.finditer(rf'\{{\s*"id"\s*:\s*"{re.escape(request_id)}"', text)]
    if not starts:
        raise MalformedResponseError(f"the answer does not end with a judgement: {_show(answer)}")
    return _validate(SignedJudgement, text[starts[-1] :])


def _validate(model: type[Judgement], text: str) -> Judgement:
    if not text:
        raise MalformedResponseError("the answer is empty")
    try:
        return model.model_validate(json.loads(text, object_pairs_hook=_refuse_repeated_keys))
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "judgement"
        raise MalformedResponseError(f"the answer is no judgement: {field}: {detail['msg']}: {_show(text)}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedResponseError(f"the answer is not JSON: {_show(text)}") from error


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _show(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def estimate_tokens(body: dict[str, Any], max_tokens: int) -> int:
    """Returns how many tokens a request and its answer take at most."""
    characters = images = 0
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        characters += sum(len(part.get("text", "")) for part in parts)
        images += sum("image_url" in part for part in parts)
    answer = body.get("max_completion_tokens", body.get("max_tokens", max_tokens))
    return characters // CHARACTERS_PER_TOKEN + images * TOKENS_PER_IMAGE + int(answer)


def _pause_s(state: RetryCallState) -> float:
    """Returns an exponential pause, never shorter than the server asks for; a malformed answer needs no pause."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, TransientError):
        return max(BACKOFF(state), error.retry_after_s or 0.0)
    return 0.0


def _words(response: httpx.Response) -> str:
    """Returns the server's words in one line; empty when it said nothing that is text."""
    text = response.text
    try:
        value = json.loads(text)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        pass
    text = " ".join(text.split())
    return f": {text[:MAX_SERVER_WORDS]}" if text else ""
