"""Questions whose answers can be guessed or not be checked: multiple choice, true or false, proofs (k1.5 section 2.1).

Heuristics on English text and on the verifier. Programs are judged by running them, so the text of a programming
problem decides nothing ("return True or False" is no true-or-false question).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from perigee.curation.findings import Decision, Finding, Question

MULTIPLE_CHOICE = "multiple choice"
TRUE_FALSE = "true or false"
PROOF = "proof"

# Verifiers that say it themselves.
KINDS = {"choice": MULTIPLE_CHOICE, "true_false": TRUE_FALSE, "proof": PROOF}

_OPTION = re.compile(
    r"""(?:^|(?<=[\s$,;.]))                            # at the start of a line or of a word
        (?:\\(?:textbf|mathrm|text|mathbf)\{\s*)?      # bold or upright in LaTeX
        (?:\(([A-H])\)|([A-H])[.):](?=[\s\\$}]))""",
    re.VERBOSE | re.MULTILINE,
)
_WHICH_OF_THE_FOLLOWING = re.compile(r"\b(?:which|what) (?:one )?of the (?:following|options|choices|above)\b", re.I)
_CHOOSE = re.compile(
    r"\b(?:choose|select|pick|circle|mark) (?:the|all|one|an?) (?:of the )?(?:\w+ ){0,3}"
    r"(?:options?|answers?|choices?|letters?|statements?)\b"
    r"|\b(?:choose|select|pick|circle|mark) (?:the )?(?:single )?(?:correct|right|best|most appropriate)\b"
    r"|^\W*(?:this is a )?multiple[- ]choice\b|\banswer choices:|\bselect all\b|(?:^|(?<=[.?\n] ))options?:"
    r"|\b(?:letter|number) of (?:the|your) (?:option|answer|choice)\b|\banswer with (?:a|the|one) letter\b",
    re.I,
)
_LETTER = re.compile(r"\(?[A-H]\)?\.?(?:\s*(?:,|and)\s*\(?[A-H]\)?\.?)*")

_TRUE_OR_FALSE = re.compile(
    r"(?:^|(?<=[.!?\n(]) ?|\b(?:is|are|be|answer|say|with|whether) )\(?(?:true|yes) ?(?:or|/) ?(?:false|no)\b"
    r"|(?:^|[\n(])T/F\b"
    r"|\bis (?:it|this|that|the (?:following )?(?:statement|claim|assertion)(?: below)?) (?:true|correct|false|valid)\b"
    r"|\bis it (?:possible|the case)\b|\bprove or disprove\b",
    re.I,
)
_WHETHER = re.compile(
    r"(?:^|(?<=[.!?:;,\n]) ?|\b(?:and|then|please) )(?:determine|decide|state|say|check|find out|tell)(?: me)? "
    r"(?:whether|if)\b",
    re.I | re.M,
)
# What asks for more than yes or no.
_OPEN = r"(?!\b(?:how|what|which|who|where|when)\b)"
_YES_NO_QUESTION = re.compile(
    r"(?:^|(?<=[.!?\n]))\s*(?:then )?(?:is|are|was|were|does|do|did|will|would|has|have|can|could|must|should) "
    rf"(?!you\b)(?:{_OPEN}[^.!?\n])*\?\s*(?:explain[^.]*\.|why\??|justify[^.]*\.)?\s*$",
    re.I,
)
_BINARY = {"true", "false", "yes", "no", "t", "f"}

_PROVE = re.compile(
    r"(?<!can )(?<!be )(?<!to )(?<!could )(?<!you )\b(?:prove|disprove)\b(?! ?(?:useful|fatal|difficult|to be\b))"
    r"|(?<!can )(?<!to )(?<!you )\bshow (?:that|by)\b"
    r"|\b(?:give|write|provide|find|construct|present|complete|sketch) (?:a|an|the|another)?\s?(?:\w+ )?proof\b"
    r"|\b(?:demonstrate|verify|deduce|conclude|justify) that\b",
    re.I,
)
_ASKS_FOR_VALUE = re.compile(
    r"\b(?:find|compute|calculate|evaluate|determine|what is|what are|how many|how much)\b(?! (?:a |an |the )?proof)",
    re.I,
)


def find_question_kinds(questions: Iterable[Question]) -> Iterator[Finding]:
    """Yields a finding per prompt, in order: one of the three kinds is dropped, with the words that show it."""
    for question in questions:
        found = classify(question)
        if found is None:
            yield Finding(question.id)
        else:
            yield Finding(question.id, Decision.DROP, found[0], {"evidence": found[1][:100]})


def classify(question: Question) -> tuple[str, str] | None:
    """Returns the kind of a question that should not be trained on, and the evidence; None for any other question."""
    if question.kind in KINDS:
        return KINDS[question.kind], f"verifier {question.kind}"
    if question.kind == "code":
        return None
    for kind, rule in ((MULTIPLE_CHOICE, find_options), (TRUE_FALSE, find_true_or_false), (PROOF, find_proof)):
        if (evidence := rule(question)) is not None:
            return kind, evidence
    return None


def find_options(question: Question) -> str | None:
    """Returns the evidence of a choice between given options: lettered options, or words that ask for a choice."""
    letters = [one or other for one, other in _OPTION.findall(question.text)]
    run = _longest_run(letters)
    if run >= 3:
        return f"options {'ABCDEFGH'[:run]}"
    if match := _CHOOSE.search(question.text) or _WHICH_OF_THE_FOLLOWING.search(question.text):
        return match.group()
    if run >= 2 and _LETTER.fullmatch(question.reference.strip()):
        return f"options {'ABCDEFGH'[:run]} and the reference {question.reference.strip()}"
    return None


def find_true_or_false(question: Question) -> str | None:
    """Returns the evidence of a question with two possible answers."""
    if question.reference.strip().strip(".$").casefold() in _BINARY:
        return f"the reference {question.reference.strip()}"
    for pattern in (_TRUE_OR_FALSE, _WHETHER, _YES_NO_QUESTION):
        if match := pattern.search(question.text):
            return " ".join(match.group().split())
    return None


def find_proof(question: Question) -> str | None:
    """Returns the evidence that a proof is asked for and no value beside it."""
    match = _PROVE.search(question.text)
    if match is None or _ASKS_FOR_VALUE.search(question.text, match.end()):
        return None
    return match.group()


def _longest_run(letters: list[str]) -> int:
    """Returns how many letters from A on come in order."""
    wanted = "ABCDEFGH"
    length = 0
    for letter in letters:
        if length < len(wanted) and letter == wanted[length]:
            length += 1
    return length
