"""Bar charts of four bars: which is highest or lowest, and what two of them are together."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw, ImageFont

from visual_tasks.problem import PATCH, SIZE, Problem, new_picture

NAMES = "abcd"
HIGHEST = 9
# Pixels of a unit, and of the row of names below the bars.
UNIT, FOOT = 5, 10
FONT = ImageFont.load_default(size=10)


def make_problem(rng: random.Random) -> Problem:
    """Draws a chart and asks about it."""
    values = dict(zip(NAMES, rng.sample(range(1, HIGHEST + 1), len(NAMES)), strict=True))
    seen = "".join(f"{name}{value}" for name, value in values.items())
    kind = rng.choice(("highest", "lowest", "sum"))
    if kind == "sum":
        first, second = rng.sample(NAMES, 2)
        question, answer = f"{first}+{second}", str(values[first] + values[second])
        thought = f"{seen};{values[first]}+{values[second]}"
    else:
        pick = max if kind == "highest" else min
        question, thought, answer = kind, seen, pick(values, key=values.__getitem__)
    return Problem("chart", seen, _paint(rng, values), question, thought, answer, 2.0 if kind == "sum" else 1.0)


def _paint(rng: random.Random, values: dict[str, int]) -> Image.Image:
    image = new_picture()
    pen = ImageDraw.Draw(image)
    ground = SIZE - FOOT - 1
    ink = rng.randint(0, 170), rng.randint(0, 170), rng.randint(0, 170)
    for index, (name, value) in enumerate(values.items()):
        left = PATCH * index + rng.randint(2, 3)
        pen.rectangle((left, ground - UNIT * value, left + 8, ground), fill=ink)
        pen.text((PATCH * index + PATCH // 2, SIZE - FOOT // 2), name, fill=(0, 0, 0), font=FONT, anchor="mm")
    pen.line((0, ground, SIZE, ground), fill=(0, 0, 0))
    return image
