"""The clause of a sentence that tells of the one that was asked about."""

from __future__ import annotations

import re

CLAUSES = re.compile(r",?\s+(?:and|while|but|whereas)\s+|[;,]\s+")
VERB = r"\s+(?:is|was|are|must be|has to be)\s"
OTHER = re.compile(rf"\b[A-Z][a-z]+{VERB}")


def clause_about(subject: str, sentence: str) -> str:
    """The clause "Abe is a knight" of "Abe is a knight and Bea is a knave" where Abe was asked about."""
    if not subject or subject not in sentence:
        return sentence
    clauses = CLAUSES.split(sentence)
    own = [clause for clause in clauses if re.search(rf"\b{re.escape(subject)}{VERB}", clause)]
    others = [clause for clause in clauses if clause not in own and OTHER.search(clause)]
    return own[0] if len(own) == 1 and others else sentence
