"""Makes of a written answer the text that math-verify reads in full.

Outside of dollar signs math-verify takes the first number that it finds: `2x+1` would be 2 and `10^{5}` would be 10.
"""

from __future__ import annotations

import re

DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
SYMBOLS = {
    "√": "\\sqrt ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "×": "\\times ",
    "·": "\\cdot ",
    "÷": "/",
    "−": "-",
    "≤": "\\le ",
    "≥": "\\ge ",
    "∪": "\\cup ",
    "½": "\\frac{1}{2}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "°": "^\\circ ",
    "²": "^2",
    "³": "^3",
}
ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])")
MIXED_NUMBER = re.compile(r"(?<![0-9.^/])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9.])")
SCIENTIFIC = re.compile(r"(?<![0-9A-Za-z.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?![0-9A-Za-z.])")
# Words, not products of variables nor commands.
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?![A-Za-z])")
NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")


def prepare_expression(text: str) -> str:
    """An answer that stands by itself, as LaTeX between dollar signs; text that has delimiters stays as it is.

    Words around a single number stay text: the number is found in them.
    """
    if any(delimiter in text for delimiter in DELIMITERS):
        return text
    text = "".join(SYMBOLS.get(character, character) for character in text)
    text = ROOT.sub(r"\\sqrt{\1}", text)
    text = NAME.sub(r"\\\1 ", text)
    text = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    if WORD.search(text) and len(NUMBER.findall(text)) == 1 and not re.search(r"[\^_=<>+*/\\]", text):
        return text
    return f"${text}$"


def prepare_response(text: str) -> str:
    """A whole response: one short line without words is an expression, anything else is searched for its answer."""
    is_expression = len(text) <= 100 and "\n" not in text and not WORD.search(text)
    return prepare_expression(text) if is_expression else text
