"""Scores the responses of a data set with Ray Data, and prints what was found.

    python score.py [--data FILE.jsonl] [--verifier math] [--workers 2]

The data are JSON Lines of prompt, response and answer. Address, token and authority are those of
PERIGEE_REWARD_ADDRESS, PERIGEE_TOKEN and PERIGEE_CA_FILE on each node.
"""

import argparse

import pyarrow as pa
import ray

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions, make_item
from perigee.reward.scoring import read_reward

ROWS = [
    {"prompt": "1/2 + 1/3 =", "response": r"\boxed{5/6}", "answer": "5/6"},
    {"prompt": "1/2 + 1/3 =", "response": r"\boxed{2/5}", "answer": "5/6"},
]


class Judge:
    """Scores batches of rows; each of Ray's workers has one, with a channel of its own.

    A full or absent service is called again within `ScoringOptions.unavailable_s`; a response that could not be judged
    has a null as its reward, which is not 0.
    """

    def __init__(self, options: GroundTruthOptions) -> None:
        self._options = options
        self._scorer = BlockingScorer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = [
            make_item(str(number), row["prompt"], row["response"], row["answer"], self._options)
            for number, row in enumerate(batch.to_pylist())
        ]
        outcomes = self._scorer.score(items)
        verdicts = [buffer_pb2.Verdict.Name(outcome.verdict) for outcome in outcomes]
        batch = batch.append_column("verdict", pa.array(verdicts, pa.string()))
        return batch.append_column("reward", pa.array(map(read_reward, outcomes), pa.float64()))


def main() -> None:
    """Reads the command line and scores the data set."""
    parser = argparse.ArgumentParser(description="Scores a data set with Ray Data.")
    parser.add_argument("--data", help="JSON Lines of prompt, response and answer; two rows by default")
    parser.add_argument("--verifier", default="math")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    rows = ray.data.read_json(arguments.data) if arguments.data else ray.data.from_items(ROWS)
    scored = rows.map_batches(
        Judge,
        fn_constructor_args=(GroundTruthOptions(arguments.verifier),),
        batch_format="pyarrow",
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
    )
    for row in scored.iter_rows():
        print(row["response"], row["verdict"], row["reward"])


if __name__ == "__main__":
    main()
