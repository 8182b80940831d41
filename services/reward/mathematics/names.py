"""What names a value: variables, functions, lines of geometry, words."""

from __future__ import annotations

import re

from services.reward.mathematics.brackets import read_brackets
from services.reward.mathematics.number_words import is_number_word

VARIABLE = re.compile(r"[A-Za-z]'?(?:_\{?[A-Za-z0-9]+\}?)?'*|\\(?!pi\b|frac\b|sqrt\b)[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?")
FUNCTION_NAME = re.compile(
    r"[A-Za-z]+'*(?:_\{?[A-Za-z0-9]+\}?)?(?:\^\{[^{}]*\}|\^-1)?\s*\([^=]*\)"
    r"|\\frac\{d[^{}]*\}\{d[^{}]*\}.*|\\(?:int|lim)(?![A-Za-z]).*"
)
MATRIX_NAME = re.compile(r"[A-Z]\^\{(?:-1|T)\}")
WORDY_NAME = re.compile(r"(?:\\(?:angle|triangle|overline)\s*)?\{?[A-Z]{2,4}\}?|[A-Za-z][A-Za-z ]{2,}")


def is_name(text: str) -> bool:
    """Whether a text names a value: a variable, f(x), angle ABC, (x, y), or words."""
    if any(kind.fullmatch(text) for kind in (VARIABLE, FUNCTION_NAME, MATRIX_NAME)) or is_words_name(text):
        return True
    group = read_brackets(text)
    return group is not None and group.kind == "tuple" and all(VARIABLE.fullmatch(item) for item in group.items)


def is_words_name(text: str) -> bool:
    """Whether a text names a value in words or as a line of geometry."""
    return bool(WORDY_NAME.fullmatch(text)) and not any(is_number_word(word) for word in text.lower().split())
