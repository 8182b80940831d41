"""Options of the command line as settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perigee.cli.prompts.candidates import Columns
from perigee.cli.prompts.settings import CurationSettings
from perigee.errors import InvalidArgumentError
from services.kit.config import validate


def make_settings(**values: Any) -> CurationSettings:
    """The settings. Raises InvalidArgumentError naming the one that is wrong."""
    return validate(CurationSettings, values, "settings", "")


def make_columns(renames: Sequence[str], defaults: Sequence[str], answer_after: str, split: str | None) -> Columns:
    """How columns become fields. Raises InvalidArgumentError for a pair without an equals sign."""
    fields = dict(_split_pair("--rename", pair) for pair in renames)
    return Columns(
        {column: field for field, column in fields.items()},
        dict(_split_pair("--default", pair) for pair in defaults),
        answer_after,
        split,
    )


def read_template(path: Path | None) -> dict[str, str]:
    """The template of guesses from its file. Raises InvalidArgumentError when it has no place for the prompt."""
    if path is None:
        return {}
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.of("--guess-template", f"{path} cannot be read: {error}") from error
    if "{prompt}" not in template:
        raise InvalidArgumentError.of("--guess-template", f"{path} has no {{prompt}}, where the prompt belongs")
    return {"guess_template": template}


def _split_pair(option: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise InvalidArgumentError.of(option, f"{pair!r} is not of the form A=B")
    return name, value
