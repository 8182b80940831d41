"""`perigee eval`: figures of a model's responses to suites."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from perigee.cli.ending import Interrupt
from perigee.cli.eval.responses import ModelOptions, Target, collect, note, open_target
from perigee.cli.eval.results import ANSWERS_FILE, FAILED, RESULTS_FILE, Answer, by_suite, show, summarize, to_json
from perigee.cli.eval.suites import LoadedSuite, SamplingSettings, load_suite
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.files import write_atomically
from perigee.image_sources import IMAGES_FOLDER, ImageStore


@dataclass(frozen=True)
class EvalOptions:
    """Arguments of `perigee eval`."""

    model: ModelOptions
    suites: Sequence[str]
    data_path: Path
    out: Path | None
    limit: int | None
    sampling: dict[str, Any]
    """Sampling settings in place of the suites' own."""


def choose_sampling(suite: LoadedSuite, changes: dict[str, Any]) -> SamplingSettings:
    """Returns a suite's sampling with changes. Raises InvalidArgumentError when no response is asked for."""
    sampling = suite.sampling.model_copy(update=changes)
    if not sampling.greedy and not sampling.samples:
        raise InvalidArgumentError.for_field("--samples", "is 0, and --no-greedy leaves no response to ask for")
    return sampling


async def evaluate(options: EvalOptions, console: Console, interrupt: Interrupt) -> None:
    """Evaluates the suites, prints the figures and writes results.json.

    Raises PerigeeError, with what to do, when data is absent, a service does not start or nothing could be judged.
    """
    asked = options.model.target or (options.model.endpoint.model if options.model.endpoint else "")
    out = options.out or Path("evals") / re.sub(r"[^\w.-]+", "-", asked).strip("-")
    images = ImageStore(out / IMAGES_FOLDER)
    suites = [load_suite(name, options.data_path, options.limit, images) for name in options.suites]
    samplings = {suite.name: choose_sampling(suite, options.sampling) for suite in suites}
    if len(samplings) < len(suites):
        raise InvalidArgumentError.for_field("SUITE", f"two suites have the same name: {', '.join(samplings)}")
    model = replace(options.model, images=images)
    target = await open_target(model)
    attempts = [attempt for suite in suites for attempt in target.plan(suite, samplings[suite.name])]
    write_results(await collect(attempts, target, model, out, console, interrupt), target, samplings, out, console)


def write_results(
    answers: Sequence[Answer], target: Target, samplings: Mapping[str, SamplingSettings], out: Path, console: Console
) -> None:
    """Writes results.json and prints the figures. Raises FailedPreconditionError when no response was judged."""
    figures = {suite: summarize(some) for suite, some in by_suite(answers).items()}
    head = {"model": target.name, "endpoint": None if target.folder else target.endpoint.url}
    found = {
        "sampling": {suite: each.model_dump() for suite, each in samplings.items()},
        "suites": to_json(figures),
        "digests": {suite: sorted(each["digest"] for each in some) for suite, some in by_suite(answers).items()},
    }
    before = json.loads((out / RESULTS_FILE).read_text()) if (out / RESULTS_FILE).is_file() else {}
    # Other suites of the same model stay.
    kept = before if all(before.get(key) == value for key, value in head.items()) else {}
    results = head | {key: kept.get(key, {}) | values for key, values in found.items()}
    write_atomically(out / RESULTS_FILE, f"{json.dumps(results, indent=2)}\n".encode())
    reasons = Counter(answer["reason"] for answer in answers if answer["verdict"] == FAILED)
    if reasons:
        [(reason, _)] = reasons.most_common(1)
        words = f"{reasons.total():,} of {len(answers):,} answers failed and are left out, most often because {reason}"
        if reasons.total() == len(answers):
            raise FailedPreconditionError(words)
        note(console, f"{words}; the same command asks for them again")
    show(figures, console)
    note(console, f"results: {out / RESULTS_FILE}, answers: {out / ANSWERS_FILE}")
