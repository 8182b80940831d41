"""Coloured shapes in a scene of 4 x 4 places: how many there are of a kind, and of which there are more."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from visual_tasks.problem import PATCH, Problem, new_picture

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220)}
SHAPES = ("circle", "square", "triangle")
PLACES = 16


def make_problem(rng: random.Random) -> Problem:
    """Draws a scene and asks about it."""
    # How crowded a scene is differs, so that a count cannot be guessed from the rest.
    filled = rng.uniform(0.3, 0.9)
    scene = [_draw_kind(rng) if rng.random() < filled else None for _ in range(PLACES)]
    key = " ".join("-" if kind is None else kind[0][0] + kind[1][0] for kind in scene)
    question, thought, answer = rng.choice((_count_colour, _count_shape, _compare_colours))(rng, scene)
    return Problem("scene", key, _paint(rng, scene), question, thought, answer, sum(kind is not None for kind in scene))


Kind = tuple[str, str] | None


def _draw_kind(rng: random.Random) -> tuple[str, str]:
    return rng.choice(tuple(COLOURS)), rng.choice(SHAPES)


def _count_colour(rng: random.Random, scene: list[Kind]) -> tuple[str, str, str]:
    asked = rng.choice(tuple(COLOURS))
    seen = "".join(asked[0] if kind and kind[0] == asked else "." for kind in scene)
    return f"count {asked}", seen, str(seen.count(asked[0]))


def _count_shape(rng: random.Random, scene: list[Kind]) -> tuple[str, str, str]:
    asked = rng.choice(SHAPES)
    seen = "".join(asked[0] if kind and kind[1] == asked else "." for kind in scene)
    return f"count {asked}", seen, str(seen.count(asked[0]))


def _compare_colours(rng: random.Random, scene: list[Kind]) -> tuple[str, str, str]:
    first, second = rng.sample(tuple(COLOURS), 2)
    seen = "".join(kind[0][0] if kind and kind[0] in (first, second) else "." for kind in scene)
    counts = seen.count(first[0]), seen.count(second[0])
    answer = "same" if counts[0] == counts[1] else first if counts[0] > counts[1] else second
    return f"more {first} or {second}", f"{seen};{counts[0]},{counts[1]}", answer


def _paint(rng: random.Random, scene: list[Kind]) -> Image.Image:
    image = new_picture()
    pen = ImageDraw.Draw(image)
    for place, kind in enumerate(scene):
        if kind is None:
            continue
        x = PATCH * (place % 4) + PATCH // 2 + rng.randint(-1, 1)
        y = PATCH * (place // 4) + PATCH // 2 + rng.randint(-1, 1)
        half = rng.randint(4, 5)
        box, ink = (x - half, y - half, x + half, y + half), COLOURS[kind[0]]
        if kind[1] == "circle":
            pen.ellipse(box, fill=ink)
        elif kind[1] == "square":
            pen.rectangle(box, fill=ink)
        else:
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=ink)
    return image
