"""Model folders to merge: what they have to share, their tensors in blocks, and the merged folder, written whole.

The result has the files of the first model: its shards, their tensors in the same order and types, its configuration,
tokenizer and chat template.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch

from perigee import __version__
from perigee.cli.eval.model import find_model
from perigee.cli.merge.methods import BASED, MergeSettings, merge_tensor
from perigee.errors import AlreadyExistsError, DataLossError, InvalidArgumentError
from perigee.files import exclusive, remove_stale_staging, staging_folder
from services.kit.chat import open_chat_template
from services.kit.hf import (
    COMPANION_FILES,
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    SINGLE_FILE,
    ModelFolder,
    open_model_folder,
    read_json_object,
)
from services.weights.safetensors import DTYPES, TensorEntry, read_header

MERGE_FILE, CARD_FILE = "merge.json", "README.md"
# Elements of a block: what is in memory of a tensor at once, for each model.
BLOCK = 1 << 20
MERGED_TYPES = ("F32", "F16", "BF16")
# Files that go along with those of a tokenizer.
COPIED = (*COMPANION_FILES, "tokenizer.model", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
# Keys of config.json that do not change what the weights mean.
FREE_KEYS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    # Compared as one, in either of their forms.
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}
# Those that say how the model is asked and how a response ends.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A head, and the end of an embedding's name.
HEAD, EMBEDDING = "lm_head.weight", ".embed_tokens.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its bytes begin at `offset` in it."""

    path: Path
    entry: TensorEntry
    offset: int

    def read_bytes(self, size: int) -> Iterator[bytearray]:
        """Yields its bytes from the beginning on, in blocks of so many."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.entry.end - self.entry.begin
            while left:
                block = bytearray(min(size, left))
                if file.readinto(block) != len(block):
                    raise DataLossError(f"{self.path} was cut while it was read: start again")
                yield block
                left -= len(block)

    def read(self) -> Iterator[torch.Tensor]:
        """Yields float32 blocks [N]; raises DataLossError for a number that is none."""
        dtype = DTYPES[self.entry.dtype]
        for block in self.read_bytes(BLOCK * dtype.itemsize):
            block_N = torch.frombuffer(block, dtype=dtype).float()
            if not block_N.isfinite().all():
                raise DataLossError(f"{self.path}: {self.entry.name} has an element that is infinite or no number")
            yield block_N


@dataclass(frozen=True)
class SourceModel:
    """A model to merge; `name` is what the caller called it."""

    name: str
    folder: ModelFolder
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.folder.is_tied

    @property
    def names(self) -> set[str]:
        """The tensors that count: a tied head is the embedding once more, which some folders hold and others do not."""
        return {*self.tensors} - ({HEAD} if self.is_tied else set())

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file of the weights, and of config.json."""
        files = sorted({tensor.path for tensor in self.tensors.values()} | {self.folder.path / CONFIG_FILE})
        return {path.name: _digest(path) for path in files}

    def find(self, name: str) -> Tensor:
        """Returns the tensor of a name, of a tied head that is not stored the embedding."""
        if name == HEAD and name not in self.tensors:
            return next(tensor for each, tensor in self.tensors.items() if each.endswith(EMBEDDING))
        return self.tensors[name]


@dataclass(frozen=True)
class MergePlan:
    """What is merged into what; all models fit together."""

    models: Sequence[SourceModel]
    base: SourceModel | None
    settings: MergeSettings

    def describe(self) -> dict[str, Any]:
        """Returns the contents of merge.json: by the same plan the same folder is written."""
        settings = self.settings
        described: dict[str, Any] = {"method": settings.method, "models": []}
        for model, weight in zip(self.models, settings.weights, strict=True):
            described["models"].append({"model": model.name, "weight": weight, "sha256": model.digests})
        if self.base is not None:
            described |= {"base": {"model": self.base.name, "sha256": self.base.digests}, "lambda": settings.scale}
        if settings.method == "ties":
            described["density"] = settings.density
        return described


def plan_merge(
    names: Sequence[str],
    base: str | None,
    settings: MergeSettings,
    runs_path: Path = Path("runs"),
    same_chat: bool = True,
) -> MergePlan:
    """Opens the models and compares them with the first; with `same_chat` they have to be asked alike.

    Raises InvalidArgumentError, in one sentence, for models that do not fit, and where the method wants other ones.
    """
    if len(names) < 2:
        raise InvalidArgumentError.for_field("MODEL", "is to be given twice at least")
    if (base is None) == (settings.method in BASED):
        need = f"is required by {settings.method}" if base is None else f"is for {' and '.join(BASED)} only"
        raise InvalidArgumentError.for_field("--base", need)
    models = [open_source(name, find_model(name, runs_path)[0], "MODEL") for name in names]
    for other in models[1:]:
        check_fit(models[0], other)
        check_asked_alike(models[0], other, same_chat)
    based = None
    if base is not None:
        based = open_source(base, find_model(base, runs_path)[0], "--base")
        check_fit(models[0], based)
    return MergePlan(models, based, settings)


def open_source(name: str, path: Path, field: str) -> SourceModel:
    """Reads a model folder's configuration and where its tensors are; raises InvalidArgumentError naming the file."""
    folder = open_model_folder(path, field)
    files = sorted(set(folder.tensor_files().values())) or [path / SINGLE_FILE]
    tensors = {tensor.entry.name: tensor for file in files for tensor in read_tensor_places(folder, file)}
    for missing in folder.tensor_files().keys() - tensors.keys():
        raise folder.error(INDEX_FILE, f"names {missing}, which no file holds")
    return SourceModel(name, folder, tensors)


def read_tensor_places(folder: ModelFolder, path: Path) -> list[Tensor]:
    """Returns the tensors of a safetensors file in the order of their bytes."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            entries, data = read_header(view)
    except InvalidArgumentError as error:
        raise folder.error(path.name, f"cannot be read: {error.violations[0].description}") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise folder.error(path.name, f"cannot be read as safetensors: {error}") from error
    return [Tensor(path, entry, data + entry.begin) for entry in sorted(entries, key=lambda entry: entry.begin)]


def check_fit(first: SourceModel, other: SourceModel) -> None:
    """Raises InvalidArgumentError, in one sentence that names the difference, for weights that mean something else."""
    _check_config(first, other)
    for name in sorted(first.names ^ other.names):
        holder, lacking = (first, other) if name in first.names else (other, first)
        raise _differ(first, other, f"{holder.name} has the tensor {name}, {lacking.name} does not")
    for name in sorted(first.names):
        shapes = first.find(name).entry.shape, other.find(name).entry.shape
        if shapes[0] != shapes[1]:
            raise _differ(first, other, f"{name} is {list(shapes[0])} in the one and {list(shapes[1])} in the other")
    _check_types(first, other)
    vocabularies = [model.folder.open_tokenizer().get_vocab() for model in (first, other)]
    for token in sorted(vocabularies[0].keys() | vocabularies[1].keys()):
        ids = [vocabulary.get(token) for vocabulary in vocabularies]
        if ids[0] != ids[1]:
            words = ["none" if token_id is None else str(token_id) for token_id in ids]
            raise _differ(first, other, f"token {token!r} is {words[0]} in the one and {words[1]} in the other")


def check_asked_alike(first: SourceModel, other: SourceModel, same_chat: bool) -> None:
    """Raises InvalidArgumentError, in one sentence, for models that read the same text as other tokens.

    With `same_chat` chat template, image processor, special tokens and what ends a response have to be the same, too.
    """
    # As the library writes them, so that files of other versions of it are the same.
    one, two = (json.loads(model.folder.open_tokenizer().to_str()) for model in (first, other))
    if sections := [key for key in one if one[key] != two.get(key)]:
        raise _differ(first, other, f"their tokenizers differ in {', '.join(sections)}")
    if not same_chat:
        return
    allow = "(--allow-different-templates takes those of the first)"
    templates = [open_chat_template(model.folder.path, model.folder.field) for model in (first, other)]
    if templates[0] != templates[1]:
        raise _differ(first, other, f"their chat templates differ {allow}")
    for name in (PREPROCESSOR_FILE, PROCESSOR_FILE):
        files = [model.folder.path / name for model in (first, other)]
        found = [read_json_object(file, "MODEL") if file.is_file() else None for file in files]
        if found[0] != found[1]:
            raise _differ(first, other, f"their {name} differ, by which images become other tokens {allow}")
    for key in TOKEN_KEYS:
        ids = [model.folder.config.get(key, model.folder.text_config.get(key)) for model in (first, other)]
        if ids[0] != ids[1]:
            raise _differ(first, other, f"{key} is {ids[0]} in the one and {ids[1]} in the other {allow}")
    stops = [model.folder.stop_token_ids for model in (first, other)]
    if stops[0] != stops[1]:
        raise _differ(first, other, f"{GENERATION_FILE} ends responses at {stops[0]} and {stops[1]} {allow}")


def write_merged(plan: MergePlan, out: Path, note: Callable[[str], None], cancelled: Event | None = None) -> None:
    """Writes the merged folder, which appears whole or not at all; nothing where it is there by the same plan.

    Raises AlreadyExistsError when `out` is something else, FailedPreconditionError when another merge is writing it,
    DataLossError for numbers that are none, and CancelledError before the shard that follows when `cancelled` is set.
    """
    described = plan.describe() | {"perigee": __version__}
    with exclusive(out):
        _write_once(plan, out, described, note, cancelled)


def _write_once(
    plan: MergePlan, out: Path, described: dict[str, Any], note: Callable[[str], None], cancelled: Event | None
) -> None:
    if out.exists():
        if _without_names(_read_description(out)) == _without_names(described):
            note(f"{out} is merged already")
            return
        raise AlreadyExistsError(f"{out} exists and was not merged from this: remove it, or name another --out")
    remove_stale_staging(out.parent, glob.escape(out.name))
    first = plan.models[0]
    with staging_folder(out) as staging:
        for path in sorted({tensor.path for tensor in first.tensors.values()}):
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            note(f"merging {path.name}")
            _write_shard(plan, path, staging / path.name)
        for name in (CONFIG_FILE, INDEX_FILE, *COPIED):
            if (first.folder.path / name).is_file():
                shutil.copyfile(first.folder.path / name, staging / name)
        (staging / MERGE_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (staging / CARD_FILE).write_text(write_card(described), encoding="utf-8")


def write_card(described: Mapping[str, Any]) -> str:
    """Returns the model card of a merged model."""
    sources = [*described["models"], *([described["base"]] if "base" in described else [])]
    rows = [f"| {each['model']} | {each.get('weight', 'base')} | {_short_digest(each)} |" for each in sources]
    numbers = "".join(f", {name} {described[name]:g}" for name in ("lambda", "density") if name in described)
    head = ["library_name: transformers", "tags: [merge]", "base_model_relation: merge"]
    return "\n".join(
        [
            *("---", *head, "---", "", "# Merged model", ""),
            f"Merged by `perigee merge`, method `{described['method']}`{numbers}.",
            *("", "| model | weight | weights, SHA-256 |", "|---|---|---|", *rows, ""),
            f"[{MERGE_FILE}]({MERGE_FILE}) has the digest of each file. Configuration, tokenizer and chat template are "
            "those of the first model.",
            "",
        ]
    )


def _write_shard(plan: MergePlan, source: Path, target: Path) -> None:
    """Writes the merged tensors of one shard of the first model, behind the header that this has."""
    tensors = [tensor for tensor in plan.models[0].tensors.values() if tensor.path == source]
    with source.open("rb") as header, target.open("wb") as file:
        file.write(header.read(min(tensor.offset for tensor in tensors)))
        for tensor in tensors:
            if file.tell() != tensor.offset:
                raise DataLossError(f"{source} has a gap before {tensor.entry.name}: write it again with safetensors")
            for block in _merge_blocks(plan, tensor):
                file.write(block)


def _merge_blocks(plan: MergePlan, tensor: Tensor) -> Iterator[bytearray | memoryview]:
    """Yields the bytes of a merged tensor, in the type that the first model has it in."""
    name, dtype = tensor.entry.name, DTYPES[tensor.entry.dtype]
    if tensor.entry.dtype not in MERGED_TYPES:  # the same in every model
        yield from tensor.read_bytes(BLOCK)
        return
    base = plan.base.find(name).read if plan.base is not None else None
    for block_N in merge_tensor(plan.settings, [model.find(name).read for model in plan.models], base):
        merged_N = block_N.to(dtype)
        if not merged_N.isfinite().all():
            raise DataLossError(f"the merged {name} does not fit into {dtype}: lower --weight or --lambda")
        yield memoryview(merged_N.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an ndarray is a buffer


def _check_config(first: SourceModel, other: SourceModel) -> None:
    """Compares what both configurations have, since versions of transformers write more or fewer of the defaults."""
    configs = [_read_config(model.folder) for model in (first, other)]
    for key in sorted(configs[0].keys() & configs[1].keys() - FREE_KEYS - {*TOKEN_KEYS}):
        if configs[0][key] != configs[1][key]:
            raise _differ(first, other, f"{key} is {configs[0][key]} in the one and {configs[1][key]} in the other")


def _read_config(folder: ModelFolder) -> dict[str, Any]:
    """Returns what config.json says of the language model and of the vision tower, on one level."""
    whole = {key: value for key, value in folder.config.items() if key not in ("text_config", "vision_config")}
    tower = {key: value for key, value in folder.config.get("vision_config", {}).items() if key not in FREE_KEYS}
    named = {f"vision_config.{key}": value for key, value in tower.items()}
    return {**folder.text_config, **whole, **named, "rope": _read_rope(folder.text_config)}


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the rotary embedding: transformers 4 and 5 write them under other keys."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.pop("type", "default")
    return {"rope_type": kind, "rope_theta": config.get("rope_theta")} | rope


def _check_types(first: SourceModel, other: SourceModel) -> None:
    for name in sorted(first.names):
        one, two = first.find(name), other.find(name)
        types = {one.entry.dtype, two.entry.dtype}
        if not types <= {*MERGED_TYPES} and (len(types) > 1 or not _are_same(one, two)):
            raise _differ(
                first,
                other,
                f"{name} of type {one.entry.dtype} is not the same, and {', '.join(MERGED_TYPES)} alone merge",
            )


def _are_same(one: Tensor, two: Tensor) -> bool:
    return all(a == b for a, b in zip(one.read_bytes(BLOCK), two.read_bytes(BLOCK), strict=True))


def _differ(first: SourceModel, other: SourceModel, what: str) -> InvalidArgumentError:
    return InvalidArgumentError.for_field(other.folder.field, f"{other.name} does not fit {first.name}: {what}")


def _read_description(folder: Path) -> dict[str, Any]:
    """Returns merge.json; empty where there is none that a merge has written."""
    path = folder / MERGE_FILE
    try:
        described = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
    return described if isinstance(described, dict) else {}


def _without_names(described: Mapping[str, Any]) -> list[Any]:
    """Returns what makes the weights: the models by their digests, whatever they are called."""
    sources = [*described.get("models", ()), described.get("base", {})]
    numbers = [described.get(key) for key in ("method", "lambda", "density")]
    return [*numbers, *((source.get("weight"), source.get("sha256")) for source in sources)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short_digest(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} `{digest[:12]}`" for name, digest in source["sha256"].items())
