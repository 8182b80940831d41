"""CPU and wall seconds to an accuracy, TRL's GRPO against Perigee, from the same warm-up model.

    python bench/trl.py [--seeds 0 1 2] [--rates 1e-4 2e-4 3e-4] [--accuracy 0.70] [--out bench/results/trl.json]

For each seed: the supervised stages of examples/arithmetic make a model; Perigee trains it by the recipe with PERIGEE's
changes, then TRL by `trl_grpo.py`, with the same prompts, curriculum and reward service, the learning rate being the
fastest of `--rates` on the first seed. PERIGEE's changes were chosen on seed 0; of TRL's settings the learning rate
alone is tried, and it generates with transformers (`use_vllm` is off, its default), Perigee with vLLM.

Either side computes on one thread at a time in its trainer and its engine, and is evaluated about every 250 groups.
What counts is the time of all processes of a side from its first iteration on, without evaluations, until 256 held-out
problems, two samples each, reach the accuracy; between two evaluations it is interpolated. What starts the services and
loads the models is left out on both sides. The file of figures is written after each training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

RECIPE = Path(__file__).parents[1] / "examples" / "arithmetic"
PROBLEMS, SAMPLES = 256, 2
# So that no right program is late where the machine is busy; the recipe's limit of CPU time stays.
WALL_MS = 20_000
# More than an evaluation takes: one under way when the CPU seconds have run out may end.
EVALUATION_CPU_S = 15.0
POLL_S = 0.1
# Four standard errors of an evaluation.
MOST_APART = 0.1
# About as many groups an update as TRL has: the recipe's 160 take more CPU seconds for the same accuracy. A budget
# that most responses end within, so that few are prefilled again under new weights.
PERIGEE = {"run.max_live_groups": 48, "run.rollout.token_budget": 48}


@dataclass
class Curve:
    """Accuracies of a training with the CPU and wall seconds spent before each, and when it reached the one wanted."""

    accuracies: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def seconds_to(self, accuracy: float, seconds: list[float]) -> float | None:
        """Returns the seconds at the first crossing; None when the accuracy was not reached."""
        for index, value in enumerate(self.accuracies):
            if value >= accuracy and index == 0:
                return 0.0
            if value >= accuracy:
                before = self.accuracies[index - 1]
                share = (accuracy - before) / (value - before)
                return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])
        return None


def measure_cpu_s(root: psutil.Process) -> float:
    """Returns the CPU seconds of a process, its descendants and those of them that have ended."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def follow(process: subprocess.Popen[bytes], evaluations: Path, accuracy: float, max_cpu_s: float) -> Curve:
    """Reads evaluations as they are written until one reaches the accuracy or CPU seconds run out; ends the process.

    A line of the file has `seconds`, how long the evaluation took, and the accuracy. Raises RuntimeError when the
    process fails.
    """
    root = psutil.Process(process.pid)
    curve = Curve()
    history: list[tuple[float, float]] = []
    spent_cpu = spent_wall = 0.0
    start: tuple[float, float] | None = None
    while process.poll() is None:
        time.sleep(POLL_S)
        now, cpu = time.monotonic(), measure_cpu_s(root)
        history.append((now, cpu))
        lines = evaluations.read_text(encoding="utf-8").splitlines() if evaluations.exists() else []
        if len(lines) > len(curve.accuracies):
            line = json.loads(lines[len(curve.accuracies)])
            began = now - line["seconds"]
            began_cpu = max((cpu for at, cpu in history if at <= began), default=0.0)
            if start is not None:
                curve.cpu_s.append(began_cpu - start[1] - spent_cpu)
                curve.wall_s.append(began - start[0] - spent_wall)
                spent_cpu, spent_wall = spent_cpu + cpu - began_cpu, spent_wall + now - began
            else:
                start = (now, cpu)
                curve.cpu_s.append(0.0)
                curve.wall_s.append(0.0)
            curve.accuracies.append(line["accuracy"]["overall"]["sampled"]["mean"])
            print(f"    {curve.cpu_s[-1]:7.1f} CPU s {curve.wall_s[-1]:7.1f} s  {curve.accuracies[-1]:.3f}", flush=True)
        reached = bool(curve.accuracies) and curve.accuracies[-1] >= accuracy
        if reached or (start is not None and cpu - start[1] - spent_cpu > max_cpu_s + EVALUATION_CPU_S):
            process.terminate()
            process.wait(120)
            return curve
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, process.args))} failed: see {evaluations.parent}")
    return curve


def perigee(*arguments: str | Path) -> list[str]:
    """Returns the command line of `perigee` with this interpreter."""
    return [sys.executable, "-m", "perigee.cli.main", *map(str, arguments)]


def warm_up(folder: Path, seed: int) -> Path:
    """Returns the folder of a run of the recipe's supervised stages, with `model` and `data` in it."""
    runs = folder / f"warm-up-{seed}"
    if (runs / "latest" / "model").exists():
        return (runs / "latest").resolve()
    command = perigee("train", RECIPE, "--plain", "--seed", str(seed), "--runs-dir", runs, "--set", "run.iterations=0")
    command += ["--set", "run.evaluation={samples: 1, end_problems: 1}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (runs / "latest").resolve()


def train_perigee(folder: Path, warm: Path, seed: int, options: argparse.Namespace) -> Curve:
    """Trains by the recipe with PERIGEE's changes, without its supervised stages."""
    runs = folder / f"perigee-{seed}"
    model = warm / "model"
    evaluation = f"every: {options.every}, samples: {SAMPLES}, problems: {PROBLEMS}, end_problems: {PROBLEMS}"
    values = PERIGEE | {
        "run.sft": "[]",
        "sandbox.default_limits.wall_ms": WALL_MS,
        "run.model": model,
        "rollout.model": model,
        "trainer.model": model,
        "trainer.threads": options.threads,
        "run.evaluation": f"{{{evaluation}, greedy: false}}",
    }
    command = perigee("train", RECIPE, "--plain", "--seed", str(seed), "--runs-dir", runs)
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    with (folder / f"perigee-{seed}.log").open("wb") as log, end_of(subprocess.Popen(command, stdout=log)) as process:
        return follow(process, runs / "latest" / "evaluations.jsonl", options.accuracy, options.max_cpu_s)


def train_trl(folder: Path, warm: Path, seed: int, rate: float, options: argparse.Namespace, max_cpu_s: float) -> Curve:
    """Trains with TRL beside Perigee's reward service and sandbox, whose CPU time counts, too."""
    out = folder / f"trl-{seed}-{rate:g}"
    out.mkdir()
    command = [
        sys.executable,
        "-P",  # else `import trl` finds this file
        Path(__file__).parent / "trl_grpo.py",
        "--model",
        warm / "model",
        "--data",
        warm / "data",
    ]
    command += ["--rate", rate, "--seed", seed, "--out", out, "--problems", PROBLEMS, "--samples", SAMPLES]
    command += ["--threads", options.threads, "--every", options.trl_every, "--wall-ms", WALL_MS]
    with (out / "log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        with end_of(process):
            return follow(process, out / "evaluations.jsonl", options.accuracy, max_cpu_s)


@contextlib.contextmanager
def end_of(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends the process when the block is left in any way."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains both sides for every seed, TRL with every rate for the first, and returns all curves."""
    results: dict[str, Any] = {"machine": describe_machine(), "accuracy": options.accuracy, "seeds": []}
    rates = list(options.rates)
    for seed in options.seeds:
        print(f"seed {seed}: supervised stages", flush=True)
        warm = warm_up(folder, seed)
        print("  Perigee", flush=True)
        ours = train_perigee(folder, warm, seed, options)
        found: dict[str, Any] = {"seed": seed, "perigee": asdict(ours), "trl": {}}
        results["seeds"].append(found)
        write(options.out, results)
        theirs: dict[float, Curve] = {}
        for rate in rates:
            print(f"  TRL, learning rate {rate:g}", flush=True)
            # A rate that is slower than another is of no interest.
            fastest = min(
                (cpu_s for each in theirs.values() if (cpu_s := _cpu_s(each, options.accuracy))), default=None
            )
            theirs[rate] = train_trl(folder, warm, seed, rate, options, fastest or options.max_cpu_s)
            found["trl"][f"{rate:g}"] = asdict(theirs[rate])
            check_start(ours, theirs[rate])
            best = min(theirs, key=lambda rate: _order(theirs[rate], options.accuracy))
            found |= {"rate": best} | _ratios(ours, theirs[best], options.accuracy)
            write(options.out, results)
        rates = [best]
    return results


def check_start(ours: Curve, theirs: Curve) -> None:
    """Raises RuntimeError where one side answers far better with the model that both begin with: they ask otherwise."""
    if abs(ours.accuracies[0] - theirs.accuracies[0]) > MOST_APART:
        raise RuntimeError(f"one model has accuracies {ours.accuracies[0]:.3f} and {theirs.accuracies[0]:.3f}")


def _cpu_s(curve: Curve, accuracy: float) -> float | None:
    """Returns the CPU seconds to the accuracy; None when it was not reached."""
    return curve.seconds_to(accuracy, curve.cpu_s)


def _order(curve: Curve, accuracy: float) -> float:
    """Returns the CPU seconds to the accuracy; of a training that did not reach it, later ones for lower accuracies."""
    found = _cpu_s(curve, accuracy)
    return 1e9 * (1.0 - max(curve.accuracies)) if found is None else found


def _ratios(ours: Curve, theirs: Curve, accuracy: float) -> dict[str, Any]:
    """Returns TRL / Perigee in CPU and wall seconds; None where Perigee did not reach the accuracy.

    A bound from below where TRL did not.
    """
    found: dict[str, Any] = {"trl_reached": theirs.seconds_to(accuracy, theirs.cpu_s) is not None}
    for name in ("cpu_s", "wall_s"):
        own = ours.seconds_to(accuracy, getattr(ours, name))
        other = theirs.seconds_to(accuracy, getattr(theirs, name))
        found[f"{name}_ratio"] = (getattr(theirs, name)[-1] if other is None else other) / own if own else None
        found[f"perigee_{name}"], found[f"trl_{name}"] = own, other
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Compares, prints a line per seed and the medians."""
    parser = argparse.ArgumentParser(description="TRL's GRPO against Perigee on examples/arithmetic.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 3e-4], help="learning rates of TRL")
    parser.add_argument("--accuracy", type=float, default=0.70, help="held-out sampled accuracy to reach")
    parser.add_argument("--threads", type=int, default=1, help="threads of TRL's process and of Perigee's trainer")
    parser.add_argument("--every", type=int, default=5, help="iterations of Perigee between evaluations")
    parser.add_argument("--trl-every", type=int, default=8, help="optimizer steps of TRL between evaluations")
    parser.add_argument("--max-cpu-s", type=float, default=600.0, help="CPU seconds after which a training is given up")
    parser.add_argument("--out", type=Path, default=Path("bench/results/trl.json"), help="file for the figures")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for models, runs and logs, kept; supervised stages that are in it are not run again; else a "
        "temporary one",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = compare(options, folder)
    for each in results["seeds"]:
        print(f"seed {each['seed']}: {describe(each)}")
    reached = [each for each in results["seeds"] if each["cpu_s_ratio"]]
    for name in ("cpu_s", "wall_s") if reached else ():
        print(f"median of {name}: {statistics.median(each[f'{name}_ratio'] for each in reached):.2f}")


def describe(found: dict[str, Any]) -> str:
    """Returns a seed's result as a line."""
    if not found["cpu_s_ratio"]:
        return "Perigee did not reach the accuracy"
    bound = "" if found["trl_reached"] else " at least"
    return f"TRL / Perigee{bound} {found['cpu_s_ratio']:.2f} CPU, {found['wall_s_ratio']:.2f} wall"


if __name__ == "__main__":
    main()
