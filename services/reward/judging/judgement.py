"""A judge's judgement: the JSON that is asked for, and how it is read from an answer.

With structured output the whole answer is the JSON object. Asked in words, a model may write before it; then the
object has to end the answer and to begin with the request's random id, which no quoted text can hold.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from services.reward.judging.votes import RubbishError

CODE_BLOCK = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
SHOWN_CHARACTERS = 80


class Judgement(BaseModel):
    """What a judge decided; the reasoning comes first, so that it is written first."""

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


def read_judgement(answer: str) -> Judgement:
    """The judgement that the whole answer is, a code block around it aside.

    Raises RubbishError.
    """
    text = answer.strip()
    if match := CODE_BLOCK.fullmatch(text):
        text = match[1]
    return _validate(Judgement, text)


def read_signed_judgement(answer: str, request_id: str) -> Judgement:
    """The judgement that ends the answer and begins with `request_id`.

    Raises RubbishError.
    """
    text = answer.strip().removesuffix("```").rstrip()
    starts = [match.start() for match in re.finditer(rf'\{{\s*"id"\s*:\s*"{re.escape(request_id)}"', text)]
    if not starts:
        raise RubbishError(f"the answer does not end with a judgement: {_show(answer)}")
    return _validate(SignedJudgement, text[starts[-1] :])


def _validate(model: type[Judgement], text: str) -> Judgement:
    if not text:
        raise RubbishError("the answer is empty")
    try:
        return model.model_validate(json.loads(text, object_pairs_hook=_refuse_twins))
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "judgement"
        raise RubbishError(f"the answer is no judgement: {field}: {detail['msg']}: {_show(text)}") from error
    except (ValueError, RecursionError) as error:
        raise RubbishError(f"the answer is not JSON: {_show(text)}") from error


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _show(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")
