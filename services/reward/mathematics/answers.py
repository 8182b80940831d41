"""Finds the final answer in a response: a box, an announcement, or what the response ends with.

Reasoning between <think> tags is not part of the answer. A box or a tag that does not close was cut off, so that
nobody can know the answer. Costs stay linear: only the end of a long response is searched with patterns.
"""

from __future__ import annotations

import re

from services.reward.mathematics.segments import flatten_math, isolate, trim_sentence

# An answer is announced near the end; whatever stands before it is reasoning.
SEARCHED_CHARACTERS = 3000
# A box holds an answer and not a page.
MAX_BOX_CHARACTERS = 20_000
MAX_BOXES = 50
# How the solutions of that data set, and of models that learned from it, end.
GSM8K_MARKER = "####"
BOXES = ("\\boxed", "\\fbox")
# What may stand between two boxes that are one answer.
JOINT = re.compile(r"[\s,;$&]*(?:\\text\s*\{\s*)?(?:and|or)?(?:\s*\})?[\s,;$&]*(?:\\q?quad)?\s*")
ANNOUNCEMENT = re.compile(
    r"\b(?:answers?|ans|solutions?|result)\b\**(?P<between>[^\n.:=$]{0,80}?)"
    r"(?:\b(?:is|are|be|was|were)\b\**\s*:?|:|=(?!=)|\s[-–—]\s|\n)\**",
    re.IGNORECASE,
)
# "the answer is a number between" and the like announce nothing, "the answer to part (a) is" does.
REPORTS = re.compile(r"\b(?:find|compute|give|write|check|verify|need|want|round|express)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[^\s.?])(?:\.+(?=\s+[A-Z\\$*(#]|\s*$)|(?<!!)[!?]+(?!\.)(?=\s+[A-Z$*#]|\s*$))")
PROSE = re.compile(r"(?<![\\A-Za-z])[a-z]{3}")


def find_final_answer(response: str, *, marked: bool = False, words: bool = False) -> str | None:
    """The answer as written, without the prose around it; None when the response was cut off or gives none.

    `marked` says that the response is what followed an answer marker: its first line counts, not its last. `words` says
    that the answer is words and not mathematics: they are taken as they are.
    """
    text = drop_reasoning(response)
    if text is None:
        return None
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed or None
    own_line = first_line(text) if marked else text.rstrip().rpartition("\n")[2]
    if len(own_line) > SEARCHED_CHARACTERS:
        return own_line.strip()  # no prose is like that: whatever it is, it is not cut
    text = flatten_math(text.lstrip()[:SEARCHED_CHARACTERS] if marked else text[-SEARCHED_CHARACTERS:])
    lines = [line for line in text.splitlines() if line.strip(" \t*#`_-=")]
    if not lines:
        return None
    if marked or lines[-1].startswith(GSM8K_MARKER):
        line = lines[0] if marked else lines[-1]
        sentence, first = find_announcement(line) or line, True
    elif (announcement := find_announcement(text)) is not None:
        sentence, first = announcement, True
    else:
        sentence, first = last_sentence(lines[-1]), False
    return (trim_sentence(sentence, first=first, words=True) if words else isolate(sentence, first=first)) or None


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.lstrip().partition("\n")[0]


def drop_reasoning(response: str) -> str | None:
    """What follows the last </think>; None when the reasoning did not end."""
    before, closing, after = response.rpartition("</think>")
    if "<think>" in after:
        return None
    return after if closing else before + after


def find_boxed(text: str) -> str | None:
    """The content of the last box, with those that belong to it joined by commas.

    Empty when it is empty or does not close; None when there is no box.
    """
    contents: list[str] = []
    end = len(text)
    while (start := max(text.rfind(box, 0, end) for box in BOXES)) >= 0:
        found = read_box(text, start)
        if found is None:
            return "" if not contents else ", ".join(contents)
        content, after = found
        if contents and (len(contents) == MAX_BOXES or not JOINT.fullmatch(text, after, end)):
            break
        contents.insert(0, content)
        end = start
    return ", ".join(contents) if contents else None


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


def find_announcement(text: str) -> str | None:
    """What the last "the answer is" or "Answer:" announces, to the end of its sentence; None without one.

    Empty when nothing follows it.
    """
    matches = [match for match in ANNOUNCEMENT.finditer(text) if not REPORTS.search(match["between"])]
    if not matches:
        return None
    strong = [match for match in matches if match[0].lower().startswith("ans")]
    match = (strong or matches)[-1]
    if not strong and match[0].endswith("\n"):
        return None
    rest = text[match.end() :].lstrip(" *:_")
    rest = rest if rest.strip() and not rest.startswith("\n") else rest.lstrip("\n *#_")
    line = rest.split("\n", 1)[0]
    return first_sentence(line)


def first_sentence(line: str) -> str:
    """The line up to the end of its first sentence."""
    end = SENTENCE_END.search(line)
    return line[: end.start()] if end else line


def last_sentence(line: str) -> str:
    """The last sentence of a line, without its end."""
    if not PROSE.search(line):
        return line.strip()  # no prose: a final exclamation mark is a factorial
    ends = [match.end() for match in SENTENCE_END.finditer(line.rstrip())]
    inner = [end for end in ends if line[end:].strip()]
    return first_sentence(line[inner[-1] :].strip() if inner else line.strip())
