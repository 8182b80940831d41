"""Writes SmolLM2-135M-Instruct and preferences among solutions of GSM8K, short over long, into a folder.

    PERIGEE_GSM8K=train.jsonl python prepare_pairs.py --out DIR --seed N

`model/`, as prepare.py writes it, `pairs.jsonl` and `heldout_pairs.jsonl`, and `heldout.jsonl` of the problems of the
latter. PERIGEE_GSM8K names GSM8K's training set as JSON Lines of `question` and `answer`. Chosen is its solution;
rejected the same with each calculation written once more, as the set has them between << and >>.
"""

import argparse
import json
import os
import random
import re
from pathlib import Path

from prepare import open_model

PAIRS, HELD_OUT = 48, 24
CALCULATION = re.compile(r"<<(.*?)>>")
# The sequences of longer ones take most of the time.
LONGEST = 400


def read_problems(path: Path) -> list[dict[str, str]]:
    """Returns the problems with short solutions that hold calculations."""
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [each for each in problems if len(each["answer"]) <= LONGEST and CALCULATION.search(each["answer"])]


def make_pair(problem: dict[str, str]) -> dict[str, str]:
    """Returns a line of a set of preferences."""
    chosen, rejected = (CALCULATION.sub(form, problem["answer"]) for form in ("", r"(that is \1) "))
    return {"prompt": problem["question"], "chosen": chosen, "rejected": rejected}


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Reads the command line and fills the folder."""
    parser = argparse.ArgumentParser(description="Writes SmolLM2-135M-Instruct and pairs of solutions of GSM8K.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, required=True, help="seed of the choice of problems")
    arguments = parser.parse_args()
    if not (source := os.environ.get("PERIGEE_GSM8K")):
        raise SystemExit("PERIGEE_GSM8K is not set: name GSM8K's training set, JSON Lines of question and answer")
    arguments.out.mkdir(parents=True, exist_ok=True)
    open_model(arguments.out / "model")
    drawn = random.Random(arguments.seed).sample(read_problems(Path(source)), PAIRS + HELD_OUT)
    heldout = [
        {"id": str(index), "prompt": each["question"], "answer": each["answer"].rpartition("#### ")[2]}
        for index, each in enumerate(drawn[:HELD_OUT])
    ]
    write_lines(arguments.out / "heldout.jsonl", heldout)
    write_lines(arguments.out / "heldout_pairs.jsonl", [make_pair(each) for each in drawn[:HELD_OUT]])
    write_lines(arguments.out / "pairs.jsonl", [make_pair(each) for each in drawn[HELD_OUT:]])


if __name__ == "__main__":
    main()
