"""Draws pictures.png: problems of the three domains with pictures, with what is asked, thought and answered.

python pictures.py --out pictures.png --seed 0
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from visual_tasks import charts, scenes, sums
from visual_tasks.problem import SIZE, Problem

ROWS = (scenes.make_problem, charts.make_problem, sums.make_printed_problem)
COLUMNS, ZOOM, MARGIN, TEXT = 5, 3, 12, 48
WIDTH, HEIGHT = SIZE * ZOOM + MARGIN, SIZE * ZOOM + MARGIN + TEXT


def draw_sheet(rng: random.Random) -> Image.Image:
    """Returns a row of problems for each domain."""
    sheet = Image.new("RGB", (COLUMNS * WIDTH + MARGIN, len(ROWS) * HEIGHT + MARGIN), (238, 238, 238))
    for row, make_problem in enumerate(ROWS):
        for column in range(COLUMNS):
            _paste(sheet, make_problem(rng), MARGIN + column * WIDTH, MARGIN + row * HEIGHT)
    return sheet


def _paste(sheet: Image.Image, problem: Problem, left: int, top: int) -> None:
    assert problem.image
    sheet.paste(problem.image.resize((SIZE * ZOOM, SIZE * ZOOM), Image.Resampling.NEAREST), (left, top))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    lines = f"{problem.question}=\n{problem.thought}\n#{problem.answer}"
    pen.multiline_text((left, top + SIZE * ZOOM + 2), lines, fill=(0, 0, 0), font=font, spacing=2)


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description="Draws problems of the visual recipe.")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw_sheet(random.Random(arguments.seed)).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
