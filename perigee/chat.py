"""Messages of a chat, as prompt files and supervised sets hold them: texts, and images between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.images import ImageInfo
from perigee.json_codec import name_type


class TextPart(TypedDict):
    """Text of a message that has images, too."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """Image of a message."""

    type: Literal["image"]
    image: ImageInfo


class ChatMessage(TypedDict):
    """Message of a chat: a text, its parts joined, or a list of parts where one of them is an image."""

    role: str
    content: str | list[TextPart | ImagePart]


# Responses that a line of a supervised set has beside what is asked, by the algorithm that learns from them.
RESPONSE_KEYS = {"sft": ("response",), "dpo": ("chosen", "rejected")}

# What a model is asked: text that it continues, or a chat that it answers.
Asked = str | tuple[ChatMessage, ...]

# Reads the image that a line names in a field; raises InvalidArgumentError naming the field.
ReadImage = Callable[[object, str], ImageInfo]


class Example(NamedTuple):
    """Line of a supervised set."""

    asked: Asked
    responses: tuple[str, ...]
    images: tuple[ImageInfo, ...] = ()


def text_of(message: ChatMessage) -> str:
    """Returns a message's text, that of its parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def change_text(message: ChatMessage, change: Callable[[str], str]) -> ChatMessage:
    """Returns a message with its text changed, or the last of its texts where images stand between them."""
    content = message["content"]
    if isinstance(content, str):
        return ChatMessage(role=message["role"], content=change(content))
    parts = list(content)
    last = max((index for index, part in enumerate(parts) if part["type"] == "text"), default=len(parts))
    text = "".join(part["text"] for part in parts[last:] if part["type"] == "text")
    parts[last : last + 1] = [TextPart(type="text", text=change(text))]
    return ChatMessage(role=message["role"], content=parts)


def find_images(messages: Iterable[ChatMessage]) -> Iterator[ImageInfo]:
    """Yields the images of messages, in order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def read_messages(
    values: object, read_image: ReadImage | None = None, images: Sequence[ImageInfo] = ()
) -> tuple[ChatMessage, ...]:
    """Returns the messages of a JSON value: each a role and a content, a text or a list of parts.

    `read_image` reads the parts that are images, which are refused without one; a part that names no image is the next
    of `images`, all of which are taken. Raises InvalidArgumentError with a violation for each field that is wrong.
    """
    if not isinstance(values, list | tuple) or not values:
        raise InvalidArgumentError.for_field("messages", f"must be a list of messages, got {name_type(values)}")
    reader = _Reader(read_image, iter(images))
    messages = tuple(reader.read(value, f"messages[{index}]") for index, value in enumerate(values))
    left = len(list(reader.beside))
    if left:
        reader.add("images", f"has {left} more than messages have parts of type image")
    if reader.violations:
        raise InvalidArgumentError.for_fields(reader.violations)
    return messages


def read_question(messages: tuple[ChatMessage, ...]) -> str:
    """Returns what the user asked last; raises InvalidArgumentError for a chat that does not wait for an answer."""
    if messages[-1]["role"] == "assistant":
        raise InvalidArgumentError.for_field(
            "messages", "must end with what is to be answered, ends with an assistant's"
        )
    asked = [message for message in messages if message["role"] == "user"]
    if not asked:
        raise InvalidArgumentError.for_field("messages", "holds no message of the role user")
    return text_of(asked[-1])


def read_images(value: object, read_image: ReadImage | None, field: str = "images") -> tuple[ImageInfo, ...]:
    """Returns the images of a field that holds one or a list of them; raises InvalidArgumentError naming the first that
    is none.
    """
    if value is None:
        return ()
    if read_image is None:
        raise InvalidArgumentError.for_field(field, _NO_IMAGES)
    if not isinstance(value, list | tuple):
        return (read_image(value, field),)
    return tuple(read_image(each, f"{field}[{index}]") for index, each in enumerate(value))


def read_example(values: Mapping[str, Any], algorithm: str = "sft", read_image: ReadImage | None = None) -> Example:
    """Returns what a model is asked in a line of a supervised set, and the responses to learn from.

    The line has those of RESPONSE_KEYS beside "prompt" or "messages"; one response may be the assistant's, at the end
    of the messages. Raises InvalidArgumentError naming the field.
    """
    keys = RESPONSE_KEYS[algorithm]
    images = read_images(values.get("images"), read_image)
    asked, responses = values.get("prompt"), [values.get(key) for key in keys]
    if values.get("messages") is not None:
        if asked is not None:
            raise InvalidArgumentError.for_field("prompt", "stands beside messages: give one of them")
        asked = read_messages(values["messages"], read_image, images)
        if responses == [None] and asked[-1]["role"] == "assistant":
            *rest, last = asked
            asked, responses = tuple(rest), [last["content"]]
        images = tuple(find_images(asked))
        if not asked or asked[-1]["role"] == "assistant":
            raise InvalidArgumentError.for_field("messages", "must hold what the response answers")
    elif not isinstance(asked, str) or not asked:
        raise InvalidArgumentError.for_field("prompt", f"must be a text, got {name_type(asked)}: the prompt is empty")
    found = tuple(response for response in responses if isinstance(response, str) and response)
    if len(found) < len(keys):
        wrong = next(key for key, response in zip(keys, responses, strict=True) if response not in found)
        raise InvalidArgumentError.for_field(wrong, _why_empty(wrong, values))
    return Example(asked, found, images)


def _why_empty(key: str, values: Mapping[str, Any]) -> str:
    """Returns what is wrong with a response that is not there, empty or no text."""
    if values.get(key) not in (None, ""):
        return f"must be a text, got {name_type(values[key])}"
    if key == "response":
        return "is empty: a model cannot learn to say nothing"
    return "is empty: a line of a pair has prompt or messages, chosen and rejected"


_NO_IMAGES = "is an image, and text alone is read here"


class _Reader:
    """Reads messages; what is wrong with them is collected."""

    def __init__(self, read_image: ReadImage | None, beside: Iterator[ImageInfo]) -> None:
        self.violations: list[FieldViolation] = []
        self.beside = beside
        self._read_image = read_image

    def add(self, place: str, description: str) -> None:
        """Notes what is wrong."""
        self.violations.append(FieldViolation(place, description))

    def read(self, value: object, place: str) -> ChatMessage:
        """Returns a message."""
        if not isinstance(value, Mapping):
            self.add(place, f"must be an object with role and content, got {name_type(value)}")
            return ChatMessage(role="", content="")
        # Tables have a null for each key that only other messages have.
        found = {key: part for key, part in value.items() if part is not None}
        role = found.pop("role", None)
        if not isinstance(role, str) or not role:
            self.add(f"{place}.role", "is required: system, user or assistant")
        content = self._read_content(found.pop("content", None), f"{place}.content")
        for key in found:
            self.add(f"{place}.{key}", "unknown key; a message has role and content")
        return ChatMessage(role=str(role), content=content)

    def _read_content(self, content: object, place: str) -> str | list[TextPart | ImagePart]:
        """Returns a text, or the parts of a content that has an image."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list | tuple):
            self.add(place, f"must be a text or a list of parts, got {name_type(content)}")
            return ""
        parts = [part for index, each in enumerate(content) for part in self._read_part(each, f"{place}[{index}]")]
        message = ChatMessage(role="", content=parts)
        return parts if any(find_images([message])) else text_of(message)

    def _read_part(self, value: object, place: str) -> Iterator[TextPart | ImagePart]:
        """Yields a part; nothing where it is wrong."""
        part = value if isinstance(value, Mapping) else {}
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            yield TextPart(type="text", text=text)
        elif kind not in ("image", "image_url"):
            self.add(place, 'must be {"type": "text", "text": ...} or {"type": "image", "image": ...}')
        elif self._read_image is None:
            self.add(place, _NO_IMAGES)
        elif not any(part[key] is not None for key in part if key not in ("type", "text")):
            if (image := next(self.beside, None)) is None:
                self.add(place, "names no image, and images beside the messages has none left for it")
            else:
                yield ImagePart(type="image", image=image)
        else:
            try:
                yield ImagePart(type="image", image=self._read_image(part, place))
            except InvalidArgumentError as error:
                self.violations += error.violations
