"""What the domains share: a problem with its picture, and the canvas that pictures are drawn on."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

from PIL import Image

# Pictures are squares of this many pixels: 4 x 4 patches of the model's tower.
SIZE, PATCH = 56, 14
# What follows the last marker of a response is the answer.
ANSWER_MARKER = "#"

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """A question about a picture, or about none, with its answer and the looking that leads there.

    `key` is what is asked about, however it is drawn: what is held out is held out under every question and in every
    font.
    """

    domain: str
    key: str
    image: Image.Image | None
    question: str
    thought: str
    answer: str
    difficulty: float

    @property
    def held_out(self) -> bool:
        """Whether the problem may be measured by and not trained on: one in five keys."""
        return zlib.crc32(self.key.encode()) % 5 == 0

    def respond(self, think: bool) -> str:
        """Returns a correct response: what is seen, written out, and then the answer, or the answer alone."""
        return f"{self.thought if think else ''}{ANSWER_MARKER}{self.answer}"


def new_picture(paper: Colour = (255, 255, 255)) -> Image.Image:
    """Returns an empty picture."""
    return Image.new("RGB", (SIZE, SIZE), paper)


def to_png(image: Image.Image) -> bytes:
    """Returns the picture's file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
