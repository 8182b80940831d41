"""The folder of a trained value head, and how it reads responses.

`perigee_value_head.json` holds what serving needs, `head.safetensors` the head; the backbone and its tokenizer are in
files of Hugging Face's names. Question, reference answer and response are read in one template, as tokens of bounded
number. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError, ResourceExhaustedError
from perigee.files import staging_folder
from services.kit.hf import TOKENIZER_FILES, open_tokenizer

DESCRIPTION_FILE = "perigee_value_head.json"
HEAD_FILE = "head.safetensors"
DIGEST_BYTES = 16
# The response ends the text, so that the last token has seen all of it.
TEMPLATE = "Question:\n{question}\n\nReference answer:\n{reference}\n\nResponse:\n{response}"
_RESPONSE = "{response}"


class Description(BaseModel):
    """Template and limits of a value head, and the figures of its training."""

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
    """Settings of its training."""


def read_description(folder: Path) -> Description:
    """Returns the description in a folder.

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
    """Yields a folder to fill that becomes `target` at the end, complete or not at all.

    Raises ResourceExhaustedError naming the target when the disk refuses.
    """
    try:
        with staging_folder(target) as staging:
            yield staging
    except OSError as error:
        raise ResourceExhaustedError(
            f"{target} cannot be written: {error.strerror or error}; free space or name another folder"
        ) from error


@dataclass(frozen=True)
class Encoder:
    """Turns a response to judge into at most `max_tokens` tokens; the last one is `end_token_id` unless that is None.

    A text that is too long loses the beginning of its response, since the answer stands at the end. Only when what
    stands before the response takes more than half of all tokens does that lose its own beginning.
    """

    tokenizer: Tokenizer
    max_tokens: int
    end_token_id: int | None
    template: str = TEMPLATE

    def encode(self, question: str, reference: str, response: str) -> list[int]:
        """Returns the tokens of one response; safe to call from several threads."""
        before = self.template.removesuffix(_RESPONSE).format(question=question, reference=reference)
        head = self.tokenizer.encode(before, add_special_tokens=False).ids
        tail = self.tokenizer.encode(response, add_special_tokens=False).ids
        end = [] if self.end_token_id is None else [self.end_token_id]
        room = self.max_tokens - len(end)
        kept = min(len(tail), max(room - len(head), room // 2))
        head_kept = min(len(head), room - kept)
        return [*head[len(head) - head_kept :], *tail[len(tail) - kept :], *end]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a model folder, which takes special tokens that stand in a text for text.

    Raises InvalidArgumentError naming the file.
    """
    tokenizer = open_tokenizer(folder, "model")
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
