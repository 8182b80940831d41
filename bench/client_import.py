"""Prints how long the clients take to import, in a new interpreter each time.

    .venv/bin/python bench/client_import.py [--times 20]

Seconds are those of the import statement alone, as its interpreter measures them; CPU seconds are of the whole process,
interpreter included.
"""

import argparse
import resource
import statistics
import subprocess
import sys

STATEMENTS = {
    "asyncio": "import perigee.reward.client, perigee.sandbox.client",
    "blocking": "import perigee.reward.adapters.blocking, perigee.sandbox.blocking",
}
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def measure(statement: str) -> float:
    """Seconds of one import."""
    command = (sys.executable, "-c", PROGRAM.format(statement))
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Reads the command line and prints a line for each form of the clients."""
    parser = argparse.ArgumentParser(description="Times of the clients' import.")
    parser.add_argument("--times", type=int, default=20)
    times = parser.parse_args().times
    for name, statement in STATEMENTS.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        seconds = [measure(statement) for _ in range(times)]
        cpu = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / times
        print(f"{name:8}  import {statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s, CPU {cpu:.3f} s")


if __name__ == "__main__":
    main()
