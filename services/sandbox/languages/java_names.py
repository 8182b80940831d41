"""Names that a Java source must be compiled and started by.

Patterns match in linear time, whatever the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# What is not closed goes to the end of its line, or of the source.
_NOISE = re.compile(
    r"//[^\n]*|/\*.*?(?:\*/|\Z)|\"\"\".*?(?:\"\"\"|\Z)|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?", re.DOTALL
)
_PACKAGE = re.compile(r"\s*package\s+(\w+(?:\.\w+)*)\s*;")
_TYPE = re.compile(r"\b(?:class|interface|enum|record)\s+(\w+)")
_BRACE = re.compile(r"[{}]")
# The text between two of these marks is one declaration or statement, or a part of one.
_PART = re.compile(r"[^;{}()]*[;{}()]?")
_MAIN = re.compile(r"\bvoid\s+main\s*\(")
_STATIC = re.compile(r"\bstatic\b")
_PUBLIC = re.compile(r"\bpublic\b[\s\w-]*\Z")

_MODIFIERS_LENGTH = 200
# Bytes of a file's name.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class JavaNames:
    """Path of the source in the working folder, and the class to start."""

    source: str
    main: str


def find_java_names(source: bytes) -> JavaNames:
    """Returns the names of a source: the file is its public type's, below its package, and the class to start the one
    with `main`, the public one where there are several; Main unless the source says otherwise.
    """
    text = _NOISE.sub(" ", source.decode(errors="replace"))
    public = main = ""
    for is_public, name, has_main in _top_types(text):
        if has_main and (not main or is_public):
            main = name
        if is_public:
            public = name
    name = public or main or "Main"
    package = match[1] if (match := _PACKAGE.match(text)) else ""
    prefix = f"{package}." if package else ""
    path = f"{prefix}{name}".replace(".", "/") + ".java"
    if any(len(part.encode()) > _LONGEST_NAME for part in path.split("/")):
        path = "Main.java"  # the compiler says what is wrong
    return JavaNames(path, f"{prefix}{main or name}")


def _top_types(text: str) -> Iterator[tuple[bool, str, bool]]:
    """Yields the types that lie in no other: whether each is public, its name, and whether it has `main`."""
    start = 0
    while (found := _TYPE.search(text, start)) is not None:
        modifiers = text[max(start, found.start() - _MODIFIERS_LENGTH) : found.start()]
        end = _end_of_body(text, found.end())
        yield _PUBLIC.search(modifiers) is not None, found[1], _has_main(text, found.end(), end)
        start = end


def _end_of_body(text: str, start: int) -> int:
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth <= 0:
            return brace.end()
    return len(text)


def _has_main(text: str, start: int, end: int) -> bool:
    parts = (part[0] for part in _PART.finditer(text, start, end))
    return any(part.endswith("(") and _MAIN.search(part) and _STATIC.search(part) for part in parts)
