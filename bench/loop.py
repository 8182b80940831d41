"""The loop's own cost, as ratios measured in one run.

    python bench/loop.py [--quick] [--run runs/latest] [--out bench/results/loop.json]

1. Rollout tokens per second through the whole rollout service (gRPC, buffer) against bare AsyncLLM with the same
   requests, the two taking turns.
2. The share of an iteration that is neither rollout nor training, from the run's metrics.jsonl.
3. Rollout time of an iteration without the token budget against with it, on long-tailed lengths.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "arithmetic"))

import tiny_model
from iteration_share import longest_others, measure_iteration_share
from rollout_ratio import measure_rollout_ratio
from tasks import sets
from token_budget import BudgetLoad, measure_budget_ratio, write_long_model

from perigee.reward.sources import Columns, read_source
from perigee.trainer.v1 import trainer_pb2
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder
from services.rollout.config import RolloutConfig

TARGETS = {"rollout_ratio": 0.90, "other_share": 0.10, "budget_iteration_ratio": 1.30}


def read_prompt_ids(path: Path, model: Path, count: int) -> list[list[int]]:
    """Returns token ids of the first prompts of a source, by the model's chat template where it has one."""
    lines = read_source(path, Columns(), "--prompts")[:count]
    encoder = open_encoder(open_model_folder(model, "--model"))
    if encoder.template is not None:
        encoder = open_encoder(encoder.model, trainer_pb2.ChatSettings(mode="always"))
    return encoder.encode([line.asked for line in lines], [line.place for line in lines])


def draw_prompts(count: int, seed: int) -> list[list[int]]:
    """Returns token ids of prompts of both domains."""
    rng, tokenizer = random.Random(seed), tiny_model.make_tokenizer()
    draws = (sets.draw_expression_problem, sets.draw_function_problem)
    return [tokenizer.encode(draws[index % 2](rng).prompt).ids for index in range(count)]


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures all figures; those of a run only when there is one."""
    quick = arguments.quick
    tiny_model.write_model(folder / "model", seed=0)
    trained = arguments.run / "model"
    model = arguments.model or (trained if (trained / "model.safetensors").exists() else folder / "model")
    settings = {"dtype": "float32", "max_num_seqs": arguments.max_num_seqs, "engine_threads": arguments.threads}
    results: dict[str, Any] = {"machine": {"cores": os.cpu_count()}, "targets": TARGETS, "settings": settings}

    (folder / "ratio").mkdir(parents=True, exist_ok=True)
    count = 48 if quick else 160
    prompts = read_prompt_ids(arguments.prompts, model, count) if arguments.prompts else draw_prompts(count, seed=0)
    ratio = await measure_rollout_ratio(
        folder / "ratio", RolloutConfig(model=str(model), **settings), prompts, 8, 32, turns=2 if quick else 5
    )
    results["rollout"] = {"model": str(model), "requests": len(prompts) * 8, **asdict(ratio), "ratio": ratio.ratio}

    if (arguments.run / "metrics.jsonl").exists():
        share = measure_iteration_share(arguments.run)
        phases = dict(longest_others(arguments.run))
        results["iteration"] = {**asdict(share), "other_share": share.median, "other_phases": phases}

    load = BudgetLoad(128, 128, 64, 900) if quick else BudgetLoad(256, 256, 128, 1900)
    write_long_model(folder / "long_model", load.mean_tokens, load.max_response_tokens)
    (folder / "budget").mkdir(parents=True, exist_ok=True)
    long_config = RolloutConfig(model=str(folder / "long_model"), **settings)
    budgets = await measure_budget_ratio(folder / "budget", long_config, load, rounds=2 if quick else 5)
    results["budget"] = {
        **asdict(load),
        "seconds_with": [round_.seconds for round_ in budgets.with_budget],
        "seconds_without": [round_.seconds for round_ in budgets.without_budget],
        "iteration_ratio": budgets.iteration_ratio,
        "finished_per_second_ratio": budgets.finished_ratio,
    }
    return results


def print_table(results: dict[str, Any]) -> None:
    """Prints the figures with their targets and sources."""
    rollout, budget = results["rollout"], results["budget"]
    rows = [
        (
            "rollout through the service / bare AsyncLLM",
            f"{rollout['ratio']:.2f}",
            ">= 0.90",
            f"{statistics.median(rollout['service']):.0f} / {statistics.median(rollout['bare']):.0f} tokens/s",
        ),
        (
            "iteration without the token budget / with it",
            f"{budget['iteration_ratio']:.2f}",
            ">= 1.30",
            f"{statistics.median(budget['seconds_without']):.2f} / {statistics.median(budget['seconds_with']):.2f} s, "
            f"{budget['finished_per_second_ratio']:.2f} times the responses per second",
        ),
    ]
    if iteration := results.get("iteration"):
        others = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in iteration["other_phases"].items())
        share = (
            f"{iteration['other_share']:.3f}",
            "<= 0.10",
            f"of {statistics.median(iteration['seconds']):.1f} s: {others}",
        )
        rows.insert(1, ("share of an iteration neither rollout nor training", *share))
    for name, measured, target, detail in rows:
        print(f"{name:<52} {measured:>6}  {target:>8}  {detail}")
    if "iteration" not in results:
        print("No run with metrics.jsonl: the share of an iteration needs one (--run).")


def main() -> None:
    """Measures, prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="Measures the loop's own cost.")
    parser.add_argument("--quick", action="store_true", help="fewer requests and turns: about two minutes")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/latest"), help="run folder to read, and its model to use"
    )
    parser.add_argument("--model", type=Path, help="model folder of the rollouts; the run's by default")
    parser.add_argument("--prompts", type=Path, help="prompt file of the rollouts, in that model's tokens")
    parser.add_argument("--out", type=Path, default=Path("bench/results/loop.json"), help="file for the figures")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences decoded at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of an engine's forward pass")
    parser.add_argument("--work", type=Path, help="folder for the services' data and logs, kept; else a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as folder:
        results = asyncio.run(measure(arguments, arguments.work or Path(folder)))
    print_table(results)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# EngineCore is spawned and imports this module again.
if __name__ == "__main__":
    main()
