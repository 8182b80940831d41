"""Formulas in text: what is between dollar signs and the like."""

from __future__ import annotations

import re

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
ELLIPSIS = re.compile(r"\.{3,}|\\(?:l|c)?dots(?![A-Za-z])")

CONSTANT = re.compile(r"\+\s*(?:\\text\s*\{\s*)?(?:an?\s+)?(?:arbitrary\s+)?const(?:ant|\.)?(?![a-z])(?:\s*\})?")

# "0.58333... (repeating 3)", "0.583 with the 3 repeating".
REPEATS = re.compile(
    r"(?P<digits>[0-9]*\.[0-9]{1,40})(?:…|\.{3})?,?\s*\(?(?:(?:with|where)\s+)?(?:the\s+)?(?:digits?\s+|block\s+)?"
    r"(?:(?P<block>[0-9]{1,20})\s+(?:is\s+|being\s+)?(?:repeat|recur)(?:s|ing|ring)|(?:repeating|recurring)\s+(?P<other>[0-9]{1,20}))"
    r"(?:\s+(?:forever|indefinitely))?\)?",
    re.IGNORECASE,
)


def name_repeating(text: str) -> str:
    """The text with a line over the digits that are said to repeat, where the decimal ends with them."""

    def overline(match: re.Match[str]) -> str:
        block = match["block"] or match["other"]
        digits: str = match["digits"]
        if not digits.endswith(block):
            return match[0]
        while digits.endswith(block * 2):
            digits = digits.removesuffix(block)
        return f"{digits.removesuffix(block)}\\overline{{{block}}}"

    return REPEATS.sub(overline, text) if "epeat" in text or "ecur" in text else text


def name_constant(text: str) -> str:
    """The text with a letter for a constant in words."""
    return CONSTANT.sub("+ C", text) if "const" in text else text


def flatten_math(text: str) -> str:
    """The text with every displayed formula between single dollar signs, and every environment, on one line."""

    def flatten(match: re.Match[str]) -> str:
        if match["environment"]:
            return " ".join(match["environment"].split())
        return f"${' '.join((match['bracket'] or match['dollars'] or match['parenthesis']).split())}$"

    text = SPLIT_UNIT.sub(r"\1\2", text)
    return DISPLAY.sub(flatten, text) if "\\" in text or "$$" in text else text


def unwrap(text: str) -> str:
    """The text without the dollar signs around its formulas."""
    return SPAN.sub(lambda match: match[1], text) if "$" in text else text
