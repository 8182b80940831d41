"""A run on shared devices: what it learns, seconds of each stage of an iteration, and memory of trainer and worker.

    python -m bench.hybrid_run sleep [--recipe examples/arithmetic] [--set run.iterations=3] [--interval 1]

Trains a recipe with one worker, its engine in this residence while the trainer trains, and samples the memory of both
process trees. Prints JSON: medians over the iterations that trained, without the first; whether each of these went
through all stages in their order; accuracies; what failed; the peak of both trees, together and each by itself. Exit
status 1 when an iteration left a stage out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.pair_memory import find_children, list_tree, sampling

MIB = 1 << 20
STAGES = ("rollout", "scoring", "leave", "onload", "training", "checkpoint", "convert", "offload", "weights")


async def train(options: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Trains, and returns the memory."""
    sets = ["run.deployment=hybrid", f"run.hybrid.engine={options.residence}", *options.sets]
    command = [sys.executable, "-m", "perigee.cli.main", "train", options.recipe, "--runs-dir", str(runs)]
    process = await asyncio.create_subprocess_exec(*command, *(word for each in sets for word in ("--set", each)))
    async with AsyncExitStack() as stack:
        ended = asyncio.create_task(process.wait())
        pids: Sequence[int | None] = [None]
        while None in pids and not ended.done():
            await asyncio.wait([ended], timeout=options.interval)
            pids = await asyncio.to_thread(find_services, process.pid, ("trainer", "rollout"))
        peaks = await stack.enter_async_context(sampling(pids[0] or 0, pids[1] or 0, options.interval))
        if await ended:
            sys.exit(f"the run failed with exit code {process.returncode}")
    return {
        "samples": peaks.samples,
        "pair_peak_mib": peaks.pair // MIB,
        "trainer_peak_mib": peaks.trainer // MIB,
        "worker_peak_mib": peaks.worker // MIB,
    }


def find_services(root: int, names: Sequence[str]) -> list[int | None]:
    """Returns the processes of services below a process; None for one that is not there."""
    found: dict[str, int] = {}
    for pid in list_tree(root, find_children()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The guard above it has the service's command behind its own.
        if words[1:2] == ["-m"] and words[2].startswith("services."):
            found.setdefault(words[2].removeprefix("services."), pid)
    return [found.get(name) for name in names]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def goes_through(line: Mapping[str, Any], stages: Sequence[str]) -> bool:
    """Returns whether an iteration has the stages in this order."""
    starts = [line.get(f"time/{stage}/start") for stage in stages]
    return None not in starts and starts == sorted(starts)  # type: ignore[type-var]


def read_run(run: Path) -> dict[str, Any]:
    """Returns what a run's files tell."""
    lines, summary = read_lines(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text(encoding="utf-8"))
    trained = [line for line in lines if line["train/groups"]]
    timed = trained[1:] or trained
    names = [*(f"{stage}/seconds" for stage in STAGES), "iteration_seconds"]
    return {
        "iterations": len(lines),
        "trained": len(trained),
        "whole": sum(goes_through(line, STAGES) for line in trained),
        "seconds": {name: statistics.median(line[f"time/{name}"] for line in timed) for name in names},
        "failures": sum(line["rollout/failures"] + line["reward/failures"] for line in lines),
        "events": [event["event"] for line in lines for event in line["events"]],
        "tokens": summary["tokens_generated"],
        "logprob_diff_max": summary["train_infer_logprob_diff_max"],
        "accuracy": {kind: summary[f"accuracy_{kind}"] for kind in ("baseline", "final")},
        "total_seconds": summary["seconds"],
    }


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("residence", choices=("keep", "sleep", "restart"))
    parser.add_argument("--recipe", default="examples/arithmetic")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples of the memory")
    parser.add_argument("--out", type=Path, help="file for the figures; bench/results/hybrid-run-RESIDENCE.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        memory = asyncio.run(train(options, Path(path)))
        found = {"residence": options.residence} | read_run(Path(path) / "latest") | {"memory": memory}
    text = json.dumps(found, indent=2)
    out = options.out or Path(f"bench/results/hybrid-run-{options.residence}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if found["whole"] < found["trained"]:
        sys.exit(f"{found['trained'] - found['whole']} iterations did not go through all stages")


if __name__ == "__main__":
    main()
