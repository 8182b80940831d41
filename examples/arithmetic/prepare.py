"""Writes everything that a run of the arithmetic recipe needs into a folder.

    python prepare.py --out DIR --seed N

`model/` (an untrained model and its tokenizer), `heldout.jsonl`, `prompts.jsonl`, `sft_easy.jsonl` and
`sft_full.jsonl`. The same seed writes the same bytes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.sets import make_sets
from tiny_model import write_model

HELDOUT_SIZE = 512
POOL_SIZE = 3000
SFT_SIZE = 30000


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")


def prepare(out: Path, seed: int) -> None:
    """Writes the model folder and the four sets into `out`, which is made when missing."""
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "model", seed)
    sets = make_sets(random.Random(seed), HELDOUT_SIZE, POOL_SIZE, SFT_SIZE)
    write_lines(out / "heldout.jsonl", (p.to_line(f"heldout-{i:04d}") for i, p in enumerate(sets.heldout)))
    write_lines(out / "prompts.jsonl", (p.to_line(f"pool-{i:04d}") for i, p in enumerate(sets.pool)))
    write_lines(out / "sft_easy.jsonl", map(asdict, sets.sft_easy))
    write_lines(out / "sft_full.jsonl", map(asdict, sets.sft_full))


def main(fill: Callable[[Path, int], None] = prepare) -> None:
    """Reads the command line and has the folder filled."""
    parser = argparse.ArgumentParser(description="Writes the model and the problem sets of one seed.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, required=True, help="seed of the weights and of every set")
    arguments = parser.parse_args()
    fill(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
