"""Prompts: the problems of a prompt file, tokenized with the base model's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from perigee.reward.items import PromptLine, read_prompt_file
from services.kit.hf import encode_prompts
from services.kit.storage import local_file


@dataclass(frozen=True)
class Prompt:
    """Problem with its ground truth, and its token ids, BOS included where the tokenizer adds one."""

    line: PromptLine
    token_ids: tuple[int, ...]

    @property
    def id(self) -> str:
        """Id in the prompt file."""
        return self.line.id

    @property
    def domain(self) -> str:
        """Domain, by which accuracies are reported."""
        return self.line.domain


def read_prompts(
    path: str, field: str, tokenizer: Tokenizer, context_tokens: int, max_response_tokens: int
) -> dict[str, Prompt]:
    """Returns the prompts of a file or URL by id, in its order, tokenized; `field` is the key that named it.

    Raises InvalidArgumentError naming file, line and field of the first malformed line, a repeated id, or the id of a
    prompt that leaves less than `max_response_tokens` of the model's `context_tokens`.
    """
    lines = read_prompt_file(local_file(path, field), field)
    encodings = encode_prompts(tokenizer, [line.item.prompt for line in lines])
    prompts = {line.id: Prompt(line, tuple(ids)) for line, ids in zip(lines, encodings, strict=True)}
    for prompt in prompts.values():
        tokens = len(prompt.token_ids)
        if tokens == 0:
            raise InvalidArgumentError.for_field(
                f"{path}: prompt {prompt.id}", "has no tokens in the model's vocabulary"
            )
        if tokens + max_response_tokens > context_tokens:
            raise InvalidArgumentError.for_field(
                f"{path}: prompt {prompt.id}",
                f"has {tokens} tokens, which with a response of {max_response_tokens} pass the model's context of "
                f"{context_tokens}: shorten it or lower run.rollout.max_response_tokens",
            )
    return prompts
