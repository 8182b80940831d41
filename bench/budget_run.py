"""Whole iterations with the token budget against without it, training included, on long-tailed lengths.

    python -m bench.budget_run [--median 125] [--budget 256] [--groups-with-budget 32] [--rounds 3]

Two runs on one local stack, one without a budget and one with it; they take turns, a few iterations each. Coordinator,
buffer, trainer and both vLLM workers are the real ones, as processes of one thread each; the tiny model of
examples/arithmetic with random weights samples the responses. Forced are their lengths (bench/forced_lengths.py),
lognormal, cut at 16 medians, of both runs the same. Not counted are the first iteration of each turn, whose weights are
those of another run, and those of the run with a budget until the ages of its trajectories are mixed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bench.long_tail import read_costs
from bench.machine import describe_machine
from bench.token_costs import write_tiny_model
from perigee.cli.recipe import load_recipe, open_new_run
from perigee.cli.stack import LocalStack, plan_stack
from perigee.cli.train import Cursor, check_end, start_run, watch_run
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2

CAP_MEDIANS = 16
PROMPTS = 256
GROUP_SIZE = 8
# Longest prompt, in tokens, and what an engine keeps for a token: keys and values of the tiny model in float32.
PROMPT_ROOM = 64
TOKEN_BYTES = 1536


@dataclass(frozen=True)
class Turn:
    """Some iterations of a run."""

    seconds: tuple[float, ...]
    """Of each iteration, all of it."""
    rollout: tuple[float, ...]
    training: tuple[float, ...]
    trained: tuple[int, ...]
    """Trajectories trained."""
    trained_tokens: tuple[int, ...]
    sampled_tokens: tuple[int, ...]
    prefilled_tokens: tuple[int, ...]

    @property
    def iteration(self) -> float:
        """Mean seconds of an iteration."""
        return statistics.mean(self.seconds)

    @property
    def speed(self) -> float:
        """Tokens of trained responses per second."""
        return sum(self.trained_tokens) / sum(self.seconds)


def write_recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """Writes model, prompts, the runs' folders, and the recipe of the stack and of the run without a budget."""
    write_tiny_model(folder / "model", CAP_MEDIANS * arguments.median + PROMPT_ROOM)
    rule = {"verifier": "regex", "search_response": True, "pattern": "^[0-9a-m]", "difficulty": 1.0}
    lines = [json.dumps({"id": f"p{number}", "prompt": f"{number}+{number}="} | rule) for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    (folder / "heldout.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    cap = CAP_MEDIANS * arguments.median
    values: dict[str, Any] = {
        "name": "budget",
        "model": str(folder / "model"),
        "run": {
            "prompts": str(folder / "prompts.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "iterations": 0,
            "max_live_groups": arguments.groups,
            "group_size": GROUP_SIZE,
            "rollout": {
                "max_response_tokens": cap,
                "costs": read_costs(arguments.costs).token_costs(arguments.capacity).model_dump(),
            },
            "drop_uniform_groups": False,
            "update": {"minibatches": 2, "max_tokens_per_microbatch": 4096, "max_staleness": 64},
            "optimizer": {"learning_rate": 1e-6},
            "evaluation": {"every": 0, "samples": 1},
        },
        "rollout": {
            "dtype": "float32",
            "max_num_seqs": arguments.capacity,
            "kv_cache_bytes": arguments.capacity * (cap + PROMPT_ROOM) * TOKEN_BYTES,
            "engine_threads": 1,
        },
        "trainer": {"dtype": "float32", "data_parallel": arguments.workers, "threads": 1},
    }
    for name in ("without", "with"):
        (folder / name).mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's iterations; none before it has begun."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


async def go_on(
    client: CoordinatorClient, folder: Path, section: Mapping[str, Any], iterations: int
) -> list[dict[str, Any]]:
    """Runs so many iterations more, and one before them; returns their records."""
    before = len(read_lines(folder))
    config_yaml = yaml.safe_dump({**section, "iterations": before + 1 + iterations})
    request = coordinator_pb2.StartRunRequest(run_id=folder.name, config_yaml=config_yaml, run_path=str(folder))
    await start_run(client, request, print)
    async for event in watch_run(client, request, Cursor(), print):
        snapshot = event.run
    check_end(snapshot)
    return read_lines(folder)[before + 1 :]


def read_turn(lines: Sequence[Mapping[str, Any]]) -> Turn:
    """Returns the figures of iterations."""

    def column(name: str) -> tuple[Any, ...]:
        return tuple(line[name] for line in lines)

    return Turn(
        seconds=column("time/iteration_seconds"),
        rollout=column("time/rollout/seconds"),
        # An iteration in which no group is complete has no such phase.
        training=tuple(line.get("time/training/seconds", 0.0) for line in lines),
        trained=column("train/trajectories"),
        trained_tokens=column("train/tokens"),
        sampled_tokens=column("rollout/tokens"),
        prefilled_tokens=column("rollout/prefilled_tokens"),
    )


def show(values: Sequence[float]) -> str:
    """Returns the median, with the least and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--median", type=int, default=125)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--groups-with-budget", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--capacity", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6, help="with the budget, of a turn")
    parser.add_argument("--iterations-without", type=int, default=2)
    parser.add_argument("--run-in", type=int, default=12, help="iterations with the budget that mix the ages first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--costs", type=Path, default=Path(__file__).parent / "costs" / "tiny-cpu.json")
    parser.add_argument("--out", type=Path, default=Path("bench/results/budget_run.json"))
    return parser.parse_args()


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Turn]]:
    """Returns the turns of each run."""
    run, recipe = open_new_run(folder / "runs", load_recipe(write_recipe(folder, arguments)))
    lengths = [str(arguments.median), str(arguments.sigma)]
    specs = [
        replace(spec, command=[sys.executable, "-m", "bench.forced_lengths", *lengths, *spec.command[3:]])
        if spec.service == "rollout"
        else spec
        for spec in plan_stack(run, recipe.values, arguments.workers)
    ]
    without: dict[str, Any] = dict(recipe.values["run"])
    with_budget = copy.deepcopy(without) | {"max_live_groups": arguments.groups_with_budget}
    with_budget["rollout"]["token_budget"] = arguments.budget
    turns: dict[str, list[Turn]] = {"without": [], "with": []}
    [address] = [spec.address for spec in specs if spec.service == "coordinator"]
    async with LocalStack(run, specs, print), CoordinatorClient.connect(address) as client:
        # What the run began with has ended by then, and with it most groups whose long responses came late.
        await go_on(client, folder / "with", with_budget, arguments.run_in)
        for number in range(arguments.rounds):
            for name, section, iterations in (
                ("without", without, arguments.iterations_without),
                ("with", with_budget, arguments.iterations),
            ):
                turn = read_turn(await go_on(client, folder / name, section, iterations))
                turns[name].append(turn)
                rollout, training = statistics.mean(turn.rollout), statistics.mean(turn.training)
                seconds = f"{turn.iteration:.2f} s (rollout {rollout:.2f}, training {training:.2f})"
                print(f"{number} {name}: {seconds}, {turn.speed:.0f} tokens/s", flush=True)
    return turns


def main() -> None:
    """Runs, prints and writes."""
    arguments = parse()
    load = describe_machine()
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as path:
        turns = asyncio.run(measure(arguments, Path(path)))
    pairs = list(zip(turns["without"], turns["with"], strict=True))
    ratios = {
        "iteration without / with": [without.iteration / with_.iteration for without, with_ in pairs],
        "trained tokens per second with / without": [with_.speed / without.speed for without, with_ in pairs],
    }
    for name, values in ratios.items():
        print(f"{name}: {show(values)}")
    figures = {
        "command": " ".join(["python -m bench.budget_run", *sys.argv[1:]]),
        "machine": load,
        "ratios": ratios,
        "turns": {name: [asdict(turn) for turn in each] for name, each in turns.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
