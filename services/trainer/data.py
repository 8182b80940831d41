"""Training data: prompt-response examples from a file, as token sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from services.trainer.packing import TokenSequence


def read_examples(dataset: Path, tokenizer: Path, eos_token_id: int, max_tokens: int) -> list[TokenSequence]:
    """Returns the examples of a JSON Lines file with "prompt" and "response" text; EOS follows each response.

    Raises InvalidArgumentError naming file and line for a malformed or overlong example.
    """
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidArgumentError(f"{tokenizer} cannot be read as a tokenizer: {error}") from error
    try:
        lines = dataset.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field("dataset_path", f"{dataset} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt, response = _parse_line(dataset, number, line)
        prompt_tokens = encoder.encode(prompt, add_special_tokens=False).ids
        response_tokens = [*encoder.encode(response, add_special_tokens=False).ids, eos_token_id]
        if not prompt_tokens:
            raise InvalidArgumentError.for_field("dataset_path", f"{dataset} line {number}: the prompt is empty")
        tokens = np.array(prompt_tokens + response_tokens, dtype=np.int64)
        if len(tokens) > max_tokens:
            raise InvalidArgumentError.for_field(
                "dataset_path",
                f"{dataset} line {number}: {len(tokens)} tokens are more than the context of {max_tokens}",
            )
        trained_T = np.arange(1, len(tokens)) >= len(prompt_tokens)
        examples.append(TokenSequence(tokens, trained_T))
    if not examples:
        raise InvalidArgumentError.for_field("dataset_path", f"{dataset} holds no example")
    return examples


def _parse_line(dataset: Path, number: int, line: str) -> tuple[str, str]:
    where = f"{dataset} line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError.for_field("dataset_path", f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError.for_field("dataset_path", f"{where} is no JSON object")
    for key in ("prompt", "response"):
        if not isinstance(value.get(key), str):
            raise InvalidArgumentError.for_field("dataset_path", f"{where}: {key} is missing or no text")
    return value["prompt"], value["response"]
