"""Prompt sets: JSON Lines with a problem and its ground truth a line, tokenized with the base model's tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from services.coordinator.verifier_specs import (
    ChoiceSpec,
    CodeSpec,
    CodeTest,
    CompositeSpec,
    ExactSpec,
    FunctionTest,
    JsonSpec,
    JudgeSpec,
    MathSpec,
    RegexSpec,
    ShortAnswerSpec,
    Spec,
    ValueHeadSpec,
)
from services.kit.config import Model, validate


class PromptLine(Model):
    """What every line holds."""

    id: str = Field(min_length=1)
    """Unique in its file."""
    domain: str = Field("default", min_length=1)
    """Accuracies are reported by domain."""
    prompt: str = Field(min_length=1)
    """The text that the model continues."""
    difficulty: float = 0.0
    """The curriculum goes by it."""
    answer_marker: str = ""
    """What follows its last occurrence in the response is the answer."""


class MathLine(PromptLine, MathSpec):
    """A problem whose final answer is compared with a reference."""


class CodeLine(PromptLine, CodeSpec):
    """A problem whose program is judged on hidden tests."""


class ChoiceLine(PromptLine, ChoiceSpec):
    """A multiple-choice question."""


class ShortAnswerLine(PromptLine, ShortAnswerSpec):
    """A question whose answer is a word, a name or a short phrase."""


class ExactLine(PromptLine, ExactSpec):
    """A problem whose answer is a given text."""


class RegexLine(PromptLine, RegexSpec):
    """A problem whose answer matches a regular expression."""


class JsonLine(PromptLine, JsonSpec):
    """A problem whose answer is JSON."""


class JudgeLine(PromptLine, JudgeSpec):
    """A problem whose answer a language model judges."""


class ValueHeadLine(PromptLine, ValueHeadSpec):
    """A problem whose answer a trained model judges."""


class CompositeLine(PromptLine, CompositeSpec):
    """A problem whose answer several verifiers judge."""


Line = (
    MathLine
    | CodeLine
    | ChoiceLine
    | ShortAnswerLine
    | ExactLine
    | RegexLine
    | JsonLine
    | JudgeLine
    | ValueHeadLine
    | CompositeLine
)
LINE_CLASSES: dict[str, type[Line]] = {
    "math": MathLine,
    "code": CodeLine,
    "choice": ChoiceLine,
    "short_answer": ShortAnswerLine,
    "exact": ExactLine,
    "regex": RegexLine,
    "json": JsonLine,
    "judge": JudgeLine,
    "value_head": ValueHeadLine,
    "composite": CompositeLine,
}


@dataclass(frozen=True)
class Prompt:
    """A problem with its ground truth, as token ids, too."""

    line: Line
    token_ids: tuple[int, ...]

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.line.id

    @property
    def domain(self) -> str:
        """The prompt's domain."""
        return self.line.domain


@dataclass(frozen=True)
class ModelFolder:
    """What the coordinator knows of the base model."""

    tokenizer: Tokenizer
    context_tokens: int


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, in its order."""

    prompts: tuple[Prompt, ...]
    by_id: dict[str, Prompt]


def read_model_folder(path: str) -> ModelFolder:
    """Tokenizer and context length of a Hugging Face folder.

    Raises InvalidArgumentError saying what is missing when the folder is not one of a model.
    """
    folder = Path(path)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InvalidArgumentError.of("run.model", f"{path} is no model folder: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        context_tokens = int(config["max_position_embeddings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError.of("run.model", f"{path}/config.json has no max_position_embeddings") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise InvalidArgumentError.of("run.model", f"{path}/tokenizer.json cannot be read: {error}") from error
    return ModelFolder(tokenizer, context_tokens)


def read_prompts(path: str, field: str, model: ModelFolder, max_response_tokens: int) -> PromptSet:
    """The prompts of a JSON Lines file; `field` is the configuration key that named it.

    Raises InvalidArgumentError naming file, line and field of the first malformed line, a repeated id, or the id
    of a prompt that leaves less than `max_response_tokens` tokens of the model's context.
    """
    lines = parse_prompt_lines(path, field)
    encodings = model.tokenizer.encode_batch([line.prompt for line in lines])
    prompts = tuple(Prompt(line, tuple(encoding.ids)) for line, encoding in zip(lines, encodings, strict=True))
    for prompt in prompts:
        tokens = len(prompt.token_ids)
        if tokens == 0:
            raise InvalidArgumentError.of(f"{path}: prompt {prompt.id}", "has no tokens in the model's vocabulary")
        if tokens + max_response_tokens > model.context_tokens:
            raise InvalidArgumentError.of(
                f"{path}: prompt {prompt.id}",
                f"has {tokens} tokens, which with a response of {max_response_tokens} pass the model's context of "
                f"{model.context_tokens}: shorten it or lower run.rollout.max_response_tokens",
            )
    return PromptSet(prompts, {prompt.id: prompt for prompt in prompts})


def parse_prompt_lines(path: str, field: str) -> list[Line]:
    """The lines of a prompt file, empty ones skipped.

    Raises InvalidArgumentError naming file, line and field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.of(field, f"{path} cannot be read: {error}") from error
    lines = [
        parse_prompt_line(line, f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise InvalidArgumentError.of(field, f"{path} holds no prompts")
    repeated = [name for name, count in Counter(line.id for line in lines).items() if count > 1]
    if repeated:
        raise InvalidArgumentError.of(field, f"{path} holds the id {repeated[0]} more than once")
    return lines


def parse_prompt_line(text: str, source: str) -> Line:
    """One line; `source` is file and line number, for the message.

    Raises InvalidArgumentError naming source and field.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError.of(source, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.of(source, "must be a JSON object")
    kind = values.get("verifier")
    if not isinstance(kind, str) or kind not in LINE_CLASSES:
        known = ", ".join(sorted(LINE_CLASSES))
        raise InvalidArgumentError.of(f"{source}: verifier", f"must be one of {known}, got {kind!r}")
    line = validate(LINE_CLASSES[kind], values, source, "")
    check_spec(line, source)
    return line


def check_spec(spec: Spec, source: str) -> None:
    """What no single field says. Raises InvalidArgumentError naming source and field."""
    calls = isinstance(spec, CodeSpec) and any(isinstance(test, FunctionTest | CodeTest) for test in spec.tests)
    if isinstance(spec, CodeSpec) and calls and not spec.function:
        raise InvalidArgumentError.of(f"{source}: function", "is required by tests with arguments or code")
    if isinstance(spec, JsonSpec) and spec.json_schema is None and "expected" not in spec.model_fields_set:
        raise InvalidArgumentError.of(f"{source}: json_schema", "is required where nothing is expected")
    if isinstance(spec, JudgeSpec) and not spec.answer and not spec.rubric:
        raise InvalidArgumentError.of(f"{source}: answer", "is required where there is no rubric")
    if isinstance(spec, CompositeSpec):
        for number, part in enumerate(spec.parts):
            check_spec(part.judged_by, f"{source}: parts.{number}.judged_by")
