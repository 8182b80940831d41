"""The chat-completions API: one request, and its answer or the error that it stands for."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from services.reward.config import JudgeEndpointConfig
from services.reward.judging.judgement import SCHEMA
from services.reward.judging.prompts import Message
from services.reward.judging.votes import RubbishError, TransientError, VoteError

MAX_SERVER_WORDS = 300
# Timeout, conflict, too early, too many requests, and whatever is the server's own fault.
TRANSIENT_STATUSES = {408, 409, 425, 429}
REFUSED_STATUSES = {400, 422, 501}


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
    """What the API returns, as far as it matters here."""

    choices: list[_Choice]
    usage: Usage | None = None


def build_body(config: JudgeEndpointConfig, messages: list[Message], by_schema: bool) -> dict[str, Any]:
    """The request; fields that are null are left out."""
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
    """The completion that an HTTP response carries.

    Raises TransientError, RefusedError, RubbishError when it is none, and VoteError for other statuses.
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
        raise RubbishError("the endpoint's answer is no chat completion") from error


def read_answer(completion: Completion) -> str:
    """The text of the assistant's message.

    Raises RubbishError when there is none or it is not whole.
    """
    if not completion.choices:
        raise RubbishError("the completion has no choice")
    choice = completion.choices[0]
    if choice.finish_reason == "length":
        raise RubbishError("the answer was cut off at max_tokens")
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        raise RubbishError(f"the judge declined to answer: {choice.message.refusal or choice.finish_reason}")
    if not choice.message.content:
        raise RubbishError("the answer is empty")
    return choice.message.content


def read_retry_after(headers: httpx.Headers) -> float | None:
    """Seconds from Retry-After, a number or a date; None without one that can be read."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _words(response: httpx.Response) -> str:
    """What the server said, in one line; empty when it said nothing that is text."""
    text = response.text
    try:
        value = json.loads(text)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        pass
    text = " ".join(text.split())
    return f": {text[:MAX_SERVER_WORDS]}" if text else ""
