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
from typing import TYPE_CHECKING, Any, NoReturn

from perigee.chat import RESPONSE_KEYS, Asked, ChatMessage, read_example
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.reward.items import read_lines, read_object
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import TOKENIZER_SETTINGS_FILE, ModelFolder, read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# The date that templates of Llama 3 have where nobody tells them one.
_DATE = datetime(2024, 7, 26)
# A response that no template changes.
_PROBE = "perigee-response"


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
            return str(
                self._compiled.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=generation,
                    **self.special_tokens,
                )
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidArgumentError.for_field(field, f"the model's chat template fails: {reason}") from error

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

    def uses_template(self, asked: Asked) -> bool:
        """Returns whether the chat template is applied: to messages, and to text by `chat` or a system prompt."""
        mode = self.settings.mode
        return not isinstance(asked, str) or mode == "always" or (bool(self.settings.system_prompt) and mode != "never")

    def render(self, asked: Asked) -> str:
        """Returns the text that the model continues; raises InvalidArgumentError naming the field."""
        instruction, field = self.settings.instruction, "prompt" if isinstance(asked, str) else "messages"
        if not self.uses_template(asked):
            return f"{asked}\n{instruction}" if instruction else str(asked)
        if self.template is None or self.settings.mode == "never":
            why = "run.chat is never" if self.template else f"{self.model.path} has no chat template"
            raise InvalidArgumentError.for_field(field, f"cannot be asked as a chat: {why}")
        if isinstance(asked, str):
            if asked.startswith(self._special_texts):
                raise InvalidArgumentError.for_field(
                    field, "begins with a special token, as a rendered chat does: chat: never takes it as it is"
                )
            asked = (ChatMessage(role="user", content=asked),)
        messages = list(asked)
        last = max((index for index, each in enumerate(messages) if each["role"] == "user"), default=None)
        if instruction and last is not None:
            messages[last] = ChatMessage(role="user", content=f"{messages[last]['content']}\n{instruction}")
        if self.settings.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, ChatMessage(role="system", content=self.settings.system_prompt))
        return self.template.render(messages, field=field)

    def encode(self, asked: Sequence[Asked], places: Sequence[str], begun: str = "") -> list[list[int]]:
        """Returns the token ids of prompts, each followed by what is `begun` of the answer.

        `places` tells where each stands, empty where it is the call's own. Raises InvalidArgumentError naming the first
        that cannot be asked.
        """
        texts: list[str] = []
        for each, place in zip(asked, places, strict=True):
            try:
                texts.append(self.render(each) + begun)
            except InvalidArgumentError as error:
                [violation] = error.violations
                named = f"{place}: {violation.field}".removeprefix(": ")
                raise InvalidArgumentError.for_field(named, violation.description) from error
        before = self._tokens_before_text
        return [
            ids if self.uses_template(each) or ids[: len(before)] == before else [*before, *ids]
            for each, ids in zip(asked, self._encode_bare(texts), strict=True)
        ]

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
    return PromptEncoder(model, model.open_tokenizer(), template, settings or pb.ChatSettings())


def encode_examples(
    path: Path,
    field: str,
    encoder: PromptEncoder,
    max_tokens: int,
    limit: int | None = None,
    algorithm: str = "sft",
) -> list[tuple[list[int], list[list[int]]]]:
    """Returns the token ids of the prompt and of the responses of each line of a supervised set, or of its first
    `limit` lines; `field` is the key that named it, and `algorithm` says which responses a line has.

    Raises InvalidArgumentError naming file, line and field of malformed examples, of those that have more than
    `max_tokens`, and of pairs whose responses are the same.
    """
    places, asked, responses = zip(*_read_examples(path, field, limit, algorithm), strict=True)
    keys = RESPONSE_KEYS[algorithm]
    encoded = [encoder.encode_responses(asked, [each[number] for each in responses]) for number in range(len(keys))]
    prompts = encoder.encode(asked, places)
    examples = [(prompt, list(each)) for prompt, *each in zip(prompts, *encoded, strict=True)]
    for place, (prompt, found) in zip(places, examples, strict=True):
        _check_example(place, prompt, dict(zip(keys, found, strict=True)), max_tokens)
    return examples


def _check_example(place: str, prompt: list[int], responses: dict[str, list[int]], max_tokens: int) -> None:
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
    path: Path, field: str, limit: int | None, algorithm: str
) -> list[tuple[str, Asked, tuple[str, ...]]]:
    """Returns where each line of a supervised set stands, what a model is asked there, and the responses."""
    examples: list[tuple[str, Asked, tuple[str, ...]]] = []
    violations: list[FieldViolation] = []
    for line, text in itertools.islice(read_lines(path, field), limit):
        place = f"{field}: {line}"
        values = read_object(text, place)
        try:
            examples.append((place, *read_example(values, algorithm)))
        except InvalidArgumentError as error:
            violations += [FieldViolation(f"{place}: {each.field}", each.description) for each in error.violations]
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    if not examples:
        raise InvalidArgumentError.for_field(field, f"{path} holds no example")
    return examples


def _refuse(reason: str) -> NoReturn:
    """Ends a template, at its own wish."""
    raise ValueError(reason)


def _to_json(value: Any, **options: Any) -> str:
    """Returns JSON without the escapes for HTML that jinja makes."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _format_now(form: str) -> str:
    """Returns a date that stays: a run's prompts are the same tokens whenever it is resumed."""
    return _DATE.strftime(form)
