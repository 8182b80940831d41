"""Multiple choice: one or several letters, however they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.math.extract import clean, find_boxes, last_group
from services.reward.verifiers.base import Item, Outcome, Verifier, read_answer
from services.reward.verifiers.text import normalise_phrase

# Longer than any option with its reason.
MAX_ANSWER_CHARACTERS = 3000
# The answer stands at the end; what stands before is reasoning about the options.
SEARCHED_CHARACTERS = 3000
# Without their texts nobody knows how many options there are.
LETTERS = "ABCDEFGHIJ"
ANNOUNCEMENT = re.compile(
    r"\b(?:options?|choices?|answers?)\s+(?P<named>\(?[A-Z]\)?)\s+(?:is|are)\s+(?:the\s+)?(?:correct|right|best|true)\b[^\n.]*"
    r"|\b(?:answers?|options?|choices?|ans)\b(?!\s+\(?[A-Z]\)?\s)[^\n.:]{0,40}?(?:\b(?:is|are|be)\b\s*:?|:)"
    r"|\b(?:choose|chose|select|pick)\b\s+(?:options?\s+|choices?\s+)?"
    r"|\b(?:hence|therefore|thus|so)\b,?\s+(?:it\s+(?:is|must be)\s+)?(?:options?|choices?)\s+"
    r"|\banswers?[ *]*\n+",
    re.IGNORECASE,
)
CORRECTION = re.compile(r"\b(?:wait|actually|however|no,|but|instead|correction|reconsider|rather|hmm|mistake)\b", re.I)
WORD = re.compile(r"(?:options?|choices?|answers?|letters?)\s+", re.IGNORECASE)
LETTER = r"(?:\(\s*{0}\s*\)|\[\s*{0}\s*\]|{0}(?=$|[\s.,:;)\]/&!?-]))"
JOINT = re.compile(r"(?:\.(?=,|\s+(?:and|or)\b))?[\s,;/&)\]]*(?P<word>and|or)?[\s,;/&(\[]*", re.IGNORECASE)
MARKUP = re.compile(r"[*_`$\"]|\\(?:text|mathrm|mathbf|textbf|boxed)\s*|[{}]")


class ChoiceVerifier(Verifier[pb.ChoiceVerifier]):
    """Correct when the letters are those of the reference, in any order.

    Read are (B), B., **B**, \\boxed{B}, "the answer is B", "B) text", the text of an option, "A and C", "AC". The
    answer is what follows the marker; without one it is the last box, the last announcement, or the last line. An
    answer that leaves a choice, "A or B", or one announcement after another without a word of correction, is refused.
    """

    name: ClassVar[str] = "choice"
    version: ClassVar[str] = "2"

    def find_violations(self, parameters: pb.ChoiceVerifier) -> list[FieldViolation]:
        letters = read_reference(parameters.reference)
        if not letters:
            return [FieldViolation("choice.reference", 'must be letters from A to Z, "B" or "A,C" for instance')]
        if parameters.options and max(letters) > chr(ord("A") + len(parameters.options) - 1):
            return [FieldViolation("choice.reference", f"names {max(letters)} of {len(parameters.options)} options")]
        return []

    async def judge(self, item: Item[pb.ChoiceVerifier]) -> Outcome:
        text = read_answer(item)
        if isinstance(text, Outcome):
            return text
        expected = read_reference(item.parameters.reference)
        allowed = allowed_letters(item.parameters)
        answers = find_answers(text, marked=bool(item.answer_marker))
        if not answers:
            return Outcome.ungradable("the response gives no final answer")
        extracted = answers[-1]
        if max(map(len, answers)) > MAX_ANSWER_CHARACTERS:
            return Outcome.ungradable("the answer is too long to name an option", extracted)
        found = [read_choice(answer, allowed, item.parameters.options) for answer in answers]
        if found[-1] is None:
            return Outcome.ungradable("the answer names no option, or leaves a choice", extracted)
        if any(letters is not None and letters != found[-1] for letters in found):
            return Outcome.ungradable("the response gives two different answers", extracted)
        return Outcome.correct(extracted) if found[-1] == expected else Outcome.wrong(extracted)


def read_reference(text: str) -> frozenset[str]:
    """The letters of a reference; empty when it is none."""
    letters = re.sub(r"[\s,;()]|\band\b", "", text)
    return frozenset(letters) if re.fullmatch(r"[A-Z]+", letters) else frozenset()


def allowed_letters(parameters: pb.ChoiceVerifier) -> str:
    """The letters that name an option."""
    last = max(read_reference(parameters.reference))
    count = len(parameters.options) or max(len(LETTERS), ord(last) - ord("A") + 1)
    return "".join(chr(ord("A") + index) for index in range(count))


def find_answers(text: str, *, marked: bool) -> list[str]:
    """The final answer, last, and before it those of the same breath that it does not correct."""
    after = clean(text)
    boxes = None if after is None else find_boxes(after)
    if after is None or boxes is None:
        return []
    if boxes:
        return [", ".join(box.text for box in last_group(after, boxes))]
    lines = [line.strip() for line in after.splitlines() if line.strip(" \t*#`_-=")]
    if not lines:
        return []
    tail = lines[0] if marked else after[-SEARCHED_CHARACTERS:]
    matches = list(ANNOUNCEMENT.finditer(tail))
    if not matches:
        return [lines[0] if marked else lines[-1]]
    ends = [*(match.start() for match in matches[1:]), len(tail)]
    answers = [
        match["named"] or tail[match.end() : end].strip().partition("\n")[0]
        for match, end in zip(matches, ends, strict=True)
    ]
    first = len(answers) - 1
    while first and not breaks(tail[matches[first - 1].end() : matches[first].start()]):
        first -= 1
    return answers[first:]


def breaks(between: str) -> bool:
    """Whether what stands between two announcements parts them: a paragraph, or a word of correction."""
    return "\n\n" in between or bool(CORRECTION.search(between))


def read_choice(text: str, allowed: str, options: Sequence[str]) -> frozenset[str] | None:
    """The letters that an answer names; None when it names none or leaves a choice."""
    text = WORD.sub("", MARKUP.sub("", text)).strip()
    by_text = [letter for letter, option in zip(allowed, options, strict=False) if same_phrase(option, text)]
    if len(by_text) == 1:
        return frozenset(by_text)
    letter = re.compile(LETTER.format(f"([{allowed}])"))
    run = re.fullmatch(rf"[{allowed}]{{1,10}}[.)!?]*", text)
    if run:
        return frozenset(text.rstrip(".)!?"))
    letters: set[str] = set()
    position = 0
    while match := letter.match(text, position):
        found = next(group for group in match.groups() if group)
        letters.add(found)
        joint = JOINT.match(text, skip_option(text, match.end(), found, options))
        assert joint is not None
        position = joint.end()
        if letter.match(text, position) and (joint["word"] or "").lower() == "or":
            return None
    rest = text[position:].strip(" .!?")
    if not letters or (rest and not explains(text, rest, letters, allowed, options)):
        return None
    return frozenset(letters)


def skip_option(text: str, position: int, letter: str, options: Sequence[str]) -> int:
    """Where the text goes on after the letter's own option, "A) 2 and C) 5"."""
    index = ord(letter) - ord("A")
    option = options[index].strip() if index < len(options) else ""
    follows = re.compile(r"[\s.:,;)\]-]*").match(text, position)
    assert follows is not None
    begins = option and text[follows.end() :].casefold().startswith(option.casefold())
    return follows.end() + len(option) if begins else position


def explains(text: str, rest: str, letters: set[str], allowed: str, options: Sequence[str]) -> bool:
    """Whether what follows the letters belongs to them: the option's text, or words after a sign that parts them.

    "A dog" names nothing; "A. dog", "(A) dog" and "A because ..." do. The text of another option is another answer.
    """
    others = [option for letter, option in zip(allowed, options, strict=False) if letter not in letters]
    if any(same_phrase(option, rest) for option in others):
        return False
    if re.search(r"\bor\s+\(?[" + allowed + r"]\b", rest):
        return False
    parted = re.match(rf"(?:\(\s*[{allowed}]\s*\)|\[[{allowed}]\]|[{allowed}]\s*[.:,;)\]-])", text)
    words = re.match(r"(?:because|since|as|is|are|which|with|the|for|so|from)\b", rest, re.IGNORECASE)
    is_own = any(same_phrase(option, rest) for option in options)
    return bool(parted or is_own or (words and not text.startswith("A ")) or (words and "because" in words[0].lower()))


def same_phrase(option: str, text: str) -> bool:
    """Whether a text is an option's, case and punctuation aside."""
    phrase = normalise_phrase(text)
    return bool(phrase) and phrase == normalise_phrase(option)
