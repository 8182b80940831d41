"""Finds what a response announces as its answer: "The answer is 5", "**Answer:** 5"."""

from __future__ import annotations

import re

from services.reward.mathematics.sentences import first_sentence

ANNOUNCEMENT = re.compile(
    r"\b(?:answers?|ans|solutions?|result)\b\**(?P<between>[^\n.:=$]{0,80}?)"
    r"(?:\b(?:is|are|be|was|were)\b\**\s*:?|:|=(?!=)|\s[-–—]\s|\n)\**",
    re.IGNORECASE,
)
# "the answer is a number between" and the like announce nothing, "the answer to part (a) is" does.
REPORTS = re.compile(
    r"\b(?:find|compute|give|write|check|verify|need|want|round|express|how|what|whether)\b",
    re.IGNORECASE,
)
# "the answer is not 9" announces nothing, "the answer is not 9 but 12" does.
DENIES = re.compile(r"\s*(?:definitely |certainly |simply |actually )?(?:not|never)\b(?![^\n.]*\bbut\b)", re.IGNORECASE)
# What concludes after "the solution is", or after "a solution of acid is", outweighs it.
CONCLUDES = re.compile(
    r"(?:\n|[.!?:✓] )[ *_#>]*(?:so|thus|hence|therefore|consequently|in total|altogether)\b", re.IGNORECASE
)
# The answer, and nothing that only has to do with it.
CLAIM = re.compile(
    r"(?:^|\n|(?<=[.!] ))[ *_#>]*(?:so |thus,? |therefore,? |hence,? )?(?:the |my |our )?(?:final |correct )?answer\**"
    r"(?:\s+(?:is|=)|:)[*_: ]*(?P<claim>[^\n]+)",
    re.IGNORECASE,
)


def is_announcement(match: re.Match[str]) -> bool:
    """Whether a match announces something; "the solution of x² - 4 =" is the left side of an equation."""
    before = match.string[max(0, match.start() - 20) : match.start()]
    if re.search(r"\b(?:reference|expected|gold|true|ground truth|answer key'?s?|no(?: [a-z]+)?)\s+$", before, re.I):
        return False
    if DENIES.match(match.string, match.end()):
        return False
    return not REPORTS.search(match["between"]) and not ("=" in match[0] and re.search(r"[0-9^²+]", match["between"]))


def find_announcement(text: str, *, only_answers: bool = False) -> str | None:
    """What the last "the answer is" or "Answer:" announces, to the end of its sentence; None without one.

    Empty when nothing follows it. `only_answers` leaves out "the solution is" and "the result is".
    """
    matches = [match for match in ANNOUNCEMENT.finditer(text) if is_announcement(match)]
    strong = [match for match in matches if match[0].lower().startswith("ans")]
    if not strong and (only_answers or not matches):
        return None
    match = (strong or matches)[-1]
    if not strong and (match[0].endswith("\n") or CONCLUDES.search(text, match.end())):
        return None
    rest = text[match.end() :].lstrip(" *:_")
    rest = rest if rest.strip() and not rest.startswith("\n") else rest.lstrip("\n *#_")
    line = rest.split("\n", 1)[0]
    return first_sentence(line)


def find_claim(text: str, announced: str | None) -> str | None:
    """The claim before the last one where it is another one and nothing but white space is between them.

    Of a text that nothing was announced in before, the last claim. None without one.
    """
    claims = list(CLAIM.finditer(text))
    if announced is None:
        return first_sentence(claims[-1]["claim"]) if claims else None
    if len(claims) < 2 or text[claims[-2].end() : claims[-1].start()].strip(" \n*"):
        return None
    return first_sentence(claims[-2]["claim"])
