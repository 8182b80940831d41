"""The wording of a prompt: what two prompts are compared by."""

from __future__ import annotations

import re
import unicodedata

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]|_")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def normalize(text: str) -> str:
    """The text without differences of case, Unicode form and white space, and without punctuation at its end.

    Signs inside it stay: 2+3 and 2-3 are two questions.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!:;")


def tokens(text: str) -> list[str]:
    """Words, numbers and single signs of a normalized text."""
    return _TOKEN.findall(text)


def numbers(text: str) -> list[str]:
    """The numbers of a text, sorted: questions of one template with other numbers are other questions."""
    return sorted(_NUMBER.findall(text))


def ngrams(words: list[str], length: int) -> set[str]:
    """All runs of `length` words; a shorter text is one run."""
    if len(words) <= length:
        return {" ".join(words)}
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}
