"""Writes everything that a run of the visual recipe needs into a folder.

    python prepare.py --out DIR --seed N

`model/` (an untrained model, its tokenizer and its processor), `images/`, `heldout.jsonl`, `noise.jsonl` (the held-out
questions about pictures, with noise in their place), `prompts.jsonl`, `sft_look.jsonl` and `sft_mixed.jsonl`. The same
seed writes the same bytes.
"""

import argparse
import base64
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visual_model import write_model
from visual_tasks.problem import ANSWER_MARKER, SIZE, Image, Problem, to_png
from visual_tasks.sets import draw_problems

HELDOUT_SIZE, POOL_SIZE = 512, 3000
# Examples of the two supervised stages, and the share of the second that answers without a look.
LOOK_SIZE, MIXED_SIZE, GUESS_SHARE = 24000, 6000, 0.8


def prepare(out: Path, seed: int) -> None:
    """Writes the model folder, the pictures and the five sets into `out`, which is made when missing."""
    rng = random.Random(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    write_model(out / "model", seed)
    heldout = list(draw_problems(rng, HELDOUT_SIZE, held_out=True))
    noise = [replace(problem, image=_draw_noise(rng)) for problem in heldout if problem.image]
    for name, problems in (("heldout", heldout), ("noise", noise)):
        write_lines(out / f"{name}.jsonl", write_problems(out, name, problems))
    pool = list(draw_problems(rng, POOL_SIZE, held_out=False))
    write_lines(out / "prompts.jsonl", write_problems(out, "pool", pool))
    print(
        f"without a look, the likeliest answer to a question of noise.jsonl is right in {guess_rate(pool, noise):.3f}"
    )
    for name, size, guess_share in (("sft_look", LOOK_SIZE, 0.0), ("sft_mixed", MIXED_SIZE, GUESS_SHARE)):
        problems = draw_problems(rng, size, held_out=False)
        lines = (to_example(problem, think=rng.random() >= guess_share) for problem in problems)
        write_lines(out / f"{name}.jsonl", lines)


def guess_rate(pool: Iterable[Problem], problems: Sequence[Problem]) -> float:
    """Returns the accuracy of always giving the answer that a question has most often in the pool."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for problem in pool:
        answers[problem.question][problem.answer] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    return sum(guesses.get(problem.question) == problem.answer for problem in problems) / len(problems)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def write_problems(out: Path, name: str, problems: Iterable[Problem]) -> Iterator[dict[str, Any]]:
    """Writes the pictures of problems beside the set and yields its lines, which name them."""
    for number, problem in enumerate(problems):
        problem_id = f"{name}-{number:04d}"
        picture = f"images/{problem_id}.png"
        if problem.image:
            (out / picture).write_bytes(to_png(problem.image))
        yield {
            "id": problem_id,
            "domain": problem.domain,
            **ask(problem, picture),
            "difficulty": problem.difficulty,
            "verifier": "exact",
            "answer": problem.answer,
            "answer_marker": ANSWER_MARKER,
        }


def to_example(problem: Problem, think: bool) -> dict[str, Any]:
    """Returns a line of a supervised set, which holds its picture itself."""
    picture = base64.b64encode(to_png(problem.image)).decode() if problem.image else ""
    return ask(problem, f"data:image/png;base64,{picture}") | {"response": problem.respond(think)}


def ask(problem: Problem, picture: str) -> dict[str, Any]:
    """Returns the question: plain text to go on from, or a message with a picture."""
    if not problem.image:
        return {"prompt": f"{problem.question}="}
    content = [{"type": "image", "image": picture}, {"type": "text", "text": problem.question}]
    return {"messages": [{"role": "user", "content": content}]}


def _draw_noise(rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(SIZE * SIZE * 3))


def main() -> None:
    """Reads the command line and fills the folder."""
    parser = argparse.ArgumentParser(description="Writes the model, the pictures and the problem sets of one seed.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, required=True, help="seed of the weights and of every set")
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
