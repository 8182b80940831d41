"""Comparisons that other judges have and the sandbox has not: a program of the standard library alone, which runs as a
checker in the sandbox.

    text_checker.py INPUT OUTPUT ANSWER NAME [OPTIONS]

Exits with 0 or 1, or with 7 and a fraction of the points.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path


def lines_of(text: bytes) -> list[bytes]:
    """Returns the lines that are not empty."""
    return [line for line in text.replace(b"\r", b"\n").split(b"\n") if line]


def number_of(word: bytes) -> float | None:
    """Returns the number that a word spells; None when it spells none."""
    try:
        return None if b"_" in word else float(word)
    except ValueError:
        return None


def near(output: float, answer: float, absolute: float, relative: float) -> bool:
    """Returns whether a number is within either tolerance of the answer."""
    difference = abs(output - answer)
    return difference <= absolute or difference <= relative * abs(answer)


def same_word(output: bytes, answer: bytes, absolute: float | None, relative: float | None) -> bool:
    """Returns whether a word is the answer's, or a number within its tolerances."""
    if output == answer:
        return True
    numbers = number_of(output), number_of(answer)
    if (absolute, relative) == (None, None) or numbers[0] is None or numbers[1] is None:
        return False
    return near(numbers[0], numbers[1], absolute or 0.0, relative or 0.0)


def kattis(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares as the default output validator of Kattis does."""
    if "space_change_sensitive" in options:
        separate: Callable[[bytes], list[bytes]] = lambda text: text.replace(b"\n", b" \n ").split(b" ")  # noqa: E731
    else:
        separate = bytes.split
    if "case_sensitive" not in options:
        output, answer = output.lower(), answer.lower()
    tolerances = dict(pairwise(options))
    both = tolerances.get("float_tolerance")
    absolute, relative = (tolerances.get(f"float_{kind}_tolerance", both) for kind in ("absolute", "relative"))
    words = separate(output), separate(answer)
    limits = [None if each is None else float(each) for each in (absolute, relative)]
    return float(len(words[0]) == len(words[1]) and all(same_word(*pair, *limits) for pair in zip(*words, strict=True)))


def floats(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares line by line, numbers within a tolerance."""
    epsilon, mode = float(options[0]), options[1]
    limits = (None if mode == "relative" else epsilon, None if mode == "absolute" else epsilon)
    lines = lines_of(output), lines_of(answer)
    if len(lines[0]) != len(lines[1]):
        return 0.0
    for ours, theirs in zip(*lines, strict=True):
        words = ours.split(), theirs.split()
        if len(words[0]) != len(words[1]) or not all(same_word(*pair, *limits) for pair in zip(*words, strict=True)):
            return 0.0
    return 1.0


def standard(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares word by word, where a line's end is not the same as a space."""
    found = (re.finditer(rb"[^\r\n]+", text) for text in (output, answer))
    ours, theirs = (filter(None, (line[0].split() for line in lines)) for lines in found)  # one line's words at a time
    return float(all(a == b for a, b in zip_longest(ours, theirs)))


def easy(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares how often each character comes, in either case, without white space."""
    return float(Counter(b"".join(output.lower().split())) == Counter(b"".join(answer.lower().split())))


def linecount(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Returns the part of the answer's lines that are in their places."""
    ours, theirs = lines_of(output), lines_of(answer)
    if len(ours) > len(theirs):
        return 0.0
    right = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=False))
    return right / len(theirs) if theirs else 1.0


def linematches(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Returns the part of the points that the right lines have; OPTIONS are the points of the answer's lines, for which
    ValueError is raised when they are not.
    """
    ours, theirs = lines_of(output), lines_of(answer)
    points = [float(option) for option in options if option != "short"]
    if len(points) != len(theirs) or not sum(points):
        raise ValueError(f"point_distribution must have the points of {len(theirs)} lines, one above 0, got {points}")
    if "short" not in options and len(ours) != len(theirs):
        return 0.0
    return sum(p for a, b, p in zip(ours, theirs, points, strict=False) if a == b) / sum(points)


def rstripped(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares line by line, without white space at their ends; empty lines count unless `filter` is an option."""
    texts = [text.replace(b"\r", b"\n").split(b"\n") for text in (output, answer)]
    ours, theirs = ([line.rstrip() for line in text if line or "filter" not in options] for text in texts)
    return float(ours == theirs)


def ordered(output: bytes, answer: bytes, options: Sequence[str]) -> float:
    """Compares the lines in any order, word by word."""
    ours, theirs = (sorted(line.split() for line in lines_of(text)) for text in (output, answer))
    return float(ours == theirs)


COMPARISONS = {
    "kattis": kattis,
    "floats": floats,
    "standard": standard,
    "easy": easy,
    "linecount": linecount,
    "linematches": linematches,
    "rstripped": rstripped,
    "sorted": ordered,
}


def main(arguments: Sequence[str]) -> int:
    """Compares two files; returns the exit code."""
    _, output, answer = (Path(name).read_bytes() for name in arguments[:3])
    fraction = COMPARISONS[arguments[3]](output, answer, arguments[4:])
    if fraction in (0.0, 1.0):
        return int(fraction == 0.0)
    print(f"points {fraction}", file=sys.stderr)
    return 7


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
