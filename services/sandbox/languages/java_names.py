"""Names that a Java source must be compiled and started by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NOISE = re.compile(r"//[^\n]*|/\*.*?\*/|\"\"\".*?\"\"\"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_PACKAGE = re.compile(r"\s*package\s+([\w.]+)\s*;")
_TYPE = re.compile(
    r"(?:\b(public)\s+)?(?:\b(?:abstract|final|sealed|strictfp|non-sealed)\s+)*\b(?:class|interface|enum|record)\s+(\w+)"
)
_MAIN = re.compile(r"\bstatic\b[^;{}()]*\bvoid\s+main\s*\(")

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
    for is_public, name, body in _top_types(text):
        has_main = _MAIN.search(body) is not None
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


def _top_types(text: str) -> Iterator[tuple[bool, str, str]]:
    """Yields the types of a source that lie in no other: whether each is public, its name and its text."""
    start = 0
    while (found := _TYPE.search(text, start)) is not None:
        depth, end = 0, text.find("{", found.end())
        if end < 0:
            end = len(text)
        for brace in re.finditer(r"[{}]", text[end:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end += brace.end()
                break
        else:
            end = len(text)
        yield bool(found[1]), found[2], text[found.end() : end]
        start = end
