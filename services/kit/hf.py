"""Hugging Face model folders: configuration, stop tokens, tokenizer and the files that hold each tensor; no weights.

The tokenizer library is imported when a tokenizer is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perigee.errors import InvalidArgumentError
from perigee.files import staging_folder, write_atomically
from perigee.trainer.client import PIECE_BYTES
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.rope import Rope, RopeConfig, change_rope, read_rope
from services.kit.storage import cache_folder, local_folder, only_process

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# OWNER/NAME.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WEIGHTS_SUFFIXES = (".safetensors", INDEX_FILE)
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_SETTINGS_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
# Of models that take images.
PROCESSOR_FILES = (PREPROCESSOR_FILE, PROCESSOR_FILE, "video_preprocessor_config.json", "chat_template.json")
# All that a model folder may hold beside config.json and the weights.
COMPANION_FILES = (GENERATION_FILE, *TOKENIZER_FILES, "chat_template.jinja", *PROCESSOR_FILES)


@dataclass(frozen=True)
class ModelFolder:
    """Configuration of a model folder; `field` is the setting that named the folder, for the messages of errors."""

    path: Path
    field: str
    config: dict[str, Any]
    """Contents of config.json."""
    generation: dict[str, Any]
    """Contents of generation_config.json, empty without one."""

    @property
    def text_config(self) -> dict[str, Any]:
        """Contents of config.json on the language model: a part of them where the model takes images, else all."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def context_tokens(self) -> int:
        """Prompt and response tokens that a sequence may have."""
        return self.positive_integer("max_position_embeddings")

    @property
    def rope(self) -> Rope:
        """Rotary embedding; raises InvalidArgumentError for one that trainer and engine would not read alike."""
        try:
            return read_rope(self.text_config)
        except ValueError as error:
            raise self.error(CONFIG_FILE, str(error)) from error

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return self.positive_integer("vocab_size")

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return any(values.get("tie_word_embeddings") for values in (self.config, self.text_config))

    @property
    def dtype(self) -> str:
        """Type of the weights by config.json; "auto" when it names none."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "auto")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, ascending; raises InvalidArgumentError when neither file names one."""
        ids = {*_token_ids(self._stop_ids), *_token_ids(self.generation.get("eos_token_id"))}
        if not ids:
            raise self.error(CONFIG_FILE, "has no eos_token_id, so no response can end")
        return tuple(sorted(ids))

    @property
    def eos_token_id(self) -> int:
        """The one token to end a response with: the first of generation_config.json, else of config.json."""
        for value in (self.generation.get("eos_token_id"), self._stop_ids):
            if ids := _token_ids(value):
                return ids[0]
        raise self.error(CONFIG_FILE, "has no eos_token_id, so no response can end")

    @property
    def _stop_ids(self) -> object:
        """The eos_token_id of config.json, that of its text_config where it has none itself."""
        value = self.config.get("eos_token_id")
        return self.text_config.get("eos_token_id") if value is None else value

    def positive_integer(self, key: str) -> int:
        """Returns a field of the text_config; raises InvalidArgumentError when it is no integer of at least 1."""
        value = self.text_config.get(key)
        if not isinstance(value, int) or value < 1:
            raise self.error(CONFIG_FILE, f"has no {key}")
        return value

    def with_rope(self, rope: RopeConfig, field: str) -> ModelFolder:
        """Returns the same with another rotary embedding; raises InvalidArgumentError naming `field` for a bad one."""
        _ = self.rope
        try:
            return replace(self, config=change_rope(self.config, rope))
        except ValueError as error:
            raise InvalidArgumentError.for_field(field, f"is wrong for {self.path}, which then {error}") from error

    def require_rope(self, rope: RopeConfig | None, field: str) -> None:
        """Raises InvalidArgumentError naming `field` where the files, which the trainer gave, say another."""
        if rope is not None and self.with_rope(rope, field).config != self.config:
            raise InvalidArgumentError.for_field(
                field, "is not the trainer's: give trainer.rope the same, or leave it out"
            )

    def open_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises InvalidArgumentError when there is none or it cannot be read."""
        return open_tokenizer(self.path, self.field)

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of each tensor by the safetensors index; empty when the weights are in SINGLE_FILE."""
        if not (self.path / INDEX_FILE).exists():
            return {}
        weight_map = read_json_object(self.path / INDEX_FILE, self.field).get("weight_map")
        if not isinstance(weight_map, dict):
            raise self.error(INDEX_FILE, "has no weight_map")
        return {name: self.path / file for name, file in weight_map.items()}

    def error(self, file: str, description: str) -> InvalidArgumentError:
        """Returns the error of a file of this folder."""
        return InvalidArgumentError.for_field(self.field, f"{self.path / file} {description}")


def fetch_model(name: str, field: str, rope: RopeConfig | None = None, *, weights: bool = False) -> str:
    """Returns the folder of a model that is named by a path or a URL; of a URL a copy, without weights unless asked.

    With another rotary embedding it is a folder in the cache, of a config.json that says so and links to the other
    files. Raises what `storage.local_folder` and `ModelFolder.with_rope` raise.
    """

    def is_wanted(file: str) -> bool:
        return file in (CONFIG_FILE, *COMPANION_FILES) or (weights and file.endswith(WEIGHTS_SUFFIXES))

    folder = local_folder(name, field, is_wanted)
    return str(folder if rope is None else _change_folder(folder, field, rope))


def _change_folder(folder: Path, field: str, rope: RopeConfig) -> Path:
    """Returns a folder of the same model with another rotary embedding."""
    model = open_model_folder(folder, field).with_rope(rope, f"{field.rpartition('.')[0]}.rope".lstrip("."))
    content = f"{json.dumps(model.config, indent=2)}\n".encode()
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CONFIG_FILE)
    digest = hashlib.sha256(repr([str(folder.resolve()), names, content]).encode()).hexdigest()[:16]
    changed = cache_folder() / f"{folder.resolve().name}-rope-{digest}"
    with only_process(changed):
        if not changed.is_dir():
            with staging_folder(changed) as staging:
                for name in names:
                    (staging / name).symlink_to(folder.resolve() / name)
                write_atomically(staging / CONFIG_FILE, content)
    return changed


def read_model_files(folder: Path) -> Iterator[pb.ReadModelFilesResponse]:
    """Yields the files of a model folder, its weights left out, in pieces."""
    for path in (folder / name for name in (CONFIG_FILE, *COMPANION_FILES)):
        if path.is_file():
            with path.open("rb") as file:
                while content := file.read(PIECE_BYTES):
                    yield pb.ReadModelFilesResponse(name=path.name, content=content)


async def receive_model_files(pieces: AsyncIterator[pb.ReadModelFilesResponse], target: Path) -> None:
    """Writes the files of a model folder, its weights left out, as folder `target`, which appears whole."""
    with staging_folder(target) as staging:
        async for piece in pieces:
            if piece.name not in (CONFIG_FILE, *COMPANION_FILES):
                raise InvalidArgumentError.for_field("name", f"{piece.name} is no file of a model")
            with (staging / piece.name).open("ab") as file:
                file.write(piece.content)


def open_model_folder(path: str | Path, field: str) -> ModelFolder:
    """Reads config.json and, where there is one, generation_config.json.

    Raises InvalidArgumentError that names `field` and the file when the folder is not a model's.
    """
    folder = Path(path)
    if not folder.is_dir():
        hub = f", or hf://{path} where the Hugging Face Hub has it" if HUB_NAME.fullmatch(str(path)) else ""
        raise InvalidArgumentError.for_field(field, f"{path} is not a folder; give a Hugging Face model folder{hub}")
    generation = folder / GENERATION_FILE
    model = ModelFolder(
        path=folder,
        field=field,
        config=read_json_object(folder / CONFIG_FILE, field),
        generation=read_json_object(generation, field) if generation.exists() else {},
    )
    if not model.config.get("architectures") and not model.config.get("model_type"):
        raise model.error(CONFIG_FILE, "names no model_type; is it a model's?")
    return model


def open_tokenizer(folder: Path, field: str) -> Tokenizer:
    """Returns the tokenizer of a model folder; raises InvalidArgumentError that names `field` and the file."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise InvalidArgumentError.for_field(field, f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise InvalidArgumentError.for_field(field, f"{path} is not a tokenizer: {error}") from error
    # Left over from other uses, they would cut prompts or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json_object(path: Path, field: str) -> dict[str, Any]:
    """Reads a JSON object; raises InvalidArgumentError that names `field` and the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError.for_field(field, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgumentError.for_field(field, f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.for_field(field, f"{path} is not a JSON object")
    return values


def count_experts(config: Mapping[str, Any]) -> int:
    """Returns the number of experts in a layer by config.json, 0 without a mixture of experts."""
    # transformers 4 writes num_experts, transformers 5 num_local_experts.
    return int(config.get("num_experts") or config.get("num_local_experts") or 0)


def _token_ids(value: object) -> list[int]:
    """Returns an eos_token_id of either form, one id or a list, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(item) for item in value]  # type: ignore[attr-defined]
