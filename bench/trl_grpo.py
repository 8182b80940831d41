"""TRL's side of `trl.py`: GRPO on the prompts of a run of examples/arithmetic, evaluated as the run is.

It starts reward service and sandbox below itself, so that their CPU seconds are found with its own. `evaluations.jsonl`
in the folder gets a line per evaluation, in the form of a run's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from perigee.cli.stack import wait_serving
from perigee.reward.adapters.trl import PerigeeReward
from perigee.rpc import ChannelOptions

RECIPE = Path(__file__).parents[1] / "examples" / "arithmetic"
# As in the recipe: groups of 8, about 64 prompts and two steps a round, a ramp over 30 rounds.
GROUP, PROMPTS, STEPS_PER_ROUND, CAP = 8, 64, 2, 144
START, END, ROUNDS = 3.0, 8.0, 30
MAX_ROUNDS = 400
PLAIN = ("id", "domain", "prompt", "difficulty")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the lines as rows: the prompt, its difficulty and the verifier's fields as JSON text."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": line["prompt"],
            "difficulty": line["difficulty"],
            "answer": json.dumps({key: value for key, value in line.items() if key not in PLAIN}),
        }
        for line in lines
    ]


def order(rows: list[dict[str, Any]], seed: int) -> Dataset:
    """Returns the prompts of all rounds in turn, drawn up to a difficulty that rises as in the recipe."""
    rng = random.Random(seed)
    found = []
    for number in range(MAX_ROUNDS):
        bound = START + (END - START) * min(1.0, number / ROUNDS)
        found += rng.sample([row for row in rows if row["difficulty"] <= bound], PROMPTS)
    return Dataset.from_list(found)


class Evaluator(TrainerCallback):  # type: ignore[misc]
    """Sampled accuracy on held-out problems, before the first step and every so many steps."""

    def __init__(self, options: argparse.Namespace, reward: PerigeeReward, tokenizer: Any) -> None:
        rows = read_rows(options.data / "heldout.jsonl")
        count = options.problems
        self.rows = [rows[index * len(rows) // count] for index in range(count)] * options.samples
        self.every, self.out = options.every, options.out / "evaluations.jsonl"
        self.reward, self.tokenizer = reward, tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluates the model as it comes."""
        self.evaluate(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluates when it is time."""
        if state.global_step % self.every == 0:
            self.evaluate(model, state.global_step)

    def evaluate(self, model: Any, step: int) -> None:
        """Appends a line to evaluations.jsonl."""
        started = time.monotonic()
        prompts, answers = [row["prompt"] for row in self.rows], [row["answer"] for row in self.rows]
        was_training, threads = model.training, torch.get_num_threads()
        model.eval()
        # Evaluations do not count, and need not take long.
        torch.set_num_threads(os.cpu_count() or 1)
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=CAP,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        torch.set_num_threads(threads)
        model.train(was_training)
        texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards = self.reward(prompts, texts, answer=answers)
        judged = [value for value in rewards if value is not None]
        line = {
            "step": step,
            "seconds": time.monotonic() - started,
            "accuracy": {"overall": {"sampled": {"mean": sum(value > 0 for value in judged) / len(judged)}}},
        }
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def train(options: argparse.Namespace, address: str) -> None:
    """Trains until it is ended."""
    torch.set_num_threads(options.threads)
    # AutoTokenizer takes a Qwen2's own splitting of text, which loses the spaces of this model's characters.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    reward = PerigeeReward(address)
    config = GRPOConfig(
        output_dir=str(options.out),
        learning_rate=options.rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=MAX_ROUNDS * STEPS_PER_ROUND,
        per_device_train_batch_size=PROMPTS * GROUP // STEPS_PER_ROUND,
        steps_per_generation=STEPS_PER_ROUND,
        num_generations=GROUP,
        max_completion_length=CAP,
        temperature=1.0,
        beta=0.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=options.seed,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=order(read_rows(options.data / "prompts.jsonl"), options.seed),
        processing_class=tokenizer,
        callbacks=[Evaluator(options, reward, tokenizer)],
    )
    trainer.train()


def main() -> None:
    """Starts the services, trains, and ends them."""
    parser = argparse.ArgumentParser(description="TRL's side of bench/trl.py.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with prompts.jsonl and heldout.jsonl")
    parser.add_argument("--rate", type=float, required=True, help="learning rate")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--problems", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps between evaluations")
    parser.add_argument("--wall-ms", type=int, required=True, help="wall-clock limit of a program")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = options.out / "services"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = [sys.executable, "-m", "perigee.cli.main", "up", RECIPE, "--only", "reward", "--only", "sandbox"]
    command += ["--set", f"sandbox.default_limits.wall_ms={options.wall_ms}"]
    services = subprocess.Popen([*command, "--runs-dir", runs], stdout=subprocess.DEVNULL)
    try:
        while not (found := list(runs.glob("*/stack.json"))):
            if services.poll() is not None:
                raise RuntimeError(f"the services did not start: see {runs}")
            time.sleep(0.2)
        address = json.loads(found[0].read_text(encoding="utf-8"))["addresses"]["reward"]
        asyncio.run(wait_serving(address, "perigee.reward.v1.RewardService", ChannelOptions()))
        train(options, address)
    except KeyboardInterrupt:
        pass
    finally:
        services.terminate()
        services.wait(60)


if __name__ == "__main__":
    main()
