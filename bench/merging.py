"""Memory and CPU time of merging model folders, by method.

    python -m bench.merging MODEL MODEL [--base MODEL] [--methods linear slerp ties task_arithmetic]

Each method runs in a process of its own, which counts from the time when everything is imported: the growth of its
resident memory at most (VmHWM: its own pages and those of mapped files), beside the largest shard of the first model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perigee.cli.merge.folders import open_source, plan_merge, write_merged
from perigee.cli.merge.methods import BASED, METHODS, MergeSettings


def read_status(key: str) -> int:
    """Returns the bytes under a key of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def measure(models: list[str], base: str | None, method: str, out: Path) -> str:
    """Merges in this process; returns a row of the table."""
    source = open_source(models[0], Path(models[0]), "MODEL")
    shard = max(tensor.path.stat().st_size for tensor in source.tensors.values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, cpu, wall = read_status("VmRSS"), time.process_time(), time.monotonic()
    settings = MergeSettings(method, (1.0,) * len(models))  # type: ignore[arg-type]  # checked there
    write_merged(plan_merge(models, base if method in BASED else None, settings), out / "merged", lambda _: None)
    cpu, wall, grown = time.process_time() - cpu, time.monotonic() - wall, read_status("VmHWM") - before
    return f"| {method} | {grown / 1e6:.0f} MB | {grown / shard:.2f} | {cpu:.1f} s | {wall:.1f} s |"


def main() -> None:
    """Prints a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--base")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            print(measure(options.models, options.base, options.methods[0], Path(folder)))
        return
    print("| method | memory grown by | of a shard | CPU | wall |\n|---|---|---|---|---|", flush=True)
    base = ["--base", options.base] if options.base else []
    for method in options.methods:
        command = [sys.executable, "-m", "bench.merging", *options.models, *base, "--methods", method, "--in-process"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
