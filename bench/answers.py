"""How often the math verifier is right on labelled answers of other people, by their source.

    python bench/answers.py [FILES ...] [--extraction prose] [--show] [--write outcomes.jsonl]

Reads dev.jsonl, reports.jsonl and adversarial.jsonl of `answers` in the folder of public data unless told otherwise,
and prints how many verdicts are right, how many right answers were called not correct (fn), how many wrong ones correct
(fp), and how many failed; `--show` prints those that are not right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import MathConfig
from services.reward.pool.workers import CheckPool
from services.reward.verifiers.base import Item, Outcome, Verdict
from services.reward.verifiers.math import MathVerifier

DATA = Path(os.environ.get("PERIGEE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "answers"
FILES = tuple(DATA / name for name in ("dev.jsonl", "reports.jsonl", "adversarial.jsonl"))
AT_ONCE = 32
WORKERS = 2
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Case:
    """A response, whether it is right, and where it comes from."""

    item: Item[pb.MathVerifier]
    is_right: bool
    source: str


def read_cases(path: Path, extraction: pb.AnswerExtraction.ValueType) -> Iterator[Case]:
    """Yields the cases of a file, in the form of `perigee reward score` or as reference, response and expectation."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        fields = json.loads(line)
        reference = fields["verifier"]["math"]["reference"] if "verifier" in fields else fields["reference"]
        prompt = fields.get("prompt", fields.get("question", ""))
        parameters = pb.MathVerifier(reference=reference, extraction=extraction)
        item = Item(f"{path.stem}-{number}", fields["response"], "", parameters, prompt)
        is_right = fields["label"] if "label" in fields else fields["expected"] == "correct"
        yield Case(item, is_right, fields.get("source", path.stem))


async def judge_all(cases: Sequence[Case]) -> list[Outcome]:
    """Returns the outcomes, in the order of the cases."""
    pool = CheckPool("math", MathConfig(workers=WORKERS))
    await pool.start()
    gate = asyncio.Semaphore(AT_ONCE)
    verifier = MathVerifier(pool)

    async def judge(case: Case) -> Outcome:
        async with gate:
            return await verifier.judge(case.item)

    try:
        return await asyncio.gather(*map(judge, cases))
    finally:
        await pool.close()


def kind_of(case: Case, outcome: Outcome) -> str:
    """Returns "right", "fn", "fp" or "failed"."""
    if outcome.verdict is Verdict.FAILED:
        return "failed"
    if (outcome.verdict is Verdict.CORRECT) == case.is_right:
        return "right"
    return "fn" if case.is_right else "fp"


def describe(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns what tells why a verdict is what it is."""
    return {
        "source": case.source,
        "id": case.item.id,
        "kind": kind_of(case, outcome),
        "reference": case.item.parameters.reference,
        "extracted": outcome.extracted,
        "reason": outcome.reason,
        "response": case.item.response[-SHOWN_CHARACTERS:],
    }


def main() -> None:
    """Prints the counts of each source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--extraction", choices=["boxed", "marker", "announced", "prose"], default="announced")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    extraction = pb.AnswerExtraction.Value(f"ANSWER_EXTRACTION_{arguments.extraction.upper()}")
    cases = [case for path in arguments.files for case in read_cases(path, extraction)]
    outcomes = asyncio.run(judge_all(cases))
    rows = [describe(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if arguments.show:
        print("\n".join(line for line, row in zip(lines, rows, strict=True) if row["kind"] != "right"))
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["source"], Counter())[row["kind"]] += 1
    for source, count in counts.items():
        share = count["right"] / count.total()
        print(f"{source:24} {count.total():5} {share:9.3%} fn {count['fn']} fp {count['fp']} failed {count['failed']}")


if __name__ == "__main__":
    main()
