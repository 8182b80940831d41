"""Numbers in English words: "twenty-four", "three quarters", "1.3 million", "three and a half"."""

from __future__ import annotations

import re
from fractions import Fraction

COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ORDINALS = "third _ fifth sixth seventh eighth ninth tenth"
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {
    "half": 2,
    "halves": 2,
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths"), 4),
    **{word: number for number, word in enumerate(ORDINALS.split(), start=3)},
    **{word + "s": number for number, word in enumerate(ORDINALS.split(), start=3)},
    **{"hundredth": 100, "hundredths": 100, "thousandth": 1000, "thousandths": 1000},
}
SMALL = {word: number for number, word in enumerate(COUNTED.split())} | {
    word: 10 * number for number, word in enumerate(TENS.split(), start=2)
}
IRREGULAR = ("five", "eight", "nine", "twelve")
RANKS = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12} | {
    **{
        word + "th": number
        for word, number in SMALL.items()
        if number > 3 and word not in ("five", "eight", "nine", "twelve")
    },
    **{word[:-1] + "ieth": number for word, number in SMALL.items() if word.endswith("ty")},
}
SIGNS = ("minus", "negative")
FIGURES = re.compile(r"[0-9]+(?:\.[0-9]+)?|[0-9]+/[0-9]+")
WORDS = {*SMALL, *SCALES, *PARTS, "hundred", "dozen"}


def read_rank(sentence: str, noun: str) -> str:
    """The sentence with "the fourth day" as "day 4", where `noun` is what is asked for."""
    pattern = rf"\b(?:the\s+)?(?P<rank>[0-9]+(?=st|nd|rd|th)|[a-z-]+)(?:st|nd|rd|th)?\s+{re.escape(noun)}\b"

    def replace_rank(match: re.Match[str]) -> str:
        word = match["rank"].lower()
        tens, _, last = word.rpartition("-")
        rank = RANKS.get(last, 0) + (SMALL.get(tens, 0) if tens else 0)
        return f"{noun} {word if word.isdigit() else rank}" if word.isdigit() or rank else match[0]

    return re.sub(pattern, replace_rank, sentence, flags=re.IGNORECASE)


def is_number_word(word: str) -> bool:
    """Whether a word alone reads as a number; parts and "dozen" do not, because prose is full of them."""
    return any(part in SMALL or part in SCALES or part == "hundred" for part in word.split("-"))


def read_number_words(text: str) -> Fraction | None:
    """The value of a number in words; None when the text is anything else."""
    words = text.lower().replace("-", " ").replace(",", " ").split()
    sign = -1 if words and words[0] in SIGNS else 1
    words = words[1:] if sign < 0 else words
    if not any(word in WORDS for word in words):
        return None
    value = read_words([word for word in words if word != "and"] if "a" not in words else words)
    return None if value is None else sign * value


def read_words(words: list[str]) -> Fraction | None:
    """The value of words without a sign."""
    if "and" in words:  # three and a half
        split = len(words) - words[::-1].index("and") - 1
        whole, part = read_words(words[:split]), read_words(words[split + 1 :])
        return whole + part if whole is not None and part is not None and part < 1 else None
    if words and words[-1] in PARTS:
        return read_parts(words[:-1], PARTS[words[-1]])
    if words and words[-1] == "dozen":
        count = Fraction(1) if words[:-1] in ([], ["a"]) else read_cardinal(words[:-1])
        return None if count is None else 12 * count
    return read_cardinal(words)


def read_parts(words: list[str], denominator: int) -> Fraction | None:
    """Three quarters, a half, half; two thirds after a whole number too: two three fourths is 2 3/4."""
    if words in ([], ["a"], ["an"]):
        return Fraction(1, denominator)
    count = read_cardinal(words)
    if count is not None:
        return count / denominator
    whole, part = read_cardinal(words[:-1]), read_cardinal(words[-1:])
    return whole + part / denominator if whole is not None and part is not None else None


def read_cardinal(words: list[str]) -> Fraction | None:
    """Two hundred thirty four thousand five; 1.3 million."""
    if not words:
        return None
    total, group, last = Fraction(0), Fraction(0), Fraction(0)
    for index, word in enumerate(words):
        if word in SCALES:
            if index == 0:
                return None
            total += group * SCALES[word]
            group, last = Fraction(0), Fraction(0)
        elif word == "hundred":
            group = (group or Fraction(1)) * 100
            last = Fraction(100)
        elif word in SMALL and (last == 0 or (last >= 20 and SMALL[word] < last)):
            group += SMALL[word]
            last = Fraction(SMALL[word]) if SMALL[word] >= 20 else Fraction(1)
        elif index == 0 and FIGURES.fullmatch(word):
            group, last = Fraction(word), Fraction(1)
        else:
            return None
    return total + group
