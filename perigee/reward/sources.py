"""Prompts as data sets hold them: JSON Lines, Parquet, folders of these or of `datasets`; columns become fields."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.chat import ReadImage
from perigee.errors import InvalidArgumentError
from perigee.image_sources import ImageReader
from perigee.reward.items import PromptLine, prompt_keys, read_lines, read_object, read_prompt_line, read_rows

KNOWN_FIELDS = prompt_keys()
# Rows that are in memory together: those of images are large.
ROWS_AT_ONCE = 64
# OWNER/NAME; what has a suffix is a file.
HUB_NAME = re.compile(r"\w[\w-]*/\w[\w-]*")
PARQUET_MAGIC = b"PAR1"
# What `datasets` puts into the folder of a saved DatasetDict, and of a saved Dataset.
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"
Row = str | Mapping[str, Any]
_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """Mapping from columns of the input to fields of a prompt line."""

    renames: Mapping[str, str] = field(default_factory=dict)
    """Field by column; a dot leads into a column of objects."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that a line lacks."""
    answer_after: str = ""
    """The answer is what follows the last of these in its column."""
    split: str | None = None
    """The split of a saved DatasetDict, or the beginning of the names of a folder's files."""


def read_source(
    path: Path, columns: Columns, field: str, name: str = "", read_image: ReadImage | None = None
) -> list[PromptLine]:
    """Returns the prompts of a file or folder; a line without an id is named after `name` and its number.

    In JSON Lines without renames an unknown key is an error; other columns are left out. `field` is the key that named
    the source. Images are checked, and kept where `read_image` keeps them. Raises InvalidArgumentError with a violation
    for each wrong field of any line.
    """
    read_image = read_image or ImageReader(image_base(str(path)))
    left_out: Counter[str] = Counter()
    numbers = itertools.count(1)

    def read(row: Row, place: str) -> PromptLine:
        values = read_object(row, place) if isinstance(row, str) else row
        keep_unknown = isinstance(row, str) and not columns.renames
        default_id = f"{name or path.stem}-{next(numbers):06d}"
        fields = read_fields(values, columns, place, default_id, left_out, keep_unknown)
        return read_prompt_line(fields, place, read_image)

    return read_rows(checked_rows(path, columns, field), read, field)


def image_base(source: str) -> str:
    """Returns the folder, a path or a URL, that the images of a source's lines are below: its own, or that it is."""
    if "://" not in source:
        return source if Path(source).is_dir() else str(Path(source).parent)
    folder, _, name = source.rstrip("/").rpartition("/")
    return folder if Path(name).suffix else source


def checked_rows(path: Path, columns: Columns, field: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of the input, each after its place; of JSON Lines the text.

    Raises InvalidArgumentError when the first of them lacks a column that is renamed, or nothing reads the input.
    """
    rows = read_data(path, columns.split, field)
    for place, row in itertools.islice(rows, 1):
        values = read_object(row, place) if isinstance(row, str) else row
        for column, name in columns.renames.items():
            if _find_column(values, column) is _MISSING:
                known = ", ".join(values)
                raise InvalidArgumentError.for_field(
                    f"{place}: {column}", f"is no column, and {name} is to be read from it; they are {known}"
                )
        yield place, row
    yield from rows


def read_fields(
    row: Mapping[str, Any],
    columns: Columns,
    place: str,
    default_id: str,
    left_out: Counter[str],
    keep_unknown: bool = False,
) -> dict[str, Any]:
    """Returns the fields of a row, with columns renamed; unknown columns are counted and left out, or kept.

    Raises InvalidArgumentError for a column that is nearly a field, and for an answer without its marker.
    """
    values: dict[str, Any] = {"id": default_id, **_spread_verifier(columns.defaults, row)}
    nested = {column: _find_column(row, column) for column in columns.renames if column not in row}
    found = {**row, **{column: value for column, value in nested.items() if value is not _MISSING}}
    names = {columns.renames.get(column, column) for column in found}
    for column, value in found.items():
        name = columns.renames.get(column, column)
        # A column whose place another one takes is none of the line's.
        if value is None or (column not in columns.renames and name in columns.renames.values()):
            continue
        if name in KNOWN_FIELDS or keep_unknown:
            values[name] = value
            continue
        near = difflib.get_close_matches(name, KNOWN_FIELDS, n=1, cutoff=0.8)
        if near and near[0] not in names:
            raise InvalidArgumentError.for_field(
                f"{place}: {name}", f"is no field of a prompt; did you mean {near[0]}?"
            )
        left_out[name] += 1
    return _complete(values, columns, place)


def _complete(values: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """Returns the fields with the answer cut out of its column, the id as text, and math where no verifier is named."""
    if columns.answer_after and isinstance(answer := values.get("answer"), str):
        _, marker, rest = answer.rpartition(columns.answer_after)
        if not marker:
            raise InvalidArgumentError.for_field(f"{place}: answer", f"has no {columns.answer_after!r}")
        values["answer"] = rest.strip()
    if isinstance(values["id"], int):
        values["id"] = str(values["id"])
    if "answer" in values:
        values.setdefault("verifier", "math")
    return values


def _spread_verifier(defaults: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults; a verifier's parameters stand beside its name, where a line has its answer.

    A line with a verifier of its own takes none of them.
    """
    verifier = defaults.get("verifier")
    if not isinstance(verifier, Mapping) or len(verifier) != 1:
        return dict(defaults)
    rest = {key: value for key, value in defaults.items() if key != "verifier"}
    [(name, parameters)] = verifier.items()
    return rest if row.get("verifier") is not None else {"verifier": name, **(parameters or {}), **rest}


def _find_column(row: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a column, or of what a dotted name leads to."""
    if column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    inner = row.get(first)
    return _find_column(inner, rest) if dot and isinstance(inner, Mapping) else _MISSING


def read_data(path: Path, split: str | None, field: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a file or folder, each after its place; of JSON Lines the text."""
    if path.is_dir():
        yield from _read_folder(path, split, field)
    elif not path.exists() and HUB_NAME.fullmatch(str(path)):
        raise InvalidArgumentError.for_field(
            field, f"{path} is no folder here; of a data set on the Hugging Face Hub name hf://datasets/{path}/FOLDER"
        )
    elif _is_parquet(path):
        yield from _read_parquet(path, field)
    else:
        yield from read_lines(path, field)


def _is_parquet(path: Path) -> bool:
    """Returns whether a file is Parquet, by its first bytes: one that was sent has lost its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def _read_folder(path: Path, split: str | None, field: str) -> Iterator[tuple[str, Row]]:
    if (path / SPLITS_FILE).is_file():
        splits = json.loads((path / SPLITS_FILE).read_text())["splits"]
        if split not in splits:
            raise InvalidArgumentError.for_field("split", f"must be one of {', '.join(splits)}, got {split}")
        path = path / str(split)
    if (path / STATE_FILE).is_file():
        yield from _read_saved(path, field)
        return
    for pattern in ("*.parquet", "*.jsonl"):
        if files := sorted(file for file in path.rglob(pattern) if file.name.startswith(split or "")):
            for file in files:
                yield from read_data(file, split, field)
            return
    which = f" whose name begins with {split}" if split else ""
    raise InvalidArgumentError.for_field(
        str(path), f"is no folder of datasets: it has neither a saved dataset nor *.parquet nor *.jsonl{which}"
    )


def _read_saved(path: Path, field: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a dataset as `save_to_disk` wrote it."""
    arrow = _open_arrow(path, field)
    try:
        files = [path / each["filename"] for each in json.loads((path / STATE_FILE).read_text())["_data_files"]]
        batches = (batch for file in files for batch in arrow.ipc.open_stream(arrow.memory_map(str(file))))
        yield from _number_rows(path, batches)
    except (OSError, ValueError, LookupError) as error:
        raise InvalidArgumentError.for_field(field, f"{path} is no saved dataset that can be read: {error}") from error


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Row]]:
    try:
        with _open_arrow(path, field).parquet.ParquetFile(path) as file:
            yield from _number_rows(path, file.iter_batches(batch_size=ROWS_AT_ONCE))
    except (OSError, ValueError) as error:  # pyarrow's class for a damaged file is a ValueError
        raise InvalidArgumentError.for_field(field, f"{path} cannot be read: {error}") from error


def _number_rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, Row]]:
    parts = (batch[start : start + ROWS_AT_ONCE] for batch in batches for start in range(0, len(batch), ROWS_AT_ONCE))
    rows = itertools.chain.from_iterable(part.to_pylist() for part in parts)
    yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def _open_arrow(path: Path, field: str) -> Any:
    """Returns pyarrow; raises InvalidArgumentError where it is not installed."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgumentError.for_field(
            field, f"{path} needs the package pyarrow, or JSON Lines instead: pip install 'perigee-services[parquet]'"
        ) from error
    return pyarrow
