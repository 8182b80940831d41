"""Results of an evaluation: figures by suite and domain, as a table and JSON, and the comparison of two of them.

A line of answers.jsonl has suite, id, domain, attempt ("greedy" or "sample-0" and so on), digest, response, tokens,
truncated, verdict, reward, answer and reason. What was not answered or not judged is left out and counted as a failure.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from perigee.errors import InvalidArgumentError
from perigee.files import read_lines
from perigee.statistics import Interval, clustered_interval, majority, mcnemar, paired_bootstrap, wilson_interval

ANSWERS_FILE = "answers.jsonl"
RESULTS_FILE = "results.json"
OVERALL = "overall"
GREEDY = "greedy"
FAILED = "failed"

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Length:
    """Length of some responses."""

    tokens: float | None
    """Mean; None where the endpoint does not count them."""
    truncated: float
    """Share of those that reached the cap."""


@dataclass(frozen=True)
class Figures:
    """Accuracy and length of the responses to some problems; None without such responses."""

    problems: int
    samples: int
    """Largest number of samples of a problem: the k of what follows."""
    greedy: Interval | None
    """pass@1 of greedy decoding."""
    avg_at_k: Interval | None
    """Mean over samples: pass@1 of sampling."""
    maj_at_k: Interval | None
    """Whether the most frequent answer is right; None for one sample, and for verifiers that extract no answer."""
    pass_at_k: Interval | None
    """Whether any sample is right; None for one sample."""
    greedy_length: Length | None
    sample_length: Length | None
    failures: int
    """Requests without a response, and responses without a verdict."""


def is_correct(answer: Answer) -> bool:
    """Returns whether a response is right."""
    return bool(answer["verdict"] == "correct")


def summarize(answers: Iterable[Answer]) -> dict[str, Figures]:
    """Returns the figures of one suite's answers, overall and by domain."""
    by_scope: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_scope[OVERALL].append(answer)
        by_scope[answer["domain"]].append(answer)
    if len(by_scope) == 2:  # one domain says nothing more
        by_scope = defaultdict(list, {OVERALL: by_scope[OVERALL]})
    return {scope: _figures(some) for scope, some in by_scope.items()}


def _figures(answers: Sequence[Answer]) -> Figures:
    judged = [answer for answer in answers if answer["verdict"] != FAILED]
    greedy = [answer for answer in judged if answer["attempt"] == GREEDY]
    sampled = [answer for answer in judged if answer["attempt"] != GREEDY]
    groups = list(_by_problem(sampled).values())
    votes = [majority([(each["answer"], is_correct(each)) for each in group]) for group in groups]
    any_right = [any(map(is_correct, group)) for group in groups]
    k = max(map(len, groups), default=0)
    has_answers = any(each["answer"] for each in sampled)
    return Figures(
        problems=len(_by_problem(answers)),
        samples=k,
        greedy=wilson_interval(sum(map(is_correct, greedy)), len(greedy)) if greedy else None,
        avg_at_k=clustered_interval([list(map(is_correct, group)) for group in groups]) if groups else None,
        maj_at_k=wilson_interval(sum(votes), len(votes)) if has_answers and k > 1 else None,
        pass_at_k=wilson_interval(sum(any_right), len(groups)) if k > 1 else None,
        greedy_length=_measure_length(greedy),
        sample_length=_measure_length(sampled),
        failures=len(answers) - len(judged),
    )


def _measure_length(answers: Sequence[Answer]) -> Length | None:
    if not answers:
        return None
    tokens = [answer["tokens"] for answer in answers if answer["tokens"] is not None]
    truncated = fmean(answer["truncated"] for answer in answers)
    return Length(round(fmean(tokens), 2) if tokens else None, round(truncated, 4))


def _by_problem(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer["id"]].append(answer)
    return groups


def by_suite(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Returns answers by their suite."""
    suites: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        suites[answer["suite"]].append(answer)
    return dict(suites)


def to_json(figures: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """Returns figures by suite and scope as JSON."""
    return {suite: {scope: asdict(each) for scope, each in scopes.items()} for suite, scopes in figures.items()}


def show(figures: Mapping[str, Mapping[str, Figures]], console: Console) -> None:
    """Prints the figures, a line for each measure; intervals are of 95%."""
    head = ("suite", "domain", "problems", "measure", "accuracy", "tokens", "truncated", "failed")
    table = Table(*head, box=None, pad_edge=False)
    table.columns[4].no_wrap = True
    for suite, scopes in figures.items():
        for scope, each in scopes.items():
            k = each.samples
            sampled = ((f"avg@{k}", each.avg_at_k), (f"maj@{k}", each.maj_at_k), (f"pass@{k}", each.pass_at_k))
            rows = [("greedy", each.greedy, each.greedy_length), *((*row, each.sample_length) for row in sampled)]
            for name, interval, length in rows:
                if interval is not None and length is not None:
                    tokens = "-" if length.tokens is None else f"{length.tokens:,.0f}"
                    shown = (tokens, f"{length.truncated:.1%}", str(each.failures))
                    table.add_row(suite, scope, f"{each.problems:,}", name, str(interval), *shown)
    console.print(table, highlight=False)


@dataclass(frozen=True)
class Comparison:
    """Difference of two models, second minus first, over the problems that both have answered."""

    suite: str
    measure: str
    problems: int
    first: float
    second: float
    difference: Interval
    p: float
    test: str
    only_first: int | None = None
    """Problems that the first model alone has right."""
    only_second: int | None = None
    """Problems that the second model alone has right."""


def read_answers(folder: Path) -> list[Answer]:
    """Returns the answers that the folder's figures are made of: those of other weights or sampling are left out.

    Raises InvalidArgumentError where there are no results.
    """
    for name in (ANSWERS_FILE, RESULTS_FILE):
        if not (folder / name).is_file():
            raise InvalidArgumentError.for_field(str(folder), f"holds no {name}; name the folder of a whole evaluation")
    digests = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["digests"]
    counted = {(suite, digest) for suite, some in digests.items() for digest in some}
    lines = [line for line in read_lines(folder / ANSWERS_FILE) if (line["suite"], line["digest"]) in counted]
    return list({(line["suite"], line["id"], line["attempt"]): line for line in lines}.values())


def compare(first: Sequence[Answer], second: Sequence[Answer]) -> list[Comparison]:
    """Returns the comparisons of the suites that both have: greedy by McNemar's exact test, samples by a bootstrap.

    Raises InvalidArgumentError when no problem is in both.
    """
    found = []
    firsts, seconds = by_suite(first), by_suite(second)
    for suite in firsts.keys() & seconds.keys():
        for measure, is_greedy in ((GREEDY, True), ("avg@k", False)):
            scores = [_scores(answers, is_greedy) for answers in (firsts[suite], seconds[suite])]
            shared = sorted(scores[0].keys() & scores[1].keys())
            if shared:
                found.append(_compare(suite, measure, *([each[key] for key in shared] for each in scores)))
    if not found:
        raise InvalidArgumentError("the two results have no problem in common")
    return sorted(found, key=lambda each: (each.suite, each.measure != GREEDY))


def _scores(answers: Iterable[Answer], is_greedy: bool) -> dict[str, float]:
    """Returns the mean correctness of each problem's responses."""
    some = [each for each in answers if (each["attempt"] == GREEDY) == is_greedy and each["verdict"] != FAILED]
    return {key: fmean(map(is_correct, group)) for key, group in _by_problem(some).items()}


def _compare(suite: str, measure: str, first: Sequence[float], second: Sequence[float]) -> Comparison:
    differences = [after - before for before, after in zip(first, second, strict=True)]
    interval, p = paired_bootstrap(differences)
    values = (suite, measure, len(differences), fmean(first), fmean(second), interval)
    if measure != GREEDY:
        return Comparison(*values, p, "paired bootstrap over problems")
    only_first, only_second = differences.count(-1.0), differences.count(1.0)
    return Comparison(*values, mcnemar(only_first, only_second), "McNemar, exact", only_first, only_second)


def show_comparisons(comparisons: Iterable[Comparison], console: Console) -> None:
    """Prints comparisons; intervals are of 95%, by a bootstrap over problems."""
    head = ("suite", "measure", "problems", "first", "second", "difference", "only first", "only second", "p", "test")
    table = Table(*head, box=None, pad_edge=False)
    for each in comparisons:
        apart = ["" if count is None else str(count) for count in (each.only_first, each.only_second)]
        means = (f"{each.first:.3f}", f"{each.second:.3f}", str(each.difference))
        table.add_row(each.suite, each.measure, f"{each.problems:,}", *means, *apart, f"{each.p:.4f}", each.test)
    console.print(table, highlight=False)
