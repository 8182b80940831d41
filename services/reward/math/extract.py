"""Finds the final answer of a response: what it marks as its answer, or what its last sentence ends with.

Reasoning up to the last </think> is no part of the answer. An answer that does not close was cut off, so nobody can
know it. Different answers that stand together are all returned: a response that gives two has given none. Costs stay
linear, and only the end of a long response is searched with patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from services.reward.math.notation import DISPLAY, SPAN, flatten_math, ungroup_digits, unwrap
from services.reward.math.parse import split_top
from services.reward.math.units import is_unit_phrase

# An answer stands near the end; whatever stands before it is reasoning.
SEARCHED_CHARACTERS = 4000
# A box holds an answer and not a page.
MAX_BOX_CHARACTERS = 20_000
MAX_BOXES = 50
# Sentences at the end that are looked through for a value.
LAST_SENTENCES = 4
END_TOKEN = re.compile(
    r"<[|｜](?:im_end|im_start|eot_id|endoftext|end_of_text|end▁of▁sentence)[|｜]>|</?s>|<end_of_turn>|<eos>"
)
CALCULATOR = re.compile(r"<<[^<>\n]*>>")
DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
BARE_BOX = re.compile(r"[^\s$\\.,;{}()]+|\\[a-zA-Z]+")
UNCLOSED_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}$|\\\}$")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
JSON_ANSWER = re.compile(r'"(?:final_)?answer"\s*:\s*("(?:\\.|[^"\\])*"|-?[0-9][0-9.eE+-]*|true|false)(?=\s*[,}])')
# The answer itself, on the line of a marker or on the next one.
LINE = r"[ \t]*(?:\n\s*)?(?P<{0}>[^\n]*)"
MARKERS = re.compile(
    rf"####{LINE.format('hashes')}|^[ \t*_#>-]*(?:final[ ]+)?(?:A|ans|answer)[ *_]*[:：][ *_]*{LINE.format('line')}",
    re.IGNORECASE | re.MULTILINE,
)
ANNOUNCEMENT = re.compile(
    r"\banswers?\b\**(?:\**\s*:|(?:\s+(?:to|for|of|here)\b[^\n.:=$]{0,80}?)?"
    r"\s+(?:is|are|must be|should be|would be|will be|=)(?![A-Za-z]))[\s*_:]*(?=(?P<said>[^\n]+))"
    r"|答案(?:是|为)?\s*[:：]?\s*(?=(?P<chinese>[^\n]+))",
    re.IGNORECASE,
)
OTHERS = re.compile(r"\b(?:reference|expected|gold|true|student'?s?|no|their|your|wrong|incorrect)\s+$", re.I)
DENIAL = re.compile(r"(?:definitely |certainly |actually )?(?:not|never)\b(?!.*\bbut\b)", re.IGNORECASE)
NOT_BUT = re.compile(r"not\b.+?\bbut\s+(?:rather\s+)?", re.IGNORECASE)
# What may stand between two marks that are one answer.
JOINT = re.compile(
    r"[\s,;.:$&*_\\()\[\]]*(?:\\text\s*\{\s*)?(?:(?:and|or|so|thus|hence|therefore|the|my|our|final|correct)\b[\s,]*)*(?:\})?"
    r"[\s,;$&]*(?:\\q?quad)?[\s*_$\\(\[]*",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(?:i|we)(?:'m| am| are)?\s+(?:really\s+)?"
    r"(?:cannot|can't|could not|couldn't|do not|don't|unable|not able|not sure|have no)\b"
    r"|\bimpossible to (?:say|tell|know|answer)\b|\bground truth\b|\breference\b|\bmark (?:this|it|me)\b",
    re.IGNORECASE,
)
# What takes back the last answer though none follows it, and what does so before another one.
WITHDRAWN = (
    r"\bscratch that\b|\b(?:that|this|it)(?:'s| is| was) (?:wrong|incorrect|not right)\b"
    r"|\bi made (?:a|an) (?:mistake|error)\b|\b(?:wait|actually),? no\b"
)
WITHDRAWAL = re.compile(WITHDRAWN, re.IGNORECASE)
RETRACTION = re.compile(rf"{WITHDRAWN}|\b(?:wait|actually|correction|on second thought)\b", re.IGNORECASE)
NEGATED = re.compile(r"\b(?:not|never|cannot be|isn't|aren't)\s+\S?$", re.IGNORECASE)
ABOUT = re.compile(r"\b(?:about|approximately|approx|roughly)\b|≈|\\approx")
HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|(?:might|may) (?:also )?be|could (?:also|well|even) be|alternatively|not sure"
    r"|unless)\b",
    re.IGNORECASE,
)
EXPLANATION = re.compile(
    r",?\s+(?:because|since|as|where|when|if|rather than|instead of|after|so|given|due to|achieved|i\.e\.?)\b"
    r"|,?\s+which\b(?! (?:is|equals|gives|means))|,\s*(?:not|and not|but)\b|(?<![-+*/=×·(\s])\s+\((?=[^()\\]*[a-z]{3})"
)
# In prose "so" and the like lead to the answer.
REMARK = re.compile(
    r",?\s+(?:because|since|where|when|achieved)\b|,?\s+which\b(?! (?:is|equals|gives|means))"
    r"|(?<![-+*/=×·(\s])\s+\((?=[^()\\]*[a-z]{3})"
)
NAME = re.compile(r"\\?[A-Za-z]+'?(?:_\{?\w\}?)?(?:\([A-Za-z, ]+\))?")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Za-z]\.)\s+|[。！？]|\n+")
CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff，；：]+")
GROUP = re.compile(r"\{[^{}]*\}|\((?:(?![A-Za-z]{3})[^()\n])*\)")
TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
SENTENCE_IN_BOX = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*[A-Z][a-z]")
SIGN = re.compile(r"[0-9\\=<>≤≥≠≈+*/^√π∞∅%°]|^[-−]|[\[(]\S+[,\])]")
PROSE_WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|ln|pi|inf)[A-Za-z]{2,}")
NO_UNITS = ("in", "am", "second", "a")


class Extraction(IntEnum):
    """Level of extraction: how an answer may be given; each level also takes what those before it take."""

    BOXED = 1
    MARKER = 2
    ANNOUNCED = 3
    PROSE = 4


@dataclass(frozen=True)
class Search:
    """What to look for: the level, the marker of the prompt, how many values are asked for, and whether words are.

    Sentences of the prompt are no answer in prose.
    """

    extraction: Extraction = Extraction.ANNOUNCED
    marker: str = ""
    parts: int = 1
    is_verbal: bool = False
    prompt: str = ""


@dataclass(frozen=True)
class Mark:
    """An answer that a response marks, and where the mark begins and ends."""

    start: int
    end: int
    text: str
    is_box: bool = False


@dataclass(frozen=True)
class Found:
    """Answers that stand together at the end of a response; without any, the reason."""

    answers: tuple[str, ...] = ()
    reason: str = ""


def find_answers(response: str, search: Search) -> Found:
    """Finds the final answer in the response."""
    text = clean(response)
    if text is None:
        return Found(reason="the reasoning did not end")
    if search.marker:
        _, is_there, text = text.rpartition(search.marker)
        if not is_there:
            return Found(reason=f"the response has no answer marker {search.marker!r}")
        if not text.strip():
            return Found(reason="the answer is empty")
    marks = find_marks(text, search)
    if marks is None:
        return Found(reason="the box is empty or was cut off")
    if not marks and search.marker and search.extraction >= Extraction.MARKER:
        line = flatten_math(re.sub(r"</\w+>", "", text)).strip().partition("\n")[0]
        return finish([read_said(line, search)])
    if marks and is_withdrawn(text[marks[-1].end :], marks[-1]):
        return Found(reason="the response takes its answer back")
    if marks:
        return finish(join_parts(text, last_group(text, marks), search))
    if search.extraction < Extraction.PROSE:
        return Found(reason="the response marks no answer")
    return finish([read_prose(text, search)])


def finish(answers: list[str]) -> Found:
    """Removes what was said twice; an answer that says nothing is none."""
    if not answers or not all(answer.strip() for answer in answers):
        return Found(reason="the response gives no final answer")
    return Found(tuple(dict.fromkeys(answers)))


def clean(response: str) -> str | None:
    """Returns what follows the reasoning, without special tokens and calculator marks; None when it did not end."""
    before, closing, after = response.rpartition("</think>")
    if "<think>" in after:
        return None
    text = (after if closing else before + after).lstrip()
    while (token := END_TOKEN.match(text)) is not None:
        text = text[token.end() :].lstrip()
    token = END_TOKEN.search(text)
    return DRAWING.sub("", CALCULATOR.sub("", text[: token.start()] if token else text))


def find_marks(text: str, search: Search) -> list[Mark] | None:
    """Finds what the response marks as its answer, in order; None when the only boxes are empty or the last is open."""
    boxes = find_boxes(text)
    if boxes is None:
        return None
    marks = [*boxes, *(Mark(m.start(), m.end(), m[1].strip()) for m in TAGGED.finditer(text))]
    marks += [Mark(m.start(), m.end(), m[1].strip('"').replace("\\\\", "\\")) for m in JSON_ANSWER.finditer(text)]
    begin = max(0, len(text) - SEARCHED_CHARACTERS)
    patterns = (MARKERS, ANNOUNCEMENT)[: max(0, search.extraction - 1)]
    for pattern in patterns:
        for match in pattern.finditer(text, begin):
            said = next(group for group in match.groups() if group is not None)
            said = SENTENCE_END.split(said, maxsplit=1)[0]
            start = match.start(match.lastindex or 0)
            end = start + len(said)
            if any(mark.start < end and start < mark.end for mark in marks) or DENIAL.match(said) or BOX.search(said):
                continue  # the box tells it
            owner = pattern is ANNOUNCEMENT and OTHERS.search(text, max(0, match.start() - 20), match.start())
            if owner or (boxes and ABOUT.search(said)):
                continue  # not the response's own answer, or the one in the box, rounded
            said = read_said(flatten_math(text[start:] if DISPLAY.match(text, start) else said).split("\n")[0], search)
            if not boxes or search.is_verbal or re.search(r"[0-9\\$]|^[A-Za-z]\W*$", said):
                marks.append(Mark(match.start(), start + len(said), said))
    return sorted(marks, key=lambda mark: mark.start)


def is_withdrawn(rest: str, mark: Mark) -> bool:
    """Returns whether what follows the last mark takes it back; of an announcement, whether it names another value."""
    rest = rest[:SEARCHED_CHARACTERS]
    doubt = "" if mark.is_box else protect(rest.split("\n\n", 1)[0])
    return WITHDRAWAL.search(rest) is not None or bool(HEDGE.search(doubt) and find_runs(doubt))


def last_group(text: str, marks: list[Mark]) -> list[Mark]:
    """Returns the last mark with those beside it, and with the last box before it; what is taken back is left out."""
    group = [marks[-1]]
    for mark in reversed(marks[:-1]):
        between = text[mark.end : group[0].start]
        has_box = any(each.is_box for each in group)
        if RETRACTION.search(between) or not (JOINT.fullmatch(between) or (mark.is_box and not has_box)):
            break
        group.insert(0, mark)
    return group


def join_parts(text: str, group: list[Mark], search: Search) -> list[str]:
    """Returns the answers of a group of marks; boxes that each hold a part of the answer are one answer."""
    boxes = [mark for mark in group if mark.is_box]
    if search.parts > 1 and boxes:
        paragraph = max(0, text.rfind("\n\n", 0, boxes[0].start))
        every = find_boxes(text[paragraph:]) or []
        boxes = every if len(every) == search.parts else boxes
    others = [mark.text for mark in group if not mark.is_box]
    contents = [mark.text for mark in boxes]
    contents = [read_box_sentence(content, search) for content in contents]
    return [*([", ".join(contents)] if search.parts > 1 and boxes else contents), *others]


def read_box_sentence(content: str, search: Search) -> str:
    r"""Returns the value of a sentence in a box, "\text{There are } 35 \text{ students}"; others stay."""
    if search.is_verbal or not SENTENCE_IN_BOX.match(content):
        return content
    sentence = TEXT.sub(r" \1 ", content).replace("\\$", "$")
    return read_said(sentence, search) if find_runs(protect(sentence)) else content


def find_boxes(text: str) -> list[Mark] | None:
    """Returns the last boxes that hold something; None when there are but empty ones, or the last one is cut off."""
    openings = list(BOX.finditer(text))[-MAX_BOXES:]
    boxes: list[Mark] = []
    end = 0
    for opening in openings:
        if opening.start() < end:
            continue  # a box in a box
        found = read_box(text, opening.end())
        if found is None:
            return None
        content, end = found
        if content:
            boxes.append(Mark(opening.start(), end, content, is_box=True))
    return None if openings and not boxes else boxes


def read_box(text: str, start: int) -> tuple[str, int] | None:
    """Returns the content of the box whose argument begins at `start`, and its end; None when it does not close."""
    if text[start : start + 1] != "{":
        word = BARE_BOX.match(text, start)
        return (word[0], word.end()) if word else ("", start)
    end = closing_brace(text, start)
    if end is not None:
        return text[start + 1 : end].strip(), end + 1
    rest = text[start + 1 :].rstrip(" .$\n")
    return (rest[:-1].removesuffix("\\"), len(text)) if UNCLOSED_TEXT.search(rest) else None


def closing_brace(text: str, opening: int) -> int | None:
    """Returns where the brace at `opening` closes, escaped ones aside; None when it does not, or only far away."""
    depth, position = 0, opening
    while position < min(len(text), opening + MAX_BOX_CHARACTERS):
        character = text[position]
        position += character == "\\"
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def read_said(said: str, search: Search) -> str:
    """Returns the value that an announcement or the line of a marker gives; empty where it gives a choice or none."""
    if len(said) > SEARCHED_CHARACTERS:
        return said.strip()  # no prose is like that: whatever it is, it is not cut
    protected = protect(said)
    sentence = next((part for part in SENTENCE_END.split(protected) if part.strip(" *_`")), "").strip(" *_`")
    if inner := ANNOUNCEMENT.search(sentence):
        sentence = inner["said"] or inner["chinese"]
    if REFUSAL.search(sentence):
        return ""
    sentence = NOT_BUT.sub("", sentence, count=1) if NOT_BUT.match(sentence) else sentence
    explained = EXPLANATION.split(sentence, maxsplit=1)[0].strip(" *_`")
    if search.is_verbal:
        return restore(explained or sentence)
    runs = find_runs(sentence)
    beside = sentence[len(explained) :]
    if (HEDGE.search(sentence) and len(runs) > 1) or (re.search(r"\bor\b", beside) and find_runs(beside)):
        return ""
    runs = find_runs(explained) or runs
    if not runs or not PROSE_WORD.search(explained):
        return restore(explained)
    return runs[0] if explained.startswith(runs[0][0]) else runs[-1]


def read_prose(text: str, search: Search) -> str:
    """Returns the last value of the last sentence that has one, or the last sentence where words are asked for."""
    sentences = [part.strip(" *_`#>") for part in SENTENCE_END.split(protect(text[-SEARCHED_CHARACTERS:]))]
    asked = protect(search.prompt)
    last = [sentence for sentence in sentences if sentence and sentence not in asked][-LAST_SENTENCES:]
    if not last or any(REFUSAL.search(sentence) for sentence in last[-2:]):
        return ""
    if search.is_verbal:
        return restore(last[-1])
    for sentence in reversed(last):
        runs = find_runs(REMARK.split(sentence, maxsplit=1)[0]) or find_runs(sentence)
        if runs and not (sentence.startswith("(") and sentence.endswith(")")):
            is_open = HEDGE.search(sentence) or NEGATED.search(sentence[: sentence.rfind(runs[-1].split()[0])])
            return "" if is_open else last_item(runs[-1], search)
    return last[-1] if len(last) == 1 else ""


def last_item(run: str, search: Search) -> str:
    """Returns the last of several equations where one value is asked for, "x = 3 and x + y = 8"."""
    items = split_top(ungroup_digits(run)) if search.parts == 1 else []
    return items[-1] if len(items) > 1 and any("=" in item for item in items) else run


def protect(text: str) -> str:
    """Makes each formula and each group in braces one word, so that white space parts sentences and words."""
    text = CHINESE.sub(" ", flatten_math(text).replace("**", " ** "))
    for pattern in (DISPLAY, SPAN, GROUP, GROUP):
        text = pattern.sub(protect_formula, text)
    return text


def protect_formula(match: re.Match[str]) -> str:
    """Returns a formula without white space, and the punctuation at its end behind it."""
    formula: str = match[0]
    opening = "\\begin" if formula.startswith("\\") else formula[0]
    if opening == "$":
        inner = formula.strip("$").rstrip()
        end = inner[-1:] if inner[-1:] in ".,;" else ""
        formula = f"${inner.removesuffix(end)}${end}"
    formula = re.sub(r"\s", "\x00", formula)
    return formula if opening == "{" else f"{formula} "


def restore(text: str) -> str:
    """Undoes `protect` and removes dollar signs, markup and the full stop."""
    return unwrap(text.replace("\x00", " ").replace("**", " ")).strip(" *_`,;:").removesuffix(".").strip()


def find_runs(sentence: str) -> list[str]:
    """Returns the stretches of mathematics in a protected sentence, with their units."""
    runs = iterate_runs(sentence.replace("**", " ").split())
    return [text for run in runs if (text := restore(" ".join(run)))]


def iterate_runs(words: list[str]) -> Iterator[list[str]]:
    """Yields stretches of words that hold a value: signs, digits, lone letters between them, units behind a number."""
    run: list[str] = []
    for position, word in enumerate(words):
        bare = word.strip(".,;:!?()*\"'")
        follows = words[position + 1] if position + 1 < len(words) else ""
        is_unit = bool(run) and is_unit_phrase(bare) and bare not in NO_UNITS
        is_joint = bare in ("and", "or", "to") and bool(run) and (is_value(follows) or is_letter(follows))
        if is_value(word) or is_unit or is_joint or (is_letter(word) and (run or is_value(follows))):
            run.append(word)
            if not word.endswith((".", ";", "!", "?")):
                continue
        if any(is_value(each) for each in run):
            yield run
        run = []
    if any(is_value(each) for each in run):
        yield run


def is_letter(word: str) -> bool:
    """Returns whether a word is a lone letter that may be a variable."""
    bare = word.strip(".,;:!?()*\"'")
    return len(bare) == 1 and bare.isalpha() and bare not in "aI"


def is_value(word: str) -> bool:
    """Returns whether a word holds mathematics that is more than a name."""
    bare = word.strip("*_`.,;:!?") or word
    return bool(SIGN.search(bare) or bare.startswith("$")) and not NAME.fullmatch(bare.strip("$"))
