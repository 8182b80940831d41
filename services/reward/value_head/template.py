"""What the value head reads: question, reference answer and response in one template, as tokens of bounded number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError

# The response ends the text, so that the last token has seen all of it.
TEMPLATE = "Question:\n{question}\n\nReference answer:\n{reference}\n\nResponse:\n{response}"
_RESPONSE = "{response}"


@dataclass(frozen=True)
class Encoder:
    """Turns a response to judge into at most `max_tokens` tokens; the last one is `end_token_id` unless that is None.

    A text that is too long loses the beginning of its response, since the answer stands at the end. Only when what
    stands before the response takes more than half of all tokens does that lose its own beginning.
    """

    tokenizer: Tokenizer
    max_tokens: int
    end_token_id: int | None
    template: str = TEMPLATE

    def encode(self, question: str, reference: str, response: str) -> list[int]:
        """The tokens of one response; safe to call from several threads."""
        before = self.template.removesuffix(_RESPONSE).format(question=question, reference=reference)
        head = self.tokenizer.encode(before, add_special_tokens=False).ids
        tail = self.tokenizer.encode(response, add_special_tokens=False).ids
        end = [] if self.end_token_id is None else [self.end_token_id]
        room = self.max_tokens - len(end)
        kept = min(len(tail), max(room - len(head), room // 2))
        head_kept = min(len(head), room - kept)
        return [*head[len(head) - head_kept :], *tail[len(tail) - kept :], *end]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, which takes special tokens that stand in a text for text.

    Raises InvalidArgumentError naming the file.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidArgumentError(f"{path} cannot be read as a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
