"""Answers compared as text: the same text, or a word, a name or a phrase."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.math.extract import Extraction, Search, find_answers
from services.reward.verifiers.base import Item, Outcome, Verifier, read_answer

# A longer one is an essay and not a short answer; normalising it would only take time.
MAX_ANSWER_CHARACTERS = 2000
ARTICLES = ("a", "an", "the")
LEAD = re.compile(r"^(?:(?:it|this|that|he|she|they|these|those)\s+(?:is|was|are|were)|it's|that's)\s+", re.IGNORECASE)
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
APOSTROPHES = re.compile(r"['’`]")


class ExactVerifier(Verifier[pb.ExactVerifier]):
    """Correct when answer and reference are the same text once white space at both ends is cut; case and all count.

    The answer is what follows the marker, or the whole response.
    """

    name: ClassVar[str] = "exact"
    version: ClassVar[str] = "1"

    def find_violations(self, parameters: pb.ExactVerifier) -> list[FieldViolation]:
        return [] if parameters.reference.strip() else [FieldViolation("exact.reference", "is required")]

    async def judge(self, item: Item[pb.ExactVerifier]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        return Outcome.correct(answer) if answer == item.parameters.reference.strip() else Outcome.wrong(answer)


class ShortAnswerVerifier(Verifier[pb.ShortAnswerVerifier]):
    """Correct when the answer is one of the references, both normalised, see `normalise_phrase`; more words are wrong.

    The answer is what follows the marker; without one it is the last box, what is announced as the answer, or the last
    sentence. "It is" before it does not count.
    """

    name: ClassVar[str] = "short_answer"
    version: ClassVar[str] = "3"

    def find_violations(self, parameters: pb.ShortAnswerVerifier) -> list[FieldViolation]:
        if not parameters.references:
            return [FieldViolation("short_answer.references", "at least one is required")]
        return [
            FieldViolation(f"short_answer.references[{index}]", "has no letter or digit")
            for index, reference in enumerate(parameters.references)
            if not normalise_phrase(reference)
        ]

    async def judge(self, item: Item[pb.ShortAnswerVerifier]) -> Outcome:
        found = find_answers(item.response, Search(Extraction.PROSE, item.answer_marker, is_verbal=True))
        if len(found.answers) != 1:
            return Outcome.ungradable(found.reason or "the response gives different answers")
        [answer] = found.answers
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return Outcome.ungradable(f"the answer has {len(answer)} characters", answer)
        references = {normalise_phrase(reference) for reference in item.parameters.references}
        words = TEXT_COMMAND.sub(r"\1", answer)
        phrases = {normalise_phrase(words), normalise_phrase(LEAD.sub("", words.strip()))}
        return Outcome.correct(answer) if references & phrases else Outcome.wrong(answer)


def normalise_phrase(text: str) -> str:
    """Returns a text in lower case without accents, articles, punctuation and repeated white space.

    Unicode compatibility forms are one form (NFKD), "&" is "and", apostrophes vanish, other punctuation parts words.
    """
    text = unicodedata.normalize("NFKD", text)
    text = "".join(character for character in text if not unicodedata.combining(character)).casefold()
    text = APOSTROPHES.sub("", text).replace("&", " and ")
    words = "".join(character if character.isalnum() else " " for character in text).split()
    return " ".join(word for word in words if word not in ARTICLES) or " ".join(words)
