"""Runs of the arms, one for each seed: begun, gone on with, and read into results."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from bench.reproduce.arms import ARMS, Arm
from bench.reproduce.curves import RESULTS, Curve, Point
from perigee.config import read_yaml
from perigee.files import read_lines, write_atomically
from perigee.report.records import Iteration, read_records

HERE = Path(__file__).parent
RUNS = Path("runs/reproduce")


def run_arm(arm: Arm, seed: int) -> Path:
    """Trains an arm to its end, going on where an earlier call was ended; returns the run folder.

    Raises CalledProcessError when `perigee train` fails; its run folder has the logs.
    """
    warmup = run_arm(ARMS[arm.warmup], seed) if arm.warmup else None
    recipe, overrides = HERE / arm.recipe, [*place_overrides(arm, warmup), *arm.changes]
    runs = RUNS / f"seed-{seed}" / f"{arm.name}-{digest(recipe, overrides)}"
    latest = runs / "latest"
    if (latest / "summary.json").is_file():
        return latest.resolve()
    begun = (latest / "recipe.yaml").is_file()
    what = ["--resume", "latest"] if begun else [str(recipe), "--seed", str(seed)]
    sets = [] if begun else [part for override in overrides for part in ("--set", override)]
    print(f"{arm.name}, seed {seed}: {'going on' if begun else 'training'} in {runs}", flush=True)
    command = [
        str(Path(sys.executable).with_name("perigee")),
        "train",
        *what,
        "--plain",
        "--runs-dir",
        str(runs),
        *sets,
    ]
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / "train.log", "ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return latest.resolve()


def place_overrides(arm: Arm, warmup: Path | None) -> list[str]:
    """Returns the overrides that name an arm's run, its model and its problem sets."""
    if warmup is None:
        return [f"name={arm.name}"]
    files = [f"run.{key}={json.dumps(str(warmup / 'data' / f'{key}.jsonl'))}" for key in ("prompts", "heldout")]
    return [f"name={arm.name}", f"model={json.dumps(str(warmup / 'model'))}", *files]


def digest(recipe: Path, overrides: list[str]) -> str:
    """Returns what tells the runs of other settings apart."""
    text = json.dumps([read_yaml(recipe), overrides], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_curve(run: Path) -> Curve:
    """Reads the curve of a run."""
    records = read_records(run)
    spent = spending(records.iterations)
    lengths = {row["iteration"]: row["response_tokens"]["sampled"] for row in read_lines(run / "evaluations.jsonl")}
    return Curve(
        [
            Point(
                each.iteration,
                *spent[each.iteration],
                {domain: round(interval.mean, 4) for domain, interval in each.sampled.items()},
                lengths[each.iteration],
            )
            for each in records.evaluations
        ],
        [row.get("reward/mean") for row in records.iterations],
        [row.get("rollout/response_tokens/mean") for row in records.iterations],
    )


def spending(iterations: Sequence[Iteration]) -> list[tuple[int, int]]:
    """Returns the responses that finished and the tokens that were sampled before the end of each iteration, from 0."""
    responses = accumulate((int(row.get("rollout/finished") or 0) for row in iterations), initial=0)
    tokens = accumulate((int(row.get("rollout/tokens") or 0) for row in iterations), initial=0)
    return list(zip(responses, tokens, strict=True))


def record(arm: Arm, seed: int, curve: Curve) -> None:
    """Writes the curve into the arm's results, beside those of the other seeds."""
    path = RESULTS / f"{arm.name}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    seeds = results.get("seeds", {}) if results.get("changes") == list(arm.changes) else {}
    seeds = dict(sorted((seeds | {str(seed): asdict(curve)}).items()))
    text = json.dumps({"arm": arm.name, "changes": arm.changes, "seeds": seeds}, separators=(",", ":"))
    write_atomically(path, f"{text}\n".encode())
