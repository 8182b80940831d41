"""Finds what a response puts in a box."""

from __future__ import annotations

import re

# A box holds an answer and not a page.
MAX_BOX_CHARACTERS = 20_000
MAX_BOXES = 50
BOXES = ("\\boxed", "\\fbox")
# What may stand between two boxes that are one answer.
JOINT = re.compile(r"[\s,;$&]*(?:\\text\s*\{\s*)?(?:and|or)?(?:\s*\})?[\s,;$&]*(?:\\q?quad)?\s*")


def find_boxed(text: str) -> str | None:
    """The content of the last box, with those that belong to it joined by commas.

    Empty when it is empty or does not close; None when there is no box.
    """
    return find_last_boxes(text)[0]


def find_last_boxes(text: str) -> tuple[str | None, int]:
    """What `find_boxed` tells, and where the last box ends; the end of the text when it does not close."""
    contents: list[str] = []
    end, last = len(text), len(text)
    while (start := max(text.rfind(box, 0, end) for box in BOXES)) >= 0:
        found = read_box(text, start)
        if found is None:
            break
        content, after = found
        if contents and (len(contents) == MAX_BOXES or not JOINT.fullmatch(text, after, end)):
            break
        last = last if contents else after
        contents.insert(0, content)
        end = start
    if not contents and start >= 0:
        return "", last
    return (", ".join(contents) if contents else None), last


def find_boxes(text: str) -> list[str]:
    """The contents of all boxes from the last paragraph that has any."""
    paragraph = next((part for part in reversed(text.split("\n\n")) if any(box in part for box in BOXES)), "")
    contents: list[str] = []
    position = 0
    while len(contents) < MAX_BOXES:
        starts = [start for box in BOXES if (start := paragraph.find(box, position)) >= 0]
        found = read_box(paragraph, min(starts)) if starts else None
        if found is None:
            break
        contents.append(found[0])
        position = found[1]
    return contents


def read_box(text: str, start: int) -> tuple[str, int] | None:
    """Content of the box that begins at `start` and where it ends; None when it does not close."""
    position = text.index("box", start)
    position += 5 if text.startswith("boxed", position) else 3
    while position < len(text) and text[position].isspace():
        position += 1
    if position == len(text):
        return None
    if text[position] != "{":
        word = re.match(r"[^\s$\\.,;]+|\\[a-zA-Z]+", text[position : position + 100])
        return (word[0], position + word.end()) if word else None
    end = closing_brace(text, position)
    return None if end is None else (text[position + 1 : end].strip(), end + 1)


def closing_brace(text: str, opening: int) -> int | None:
    """Where the brace that opens at `opening` closes, escaped ones aside; None when it does not, or only far away."""
    depth, position = 0, opening
    while position < min(len(text), opening + MAX_BOX_CHARACTERS):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
