"""Files of items to score: JSON Lines, every bad line told at once."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.reward.items import read_item
from perigee.reward.v1 import reward_pb2 as pb

# Keys beside the item's own: the expected verdict, what a recipe's prompt line holds besides, and whatever `meta` is.
OWN_KEYS = ("label", "domain", "difficulty", "tags", "meta")
LABELS = ("correct", "wrong", "ungradable")
MAX_SHOWN = 20


@dataclass(frozen=True)
class FileItem:
    """An item and where it stands; `digest` tells whether an earlier outcome is of the same item."""

    line: int
    item: pb.ScoreItem
    label: str | None
    digest: str


def read_item_file(path: Path) -> list[FileItem]:
    """The items of a file, empty lines skipped; an item without an id is named after its line.

    Raises InvalidArgumentError with a violation per wrong field of any line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.of(str(path), f"cannot be read: {error}") from error
    items: list[FileItem] = []
    violations: list[FieldViolation] = []
    lines_by_id: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = _read_line(line, number, path.parent)
            if (first := lines_by_id.setdefault(found.item.id, number)) != number:
                raise InvalidArgumentError.of("id", f"{found.item.id!r} is that of line {first}, too")
        except InvalidArgumentError as error:
            violations += [FieldViolation(f"line {number}: {v.field}", v.description) for v in error.violations]
        else:
            items.append(found)
    if violations:
        raise InvalidArgumentError(_tell(path, violations), violations=violations)
    if not items:
        raise InvalidArgumentError.of(str(path), "holds no items")
    return items


def _read_line(line: str, number: int, folder: Path) -> FileItem:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError.of("line", f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.of("line", "must be a JSON object")
    violations: list[FieldViolation] = []
    label = values.get("label")
    if isinstance(label, bool):
        label = "correct" if label else "wrong"
    elif label is not None and label not in LABELS:
        violations.append(FieldViolation("label", f"must be true, false or one of {', '.join(LABELS)}, got {label!r}"))
    images, unreadable = _read_image_files(values.get("images"), folder)
    violations += unreadable
    item = pb.ScoreItem()
    try:
        item = read_item(values | {"images": images}, f"line-{number}", OWN_KEYS)
    except InvalidArgumentError as error:
        violations += error.violations
    if violations:
        raise InvalidArgumentError("the line is no item", violations=violations)
    digest = hashlib.blake2b(item.SerializeToString(deterministic=True), digest_size=8).hexdigest()
    return FileItem(number, item, label, digest)


def _read_image_files(images: object, folder: Path) -> tuple[object, list[FieldViolation]]:
    """The images with the files among them read; what is neither URL nor name is for the item's reader to refuse."""
    if not isinstance(images, list):
        return images, []
    read: list[object] = []
    violations = []
    for index, image in enumerate(images):
        if not isinstance(image, str) or image.startswith(("http://", "https://", "data:")):
            read.append(image)
            continue
        try:
            read.append({"data_base64": base64.b64encode((folder / image).read_bytes()).decode()})
        except OSError as error:
            violations.append(FieldViolation(f"images[{index}]", f"{image} cannot be read: {error.strerror}"))
    return read, violations


def _tell(path: Path, violations: Sequence[FieldViolation]) -> str:
    shown = [f"  {violation.field}: {violation.description}" for violation in violations[:MAX_SHOWN]]
    if len(violations) > MAX_SHOWN:
        shown.append(f"  and {len(violations) - MAX_SHOWN} more")
    return f"{path} has lines that are no items; nothing was scored:\n" + "\n".join(shown)
