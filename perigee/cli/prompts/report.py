"""What a curation kept, dropped and put aside, and why: as JSON and for reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perigee.cli.prompts.stages import StageResult
from perigee.curation.balance import Buckets, Cell, count_cells, shares
from perigee.curation.findings import Decision, Question
from perigee.files import write_atomically

EXAMPLES = 3
EXAMPLE_CHARACTERS = 160


def build_report(
    stages: Sequence[StageResult],
    before: Sequence[Question],
    kept: Sequence[Question],
    buckets: Buckets,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Counts by stage and reason, and the set by domain and difficulty before and after the balance."""
    cells_before, cells_after = count_cells(before, buckets), count_cells(kept, buckets)
    return {
        "prompts": len(stages[0].questions),
        "kept": len(kept),
        "dropped": sum(_count(stage, Decision.DROP).total() for stage in stages),
        "aside": sum(_count(stage, Decision.ASIDE).total() for stage in stages),
        "columns_left_out": list(left_out),
        "stages": [_describe(stage) for stage in stages],
        "domains": {
            "before_balance": shares(cells_before),
            "kept": shares(cells_after),
        },
        "buckets": [buckets.name(bucket) for bucket in range(buckets.count)],
        "cells": {
            domain: {
                "before_balance": _row(cells_before, domain, buckets),
                "kept": _row(cells_after, domain, buckets),
            }
            for domain in sorted({cell.domain for cell in cells_before})
        },
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report as Markdown."""
    write_atomically(path, ("\n".join(_lines(report)) + "\n").encode())


def _describe(stage: StageResult) -> dict[str, Any]:
    if stage.skipped:
        return {"name": stage.name, "seen": len(stage.questions), "skipped": stage.skipped}
    examples: dict[str, list[dict[str, Any]]] = {}
    for question in stage.questions:
        finding = stage.findings[question.id]
        if finding.decision is Decision.KEEP or len(examples.setdefault(finding.reason, [])) >= EXAMPLES:
            continue
        text = " ".join(question.text.split())
        cut = text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]}..."
        examples[finding.reason].append({"id": question.id, "prompt": cut, "details": dict(finding.details)})
    return {
        "name": stage.name,
        "seen": len(stage.questions),
        "kept": len(stage.survivors()),
        "dropped": dict(_count(stage, Decision.DROP)),
        "aside": dict(_count(stage, Decision.ASIDE)),
        "examples": examples,
    }


def _count(stage: StageResult, decision: Decision) -> Counter[str]:
    return Counter(finding.reason for finding in stage.findings.values() if finding.decision is decision)


def _row(cells: Mapping[Cell, int], domain: str, buckets: Buckets) -> list[int]:
    return [cells.get(Cell(domain, bucket), 0) for bucket in range(buckets.count)]


def _lines(report: Mapping[str, Any]) -> Iterable[str]:
    yield "# Curation report"
    yield ""
    yield (
        f"{report['kept']:,} of {report['prompts']:,} prompts are kept (`prompts.jsonl`), {report['dropped']:,} are "
        f"dropped (`dropped.jsonl`), {report['aside']:,} put aside because nobody knows (`aside.jsonl`)."
    )
    if report["columns_left_out"]:
        yield ""
        yield f"Columns that are no fields of a prompt and were left out: {', '.join(report['columns_left_out'])}."
    yield ""
    yield "## Stages"
    yield ""
    yield "| stage | seen | kept | dropped | put aside |"
    yield "|---|---|---|---|---|"
    for stage in report["stages"]:
        if "skipped" in stage:
            yield f"| {stage['name']} | {stage['seen']:,} | skipped: {stage['skipped']} | | |"
            continue
        dropped, aside = _reasons(stage["dropped"]), _reasons(stage["aside"])
        yield f"| {stage['name']} | {stage['seen']:,} | {stage['kept']:,} | {dropped} | {aside} |"
    yield from _example_lines(report["stages"])
    yield ""
    yield "## Domains and difficulty"
    yield ""
    yield "Kept prompts, and in brackets those before the balance where there were more."
    yield ""
    yield f"| domain | share | {' | '.join(report['buckets'])} |"
    yield "|---" * (2 + len(report["buckets"])) + "|"
    for domain, cells in report["cells"].items():
        share = report["domains"]["kept"].get(domain, 0.0)
        yield f"| {domain} | {share:.1%} | {' | '.join(_cells(cells))} |"


def _example_lines(stages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for stage in stages:
        for reason, examples in stage.get("examples", {}).items():
            yield ""
            yield f"### {stage['name']}: {reason}"
            yield ""
            for example in examples:
                details = ", ".join(f"{key} {value}" for key, value in example["details"].items())
                yield f"- `{example['id']}`: {example['prompt']}" + (f" ({details})" if details else "")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _cells(cells: Mapping[str, Sequence[int]]) -> Iterable[str]:
    for kept, before in zip(cells["kept"], cells["before_balance"], strict=True):
        yield f"{kept:,}" + (f" ({before:,})" if before > kept else "")
