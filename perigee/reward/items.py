"""Items to score from JSON objects, as prompt files, files of responses, data sets and other pipelines hold them.

    {"response": "... #4", "answer_marker": "#", "verifier": {"math": {"reference": "4"}}}
    {"response": "... #4", "answer_marker": "#", "verifier": "math", "answer": "4"}

A verifier's message stands in full under its name, or its fields stand beside the name. Either way keys are the
message's fields or the short names below, so that a new verifier needs no line here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from perigee.chat import Asked, ChatMessage, ReadImage, find_images, read_images, read_messages, read_question
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.image_sources import ImageReader
from perigee.images import Image, ImageInfo
from perigee.json_codec import fill_message, keys_of, name_type, unknown_key
from perigee.reward.v1 import reward_pb2 as pb

RowT = TypeVar("RowT")
NamedT = TypeVar("NamedT", bound="Named")
# Wrong fields that an error's message names.
MAX_SHOWN = 20
TEXT_ALONE = "value_head reads text alone, and the question has images: take a judge"
VERIFIERS = tuple(field.name for field in pb.ScoreItem.DESCRIPTOR.oneofs_by_name["verifier"].fields)
PLAIN_FIELDS = ("id", "prompt", "response", "answer_marker", "images")
ITEM_KEYS = (*PLAIN_FIELDS, "verifier")
LINE_KEYS = ("id", "domain", "difficulty", "prompt", "messages", "answer_marker", "images", "verifier")

# Short names, each for the first of its fields that a message has; beside them `x` stands for the JSON text `x_json`.
SHORT_NAMES = {
    "answer": ("reference", "references"),
    "answers": ("references",),
    "function": ("function_name",),
    "signature": ("function_signature",),
    "json_schema": ("schema_json",),
    "judged_by": ("verifier",),
}
_LONG_TO_SHORT = {long: short for short, longs in SHORT_NAMES.items() for long in longs if long != "verifier"}
DEFAULTS: dict[str, dict[str, Any]] = {"CodeVerifier": {"language": "python"}}
# Messages whose kind their keys show: a test with `stdin` is one by standard input and output.
KNOWN_BY_KEYS = ("TestCase",)

# What a ground truth needs to be one: of each group, one of the fields.
NEEDED: dict[str, Sequence[Sequence[str]]] = {
    "MathVerifier": [["reference"]],
    "CodeVerifier": [["tests"]],
    "ChoiceVerifier": [["reference"]],
    "ShortAnswerVerifier": [["references"]],
    "ExactVerifier": [["reference"]],
    "RegexVerifier": [["pattern"]],
    "JsonVerifier": [["schema_json", "expected_json"]],
    "JudgeVerifier": [["reference", "rubric"]],
    "CompositeVerifier": [["parts"]],
    "CompositePart": [["name"], ["verifier"]],
}
# Least and largest values of fields, by their name.
RANGES = {"threshold": (0.0, 1.0), "weight": (0.0, math.inf)} | dict.fromkeys(
    ("votes", "wall_ms", "cpu_ms", "memory_bytes", "processes", "output_bytes"), (1.0, math.inf)
)


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompt file: a problem with its ground truth."""

    id: str
    domain: str
    """Accuracies are reported by domain."""
    difficulty: float
    """What the curriculum goes by."""
    item: pb.ScoreItem
    """The item of any response to it, but for id, response and images; its prompt is the question as the user wrote
    it."""
    messages: tuple[ChatMessage, ...] = ()
    """The chat that asks the question; none where it is asked as text."""
    place: str = ""
    """Where it stands, for messages of errors."""
    images: tuple[ImageInfo, ...] = ()
    """Images of the question, in order."""

    @property
    def asked(self) -> Asked:
        """What a model is asked."""
        return self.messages or self.item.prompt

    @property
    def question(self) -> tuple[str, ...]:
        """What makes it another question: its text, and its images' digests."""
        return (self.item.prompt, *(image.digest for image in self.images))

    @property
    def judged_images(self) -> tuple[ImageInfo, ...]:
        """Images that its verifier looks at: a message to the reward service has no room for others."""
        return self.images if looks_at_images(self.item) else ()


def read_item(
    values: Mapping[str, Any], default_id: str, ignored: Collection[str] = (), images: ImageReader | None = None
) -> pb.ScoreItem:
    """Returns the item of a JSON object; keys in `ignored` are the caller's own. `images` reads those of messages,
    which are refused without it.

    Raises InvalidArgumentError with a violation for each field that is wrong.
    """
    item = pb.ScoreItem(id=default_id)
    rest = {key: value for key, value in values.items() if key not in ignored}
    rest, messages, violations = _ask_as_text(rest, images.load if images else None)
    violations += _fill_item(item, rest)
    item.images.extend(pb.Image(data=image.data) for image in find_images(messages) if isinstance(image, Image))
    if values.get("response") is None:
        violations.append(FieldViolation("response", "is required"))
    _raise_any(violations)
    return item


def read_prompt_line(values: Mapping[str, Any], source: str, read_image: ReadImage | None = None) -> PromptLine:
    """Returns the prompt of a JSON object; `source` tells where it stands, for messages. Images are refused where
    nothing reads them.

    Raises InvalidArgumentError with a violation for each field that is wrong, or missing from its ground truth.
    """
    domain, difficulty = values.get("domain", "default"), values.get("difficulty", 0.0)
    item = pb.ScoreItem()
    # A response is none of a prompt's fields.
    rest = {key: value for key, value in values.items() if key not in ("domain", "difficulty", "response", "images")}
    images: tuple[ImageInfo, ...] = ()
    violations: list[FieldViolation] = []
    try:
        images = read_images(values.get("images"), read_image)
    except InvalidArgumentError as error:
        violations += error.violations
    rest, messages, wrong = _ask_as_text(rest, read_image, images)
    images = tuple(find_images(messages)) if messages else images
    violations += wrong
    if "response" in values:
        violations.append(FieldViolation("response", unknown_key("response", LINE_KEYS)))
    violations += _fill_item(item, rest)
    if not isinstance(domain, str) or not domain:
        violations.append(FieldViolation("domain", f"must be a text, got {domain!r}"))
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | float) or not math.isfinite(difficulty):
        violations.append(FieldViolation("difficulty", f"must be a number, got {name_type(difficulty)}"))
    needed = ("id",) if "messages" in values else ("id", "prompt")
    violations += [FieldViolation(name, "is required") for name in needed if not values.get(name)]
    if not violations:
        verifier = values["verifier"]
        place = "" if isinstance(verifier, str) else f"verifier.{item.WhichOneof('verifier')}."
        violations = find_faults(getattr(item, str(item.WhichOneof("verifier"))), place)
        if (images or any(find_images(messages))) and any(
            isinstance(p, pb.ValueHeadVerifier) for p in find_parts(item)
        ):
            violations.append(FieldViolation("verifier", TEXT_ALONE))
    _raise_any([FieldViolation(f"{source}: {each.field}", each.description) for each in violations])
    line = PromptLine(item.id, domain, float(difficulty), item, messages, source, images)
    item.ClearField("id")
    return line


class Named(Protocol):
    """Anything with an id."""

    @property
    def id(self) -> str: ...


def read_rows(
    rows: Iterable[tuple[str, RowT]], read: Callable[[RowT, str], NamedT], field: str, what: str = "prompts"
) -> list[NamedT]:
    """Returns what `read` makes of rows and their places; ids must differ.

    Raises InvalidArgumentError for all wrong rows at once, and naming `field` when there are none.
    """
    found: list[NamedT] = []
    violations: list[FieldViolation] = []
    places: dict[str, str] = {}
    for place, row in rows:
        try:
            one = read(row, place)
            if (first := places.setdefault(one.id, place)) != place:
                raise InvalidArgumentError.for_field(f"{place}: id", f"{one.id!r} is that of {first}, too")
            found.append(one)
        except InvalidArgumentError as error:
            violations += error.violations
    if len(violations) == 1:
        raise InvalidArgumentError.for_fields(violations)
    if violations:
        shown = [f"  {each.field}: {each.description}" for each in violations[:MAX_SHOWN]]
        more = [f"  and {len(violations) - MAX_SHOWN} more"] if len(violations) > MAX_SHOWN else []
        raise InvalidArgumentError("\n".join([f"some lines are no {what}:", *shown, *more]), violations=violations)
    if not found:
        raise InvalidArgumentError.for_field(field, f"holds no {what}")
    return found


def prompt_keys() -> frozenset[str]:
    """Returns the keys of a prompt file's lines, by their short names, those of all verifiers together."""
    return frozenset(LINE_KEYS).union(*(short_keys(getattr(pb.ScoreItem(), name).DESCRIPTOR) for name in VERIFIERS))


def short_keys(descriptor: Any) -> list[str]:
    """Returns a message's keys by their short names."""
    return [_LONG_TO_SHORT.get(field.name, field.name.removesuffix("_json")) for field in descriptor.fields]


def read_lines(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yields the lines of a text file that are not empty, each after its place, "file:line".

    Raises InvalidArgumentError naming `field`, which names the file.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field(field, f"{path} cannot be read: {error}") from error


def read_object(text: str, source: str) -> dict[str, Any]:
    """Returns a line's JSON object. Raises InvalidArgumentError naming `source`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError.for_field(source, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.for_field(source, "must be a JSON object")
    return values


def find_parts(message: Message) -> Iterator[Any]:
    """Yields a message and the messages in it, at every depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from find_parts(part)


def looks_at_images(item: pb.ScoreItem) -> bool:
    """Returns whether a verifier of an item looks at the question's images."""
    return any(isinstance(part, pb.JudgeVerifier) for part in find_parts(item))


def find_faults(message: Message, place: str = "") -> list[FieldViolation]:
    """Returns what makes a ground truth impossible to judge by: fields that are missing or out of their range."""
    name = message.DESCRIPTOR.name
    missing = [names for names in NEEDED.get(name, ()) if not any(_is_set(message, field) for field in names)]
    violations = []
    for first, *others in missing:
        where = f" where there is no {' or '.join(others)}" if others else ""
        violations.append(FieldViolation(f"{place}{_LONG_TO_SHORT.get(first, first)}", f"is required{where}"))
    if isinstance(message, pb.CodeVerifier) and not message.function_name:
        kinds = {test.WhichOneof("kind") for test in message.tests}
        if kinds & {"function", "code"}:
            violations.append(FieldViolation(f"{place}function", "is required by tests with arguments or code"))
    for field, value in message.ListFields():
        least, most = RANGES.get(field.name, (-math.inf, math.inf))
        if field.message_type is not None:
            for index, part in enumerate(value if field.is_repeated else [value]):
                position = f"[{index}]" if field.is_repeated else ""
                violations += find_faults(part, f"{place}{field.name}{position}.")
        elif field.name in RANGES and not least <= value <= most:
            violations.append(
                FieldViolation(f"{place}{field.name}", f"must be from {least:g} to {most:g}, got {value}")
            )
    return violations


def _is_set(message: Message, name: str) -> bool:
    """Returns whether a field holds something."""
    field = message.DESCRIPTOR.fields_by_name[name]
    return message.HasField(name) if field.has_presence else bool(getattr(message, name))


def _raise_any(violations: Sequence[FieldViolation]) -> None:
    """Raises InvalidArgumentError when there are violations."""
    if violations:
        raise InvalidArgumentError.for_fields(violations)


def _ask_as_text(
    values: Mapping[str, Any], read_image: ReadImage | None, images: Sequence[ImageInfo] = ()
) -> tuple[dict[str, Any], tuple[ChatMessage, ...], list[FieldViolation]]:
    """Returns the values with the question of their messages as prompt, the messages, and what is wrong with them."""
    rest = dict(values)
    if rest.pop("messages", None) is None:
        return rest, (), []
    if values.get("prompt") is not None:
        return rest, (), [FieldViolation("prompt", "stands beside messages: give one of them")]
    try:
        messages = read_messages(values["messages"], read_image, images)
        return rest | {"prompt": read_question(messages)}, messages, []
    except InvalidArgumentError as error:
        return rest, (), list(error.violations)


def _fill_item(item: pb.ScoreItem, values: Mapping[str, Any]) -> list[FieldViolation]:
    """Sets the item's fields; returns what is wrong, field by field."""
    plain = {name: values[name] for name in PLAIN_FIELDS if name in values}
    if isinstance(images := plain.get("images"), list):
        plain["images"] = [{"url": image} if isinstance(image, str) else image for image in images]
    violations = fill_message(item, plain)
    rest = {key: value for key, value in values.items() if key not in ITEM_KEYS}
    return violations + _fill_verifier(item, values.get("verifier"), rest)


def _fill_verifier(item: pb.ScoreItem, verifier: object, rest: Mapping[str, Any]) -> list[FieldViolation]:
    """Sets the item's verifier from its name and the fields beside it, or from an object under its name."""
    known = ", ".join(VERIFIERS)
    if verifier is None:
        return [FieldViolation("verifier", f"is required: one of {known}")]
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            return [FieldViolation("verifier", f"must be one of {known}, got {verifier!r}")]
        return _fill_member(item, verifier, rest, "")
    if not isinstance(verifier, Mapping) or len(verifier) != 1:
        got = f"{len(verifier)} keys" if isinstance(verifier, Mapping) else name_type(verifier)
        return [FieldViolation("verifier", f"must be a name or an object with one key, got {got}")]
    [(name, parameters)] = verifier.items()
    if name not in VERIFIERS:
        return [FieldViolation(f"verifier.{name}", f"is no verifier; they are {known}")]
    violations = [FieldViolation(key, unknown_key(key, ITEM_KEYS)) for key in rest]
    return violations + _fill_member(item, name, parameters, f"verifier.{name}")


def _fill_member(item: pb.ScoreItem, name: str, parameters: Any, place: str) -> list[FieldViolation]:
    """Sets the message of one verifier; guesses what unknown keys should be among short names, too."""
    message: Message = getattr(item, name)
    message.SetInParent()
    violations = fill_message(message, spell_out(message.DESCRIPTOR, parameters), place)
    if not isinstance(parameters, Mapping):
        return violations
    # The reader of messages guesses among their own names only.
    known = [*short_keys(message.DESCRIPTOR), *keys_of(message.DESCRIPTOR), *(() if place else ITEM_KEYS)]
    keys = {f"{place}.{key}".removeprefix("."): key for key in parameters if isinstance(key, str)}
    return [
        FieldViolation(each.field, unknown_key(keys[each.field], known))
        if each.field in keys and each.description.startswith("unknown key")
        else each
        for each in violations
    ]


def spell_out(descriptor: Any, value: Any) -> Any:
    """Returns a message's JSON value with its fields' names for short ones, at every depth.

    Keys that are neither stay, for the reader of messages to refuse.
    """
    if not isinstance(value, Mapping):
        # A message of one text may be that text.
        return {descriptor.fields[0].name: value} if isinstance(value, str) and len(descriptor.fields) == 1 else value
    if descriptor.name in KNOWN_BY_KEYS:
        value = _move_into_member(descriptor, value)
    if descriptor.name == "VerifierSpec" and isinstance(name := value.get("verifier"), str):
        value = {name: {key: part for key, part in value.items() if key != "verifier"}}
    defaults = DEFAULTS.get(descriptor.name, {})
    spelled: dict[str, Any] = dict(defaults)
    for key, part in value.items():
        name, part = _spell_out_field(descriptor, key, part)
        # Beside the field's own name a short one is left for the reader to refuse.
        is_twice = name != key and (name in value or (name in spelled and name not in defaults))
        spelled[key if is_twice else name] = part
        if key == "judged_by":
            spelled.setdefault("weight", value.get("weight", 1.0))
    return spelled


def _spell_out_field(descriptor: Any, key: str, value: Any) -> tuple[str, Any]:
    """Returns the name and value of a field for a key and its value."""
    if key in keys_of(descriptor):
        name = key
    elif name := next((name for name in SHORT_NAMES.get(key, ()) if name in descriptor.fields_by_name), ""):
        if name == "schema_json":
            value = None if value is None else json.dumps(value)
        elif descriptor.fields_by_name[name].is_repeated and not isinstance(value, list | type(None)):
            value = [value]
    elif f"{key}_json" in descriptor.fields_by_name:
        name, value = f"{key}_json", json.dumps(value)
    field = descriptor.fields_by_name.get(name or key)
    if (name or key) in ("reference", "references") and field is not None and field.type == field.TYPE_STRING:
        value = [_write_number(each) for each in value] if isinstance(value, list) else _write_number(value)
    if field is not None and field.message_type is not None:
        parts = [spell_out(field.message_type, part) for part in value] if isinstance(value, list) else None
        value = spell_out(field.message_type, value) if parts is None else parts
    return name or key, value


def _write_number(value: Any) -> Any:
    """Returns a number as the text of an answer, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _move_into_member(descriptor: Any, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the value with keys that are not the message's own under the one member that has them all."""
    others = {key for key in value if key not in keys_of(descriptor)}
    if not others:
        return value
    for member in descriptor.oneofs[0].fields:
        part = member.message_type
        if part is not None and all(_spell_out_field(part, key, None)[0] in keys_of(part) for key in others):
            own = {key: item for key, item in value.items() if key not in others}
            return own | {member.name: {key: value[key] for key in others}}
    return value
