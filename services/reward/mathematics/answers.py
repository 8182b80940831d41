"""Finds the final answer in a response: a box, an announcement, or what the response ends with.

Reasoning between <think> tags is not part of the answer. A box or a tag that does not close was cut off, so that
nobody can know the answer. Costs stay linear: only the end of a long response is searched with patterns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.announcements import find_announcement, find_claim
from services.reward.mathematics.asides import (
    DOUBT,
    concludes,
    find_retraction,
    find_statements,
    is_alternative,
    is_unfinished,
    states_nothing,
)
from services.reward.mathematics.boxes import find_boxes, find_last_boxes
from services.reward.mathematics.candidates import answers_of
from services.reward.mathematics.clauses import clause_about
from services.reward.mathematics.comparatives import read_comparatives
from services.reward.mathematics.conditions import REGIONAL
from services.reward.mathematics.expectations import ANYTHING, Expectation, Form
from services.reward.mathematics.formulas import flatten_math, unwrap
from services.reward.mathematics.labels import find_labelled
from services.reward.mathematics.segments import has_mathematics, isolate, trim_sentence
from services.reward.mathematics.sentences import Sentence, split_sentences, strip_end

# An answer is announced near the end; whatever stands before it is reasoning.
SEARCHED_CHARACTERS = 3000
# How the solutions of that data set, and of models that learned from it, end.
GSM8K_MARKER = "####"
# As many sentences are looked through for an answer of the form that is expected, or for its parts.
LAST_SENTENCES = 4
BOXED_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|textrm)\s*\{([^{}]*)\}")
# How many there are where there are none; "no solution" is no number.
NONE_OF = re.compile(
    r"(?:(?:so|thus|hence|therefore|consequently),? )?(?:there (?:are|is|exist) no|none of)\b(?!.*\b(?:solutions?"
    r"|roots?|real|value)\b)",
    re.IGNORECASE,
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
SAYS = re.compile(r"\W*(?:(?:so|thus|hence|therefore)\W+)?(?:yes|no|true|false)\b", re.IGNORECASE)
ANOTHER = re.compile(
    r"\W*(?:and\s+)?(?:the\s+(?:other|second|third|last|larger|smaller|remaining)|another|also)\b", re.IGNORECASE
)


def find_final_answer(response: str, *, marked: bool = False, expectation: Expectation = ANYTHING) -> str | None:
    """The answer as written, without the prose around it; None when the response was cut off or gives none.

    `marked` says that the response is what followed an answer marker: its first line counts, not its last.
    `expectation` is the form of answer to look for; words are taken as they are.
    """
    text = drop_reasoning(response)
    if text is None:
        return None
    boxed, end = find_last_boxes(text)
    if boxed is not None:
        boxes = find_boxes(text) if expectation.form in (Form.LIST, Form.TUPLE) else []
        if expectation.count > 1 and len(boxes) == expectation.count:
            return ", ".join(boxes)
        return settle_box(boxed, text[end:], expectation) or None
    own_line = first_line(text) if marked else text.rstrip().rpartition("\n")[2]
    if len(own_line) > SEARCHED_CHARACTERS:
        return own_line.strip()  # no prose is like that: whatever it is, it is not cut
    text = flatten_math(text.lstrip()[:SEARCHED_CHARACTERS] if marked else text[-SEARCHED_CHARACTERS:])
    if marked:
        line = first_line(text)
        announced = find_announcement(line)
        return read_sentence(line if announced is None else announced, expectation, first=True) or None
    return find_unboxed(text, expectation) or None


def find_unboxed(text: str, expectation: Expectation) -> str | None:
    """The answer of a response without boxes."""
    retraction = find_retraction(text)
    if retraction >= 0 and has_mathematics(text[retraction:]):
        text = text[retraction:]
    sentences = split_sentences(text)
    if not sentences:
        return None
    if sentences[-1].text.startswith(GSM8K_MARKER):
        line = sentences[-1].text
        announced = find_announcement(line)
        return read_sentence(line if announced is None else announced, expectation, first=True)
    statements = find_statements(sentences)
    is_several = expectation.form in (Form.LIST, Form.TUPLE)
    if is_several and (parts := find_parts(statements, expectation)):
        return parts
    announced = find_announcement(rejoin(statements))
    if announced is not None:
        answers = [read_sentence(announced, expectation, first=True)]
        if not answers[0]:
            return None
        rival = find_claim(rejoin(statements), announced)
        if rival is not None and not expectation.is_verbal:
            answers.append(read_sentence(rival, expectation, first=True))
    else:
        answers = [find_stated(statements, expectation)]
    if not expectation.is_verbal and is_alternative(statements):
        before = statements[:-1] if announced is None else statements[-1:]
        answers.append(isolate(strip_end(before[-1].text), first=False))
    return ", ".join(dict.fromkeys(filter(None, answers)))


def settle_box(boxed: str, rest: str, expectation: Expectation) -> str:
    """What is in the box, unless the rest of the response takes it back or announces another answer."""
    rest = rest[-SEARCHED_CHARACTERS:]
    if rest.strip(" .$\n") and not expectation.is_verbal:
        rest = flatten_math(rest)
        retraction = find_retraction(rest)
        if retraction >= 0:
            announced = find_announcement(rest[retraction:])
            if announced and has_mathematics(announced):
                return isolate(announced, first=True, expectation=expectation)
        claim = find_claim(rest, None)
        if claim is not None and has_mathematics(claim):
            other = isolate(claim, first=True, expectation=expectation)
            return boxed if not other or "≈" in other or "." in other else f"{boxed}, {other}"
    if expectation.is_verbal or ("\\text" not in boxed and "\\mathrm" not in boxed and "\\mbox" not in boxed):
        return boxed
    # A sentence in a box: "\text{There are } 35 \text{ students}".
    plain = " ".join(BOXED_TEXT.sub(r" \1 ", boxed).replace("\\$", "$").split())
    begins = re.match(r"(?!not\b|no\b)[A-Za-z][a-z]+[ :]", plain)
    if begins and boxed.lstrip().startswith("\\text") and has_mathematics(plain) and not DOUBT.search(plain):
        return isolate(plain, first=False, expectation=expectation)
    return boxed


def read_sentence(sentence: str, expectation: Expectation, *, first: bool) -> str:
    """What one sentence says the answer is."""
    if expectation.is_verbal:
        return trim_sentence(clause_about(expectation.subject, sentence), first=first, words=True)
    if expectation.labels and (labelled := find_labelled(unwrap(sentence), expectation.labels)):
        return ", ".join(f"{label} {value}" for label, value in labelled.items())
    return isolate(sentence, first=first, expectation=expectation)


def find_stated(statements: Sequence[Sentence], expectation: Expectation) -> str:
    """What the last sentence that states something says; of a list or a tuple as many as belong to it."""
    if expectation.is_verbal:
        is_short = expectation.form is Form.YES_NO
        said = [sentence for sentence in statements if is_short and SAYS.match(sentence.text)]
        return read_sentence(strip_end((said or statements)[-1].text), expectation, first=False)
    if expectation.form is not Form.ANY and is_unfinished(statements[-1]):
        return ""
    position = len(statements) - 1
    while position > 0 and states_nothing(statements[position]) and not tells(statements[position].text, expectation):
        position -= 1
    for earlier in range(position, max(-1, position - LAST_SENTENCES), -1):
        answer = read_sentence(strip_end(statements[earlier].text), expectation, first=False)
        if expectation.form is Form.SCALAR and NONE_OF.match(answer) and not has_mathematics(answer):
            return "0"
        if answers_of(answer, expectation):
            return answer
        if concludes(statements[earlier].text.lstrip(" *_#")) or not states_nothing(statements[earlier]):
            break
    return read_sentence(strip_end(statements[position].text), expectation, first=False)


def tells(text: str, expectation: Expectation) -> bool:
    """Whether a sentence holds anything that the answer may be."""
    if expectation.form is Form.REGION and (REGIONAL.search(text) or read_comparatives(unwrap(text)) is not None):
        return True
    return has_mathematics(text)


def find_parts(statements: Sequence[Sentence], expectation: Expectation) -> str | None:
    """Several values that the last lines or sentences give one by one; None where the last one gives them all."""
    last = statements[-LAST_SENTENCES:]
    if expectation.labels and find_announcement(rejoin(statements), only_answers=True) is None:
        for count in range(1, len(last) + 1):
            together = " ".join(unwrap(sentence.text) for sentence in last[-count:])
            if labelled := find_labelled(together, expectation.labels):
                return ", ".join(f"{label} {value}" for label, value in labelled.items())
    count = expectation.count
    if not 1 < count <= len(statements):
        return None
    block = statements[-count:]
    are_lines = all(is_item(sentence) for sentence in block) and block[0].line < block[-1].line
    are_ordered = all(ANOTHER.match(sentence.text) for sentence in block[1:])
    if not (are_lines or are_ordered):
        return None
    values = [isolate(strip_end(sentence.text), first=False) for sentence in block]
    return ", ".join(values)


def is_item(sentence: Sentence) -> bool:
    """Whether a line is an item of a list, or mathematics alone."""
    text = sentence.text.strip(" *_")
    return re.match(r"[-•*]\s|[0-9]+[.)]\s", sentence.text) is not None or not WORD.search(text)


def rejoin(sentences: Sequence[Sentence]) -> str:
    """The sentences as text, on the lines that they were on."""
    text = ""
    for position, sentence in enumerate(sentences):
        if position:
            before = sentences[position - 1]
            text += "\n\n" if before.paragraph < sentence.paragraph else "\n" if before.line < sentence.line else " "
        text += sentence.text
    return text


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.lstrip().partition("\n")[0]


def drop_reasoning(response: str) -> str | None:
    """What follows the last </think>; None when the reasoning did not end."""
    before, closing, after = response.rpartition("</think>")
    if "<think>" in after:
        return None
    return after if closing else before + after
