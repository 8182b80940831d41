"""What the service reads from a Hugging Face model folder: limits, stop tokens, tokenizer, tensor names; no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError

FIELD = "rollout.model"


@dataclass(frozen=True)
class ModelFolder:
    """A policy's shape and tokenizer."""

    path: Path
    context_tokens: int
    """Prompt and response tokens that a sequence may have."""
    vocabulary_size: int
    dtype: str
    """Type of the weights by config.json; "auto" when it names none."""
    stop_token_ids: tuple[int, ...]
    tokenizer: Tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response without the stop token that ends it; special tokens inside it are shown."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def open_model_folder(path: str, max_model_len: int | None) -> ModelFolder:
    """Reads config.json, generation_config.json (optional) and tokenizer.json.

    Raises InvalidArgumentError that names the file when the folder is not a model's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidArgumentError.of(FIELD, f"{path} is not a folder; give a Hugging Face model folder")
    config = _read_json(folder / "config.json")
    if not config.get("architectures") and not config.get("model_type"):
        raise InvalidArgumentError.of(FIELD, f"{folder / 'config.json'} names no model_type; is it a model's?")
    context = _positive_integer(config, "max_position_embeddings", folder)
    if max_model_len is not None and max_model_len > context:
        raise InvalidArgumentError.of(
            "rollout.max_model_len", f"{max_model_len} is more than the model's {context} positions"
        )
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    stop_token_ids = {*_token_ids(config.get("eos_token_id")), *_token_ids(generation.get("eos_token_id"))}
    if not stop_token_ids:
        raise InvalidArgumentError.of(FIELD, f"{folder / 'config.json'} has no eos_token_id, so no response can end")
    return ModelFolder(
        path=folder,
        context_tokens=min(context, max_model_len or context),
        vocabulary_size=_positive_integer(config, "vocab_size", folder),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "auto"),
        stop_token_ids=tuple(sorted(stop_token_ids)),
        tokenizer=_open_tokenizer(folder / "tokenizer.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError.of(FIELD, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgumentError.of(FIELD, f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.of(FIELD, f"{path} is not a JSON object")
    return values


def _positive_integer(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InvalidArgumentError.of(FIELD, f"{folder / 'config.json'} has no {key}")
    return value


def _token_ids(value: object) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(item) for item in value]  # type: ignore[attr-defined]


def _open_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InvalidArgumentError.of(FIELD, f"{path} is missing")
    try:
        return Tokenizer.from_file(str(path))
    # The library raises bare Exception for a malformed file.
    except Exception as error:
        raise InvalidArgumentError.of(FIELD, f"{path} is not a tokenizer: {error}") from error
