"""Tags prompts by domain: a tag that is there stays; else the verifier, LaTeX and words of the text decide.

A rule per domain; each of its patterns that is found counts once, and the domain with the most wins. Ties go to the
rule that comes first, so special domains stand before general ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from perigee.curation.domain_rules import RULES
from perigee.curation.findings import Finding, Question

CODE = "code"
OTHER_MATH = "math"
OTHER = "general"
# Tags that say nothing.
EMPTY_TAGS = {"", "default"}


def find_domains(questions: Iterable[Question]) -> Iterator[Finding]:
    """A finding per prompt, in order, with its `domain` and what told it."""
    for question in questions:
        domain, evidence = tag(question)
        yield Finding(question.id, details={"domain": domain, "evidence": evidence})


def tag(question: Question) -> tuple[str, str]:
    """The domain, and what told it: the input's tag, the verifier, or the words found."""
    if question.domain not in EMPTY_TAGS:
        return question.domain, "tagged already"
    if question.kind == "code":
        return CODE, "verifier code"
    found = {name: [m.group() for p in patterns if (m := p.search(question.text))] for name, patterns in RULES.items()}
    best = max(found, key=lambda name: len(found[name]))
    if not found[best]:
        return (OTHER_MATH if question.kind == "math" else OTHER), f"verifier {question.kind}"
    return best, ", ".join(" ".join(words.split())[:30] for words in found[best])
