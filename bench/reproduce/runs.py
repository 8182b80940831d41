"""Runs of the arms, one for each seed: begun, gone on with, and read into results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import psutil

from bench.reproduce.arms import ARMS, LONG_TO_SHORT, RECIPES, VALUE_HEAD, Arm, digest
from bench.reproduce.curves import RESULTS, Curve, Point
from perigee.cli.run_folder import find_stack
from perigee.config import read_yaml
from perigee.files import read_lines, write_atomically
from perigee.report.records import Iteration, read_records

RUNS = Path("runs/reproduce")
PERIGEE = str(Path(sys.executable).with_name("perigee"))


def run_arms(arms: Sequence[Arm], seed: int) -> Iterator[tuple[Arm, Curve]]:
    """Trains arms to their ends, one after another on one stack of services for each warm-up; yields their curves.

    What an earlier call finished is kept, and what it began goes on. Raises CalledProcessError when a run fails.
    """
    by_warmup: dict[str, list[Arm]] = {}
    for arm in arms:
        if not arm.warmup:
            yield arm, read_curve(metered_train(Run(arm, seed)))
        elif arm is VALUE_HEAD:
            yield arm, train_value_head(arm, seed)
        elif arm not in LONG_TO_SHORT:
            by_warmup.setdefault(arm.warmup, []).append(arm)
    if any(arm in LONG_TO_SHORT for arm in arms):
        yield from ((ARMS[name], curve) for name, curve in shorten(seed).items())
    for name, group in by_warmup.items():
        warmup = metered_train(Run(ARMS[name], seed))
        yield ARMS[name], read_curve(warmup)
        with ExitStack() as stack:
            coordinator = None
            for run in (Run(arm, seed, warmup) for arm in group):
                with metering(run.folder):
                    if coordinator is None and not run.is_finished:
                        coordinator = stack.enter_context(standing_stack(run))
                    folder = train(run, coordinator)
                yield run.arm, read_curve(folder)


@contextmanager
def metering(folder: Path) -> Iterator[None]:
    """Adds the CPU seconds that the processes below this one take in the block to `cpu.json` of a folder."""
    before = cpu_seconds()
    try:
        yield
    finally:
        path = folder / "cpu.json"
        earlier = json.loads(path.read_text()) if path.is_file() else 0.0
        write_atomically(path, json.dumps(round(earlier + cpu_seconds() - before, 1)).encode())


def cpu_seconds() -> float:
    """Returns the CPU seconds of all processes below this one, those that ended and were waited for included."""
    own = psutil.Process().cpu_times()
    total = own.children_user + own.children_system
    for process in psutil.Process().children(recursive=True):
        # A process that ends meanwhile counts among the children of its parent.
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


@dataclass(frozen=True)
class Run:
    """An arm on a seed, from the run folder of its warm-up; a warm-up itself has none."""

    arm: Arm
    seed: int
    warmup: Path | None = None

    @property
    def recipe(self) -> Path:
        """The recipe that it changes."""
        return RECIPES / self.arm.recipe

    @property
    def overrides(self) -> list[str]:
        """What it changes: name, model, problem sets, and the arm's own changes."""
        if self.warmup is None:
            return [f"name={self.arm.name}", *self.arm.changes]
        files = [f"run.{key}={json.dumps(f'{self.warmup}/data/{key}.jsonl')}" for key in ("prompts", "heldout")]
        return [f"name={self.arm.name}", f"model={json.dumps(f'{self.warmup}/model')}", *files, *self.arm.changes]

    @property
    def folder(self) -> Path:
        """The folder of its runs, of which there is one: other settings have another folder."""
        return RUNS / f"seed-{self.seed}" / f"{self.arm.name}-{digest([read_yaml(self.recipe), self.overrides])}"

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return (self.folder / "latest" / "summary.json").is_file()


def train(run: Run, coordinator: str | None = None) -> Path:
    """Trains a run to its end, unless it was; returns its run folder. Raises CalledProcessError when it fails."""
    latest = run.folder / "latest"
    if not run.is_finished:
        begun = (latest / "recipe.yaml").is_file()
        print(f"{run.arm.name}, seed {run.seed}: {'going on' if begun else 'training'} in {run.folder}", flush=True)
        what = ["--resume", "latest"] if begun else [str(run.recipe), "--seed", str(run.seed), *sets(run.overrides)]
        where = ["--coordinator", coordinator] if coordinator else []
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [PERIGEE, "train", *what, *where, "--plain", "--runs-dir", str(run.folder)]
        with open(run.folder / "train.log", "ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return latest.resolve()


def metered_train(run: Run) -> Path:
    """Trains a run with services of its own; returns its run folder."""
    with metering(run.folder):
        return train(run)


def train_value_head(arm: Arm, seed: int) -> Curve:
    """Trains a value head on the examples of the chain-of-thought judge; returns a curve of its last evaluation.

    Accuracy is that at a score of one half: the threshold that was fitted on the same responses is not used.
    """
    judge = metered_train(Run(ARMS[arm.warmup], seed))
    out = judge / arm.name
    data = judge / "data"
    sets_of_examples = ["--data", str(data / "labelled.jsonl"), "--eval-data", str(data / "labelled_heldout.jsonl")]
    models = ["--backbone", str(data / "model"), "--out", str(out), "--seed", str(seed)]
    begun = ["--resume"] if (out / "checkpoints").is_dir() else []
    with metering(out), open(judge / "value_head.log", "ab") as log:
        command = [PERIGEE, "reward", "train", *sets_of_examples, *models, *begun, *sets(arm.changes)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    spent = json.loads((out / "cpu.json").read_text(encoding="utf-8"))
    last = json.loads((out / "evaluations.json").read_text(encoding="utf-8"))[-1]
    return Curve([Point(0, 0, 0, {"overall": round(last["accuracy_at_half"], 4)}, 0.0)], [], [], spent)


def shorten(seed: int) -> dict[str, Curve]:
    """Trains a long and a short model of one warm-up and shortens the long one in four ways; returns curves by arm."""
    warmup = metered_train(Run(ARMS["warmup_styles"], seed))
    long, short = (metered_train(Run(ARMS[name], seed, warmup)) for name in ("long", "short"))
    place = RUNS / f"seed-{seed}" / "long2short"
    place.mkdir(parents=True, exist_ok=True)
    models = sets([f"run.seed={seed}", f"long2short.long={long}", f"long2short.short={short}"])
    command = [PERIGEE, "long2short", str(RECIPES / LONG_TO_SHORT[0].recipe), *models, "--out", str(place), "--plain"]
    with metering(place), open(place / "long2short.log", "ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    trained = {name: read_curve(run) for name, run in (("warmup_styles", warmup), ("long", long), ("short", short))}
    spent = json.loads((place / "cpu.json").read_text(encoding="utf-8"))
    return trained | read_comparison(place / "comparison.json", spent)


def read_comparison(path: Path, cpu_seconds: float) -> dict[str, Curve]:
    """Reads the models that `perigee long2short` compared, each a curve of one point, by arm.

    The CPU seconds of the whole pipeline are divided among them in equal parts.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {
        f"long2short_{row['name']}": Curve(
            [Point(0, 0, 0, {"overall": round(row["accuracy"]["mean"], 4)}, round(row["tokens"]["mean"], 2))],
            [],
            [],
            round(cpu_seconds / len(rows), 1),
        )
        for row in rows
    }


@contextmanager
def standing_stack(run: Run) -> Iterator[str]:
    """Starts the services with the model of a run, for it and for others; yields the coordinator's address.

    Checkpoints and buffer outlive the stack, so that a run that was interrupted goes on in the next one. Raises
    CalledProcessError when the stack ends before it is up.
    """
    assert run.warmup is not None
    place = RUNS.absolute() / f"seed-{run.seed}" / f"stack-{run.warmup.name}"
    kept = [f"trainer.run_path={place}/trainer", f"buffer.data_path={place}/buffer", f"trainer.seed={run.seed}"]
    command = [PERIGEE, "up", str(run.recipe), *sets([*run.overrides, *kept]), "--runs-dir", str(place)]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "up.log", "ab") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as stack:
        try:
            while (found := find_stack(place)) is None or "coordinator" not in found[1].addresses:
                if (code := stack.poll()) is not None:
                    raise subprocess.CalledProcessError(code, command)
                time.sleep(0.5)
            yield found[1].addresses["coordinator"]
        finally:
            stack.terminate()


def sets(overrides: Iterable[str]) -> list[str]:
    """Returns overrides as arguments of `perigee`."""
    return [part for override in overrides for part in ("--set", override)]


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
        json.loads((run.parent / "cpu.json").read_text(encoding="utf-8")),
    )


def spending(iterations: Sequence[Iteration]) -> list[tuple[int, int]]:
    """Returns the responses that finished and the tokens that were sampled before the end of each iteration, from 0."""
    responses = accumulate((int(row.values["rollout/finished"]) for row in iterations), initial=0)
    tokens = accumulate((int(row.values["rollout/tokens"]) for row in iterations), initial=0)
    return list(zip(responses, tokens, strict=True))


def record(arm: Arm, seed: int, curve: Curve) -> None:
    """Writes the curve into the arm's results, beside those of the other seeds."""
    path = RESULTS / f"{arm.name}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    seeds = results["seeds"] if results.get("settings") == arm.settings else {}
    seeds = dict(sorted((seeds | {str(seed): asdict(curve)}).items()))
    values = {"arm": arm.name, "changes": arm.changes, "settings": arm.settings, "seeds": seeds}
    text = json.dumps(values, separators=(",", ":"))
    write_atomically(path, f"{text}\n".encode())
