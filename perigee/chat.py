"""Messages of a chat, as prompt files and supervised sets hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.json_codec import name_type


class ChatMessage(TypedDict):
    """Message of a chat, its parts of text joined."""

    role: str
    content: str


# Responses that a line of a supervised set has beside what is asked, by the algorithm that learns from them.
RESPONSE_KEYS = {"sft": ("response",), "dpo": ("chosen", "rejected")}

# What a model is asked: text that it continues, or a chat that it answers.
Asked = str | tuple[ChatMessage, ...]


def read_messages(values: object) -> tuple[ChatMessage, ...]:
    """Returns the messages of a JSON value: each a role and a content, a text or a list of text parts.

    Raises InvalidArgumentError with a violation for each field that is wrong.
    """
    if not isinstance(values, list | tuple) or not values:
        raise InvalidArgumentError.for_field("messages", f"must be a list of messages, got {name_type(values)}")
    violations: list[FieldViolation] = []
    messages = tuple(_read_message(value, f"messages[{index}]", violations) for index, value in enumerate(values))
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return messages


def read_question(messages: tuple[ChatMessage, ...]) -> str:
    """Returns what the user asked last; raises InvalidArgumentError for a chat that does not wait for an answer."""
    if messages[-1]["role"] == "assistant":
        raise InvalidArgumentError.for_field(
            "messages", "must end with what is to be answered, ends with an assistant's"
        )
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        raise InvalidArgumentError.for_field("messages", "holds no message of the role user")
    return asked[-1]


def read_example(values: Mapping[str, Any], algorithm: str = "sft") -> tuple[Asked, tuple[str, ...]]:
    """Returns what a model is asked in a line of a supervised set, and the responses to learn from.

    The line has those of RESPONSE_KEYS beside "prompt" or "messages"; one response may be the assistant's, at the end
    of the messages. Raises InvalidArgumentError naming the field.
    """
    keys = RESPONSE_KEYS[algorithm]
    asked, responses = values.get("prompt"), [values.get(key) for key in keys]
    if values.get("messages") is not None:
        if asked is not None:
            raise InvalidArgumentError.for_field("prompt", "stands beside messages: give one of them")
        asked = read_messages(values["messages"])
        if responses == [None] and asked[-1]["role"] == "assistant":
            *rest, last = asked
            asked, responses = tuple(rest), [last["content"]]
        if not asked or asked[-1]["role"] == "assistant":
            raise InvalidArgumentError.for_field("messages", "must hold what the response answers")
    elif not isinstance(asked, str) or not asked:
        raise InvalidArgumentError.for_field("prompt", f"must be a text, got {name_type(asked)}: the prompt is empty")
    found = tuple(response for response in responses if isinstance(response, str) and response)
    if len(found) < len(keys):
        wrong = next(key for key, response in zip(keys, responses, strict=True) if response not in found)
        raise InvalidArgumentError.for_field(wrong, _why_empty(wrong, values))
    return asked, found


def _why_empty(key: str, values: Mapping[str, Any]) -> str:
    """Returns what is wrong with a response that is not there, empty or no text."""
    if values.get(key) not in (None, ""):
        return f"must be a text, got {name_type(values[key])}"
    if key == "response":
        return "is empty: a model cannot learn to say nothing"
    return "is empty: a line of a pair has prompt or messages, chosen and rejected"


def _read_message(value: object, place: str, violations: list[FieldViolation]) -> ChatMessage:
    """Returns a message; what is wrong is added to `violations`."""
    if not isinstance(value, Mapping):
        violations.append(FieldViolation(place, f"must be an object with role and content, got {name_type(value)}"))
        return ChatMessage(role="", content="")
    # Tables have a null for each key that only other messages have.
    found = {key: part for key, part in value.items() if part is not None}
    role = found.pop("role", None)
    if not isinstance(role, str) or not role:
        violations.append(FieldViolation(f"{place}.role", "is required: system, user or assistant"))
    content = _read_content(found.pop("content", None), f"{place}.content", violations)
    violations += [FieldViolation(f"{place}.{key}", "unknown key; a message has role and content") for key in found]
    return ChatMessage(role=str(role), content=content)


def _read_content(content: object, place: str, violations: list[FieldViolation]) -> str:
    """Returns the text of a content, that of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        violations.append(FieldViolation(place, f"must be a text or a list of parts, got {name_type(content)}"))
        return ""
    texts = []
    for index, part in enumerate(content):
        part = part if isinstance(part, Mapping) else {}
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind.startswith("image"):
            violations.append(FieldViolation(f"{place}[{index}]", "is an image, and the model reads text alone"))
        else:
            violations.append(FieldViolation(f"{place}[{index}]", 'must be {"type": "text", "text": ...}'))
    return "".join(texts)
