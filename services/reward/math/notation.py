r"""One notation for answers: LaTeX, Unicode and plain text become the same text for the same mathematics.

Numbers, fractions, roots and functions are LaTeX's (\frac{1}{2}, \sqrt{2}, \sin); everything that structures an
answer is one character: * / ± ≤ ≥ ≠ ≈ ∈ ∪ ∩ ∞ ° ∅ ℝ, ⦃ ⦄ around sets, ⟨ ⟩ around vectors. Commands for spacing, fonts
and sizes go, digits are not grouped, and words stay words.
"""

from __future__ import annotations

import re
from functools import lru_cache

from services.reward.math.numbers import SMALL

DISPLAY = re.compile(
    r"\\\[(?P<bracket>.+?)\\\]|\$\$(?P<dollars>.+?)\$\$|\\\((?P<parenthesis>[^\n]+?)\\\)"
    r"|(?P<environment>\\begin\{(?P<name>align\*?|aligned|equation\*?|gather\*?|cases|[pbvBV]?matrix|array)\}"
    r".+?\\end\{(?P=name)\})",
    re.DOTALL,
)
# TeX's rule as Markdown has it: a dollar sign that opens is followed by no blank, one that closes follows no blank and
# precedes no digit. So "3 * $1.25 = $3.75" holds prices and no formula.
SPAN = re.compile(r"(?<!\\)\$(?=[^\s$])((?:\\.|[^$\\])*)(?<=\S)(?<!\\)\$(?![0-9])")
# In an answer a dollar sign may stand apart from its formula, "$\frac{1}{2} $".
LOOSE_SPAN = re.compile(r"(?<!\\)\$((?:\\.|[^$\\])*)(?<!\\)\$(?![0-9])")
ELLIPSIS = re.compile(r"\.{3,}|\\(?:l|c)?dots(?![A-Za-z])")
COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "\\binom"),
    **dict.fromkeys(("leq", "le", "leqslant", "leqq"), "≤"),
    **dict.fromkeys(("geq", "ge", "geqslant", "geqq"), "≥"),
    **dict.fromkeys(("neq", "ne"), "≠"),
    **dict.fromkeys(("approx", "simeq"), "≈"),
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("lbrace",), "⦃"),
    **dict.fromkeys(("rbrace",), "⦄"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("lor", "vee"), " or "),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("quad", "qquad"), " ; "),
    **dict.fromkeys(("left", "right", "displaystyle", "textstyle", "limits", "big", "Big", "bigg", "Bigg"), ""),
    **dict.fromkeys(("bigl", "bigr", "Bigl", "Bigr", "rm", "bf", "it", "nonumber", "hfill", "phantom"), ""),
    **dict(
        pair.split()
        for pair in (
            *("equiv =", "lt <", "gt >", "in ∈", "cup ∪", "cap ∩", "pm ±", "mp ∓", "div /", "infty ∞", "degree °"),
            *("langle ⟨", "rangle ⟩", "colon :", "euro €", "pounds £"),
        )
    ),
}
GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma phi omega"
CHARACTERS = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("×·⋅∗∙•", "*"),
    **dict.fromkeys("≤⩽≦", "≤"),
    **dict.fromkeys("≥⩾≧", "≥"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000\t\n~", " "),
    **dict.fromkeys("’′‘", "'"),
    **dict.fromkeys("∅⌀", "∅"),
    **{character: str(digit) for digit, character in enumerate("０１２３４５６７８９")},
    **{character: f"_{digit}" for digit, character in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    "≡": "=",
    **dict.fromkeys("÷⁄∕", "/"),
    "º": "°",
    **{sign: f"\\{name} " for sign, name in zip("αβγδεθλμπρσφω", GREEK.split(), strict=True)},
    **{sign: f"\\frac{{{up}}}{{{down}}}" for sign, up, down in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅛18")},
    **dict.fromkeys("“”\u200b", ""),
    "（": "(",
    "）": ")",
    "，": ",",
}
TRANSLATION = str.maketrans(CHARACTERS)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx")
SUPERSCRIPT_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ]+")
COMMAND = re.compile(r"\\([A-Za-z]+)")
FONT = re.compile(
    r"\\(?:text|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|mbox|hbox|operatorname\*?|boldsymbol|bm|vec"
    r"|overrightarrow|mathcal|emph|underline|boxed|fbox|hspace\*?|vspace\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
ROOT_SIGNS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|pi|theta"
NAME = re.compile(rf"(?<![\\A-Za-z])({NAMES})(?![A-Za-z])")
SCIENTIFIC = re.compile(r"(?<![0-9A-Za-z.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?![0-9A-Za-z.])")
ROWS = re.compile(r"\\begin\{(cases|align\*?|aligned|gather\*?|equation\*?)\}(.*?)\\end\{\1\}", re.DOTALL)
# What follows the last one is what all of it comes to.
ARROW = re.compile(r"=>|⇒|⟹|∴|\\(?:Rightarrow|implies|Longrightarrow|therefore|iff|Leftrightarrow)(?![A-Za-z])")
ABOUT = re.compile(
    r"(?<=\S)[\s,;]*(?:\bor\b|\bthat is\b|\bi\.e\.,?)?\s*\b(?:about|approximately|roughly)\s+", re.IGNORECASE
)
MODULUS = re.compile(r"\\pmod\s*(?:\{[^{}]*\}|[0-9a-z])|\(\s*(?:\\bmod|\\mod|mod)\s+[^()]*\)")
# Nobody nests brackets deeper.
MAX_DEPTH = 50
OPENING, CLOSING = "([{⦃⟨", ")]}⦄⟩"
# Between the groups of a number's digits: 9\,500, 9{,}500, 9,\!500.
THIN_SPACE = re.compile(r"(?<=[0-9])(?:\\[,!:; ]|\{[,\s]\}|\s*,\s*\\!\s*)(?=[0-9])")
ARGUMENT = re.compile(r"\\sqrt\s*\{[^{}]*\}|\\[A-Za-z]+|.")
OVER_ESCAPED = re.compile(r"\\\\(?=[A-Za-z]{2})")
BASE_WORD = re.compile(rf"_\{{\s*({'|'.join(SMALL)})\s*\}}")
CLOCK = re.compile(r"(?<=[0-9])\s*([AaPp])\.?\s?[Mm]\b\.?")
GROUPED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])(?!,[0-9])")


def flatten_math(text: str) -> str:
    """Puts every displayed formula between single dollar signs, and every environment, on one line."""

    def flatten(match: re.Match[str]) -> str:
        if match["environment"]:
            return " ".join(match["environment"].split())
        return f"${' '.join((match['bracket'] or match['dollars'] or match['parenthesis']).split())}$"

    return DISPLAY.sub(flatten, text) if "\\" in text or "$$" in text else text


def unwrap(text: str) -> str:
    """Removes the dollar signs around formulas in prose."""
    return SPAN.sub(lambda match: match[1], text) if "$" in text else text


@lru_cache(maxsize=512)
def normalise(text: str) -> str:
    """Returns the text in the notation of this module."""
    text = flatten_math(unescape(text.strip()))
    text = LOOSE_SPAN.sub(lambda match: f" {match[1]} ", text)
    text = ROWS.sub(join_rows, text)
    text = next((part for part in reversed(ARROW.split(text)) if part.strip()), "")
    text = SUPERSCRIPT_RUN.sub(lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
    text = text.translate(TRANSLATION)
    text = ELLIPSIS.sub("…", MODULUS.sub("", text))
    text = replace_commands(text)
    text = replace_plain(text)
    text = fix_arguments(text) if nesting(text) <= MAX_DEPTH else text
    text = ungroup_digits(CLOCK.sub(lambda match: f" {match[1].lower()}m", text))
    text = " ".join(text.split())
    return text.strip(" *;,:").rstrip(" .,;:*")


def nesting(text: str) -> int:
    """Returns how deep brackets are nested in a text."""
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in OPENING) - (character in CLOSING))
        deepest = max(deepest, depth)
    return deepest


def unescape(text: str) -> str:
    """Removes a backslash that nothing follows, and the second one of commands that were escaped twice."""
    text = text.removesuffix("\\") if not text.endswith("\\\\") else text
    if not OVER_ESCAPED.search(text):
        return text
    if "\\begin" not in text:
        return OVER_ESCAPED.sub(lambda match: "\\", text)
    return text.replace("\\\\", "\\") if re.search(r"\\\\begin", text) else text


def join_rows(match: re.Match[str]) -> str:
    """Joins the cases of a system by commas; of other environments returns the last row, which is their result."""
    rows = [row.replace("&", " ").strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip(" &")]
    return ", ".join(rows) if match[1] == "cases" else (rows or [""])[-1]


def replace_commands(text: str) -> str:
    """Replaces commands of LaTeX that are one character here, or nothing."""
    text = re.sub(r"\\(?:left|right)\s*\.", "", text)
    text = THIN_SPACE.sub(lambda match: "," if "," in match[0].replace("\\,", "") else " ", text)
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\%", "%").replace("\\&", "&")
    text = re.sub(r"(?<!\\)\\[,;:> ]", " ", text)
    text = text.replace("\\{", "⦃").replace("\\}", "⦄").replace("\\|", "|")
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "°", text)
    for _ in range(3):  # fonts inside of fonts
        text = FONT.sub(lambda match: f" {match[1]} ", text)
    text = re.sub(r"\\mathbb\s*\{?\s*R\s*\}?", "ℝ", text)
    return COMMAND.sub(replace_command, text)


def replace_command(match: re.Match[str]) -> str:
    """Returns the replacement of one command; others stay."""
    return COMMANDS.get(match[1], match[0])


def replace_plain(text: str) -> str:
    """Replaces the notation of plain text: ** and <=, sqrt(2), pi, 1e5, +-."""
    text = ABOUT.sub("≈", text)
    text = re.sub(r"^<([^<>]*,[^<>]*)>$", r"⟨\1⟩", text.strip())
    text = re.sub(r"(?<![\\A-Za-z])log_?([0-9]+)\s*\(", r"\\log_{\1}(", text)
    text = text.replace("**", "^").replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("==", "=")
    text = re.sub(r"\+\s*/?\s*-(?=\s*[0-9\\A-Za-z(])", "±", text)
    text = re.sub(r"(?<=[\])])\s*U\s*(?=[\[(])", "∪", text)
    for sign, command in ROOT_SIGNS.items():
        text = text.replace(sign, command + " ")
    text = re.sub(r"(?<![\\A-Za-z])sqrt\b", r"\\sqrt", text)
    text = NAME.sub(r"\\\1 ", text)
    text = re.sub(r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", "∞", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![\\A-Za-z])abs\s*\(([^()]*)\)", r"|\1|", text)
    text = re.sub(r"(?<![\\A-Za-z])exp\s*\(([^()]*)\)", r"e^{\1}", text)
    text = SCIENTIFIC.sub(r"\1*10^{\2}", text)
    text = re.sub(r"(?<=[0-9])\s*[xX]\s*(?=[0-9])", "*", text)
    text = re.sub(r"\s+(?=[\^_])", "", text)
    text = re.sub(r"\b(?:negative|minus)\s+(?=[0-9\\])", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*([+-]?[0-9]+)", r"^{\1}", text)
    text = re.sub(r"\^\s*(\\[A-Za-z]+(?:\{[^{}]*\})?)", r"^{\1}", text)
    text = BASE_WORD.sub(lambda match: f"_{SMALL[match[1]]}", text)
    text = re.sub(r"_\{([A-Za-z0-9])\}", r"_\1", text)
    text = re.sub(r"\{([^{}]*?)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=[0-9])\s+to\s+(?=[0-9])", ":", text)
    return re.sub(r"\bpercent(?:age)?\b|\bper cent\b", "%", text)


def fix_arguments(text: str) -> str:
    r"""Puts the arguments of \frac, \binom and \sqrt in braces, however they were written."""
    pieces, position = [], 0
    for match in re.finditer(r"\\(frac|binom|sqrt)(?![A-Za-z])", text):
        if match.start() < position:
            continue
        pieces.append(text[position : match.start()])
        fixed, position = read_command(text, match)
        pieces.append(fixed)
    return "".join(pieces) + text[position:]


def read_command(text: str, match: re.Match[str]) -> tuple[str, int]:
    """Returns a command with its arguments in braces, and where it ends."""
    position, result = match.end(), match[0]
    if match[1] == "sqrt":
        index = re.compile(r"\s*\[([^\[\]]*)\]").match(text, position)
        if index:
            position, result = index.end(), f"{result}[{index[1]}]"
    for _ in range(1 if match[1] == "sqrt" else 2):
        argument, position = read_argument(text, position)
        result += f"{{{fix_arguments(argument)}}}"
    return result, position


def read_argument(text: str, position: int) -> tuple[str, int]:
    """Returns the argument at `position`, a group, a command, a number or one character, and where it ends."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position == len(text):
        return "", position
    if text[position] in "{(":
        end = group_end(text, position)
        return text[position + 1 : end], min(end + 1, len(text))
    word = ARGUMENT.match(text, position)
    return (word[0], word.end()) if word else ("", position)


def group_end(text: str, opening: int) -> int:
    """Returns where the group that opens at `opening` closes; the end of the text when it does not."""
    opener, closer = text[opening], CLOSING[OPENING.index(text[opening])]
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == opener) - (text[position] == closer)
        if depth == 0:
            return position
    return len(text)


def ungroup_digits(text: str) -> str:
    """Removes separators of thousands; inside of brackets a comma always parts two numbers."""
    depths, depth = [], 0
    for character in text:
        depth += character in OPENING
        depths.append(depth)
        depth -= character in CLOSING

    def join(match: re.Match[str]) -> str:
        return re.sub(r"[, ]", "", match[0]) if depths[match.start()] == 0 else match[0]

    return GROUPED.sub(join, text)


def squeeze(text: str) -> str:
    """Removes white space, except between digits, to compare texts."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
