"""Takes the expression out of the sentence around it."""

from __future__ import annotations

import re
from enum import Enum
from itertools import pairwise

from services.reward.mathematics.number_words import PARTS, is_number_word
from services.reward.mathematics.units import POWER_WORDS, is_unit_phrase

DISPLAY = re.compile(
    r"\\\[(?P<bracket>.+?)\\\]|\$\$(?P<dollars>.+?)\$\$|\\\((?P<parenthesis>[^\n]+?)\\\)"
    r"|(?P<environment>\\begin\{(?P<name>align\*?|aligned|equation\*?|gather\*?|cases|[pbvBV]?matrix|array)\}"
    r".+?\\end\{(?P=name)\})",
    re.DOTALL,
)
# TeX's rule as Markdown has it: a dollar sign that opens is followed by no blank, one that closes follows no blank and
# precedes no digit. So "3 * $1.25 = $3.75" holds prices and no formula.
SPAN = re.compile(r"(?<!\\)\$(?=[^\s$])((?:\\.|[^$\\])*)(?<=\S)(?<!\\)\$(?![0-9])")
# cm$^2$
SPLIT_UNIT = re.compile(r"(?<=[ 0-9}$])([A-Za-z]{1,3})\$\s*(\^\{?[23]\}?)\s*\$")
CONNECTOR = re.compile(r"[\s,;]*(?:\b(?:and|or)\b)?\s*", re.IGNORECASE)
PARENTHESIS = re.compile(r"(?<=[^-+*/=×·(\s])\s+\((?!\$)[^()\\]*[a-z]{3}[^()\\]*\)")
# Where the explanation of an answer begins, and what explains an announced one, too.
ASIDE = (
    r",?\s+(?:because|since|that is(?=,)|i\.e\.?|which is (?:about|approximately|roughly|around|the same))\b"
    r"|(?<![-+*/=×·(])\s+\((?=[^()\\]*[a-z]{3}|[^()\\]*(?:=|[0-9] [-+*/×] [0-9])[^()]*\)\W*$)"
    r"|,?\s+\(?(?:for|where|when|if|with|provided)\s+(?:that\s+|all\s+|any\s+|every\s+|real\s+|integers?\s+)*"
    r"\$?\\?[A-Za-z](?=\s*[=<>≤≥≠∈]|\s*\\(?:in|neq?|geq?|leq?)\b)"
    r"(?!.*\b(?:gives?|yields?|is|are|gets?|have|equals?|becomes?)\b)"
)
EXPLANATION = re.compile(
    ASIDE + r"|,?\s+(?:as|where|which|when|if|rather than|instead of|after|so|given|due to)\b|,\s*(?:not|and not|but)\b"
)
REMARK = re.compile(ASIDE)
# A formula after such words says when the answer holds.
CONDITION = re.compile(
    r"(?<!arrive )(?<!arrives )"
    r"\b(?:for|where|when|whenever|if|with|because|since|as|at|from|between|among|provided)\s+(?:that\s+)?"
    r"(?:all|any|every|each|some|the|real)?\s*$"
)
SETTING = re.compile(
    r"(?<!result )(?<!results )(?<!resulted )(?<!resulting )(?<!arrive )(?<!arrives )"
    r"\b(?:in|at|for|between|among|from|than|per|when|where|if|because|since|exceeds?|above|below)(?: the)?\s+$",
    re.IGNORECASE,
)
# "14 portions of 25 g", "12 weeks to save 180 dollars"; but "to get 9" tells what comes out.
PURPOSE = re.compile(
    r"\s*(?:(?:is|are) the\s+)?(?:(?!an?\b|the\b)[A-Za-z]+,?\s+){1,2}of\s+"
    r"|[^.;:]*?\bto (?!about|exactly|only|roughly|nearly|just|get|give|obtain|find|be|equal|make|have|leave|yield)"
    r"[a-z]+\s+"
)
ELLIPSIS = re.compile(r"\.{3,}|\\(?:l|c)?dots(?![A-Za-z])")
CHANCE = re.compile(r"(?:[0-9]+|[a-z-]+) (?:in|out of)(?: every)? (?:[0-9]+|[a-z-]+)", re.IGNORECASE)
NOT_BUT = re.compile(r"not\b.+?\bbut\s+(?:rather\s+)?(?P<rest>.+)")
UNIT_AFTER = re.compile(r"\s*(?:\\?%|(?:[A-Za-z/²³°.^0-9-]+ ?){1,4})")
FIGURE = re.compile(r"(\\(?:triangle|angle|overline|overrightarrow))\s+([A-Z]{1,4})\b")
BULLET = re.compile(r"^(?:[#>]+\s*|[-•]\s+(?=[A-Za-z])|(?:=>|⇒|→|∴)\s*)+")
EACH = re.compile(r"\b(?:an?|each|every)\s+(hour|minute|second|day|week|year)\b")
# A full stop after emphasis, "**9**.".
MARKED_END = re.compile(r"(?<=[*_`])\.\s*$")
TRIMMED = " \t\n*`_\"'"
SIGN = re.compile(r"[0-9=<>*×·⋅÷∪∩∈≈≠≡^\\√∛π∞±≤≥∪½¼¾²³°%$€£{}]|^[-+−][A-Za-z]|[A-Za-z)][-+/][A-Za-z(]|[a-z]\([a-z]\)")
LETTER = re.compile(r"[-−(\[|]*[A-Za-zα-ω](?:_\{?[A-Za-z0-9]+\}?|')?[)\]|]*")
CALL = re.compile(r"[A-Za-z]+'?\(.*\)")
FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|abs|infinity|inf)(?![A-Za-z])")
SYMBOL = re.compile(r"[-−:+|()!/]+")
LEADING = ("negative", "minus")
JOINING = ("or", "and", "to", "in", "plus", "over")
ARTICLES = ("a", "A", "I")
UNIT_PARTS = (*POWER_WORDS, "per")


class Kind(Enum):
    """How a word reads: as mathematics, as something that mathematics may contain, or as prose."""

    MATHEMATICS = 0
    NUMBER_WORD = 1
    LETTER = 2
    ARTICLE = 3
    LEADING = 4
    JOINING = 5
    SYMBOL = 6
    UNIT = 7
    PART = 8
    PROSE = 9


# What a stretch of mathematics does not begin with, unless it leads to something.
LOOSE = (Kind.JOINING, Kind.UNIT, Kind.ARTICLE, Kind.LETTER, Kind.SYMBOL, Kind.PART)


def flatten_math(text: str) -> str:
    """The text with every displayed formula between single dollar signs, and every environment, on one line."""

    def flatten(match: re.Match[str]) -> str:
        if match["environment"]:
            return " ".join(match["environment"].split())
        return f"${' '.join((match['bracket'] or match['dollars'] or match['parenthesis']).split())}$"

    text = SPLIT_UNIT.sub(r"\1\2", text)
    return DISPLAY.sub(flatten, text) if "\\" in text or "$$" in text else text


def isolate(sentence: str, *, first: bool) -> str:
    """The expression in a sentence: the first one where the sentence announces it, else the last.

    A sentence without any mathematics is returned as it is.
    """
    sentence = trim_sentence(sentence, first=first)
    if CHANCE.fullmatch(sentence):
        return sentence
    spans = list(SPAN.finditer(sentence))
    if spans:
        return join_spans(sentence, spans, first=first)
    sentence = ELLIPSIS.sub("…", sentence)
    runs = find_runs(split_words(sentence))
    if not runs:
        return sentence.strip(TRIMMED + ".:")
    run = runs[0] if first else choose_last(sentence, runs)
    return balance(run.strip(TRIMMED).rstrip(",;:."))


def choose_last(sentence: str, runs: list[str]) -> str:
    """The last stretch that does not say where, what for or of what size something is."""
    answers: list[str] = []
    end = 0
    for run in runs:
        start = sentence.find(run, end)
        before, between = sentence[: max(start, end)], sentence[end : max(start, end)]
        if not SETTING.search(before) and not (answers and PURPOSE.fullmatch(between)):
            answers.append(run)
        end = start + len(run) if start >= 0 else end
    return (answers or runs)[-1]


def trim_sentence(sentence: str, *, first: bool, words: bool = False) -> str:
    """The sentence without markup around it and, where it announces an answer, without its explanation."""
    sentence = EACH.sub(r"per \1", sentence)
    sentence = BULLET.sub("", MARKED_END.sub("", sentence).strip(TRIMMED))
    remark = PARENTHESIS.search(sentence)
    if remark and (words or SIGN.search(sentence[: remark.start()])):
        sentence = PARENTHESIS.sub("", sentence)
    contrast = NOT_BUT.fullmatch(sentence) if first else None
    sentence = contrast["rest"] if contrast else sentence
    for match in (EXPLANATION if first else REMARK).finditer(sentence):
        before = sentence[: match.start()]
        # Inside of a formula nothing is explained, and before the answer neither.
        is_outside = len(re.findall(r"(?<!\\)\$", before)) % 2 == 0 or not SPAN.search(sentence)
        if is_outside and before.strip(TRIMMED) and (first or words or SIGN.search(before)):
            return before
    return sentence


def balance(run: str) -> str:
    """The run without a bracket at its end that opened outside of it, or at its begin that closes outside."""
    while run and run[-1] in ")]}" and run[-2:-1] != "'" and sum(map(run.count, ")]}")) > sum(map(run.count, "([{")):
        run = run[:-1].rstrip(",;:.\"' ")
    while run and run[0] in "([{" and sum(map(run.count, "([{")) > sum(map(run.count, ")]}")):
        run = run[1:].lstrip()
    return run


def join_spans(sentence: str, spans: list[re.Match[str]], *, first: bool) -> str:
    """The formulas that belong together, with what stands between them, and the unit after them."""
    groups = [[spans[0]]]
    for before, span in pairwise(spans):
        if CONNECTOR.fullmatch(sentence, before.end(), span.start()):
            groups[-1].append(span)
        else:
            groups.append([span])
    answers = [group for group in groups if not CONDITION.search(sentence[: group[0].start()])] or groups
    group = answers[0] if first else answers[-1]
    text = group[0][1]
    for before, span in pairwise(group):
        text += (sentence[before.end() : span.start()].strip() or ",").join("  ") + span[1]
    sign = re.search(r"[-−]\s*$", sentence[: group[0].start()])
    return ("-" if sign else "") + text.strip() + read_unit_after(sentence, group[-1].end())


def read_unit_after(sentence: str, position: int) -> str:
    """The unit that begins at `position`, with a blank before it; empty when there is none."""
    match = UNIT_AFTER.match(sentence, position)
    words = match[0].rstrip(".,").split() if match else []
    while words and not is_unit_phrase(" ".join(words)):
        words.pop()
    return f" {' '.join(words)}" if words else ""


def split_words(sentence: str) -> list[str]:
    """The words of a sentence; white space inside of braces, environments and P(A or B) does not part them."""
    sentence = FIGURE.sub(r"\1{\2}", sentence)
    words, word, depth, calls = [], "", 0, 0
    for position, character in enumerate(sentence):
        opens = character == "{" or (character == "(" and (calls or (word[-1:].isalpha() and depth == 0)))
        calls += character == "(" and opens
        closes = character == "}" or (character == ")" and calls > 0)
        calls -= character == ")" and closes
        depth = max(0, depth + opens - closes)
        if character == "\\":
            depth = max(0, depth + sentence.startswith("\\begin{", position) - sentence.startswith("\\end{", position))
        if character.isspace() and depth == 0:
            words.append(word)
            word = ""
        else:
            word += character
    return [word for word in [*words, word] if word]


def find_runs(words: list[str]) -> list[str]:
    """The longest stretches of words that read as mathematics; those of number words only where there are no others."""
    kinds = [kind_of(word) for word in words]
    found: list[tuple[bool, str]] = []
    begin = 0
    for end in range(len(words) + 1):
        if end < len(words) and kinds[end] is not Kind.PROSE:
            continue
        start, stop = trim_run(words, kinds, begin, end)
        stretch = kinds[start:stop]
        if Kind.MATHEMATICS in stretch or Kind.NUMBER_WORD in stretch:
            found.append((Kind.MATHEMATICS in stretch, " ".join(words[start:stop])))
        begin = end + 1
    signs = [run for has_sign, run in found if has_sign]
    return signs or [run for _, run in found]


def trim_run(words: list[str], kinds: list[Kind], start: int, stop: int) -> tuple[int, int]:
    """The bounds of a stretch without the words at its ends that belong to the prose around it."""
    while start < stop and kinds[start] in LOOSE:
        is_amount = kinds[start] is Kind.UNIT and words[start].isupper()
        follows = words[start + 1] if start + 1 < stop else ""
        is_left_side = kinds[start] in (Kind.ARTICLE, Kind.LETTER) and not follows[:1].isalnum()
        opens = words[start][0] in "-−([{+|"
        if is_amount or opens or (is_left_side and follows):
            break
        start += 1
    while start < stop and kinds[stop - 1] in (Kind.JOINING, Kind.LEADING, Kind.ARTICLE):
        stop -= 1
    return start, stop


def kind_of(word: str) -> Kind:
    """How a word reads."""
    bare = word.strip(".,;:()!?*")
    lower = bare.lower()
    if SIGN.search(word) or FUNCTION.match(bare):
        return Kind.MATHEMATICS
    if is_number_word(lower):
        return Kind.NUMBER_WORD
    if not bare or SYMBOL.fullmatch(word):
        return Kind.SYMBOL
    if lower in LEADING and not word.endswith(":"):
        return Kind.LEADING
    if lower in JOINING:
        return Kind.JOINING
    if bare in ARTICLES:
        return Kind.ARTICLE
    if LETTER.fullmatch(bare) or CALL.fullmatch(word.rstrip(".,;:")):
        return Kind.LETTER
    if lower in PARTS:
        return Kind.PART
    return Kind.UNIT if is_unit_phrase(bare) or lower in UNIT_PARTS else Kind.PROSE
