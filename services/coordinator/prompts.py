"""Prompt sets: JSON Lines with a problem and its ground truth a line, tokenized with the base model's tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from services.kit.config import Model, validate


class StdioTest(Model):
    """A test by standard input and output."""

    stdin: str
    expected_stdout: str


class FunctionTest(Model):
    """A test by calling a function."""

    arguments: list[Any]
    expected: Any


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


class MathLine(PromptLine):
    """A problem whose final answer is compared with a reference."""

    verifier: Literal["math"]
    answer: str = Field(min_length=1)
    """The reference."""


class CodeLimits(Model):
    """Limits of the program under test; unset ones are the sandbox's defaults."""

    wall_ms: int | None = Field(None, ge=1)
    cpu_ms: int | None = Field(None, ge=1)
    memory_bytes: int | None = Field(None, ge=1)
    processes: int | None = Field(None, ge=1)
    file_bytes: int | None = Field(None, ge=0)
    output_bytes: int | None = Field(None, ge=1)


class CodeLine(PromptLine):
    """A problem whose program is judged on hidden tests."""

    verifier: Literal["code"]
    language: str = "python"
    """A runtime of the sandbox."""
    function: str = ""
    """The function that function tests call."""
    tests: list[FunctionTest | StdioTest] = Field(min_length=1)
    """The hidden tests."""
    partial_credit: bool = False
    """Reward the share of tests passed."""
    limits: CodeLimits = CodeLimits()
    """Limits of the program."""


LINE_CLASSES: dict[str, type[MathLine] | type[CodeLine]] = {"math": MathLine, "code": CodeLine}


@dataclass(frozen=True)
class Prompt:
    """A problem with its ground truth, as token ids, too."""

    line: MathLine | CodeLine
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


def read_prompts(path: str, field: str, model: ModelFolder, response_cap: int) -> PromptSet:
    """The prompts of a JSON Lines file; `field` is the configuration key that named it.

    Raises InvalidArgumentError naming file, line and field of the first malformed line, a repeated id, or the id
    of a prompt that leaves less than `response_cap` tokens of the model's context.
    """
    lines = parse_prompt_lines(path, field)
    encodings = model.tokenizer.encode_batch([line.prompt for line in lines])
    prompts = tuple(Prompt(line, tuple(encoding.ids)) for line, encoding in zip(lines, encodings, strict=True))
    for prompt in prompts:
        tokens = len(prompt.token_ids)
        if tokens == 0:
            raise InvalidArgumentError.of(f"{path}: prompt {prompt.id}", "has no tokens in the model's vocabulary")
        if tokens + response_cap > model.context_tokens:
            raise InvalidArgumentError.of(
                f"{path}: prompt {prompt.id}",
                f"has {tokens} tokens, which with a response of {response_cap} pass the model's context of "
                f"{model.context_tokens}: shorten it or lower run.rollout.response_cap",
            )
    return PromptSet(prompts, {prompt.id: prompt for prompt in prompts})


def parse_prompt_lines(path: str, field: str) -> list[MathLine | CodeLine]:
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


def parse_prompt_line(text: str, source: str) -> MathLine | CodeLine:
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
    if isinstance(line, CodeLine) and not line.function and any(isinstance(t, FunctionTest) for t in line.tests):
        raise InvalidArgumentError.of(f"{source}: function", "is required by tests with arguments")
    return line
