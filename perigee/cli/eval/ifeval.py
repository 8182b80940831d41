"""IFEval's instructions as patterns of the regex verifier: strict, and all of a prompt's (arXiv 2311.07911).

Three kinds are near what its authors check, not the same: sentences end at punctuation before white space, capital and
lower-case English need be Latin letters only, and a language is told by its script or two of its commonest words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from perigee.errors import InvalidArgumentError

SENTENCE = r"""[^\s.!?](?:[^.!?]|[.!?](?!["')\]]*(?:\s|\Z)))*+(?:[.!?]+["')\]]*|\Z)"""
BULLET = r"(?m:^)[^\S\n]*(?:\*[^*\n]|-)[^\n]*"
TWICE_THE_SAME = r"(?!\s*(?:\*{6}\s*)?((?:(?!\*{6}).)+?)\s*\*{6}\s*\1\s*(?:\*{6})?\s*\Z)"
HIGHLIGHT = r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|\*[^\n*]*[^\s*][^\n*]*\*"
CAPITAL_WORD = r"(?<![\w-])(?=[\d_-]*\p{Lu})[\p{Lu}\d_-]+(?![\w-])"
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
SCRIPTS = {
    **dict.fromkeys(("ar", "fa", "ur"), "Arabic"),
    **dict.fromkeys(("bg", "ru"), "Cyrillic"),
    **dict.fromkeys(("hi", "mr", "ne"), "Devanagari"),
    "bn": "Bengali", "gu": "Gujarati", "kn": "Kannada", "ko": "Hangul", "pa": "Gurmukhi", "ta": "Tamil", "te": "Telugu",
    "th": "Thai",
}  # fmt: skip
WORDS = {
    "de": "und|der|die|das|ist|nicht",
    "en": "the|and|of|to|is",
    "es": "el|los|que|una|para",
    "fi": "ja|on|ei|että|se",
    "fr": "le|les|des|est|une",
    "it": "che|il|di|non|per",
    "pt": "que|não|uma|para|com",
    "sw": "na|ya|wa|kwa|ni",
    "vi": "và|của|là|không|được",
}

Values = Mapping[str, Any]


def count(unit: str, number: int, relation: str, flags: str = "(?si)") -> str:
    """Returns a pattern of texts that hold a pattern at least, less or exactly so many times.

    Groups are atomic: a text with too few is refused in one pass.
    """
    several = rf"(?>.*?(?:{unit})){{{number}}}"
    tails = {
        "at least": rf"\A{several}",
        "less than": rf"\A(?!{several})",
        "exactly": rf"\A{several}(?!.*?(?:{unit}))",
    }
    return flags + tails[relation]


def split(separator: str, number: int, condition: str = "") -> str:
    """Returns a pattern of texts that a separator cuts into so many parts; the first and the last may be empty."""
    part = rf"(?=\s*+(?!{separator})\S)(?>(?:(?!{separator}).)+)"
    return rf"(?s)\A{condition}\s*(?:{separator})?{part}(?:{separator}{part}){{{number - 1}}}(?:{separator})?\s*\Z"


def first_word(values: Values) -> str:
    """Returns a pattern of texts of so many paragraphs, of which one begins with a word."""
    number, place = values["num_paragraphs"], values["nth_paragraph"]
    part, word = r"(?>(?:(?!\n\n).)+)", re.escape(values["first_word"])
    begin = rf"(?si)\A\s*(?:{part}\n\n\s*){{{place - 1}}}"
    return rf"""{begin}(?=["']*{word}(?:[\s.,?!'"]|\Z)){part}(?:\n\n\s*{part}){{{number - place}}}\s*\Z"""


def language(values: Values) -> str:
    """Returns a pattern of texts in a language. Raises KeyError when it is not known."""
    code = values["language"]
    if code in SCRIPTS:
        return rf"\A\P{{L}}*\p{{{SCRIPTS[code]}}}"
    return count(rf"\b(?:{WORDS[code]})\b", 2, "at least")


def any_of(texts: list[str]) -> str:
    """Returns a pattern of any of the texts."""
    return "|".join(map(re.escape, texts))


PATTERNS: Mapping[str, Callable[[Values], str]] = {
    "keywords:existence": lambda v: r"(?si)\A" + "".join(rf"(?=.*{re.escape(word)})" for word in v["keywords"]),
    "keywords:frequency": lambda v: count(re.escape(v["keyword"].strip()), v["frequency"], v["relation"]),
    "keywords:forbidden_words": lambda v: rf"(?si)\A(?!.*\b(?:{any_of(v['forbidden_words'])})\b)",
    "keywords:letter_frequency": lambda v: count(re.escape(v["letter"]), v["let_frequency"], v["let_relation"]),
    "language:response_language": language,
    "length_constraints:number_sentences": lambda v: count(SENTENCE, v["num_sentences"], v["relation"]),
    "length_constraints:number_paragraphs": lambda v: split(r"\*{3}", v["num_paragraphs"]),
    "length_constraints:number_words": lambda v: count(r"\w++", v["num_words"], v["relation"]),
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": lambda v: count(r"\[[^\n]*?\]", v["num_placeholders"], "at least"),
    "detectable_content:postscript": lambda v: (
        "(?i)" + POSTSCRIPTS.get(v["postscript_marker"].strip(), re.escape(v["postscript_marker"].strip()))
    ),
    "detectable_format:number_bullet_lists": lambda v: count(BULLET, v["num_bullets"], "exactly"),
    "detectable_format:constrained_response": lambda v: r"My answer is (?:yes|no|maybe)\.",
    "detectable_format:number_highlighted_sections": lambda v: count(HIGHLIGHT, v["num_highlights"], "at least"),
    "detectable_format:multiple_sections": lambda v: count(
        rf"{re.escape(v['section_spliter'].strip())}\s?\d+", v["num_sections"], "at least", "(?s)"
    ),
    "detectable_format:title": lambda v: r"<<(?=[^\n]*[^<>\s])[^\n]+>>",
    "combination:two_responses": lambda v: split(r"\*{6}", 2, TWICE_THE_SAME),
    "combination:repeat_prompt": lambda v: rf"(?si)\A\s*{re.escape(v['prompt_to_repeat'].strip())}",
    "startend:end_checker": lambda v: rf"(?si){re.escape(v['end_phrase'].strip())}[\"\s]*\Z",
    "startend:quotation": lambda v: r"(?s)\A\s*\".*\"\s*\Z",
    "change_case:capital_word_frequency": lambda v: count(
        CAPITAL_WORD, v["capital_frequency"], v["capital_relation"], "(?s)"
    ),
    "change_case:english_capital": lambda v: r"(?s)\A(?!.*\p{Ll})(?=.*[A-Z])",
    "change_case:english_lowercase": lambda v: r"(?s)\A(?!.*\p{Lu})(?=.*[a-z])",
    "punctuation:no_comma": lambda v: r"\A[^,]*\Z",
}


def read_ifeval(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record of IFEval with the parts of a composite verifier that judge its instructions.

    Raises InvalidArgumentError naming an instruction that is not known.
    """
    parts: list[dict[str, Any]] = []
    for name, values in zip(record["instruction_id_list"], record["kwargs"], strict=True):
        if name == "detectable_format:json_format":
            judged_by: dict[str, Any] = {"verifier": "json", "json_schema": {}}
        else:
            try:
                pattern = PATTERNS[name](values)
            except KeyError as error:
                raise InvalidArgumentError.for_field("instruction_id_list", f"{name} is not known: {error}") from error
            judged_by = {"verifier": "regex", "pattern": pattern, "search_response": True}
        parts.append({"name": f"{name} {len(parts) + 1}", "weight": 1, "judged_by": judged_by})
    return {**record, "parts": parts}
