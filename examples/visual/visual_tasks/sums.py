"""Sums and differences from left to right, printed into a picture in one of several fonts, or as plain text."""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from visual_tasks.problem import PATCH, Colour, Problem, new_picture

# Pillow's own font, and fonts that matplotlib brings along, with the size that fits a character into a patch.
FONTS = {
    "": 16,
    "DejaVuSans": 15,
    "DejaVuSans-Bold": 14,
    "DejaVuSans-Oblique": 15,
    "DejaVuSansMono": 16,
    "DejaVuSerif": 15,
    "STIXGeneral": 18,
}
# Shares of sums by their number of digits.
OPERANDS = {2: 0.4, 3: 0.4, 4: 0.2}


def make_printed_problem(rng: random.Random) -> Problem:
    """Prints a sum into a picture; the sum is to be read first."""
    written, values = _draw_sum(rng)
    thought = ";".join((written, ",".join(map(str, values))))
    return Problem("print", written, _print(rng, written), "compute", thought, str(values[-1]), len(values))


def make_text_problem(rng: random.Random) -> Problem:
    """Asks for a sum in plain text."""
    written, values = _draw_sum(rng)
    return Problem("text", written, None, written, ",".join(map(str, values)), str(values[-1]), len(values))


def _draw_sum(rng: random.Random) -> tuple[str, list[int]]:
    """Returns a sum of digits and its values from left to right, none of them negative."""
    [operands] = rng.choices(list(OPERANDS), list(OPERANDS.values()))
    value = rng.randint(0, 9)
    written, values = str(value), []
    for _ in range(operands - 1):
        digit = rng.randint(0, 9)
        plus = digit > value or rng.random() < 0.5
        value += digit if plus else -digit
        written += f"{'+' if plus else '-'}{digit}"
        values.append(value)
    return written, values


@functools.cache
def _font_folder() -> Path:
    # Looked up, since importing matplotlib takes longer than drawing the pictures.
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        sys.exit("the visual recipe prints in fonts that matplotlib brings along: pip install matplotlib")
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


@functools.cache
def _load_font(name: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not name:
        return ImageFont.load_default(size=FONTS[name])
    return ImageFont.truetype(_font_folder() / f"{name}.ttf", FONTS[name])


def _print(rng: random.Random, written: str) -> Image.Image:
    ink, paper = _draw_colour(rng, 0, 110), _draw_colour(rng, 225, 255)
    return draw_text(written, rng.choice(list(FONTS)), ink, paper)


def _draw_colour(rng: random.Random, darkest: int, brightest: int) -> Colour:
    return rng.randint(darkest, brightest), rng.randint(darkest, brightest), rng.randint(darkest, brightest)


def draw_text(text: str, font: str, ink: Colour, paper: Colour) -> Image.Image:
    """Returns a picture of a text of up to 16 characters, four in a line."""
    image = new_picture(paper)
    pen = ImageDraw.Draw(image)
    for index, character in enumerate(text):
        middle = PATCH * (index % 4) + PATCH // 2, PATCH * (index // 4) + PATCH // 2
        pen.text(middle, character, fill=ink, font=_load_font(font), anchor="mm")
    return image
