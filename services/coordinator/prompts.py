"""Prompt sets: the problems of a prompt file, tokenized with the base model's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from perigee.reward.items import PromptLine, read_prompt_file


@dataclass(frozen=True)
class Prompt:
    """A problem with its ground truth, as token ids, too."""

    line: PromptLine
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
    lines = read_prompt_file(Path(path), field)
    encodings = model.tokenizer.encode_batch([line.item.prompt for line in lines])
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
