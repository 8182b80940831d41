"""Which sentences of a response state something, and which check, remark, ask, or take back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.reward.mathematics.sentences import Sentence

SEEN_CHARACTERS = 600
MARKUP = " \t*_#>`~-•–—✓✔"
# What follows is tried out and not found: it counts for nothing to the end of the paragraph.
CHECK = re.compile(
    r"(?:(?:as a|a|quick|sanity|final|double)[ -]+)*(?:check|verification|proof|probe|test)\b(?![ -]?(?:digit|point"
    r"|value))"
    r"|(?:(?:let's|let me|let us|we can|we could|we|you can|i|i'll|one can|to|now|just|it is easy to|also|quickly"
    r"|easily|double|cross)[ -]+)+(?:check|verify|confirm|test|see (?:if|whether|that))\b|to be (?:sure|safe|certain)\b"
    r"|(?:double-?)?checking\b|verifying\b|confirming\b"
    r"|(?:plugging|substituting|putting|inserting) (?:it|this|that|these|them|the values?|both"
    r"|[^ ]{1,12})? ?(?:back\b|in\b)"
    r"|(?:and )?indeed\b|(?:if|when) (?:we|you|i) (?:plug|substitute|put|insert|check|test|try)\b|(?:this|that"
    r"|it) (?:checks out|works|makes sense|is consistent|agrees|matches|is (?:correct|right|true) (?:because|since"
    r"|as)|confirms|fits)\b",
    re.IGNORECASE,
)
# Remarks on what was asked, what is not asked, and what would be otherwise.
REMARK = re.compile(
    r"(?:remark|note|n\.?b\.?|notice|observe|recall|remember|keep in mind|curiously|interestingly|surprisingly"
    r"|notably|remarkably|coincidentally|by the way|btw|incidentally|fun fact"
    r"|in general|more generally|tip|another (?:way|method|approach)|an alternative"
    r"|for (?:comparison|reference|instance|example|context)|in comparison|a (?:common|typical|frequent) (?:mistake"
    r"|error)|(?:many|some|most) (?:people|students)|people often|be careful|disclaimer|bonus|side note|aside)\b"
    r"|alternative(?: (?:solution|method|approach|way))?s?:"
    r"|had (?:we|he|she|they|it|the)\b|(?:at|by) (?:that|this) (?:point|time|moment)\b|by then\b"
    r"|(?:so |thus |hence )?(?:the|this) (?:question|problem|task|exercise) (?:was|is|asks|asked|wants|wanted|[\"“])"
    r"|we (?:were|are) asked\b"
    r"|(?:this|that) (?:was|is) the question\b|(?:this|that|which) (?:answers|is what|is the answer to|was asked"
    r"|is our|is my|is the final)\b|as (?:asked"
    r"|required)\b|i hope\b|hope (?:this|that)|let me know\b|feel free\b|good luck\b|i'd be happy\b|thanks?\b"
    r"|if [^,]*\b(?:wanted|had|were|did)\b.*\bwould\b|.*\bwould\b.*\bif\b.*\b(?:were|had|[a-z]+ed)\b"
    r"|[\[{].*[\]}]$",
    re.IGNORECASE | re.DOTALL,
)
# A heading over such a remark, or over a check.
HEADING = re.compile(
    r"(?:remarks?|notes?|generali[sz]ation|extension|comments?|explanation|discussion|(?:alternative"
    r"|another) (?:method|solution"
    r"|approach)|(?:quick |sanity )?(?:check|verification|proof|test))\s*[.:]*$",
    re.IGNORECASE,
)
# After a conclusion only what would or could be otherwise.
MODAL = re.compile(r"\b(?:would|could)\b", re.IGNORECASE)
CONFIRMS = re.compile(
    r"\b(?:confirms?|indeed|on both sides|left(?:-hand)? side\b.*\bright(?:-hand)? side|as it (?:should|must)(?: be)?"
    r"|checks? out|verif(?:y|ies|ied))\b",
    re.IGNORECASE,
)
# What nobody has done yet.
INTENT = re.compile(r"(?:now,? |first,? |next,? |so )*(?:let me|let's|let us|i will|i'll|i need to)\b", re.IGNORECASE)
BROKEN_OFF = re.compile(
    r"(?:\b(?:or|and|to|the|an?|of|is|are|by|that|then|so|with|for|from|we|get|be|but|in|which)|[=+*/(,−-])\s*$",
    re.IGNORECASE,
)
# A remark that compares what was found with something else.
COMPARISON = re.compile(
    r"(?:that|this|it)(?:'s| is| was| would be| means)\b.*\b(?:than|of the (?:original|initial|total|whole)"
    r"|difference)\b"
    r"|(?:that|this|it) (?:means|implies|shows|is because|follows|uses|comes|holds)\b.*|here,? (?:we|i)\b.*"
    r"|in fact\b.*",
    re.IGNORECASE | re.DOTALL,
)
CONCLUSION = re.compile(
    r"(?:so|thus|hence|therefore|consequently|accordingly|altogether|in total|in conclusion|in summary|to sum up"
    r"|finally"
    r"|overall|as a result|it follows|we (?:conclude|find|see|get|obtain)|(?:this|that) (?:gives|yields|leaves|leads"
    r"|makes|results)|and so"
    r"|(?:the |my |our )?(?:final )?(?:answer|result|solution))\b",
    re.IGNORECASE,
)
# "So both sides agree" concludes a check and not a response.
APPROVAL = re.compile(
    r"\b(?:both sides|checks? out|holds?|match(?:es)?|as (?:required|expected|desired|it should|claimed|stated|given)"
    r"|correct|consistent|verified|confirmed|works|is true|satisf(?:y|ies)|✓|agrees?)\b|✓|✔",
    re.IGNORECASE,
)
# A computation in prose that is ticked off.
TICKED = re.compile(r"(?=.*[a-z]{3})[^=]*=.*[✓✔]\W*$")
# What was stated before is taken back.
RETRACTION = re.compile(
    r"\b(?:(?:I|we)(?:'ve| have)? (?:made|did make) an? (?:[a-z]+ )?(?:mistake|error|slip)"
    r"|(?:I|we) (?:miscalculated|miscounted|misread|forgot|overlooked)|scratch that|oops|correction:"
    r"|let me (?:redo|correct|recompute|recalculate)"
    r"|(?:that|this|which|it)(?:'s| is| was) (?:wrong|incorrect|not (?:right|correct|true)|a mistake|an error)(?! to\b)"
    r"|(?:that|this|which|it) (?:can't be|cannot be|isn't) (?:right|correct|true))",
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:can(?:'t|not) (?:be )?(?:determine|answer|solve|say|tell|find|decide)|not (?:sure|certain|enough|possible)"
    r"|unsure"
    r"|unable|don't know|no idea|impossible|unclear|insufficient|give up|need more)\w*",
    re.IGNORECASE,
)
EMPTY = re.compile(
    r"\b(?:no|none|nothing|never|neither|not|empty|does(?:n't| not) exist|infinite(?:ly)?|undefined)\b", re.I
)
HEDGE = re.compile(
    r"(?:(?:or|but|then again|and)\b,? ?)?(?:it|the [a-z]+|this|that)? ?(?:(?:might|may|could)\b.{0,20}\b(?:also|be"
    r"|well)|"
    r"(?:possibly|perhaps|maybe|alternatively)\b)",
    re.IGNORECASE,
)


def is_alternative(statements: Sequence[Sentence]) -> bool:
    """Whether the last sentence offers another answer than the one before it."""
    return (
        len(statements) > 1
        and HEDGE.match(bare(statements[-1])) is not None
        and (re.search(r"[0-9]", statements[-1].text) is not None)
    )


def bare(sentence: Sentence) -> str:
    """The text without markup, as much of it as is looked at, and its end."""
    text = re.sub(r"[*_`]+", "", sentence.text).lstrip(MARKUP)
    return text if len(text) <= SEEN_CHARACTERS else text[: SEEN_CHARACTERS // 2] + text[-SEEN_CHARACTERS // 2 :]


def find_statements(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences without checks, remarks and questions; all of them where nothing else is left."""
    statements: list[Sentence] = []
    checked = -1  # the paragraph that a check is in
    for position, sentence in enumerate(sentences):
        text = bare(sentence)
        if checked >= 0 and (sentence.paragraph > checked or concludes(text) or RETRACTION.search(text)):
            checked = -1
        heading = HEADING.match(text.rstrip(MARKUP))
        if statements and checked < 0 and (heading or CHECK.match(text) or TICKED.match(text)):
            is_heading = heading is not None or text.rstrip(MARKUP).endswith(":")
            follows = sentences[position + 1] if is_heading and position + 1 < len(sentences) else sentence
            checked = follows.paragraph
        if checked < 0 and not (statements and is_remark(text, statements[-1])):
            statements.append(sentence)
    return statements or list(sentences)


def concludes(text: str) -> bool:
    """Whether a sentence says what follows from those before it, and is no word on a check."""
    return CONCLUSION.match(text) is not None and APPROVAL.search(text) is None


def is_remark(text: str, before: Sentence) -> bool:
    """Whether a sentence goes beside what the one before it states."""
    if text.rstrip(MARKUP).endswith("?") or (text.startswith("(") and text.rstrip(MARKUP + ".").endswith(")")):
        return not re.fullmatch(r"[^a-z]*", text)
    if CONFIRMS.search(text) and not concludes(text) and not CONCLUSION.match(text):
        return True
    if REMARK.match(text):
        return re.search(r"\b(?:so|hence|therefore|thus)\b", text) is None or text[:4].lower() not in ("note", "noti")
    if not concludes(bare(before)) or concludes(text):
        return False
    return COMPARISON.match(text) is not None or (MODAL.search(text) is not None and HEDGE.match(text) is None)


def find_retraction(text: str) -> int:
    """Where the last sentence that takes something back says so; -1 where nothing is taken back."""
    matches = list(RETRACTION.finditer(text))
    return matches[-1].start() if matches else -1


def is_unfinished(sentence: Sentence) -> bool:
    """Whether a sentence was cut off, or only says what comes next."""
    text = bare(sentence)
    return (not sentence.is_finished and BROKEN_OFF.search(text) is not None) or INTENT.match(text) is not None


def states_nothing(sentence: Sentence) -> bool:
    """Whether a sentence without mathematics may be passed over: it neither gives up, denies, nor breaks off."""
    return sentence.is_finished and not DOUBT.search(sentence.text) and not EMPTY.search(sentence.text)
