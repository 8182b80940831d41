"""Token ids of prompts: the one place that applies a model's chat template and its special tokens.

A text that a model continues begins with the tokens that the tokenizer puts before a text (BOS). A rendered chat
template has all special tokens that it wants: none is added.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from perigee.chat import (
    RESPONSE_KEYS,
    Asked,
    ChatMessage,
    Example,
    ImagePart,
    ReadImage,
    TextPart,
    change_text,
    find_images,
    read_example,
)
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.images import ImageInfo
from perigee.reward.items import read_lines, read_object
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import TOKENIZER_SETTINGS_FILE, ModelFolder, read_json_object
from services.kit.vision import VisionModel, open_vision

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
# What processors of transformers 4 write.
_OLD_TEMPLATE_FILE = "chat_template.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# The date that templates of Llama 3 have where nobody tells them one.
_DATE = datetime(2024, 7, 26)
# A response that no template changes.
_PROBE = "perigee-response"
# Images that no line names: no other number of them is found in a prompt than is shown to the model.
_NO_IMAGES: tuple[ImageInfo, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """Template of a model folder that makes one text of messages."""

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Sequence[ChatMessage], *, generation: bool = True, field: str = "messages") -> str:
        """Returns the chat as text, with the beginning of an answer if `generation`.

        Raises InvalidArgumentError naming `field` when the template fails or refuses the messages.
        """
        try:
            return self._render([self._show(message) for message in messages], generation)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidArgumentError.for_field(field, f"the model's chat template fails: {reason}") from error

    def _render(self, messages: list[dict[str, Any]], generation: bool) -> str:
        return str(self._compiled.render(messages=messages, add_generation_prompt=generation, **self.special_tokens))

    def _show(self, message: ChatMessage) -> dict[str, Any]:
        """Returns a message as the template reads it: an image is a part of which it needs the place alone."""
        content: Any = message["content"]
        if isinstance(content, str):
            content = content if self._takes_text else [TextPart(type="text", text=content)]
        else:
            content = [{"type": "image"} if part["type"] == "image" else dict(part) for part in content]
        return {**message, "content": content}

    @cached_property
    def _takes_text(self) -> bool:
        """Whether a content may be a text; templates of some models with images want a list of parts always."""

        def shows(content: Any) -> bool:
            try:
                return _PROBE in self._render([{"role": "user", "content": content}], True)
            except Exception:  # a template may raise anything
                return False

        return shows(_PROBE) or not shows([TextPart(type="text", text=_PROBE)])

    @cached_property
    def _compiled(self) -> Any:
        """The template in the environment that transformers documents for chat templates."""
        from jinja2 import ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class GenerationTag(ext.Extension):
            """Takes what the model wrote, between {% generation %} and {% endgeneration %}, as it stands."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _format_now}
        return environment.from_string(self.source)


def open_chat_template(folder: Path, field: str) -> ChatTemplate | None:
    """Returns the chat template of a model folder, None when it has none; `field` named the folder, for errors."""
    file, settings_file = folder / CHAT_TEMPLATE_FILE, folder / TOKENIZER_SETTINGS_FILE
    settings = read_json_object(settings_file, field) if settings_file.exists() else {}
    source = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if source is None and (old := folder / _OLD_TEMPLATE_FILE).exists():
        source = read_json_object(old, field).get("chat_template")
    if isinstance(source, list):
        source = next((each["template"] for each in source if each["name"] == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {name: settings.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items() if token}
    return ChatTemplate(source, texts)


@dataclass(frozen=True)
class PromptEncoder:
    """Makes token ids of what a model is asked, and of the responses that it learns."""

    model: ModelFolder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: pb.ChatSettings = field(default_factory=pb.ChatSettings)
    vision: VisionModel | None = None
    """How the model takes images; None for one that takes none."""

    def uses_template(self, asked: Asked) -> bool:
        """Returns whether the chat template is applied: to messages, and to text by `chat` or a system prompt."""
        mode = self.settings.mode
        return not isinstance(asked, str) or mode == "always" or (bool(self.settings.system_prompt) and mode != "never")

    def render(self, asked: Asked, images: Sequence[ImageInfo] = _NO_IMAGES) -> str:
        """Returns the text that the model continues, with a placeholder for each image; raises InvalidArgumentError
        naming the field.

        `images` are those of a text. They stand before it in a chat, unless it has their placeholders.
        """
        if not self.uses_template(asked):
            return f"{asked}\n{self.settings.instruction}" if self.settings.instruction else str(asked)
        messages, field = self.compose(asked, images), "prompt" if isinstance(asked, str) else "messages"
        assert self.template is not None
        return self.template.render(messages, field=field)

    def compose(self, asked: Asked, images: Sequence[ImageInfo] = _NO_IMAGES) -> list[ChatMessage]:
        """Returns the messages that the chat template is applied to; raises InvalidArgumentError naming the field."""
        instruction, field = self.settings.instruction, "prompt" if isinstance(asked, str) else "messages"
        if self.template is None or self.settings.mode == "never":
            why = "run.chat is never" if self.template else f"{self.model.path} has no chat template"
            raise InvalidArgumentError.for_field(field, f"cannot be asked as a chat: {why}")
        if isinstance(asked, str):
            if asked.startswith(self._special_texts):
                raise InvalidArgumentError.for_field(
                    field, "begins with a special token, as a rendered chat does: chat: never takes it as it is"
                )
            asked = (ask_with_images(asked, () if self.image_text in asked else images),)
        messages = list(asked)
        last = max((index for index, each in enumerate(messages) if each["role"] == "user"), default=None)
        if instruction and last is not None:
            messages[last] = change_text(messages[last], lambda text: f"{text}\n{instruction}")
        if self.settings.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, ChatMessage(role="system", content=self.settings.system_prompt))
        return messages

    def encode(
        self,
        asked: Sequence[Asked],
        places: Sequence[str],
        begun: str = "",
        images: Sequence[Sequence[ImageInfo]] | None = None,
    ) -> list[list[int]]:
        """Returns the token ids of prompts, each followed by what is `begun` of the answer; an image is one token.

        `places` tells where each stands, empty where it is the call's own; `images` are those of texts. Raises
        InvalidArgumentError naming the first that cannot be asked.
        """
        shown = [
            self._images_of(each, some)
            for each, some in zip(asked, images or itertools.repeat(_NO_IMAGES), strict=False)
        ]
        texts: list[str] = []
        for each, some, place in zip(asked, shown, places, strict=True):
            try:
                if some and self.vision is None:
                    raise InvalidArgumentError.for_field("images", f"the model of {self.model.path} takes no images")
                texts.append(self.render(each, some) + begun)
            except InvalidArgumentError as error:
                [violation] = error.violations
                named = f"{place}: {violation.field}".removeprefix(": ")
                raise InvalidArgumentError.for_field(named, violation.description) from error
        before = self._tokens_before_text
        encoded = [
            ids if self.uses_template(each) or ids[: len(before)] == before else [*before, *ids]
            for each, ids in zip(asked, self._encode_bare(texts), strict=True)
        ]
        for ids, some, place in zip(encoded, shown, places, strict=True):
            self._check_placeholders(ids, len(some), place)
        return encoded

    def expand(self, token_ids: Sequence[int], images: Sequence[ImageInfo], place: str) -> Sequence[int]:
        """Returns a prompt with the tokens of its images for their placeholders, as the model reads it.

        Raises InvalidArgumentError for an image that the model does not take.
        """
        if self.vision is None or not images:
            return token_ids
        return self.vision.expand(token_ids, [(each.width, each.height) for each in images], f"{place}: images")

    def _images_of(self, asked: Asked, images: Sequence[ImageInfo]) -> Sequence[ImageInfo]:
        return images if isinstance(asked, str) else tuple(find_images(asked))

    def _check_placeholders(self, token_ids: Sequence[int], images: int, place: str) -> None:
        """Raises InvalidArgumentError for a prompt that has not as many placeholders as images."""
        if self.vision is None:
            return
        found = token_ids.count(self.vision.image_token_id)
        if found != images:
            raise InvalidArgumentError.for_field(
                f"{place}: images".removeprefix(": "),
                f"are {images}, and the prompt has {found} of {self.image_text}, which stands for an image",
            )

    @cached_property
    def image_text(self) -> str:
        """Text of the placeholder of an image."""
        token = None if self.vision is None else self.tokenizer.id_to_token(self.vision.image_token_id)
        return token or "\0"

    def encode_responses(self, asked: Sequence[Asked], responses: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of responses, each ended by a stop token: the first that it spells out.

        Others end with the one that the template puts behind an answer, and with the model's first without a template.
        """
        stops = self.model.stop_token_ids
        ended = []
        for each, ids in zip(asked, self._encode_bare(responses), strict=True):
            ids.append(self._answer_end if self.uses_template(each) else self.model.eos_token_id)
            end = next(place for place, token in enumerate(ids, start=1) if token in stops)
            ended.append(ids[:end])
        return ended

    def _encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts, with no special token but those that they spell out."""
        return [list(each.ids) for each in self.tokenizer.encode_batch([*texts], add_special_tokens=False)]

    @cached_property
    def _tokens_before_text(self) -> list[int]:
        """Tokens that the tokenizer puts before every text (BOS); those that it puts behind one (EOS) are left out."""
        plain, full = (list(self.tokenizer.encode("a", add_special_tokens=added).ids) for added in (False, True))
        starts = range(len(full) - len(plain) + 1)
        return next((full[:start] for start in starts if full[start : start + len(plain)] == plain), [])

    @cached_property
    def _answer_end(self) -> int:
        """The first stop token that the template puts behind an answer, else the model's first."""
        assert self.template is not None
        chat = (ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content=_PROBE))
        end = self.template.render(chat, generation=False).rpartition(_PROBE)[2]
        [ids] = self._encode_bare([end])
        return next((token for token in ids if token in self.model.stop_token_ids), self.model.eos_token_id)

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)


def open_encoder(model: ModelFolder, settings: pb.ChatSettings | None = None) -> PromptEncoder:
    """Returns the encoder of a model folder; raises InvalidArgumentError that names the folder's field and the file."""
    template = open_chat_template(model.path, model.field)
    return PromptEncoder(model, model.open_tokenizer(), template, settings or pb.ChatSettings(), open_vision(model))


class EncodedExample(NamedTuple):
    """Line of a supervised set as token ids."""

    prompt: list[int]
    """An image is one token, its placeholder."""
    responses: list[list[int]]
    images: tuple[ImageInfo, ...] = ()


def encode_examples(
    path: Path,
    field: str,
    encoder: PromptEncoder,
    max_tokens: int,
    limit: int | None = None,
    algorithm: str = "sft",
    read_image: ReadImage | None = None,
) -> list[EncodedExample]:
    """Returns the token ids of the prompt and of the responses of each line of a supervised set, or of its first
    `limit` lines; `field` is the key that named it, and `algorithm` says which responses a line has. `read_image` reads
    the images of lines, which are refused without it.

    Raises InvalidArgumentError naming file, line and field of malformed examples, of those that have more than
    `max_tokens`, images included, and of pairs whose responses are the same.
    """
    places, lines = zip(*_read_examples(path, field, limit, algorithm, read_image), strict=True)
    asked, images, keys = [line.asked for line in lines], [line.images for line in lines], RESPONSE_KEYS[algorithm]
    encoded = [
        encoder.encode_responses(asked, [line.responses[number] for line in lines]) for number in range(len(keys))
    ]
    prompts = encoder.encode(asked, places, images=images)
    examples = [
        EncodedExample(prompt, list(each), some) for prompt, some, *each in zip(prompts, images, *encoded, strict=True)
    ]
    for place, example in zip(places, examples, strict=True):
        prompt = encoder.expand(example.prompt, example.images, place)
        _check_example(place, prompt, dict(zip(keys, example.responses, strict=True)), max_tokens)
    return examples


def _check_example(place: str, prompt: Sequence[int], responses: dict[str, list[int]], max_tokens: int) -> None:
    """Raises InvalidArgumentError for an example without a prompt, that is too long, or of which nothing is learned."""
    if not prompt:
        raise InvalidArgumentError.for_field(f"{place}: prompt", "has no tokens in the model's vocabulary")
    for key, response in responses.items():
        if (tokens := len(prompt) + len(response)) > max_tokens:
            named = place if len(responses) == 1 else f"{place}: {key}"
            raise InvalidArgumentError.for_field(named, f"{tokens} tokens are more than the context of {max_tokens}")
    if len(responses) > 1 and len({tuple(response) for response in responses.values()}) == 1:
        raise InvalidArgumentError.for_field(
            f"{place}: rejected", "has the same tokens as chosen: there is nothing to prefer"
        )


def _read_examples(
    path: Path, field: str, limit: int | None, algorithm: str, read_image: ReadImage | None
) -> list[tuple[str, Example]]:
    """Returns the lines of a supervised set, each after its place."""
    examples: list[tuple[str, Example]] = []
    violations: list[FieldViolation] = []
    for line, text in itertools.islice(read_lines(path, field), limit):
        place = f"{field}: {line}"
        values = read_object(text, place)
        try:
            examples.append((place, read_example(values, algorithm, read_image)))
        except InvalidArgumentError as error:
            violations += [FieldViolation(f"{place}: {each.field}", each.description) for each in error.violations]
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    if not examples:
        raise InvalidArgumentError.for_field(field, f"{path} holds no example")
    return examples


def ask_with_images(text: str, images: Sequence[ImageInfo]) -> ChatMessage:
    """Returns a message of the user: the images, then the text."""
    if not images:
        return ChatMessage(role="user", content=text)
    parts = [ImagePart(type="image", image=image) for image in images]
    return ChatMessage(role="user", content=[*parts, TextPart(type="text", text=text)])


def _refuse(reason: str) -> NoReturn:
    """Ends a template, at its own wish."""
    raise ValueError(reason)


def _to_json(value: Any, **options: Any) -> str:
    """Returns JSON without the escapes for HTML that jinja makes."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _format_now(form: str) -> str:
    """Returns a date that stays: a run's prompts are the same tokens whenever it is resumed."""
    return _DATE.strftime(form)
