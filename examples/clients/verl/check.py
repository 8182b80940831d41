"""Shows before a run that the reward service can judge a verl data set.

    python check.py --reward HOST:PORT --data train.parquet [--verifier math] [--answer-marker '####']

Each ground truth is given as the answer of a response, through the function that verl calls, and has to score 1. Rows
whose ground truth is a verifier's fields are left out: what answers them is not known. The exit code is 1 when some
ground truth does not score 1.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from perigee.errors import PerigeeError
from perigee.reward.adapters.verl import compute_score_async

ROWS_AT_ONCE = 512


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a data set whose ground truth is a value, or a list of values that are as good."""
    rows = pyarrow.parquet.read_table(path, columns=["data_source", "reward_model"]).to_pylist()
    return [row for row in rows if not str(row["reward_model"]["ground_truth"]).lstrip().startswith("{")]


async def score(row: dict[str, Any], marker: str, **reward_kwargs: Any) -> float | str:
    """The score of a response that gives the row's ground truth as the answer, or why there is none."""
    truth = row["reward_model"]["ground_truth"]
    answer = truth[0] if isinstance(truth, list) else truth
    try:
        result = await compute_score_async(
            data_source=row["data_source"],
            solution_str=f"The answer is {marker} {answer}",
            ground_truth=truth,
            answer_marker=marker,
            **reward_kwargs,
        )
    except PerigeeError as error:
        return error.message
    return float(result["score"])


async def check(rows: Sequence[dict[str, Any]], marker: str, **reward_kwargs: Any) -> int:
    """Names the rows that do not score 1; how many they are."""
    missed = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        scores = await asyncio.gather(*(score(row, marker, **reward_kwargs) for row in part))
        for row, found in zip(part, scores, strict=True):
            if found != 1.0:
                missed += 1
                print(f"{row['data_source']}: {row['reward_model']['ground_truth']!r}: {found}")
    return missed


def main() -> None:
    """Reads the command line and checks the data set."""
    parser = argparse.ArgumentParser(description="Whether the reward service can judge a verl data set.")
    parser.add_argument("--reward", help="host:port of the reward service; PERIGEE_REWARD_ADDRESS by default")
    parser.add_argument("--data", type=Path, required=True, help="a parquet file of verl's")
    parser.add_argument("--verifier", default="math")
    parser.add_argument("--answer-marker", default="", help="what the answer follows in a response")
    arguments = parser.parse_args()
    rows = read_rows(arguments.data)
    options = {"address": arguments.reward, "verifier": arguments.verifier}
    missed = asyncio.run(check(rows, arguments.answer_marker, **options))
    print(f"{len(rows) - missed} of {len(rows)} ground truths score 1")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
