"""Makes untrusted text safe to quote to a language model: nothing in it can end the quotation or pose as the chat.

Quoted text stands between two lines that hold a random number. Its author did not know the number, so no text of his
can be the closing line. Tokens by which chat templates mark turns are broken up by a blank, since a server may take
them for its own wherever they stand.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

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
        """A fence whose number occurs in none of the texts."""
        texts = tuple(texts)
        while True:
            nonce = secrets.token_hex(NONCE_BYTES)
            if not any(nonce in text for text in texts):
                return cls(nonce)

    def open_line(self, name: str) -> str:
        """The line before the text."""
        return f"<<<BEGIN {name} {self.nonce}>>>"

    def close_line(self, name: str) -> str:
        """The line after the text."""
        return f"<<<END {name} {self.nonce}>>>"

    def wrap(self, name: str, text: str) -> str:
        """The text between its lines."""
        return f"{self.open_line(name)}\n{text}\n{self.close_line(name)}"

    def cut(self, text: str, characters: int) -> str:
        """The text, without its middle when it has more than that many characters, which a line in it says."""
        if len(text) <= characters:
            return text
        head = characters // 2
        left_out = len(text) - characters
        line = f"<<<CUT {self.nonce}: {left_out} characters are left out here>>>"
        return f"{text[:head]}\n{line}\n{text[head + left_out :]}"


def neutralize(text: str) -> str:
    """The text with unseen characters removed, and with control tokens, fences and role markers broken up."""
    text = UNUSUAL.sub(_visible, LINE_END.sub("\n", text))
    text = CONTROL.sub(lambda match: match[0] + " ", text)
    return ROLE.sub("> ", text)


def _visible(match: re.Match[str]) -> str:
    # Control, format (zero-width, direction), surrogate, private and unassigned characters.
    return "" if unicodedata.category(match[0]).startswith("C") else match[0]
