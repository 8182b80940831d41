"""The folder of a trained value head: a Hugging Face model, the head's weights, and how to use them.

`perigee_value_head.json` holds what serving needs, `head.safetensors` the head; the backbone and its tokenizer are in
files of Hugging Face's names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perigee.errors import InvalidArgumentError, ResourceExhaustedError

DESCRIPTION_FILE = "perigee_value_head.json"
HEAD_FILE = "head.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
DIGEST_BYTES = 16


class Description(BaseModel):
    """How a value head reads responses and what is known of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    template: str = Field(pattern=r"\{response\}$")
    """Text with {question}, {reference} and, at its end, {response}."""
    max_tokens: int = Field(ge=2)
    """Longest input."""
    end_token_id: int | None
    """Token that ends each input."""
    pad_token_id: int
    """Token that fills batches up; it is masked."""
    threshold: float = Field(ge=0, le=1)
    """A response is right from this probability on; fitted on the evaluation split."""
    digest: str = ""
    """Names weights, tokenizer and all other fields."""
    evaluation: dict[str, Any] = {}
    """Figures on the evaluation split."""
    training: dict[str, Any] = {}
    """What it was trained with."""


def read_description(folder: Path) -> Description:
    """The description in a folder.

    Raises InvalidArgumentError naming the file.
    """
    path = folder / DESCRIPTION_FILE
    try:
        return Description.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({error.strerror}): is this a folder made by perigee reward train?"
        ) from error
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise InvalidArgumentError(f"{path}: {field}: {detail['msg']}") from error


def write_description(folder: Path, description: Description) -> None:
    """Writes the description with the digest of all that the folder holds."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(description.model_copy(update={"digest": ""}).model_dump_json().encode())
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    named = description.model_copy(update={"digest": digest.hexdigest()})
    (folder / DESCRIPTION_FILE).write_text(named.model_dump_json(indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, as far as there are any."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end, complete or not at all.

    Raises ResourceExhaustedError naming the target when the disk refuses.
    """
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            _sync(path)
        _replace(aside, target)
    except OSError as error:
        raise ResourceExhaustedError(
            f"{target} cannot be written: {error.strerror or error}; free space or name another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, complete or not at all."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(aside)
    aside.rename(path)


def remove_stale_asides(folder: Path) -> None:
    """Removes what a killed writer left half-written in `folder`."""
    for path in folder.glob(".*.????????"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(aside: Path, target: Path) -> None:
    if target.exists():
        # rename(2) does not replace a folder that holds files; the old one steps aside for the moment between.
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old)
    else:
        aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
