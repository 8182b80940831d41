"""Prompts of judges: the chat messages that ask a model about one response.

The texts are files beside this package, `prompts/*.md`: what stands above a line `---` is the system's message, what
stands below the user's. Placeholders are those of string.Template and are filled in one pass, so that nothing that is
filled in is looked at again.

Quoted text is untrusted: nothing in it can end the quotation or pose as the chat. It stands between two lines that hold
a random number. Its author did not know the number, so no text of his can be the closing line. Tokens by which chat
templates mark turns are broken up by a blank, since a server may take them for its own wherever they stand.
"""

from __future__ import annotations

import base64
import re
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from services.reward.verifiers.base import ImagePart

Message = dict[str, Any]

NONCE_BYTES = 8
TAGS = (
    "s|bos|eos|pad|unk|mask|cls|sep|think|thinking|tool_call|tool_calls|tool_response|tools|image|image_soft_token|"
    "start_of_turn|end_of_turn|start_of_image|end_of_image|begin_of_text|end_of_text|start_header_id|end_header_id|eot"
)
BRACKETS = (
    "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|IMG|IMG_BREAK|IMG_END|THINK|gMASK|sMASK|"
    "CLS|SEP|PAD|MASK|UNK|BOS|EOS"
)
# The first character of what a chat template, or the quotation itself, could be made of.
CONTROL = re.compile(
    rf"<(?=[|｜])|<(?=/?(?:{TAGS})>)|<(?=</?SYS>>)|\[(?=/?(?:{BRACKETS})\])|<(?=<<\s*(?:BEGIN|END|CUT)\b)",
    re.IGNORECASE,
)
# How templates without such tokens begin a turn.
ROLE = re.compile(r"^(?=[ \t]*(?:#+[ \t]*)?(?:system|user|human|assistant)[ \t]*:)", re.IGNORECASE | re.MULTILINE)
LINE_END = re.compile("\r\n?|[\u2028\u2029]")
UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")


@dataclass(frozen=True)
class Fence:
    """The pair of lines around quoted text, by their random number."""

    nonce: str

    @classmethod
    def around(cls, texts: Iterable[str]) -> Fence:
        """Returns a fence whose number occurs in none of the texts."""
        texts = tuple(texts)
        while True:
            nonce = secrets.token_hex(NONCE_BYTES)
            if not any(nonce in text for text in texts):
                return cls(nonce)

    def open_line(self, name: str) -> str:
        """Returns the line before the text."""
        return f"<<<BEGIN {name} {self.nonce}>>>"

    def close_line(self, name: str) -> str:
        """Returns the line after the text."""
        return f"<<<END {name} {self.nonce}>>>"

    def wrap(self, name: str, text: str) -> str:
        """Returns the text between its lines."""
        return f"{self.open_line(name)}\n{text}\n{self.close_line(name)}"

    def cut(self, text: str, characters: int) -> str:
        """Returns the text, without its middle when it has more than that many characters, which a line in it says."""
        if len(text) <= characters:
            return text
        head = characters // 2
        left_out = len(text) - characters
        line = f"<<<CUT {self.nonce}: {left_out} characters are left out here>>>"
        return f"{text[:head]}\n{line}\n{text[head + left_out :]}"


@dataclass(frozen=True)
class Case:
    """Case to decide; an empty reference or rubric is not spoken of."""

    question: str
    reference: str
    rubric: str
    response: str
    images: tuple[ImagePart, ...] = ()


@dataclass(frozen=True)
class Quoted:
    """A case whose texts are safe to quote, the fence to quote them with, and the addresses of its images."""

    case: Case
    fence: Fence
    image_urls: tuple[str, ...]

    @classmethod
    def from_case(cls, case: Case) -> Quoted:
        """Neutralizes all texts of a case; takes a while for long texts."""
        question, reference, rubric, response = texts = [
            neutralize(text) for text in (case.question, case.reference, case.rubric, case.response)
        ]
        image_urls = tuple(image_url(image) for image in case.images)
        return cls(Case(question, reference, rubric, response), Fence.around(texts), image_urls)


def build_messages(quoted: Quoted, by_schema: bool, max_response_characters: int) -> list[Message]:
    """Returns the chat that asks for a judgement: as JSON by schema, or in words that end with a signed judgement."""
    case, fence = quoted.case, quoted.fence
    format_system, format_user = _load("format_schema" if by_schema else "format_words")
    pieces = {
        "question": fence.wrap("QUESTION", case.question),
        "reference": fence.wrap("REFERENCE", case.reference) if case.reference else "There is no reference answer.",
        "rubric": fence.wrap("RUBRIC", case.rubric),
        "response": fence.wrap("RESPONSE", fence.cut(case.response, max_response_characters)),
        "nonce": fence.nonce,
        "format": format_system.substitute(nonce=fence.nonce),
        "closing": format_user.substitute(nonce=fence.nonce),
    }
    system, user = (
        template.substitute(pieces) for template in _load("judge_rubric" if case.rubric else "judge_answer")
    )
    if not quoted.image_urls:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in quoted.image_urls]
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "text", "text": user}, *images]},
    ]


def neutralize(text: str) -> str:
    """Returns the text with unseen characters removed, and with control tokens, fences and role markers broken up."""
    text = UNUSUAL.sub(_visible, LINE_END.sub("\n", text))
    text = CONTROL.sub(lambda match: match[0] + " ", text)
    return ROLE.sub("> ", text)


def image_url(image: ImagePart) -> str:
    """Returns the address of an image: its own, or a data URL of its bytes."""
    return image.url or f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"


@cache
def _load(name: str) -> tuple[Template, Template]:
    text = (resources.files("services.reward") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    system, separator, user = text.partition("\n---\n")
    assert separator, name
    return Template(system.strip()), Template(user.strip())


def _visible(match: re.Match[str]) -> str:
    # Control, format (zero-width, direction), surrogate, private and unassigned characters.
    return "" if unicodedata.category(match[0]).startswith("C") else match[0]
