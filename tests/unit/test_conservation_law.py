"""The law of the soak test sees what is lost, trained twice or dropped without a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.law import Law, LawBroken, Losses, Sight


def line(iteration: int) -> dict[str, Any]:
    """Two groups of 10 tokens each are trained, and one token is added to each of the two in flight."""
    return {
        "iteration": iteration,
        "reward/groups": 2,
        "reward/failures": 0,
        "train/groups": 2,
        "train/groups_uniform": 0,
        "train/groups_failed": 0,
        "rollout/live_groups": 2,
        "rollout/tokens": 22 if iteration == 1 else 20,
        f"train/tokens_by_version/{iteration}": 20,
    }


def sight(iteration: int) -> Sight:
    """Two groups in flight, and one that the iteration under way has created."""
    issued = 2 * iteration + 2
    groups = {f"g{number}": {f"g{number}-0": 1} for number in range(2 * iteration, issued + 1)}
    state = {"next_group": issued, "last_line": line(iteration), "starts": {"a": [1], "b": [1]}}
    return Sight(iteration, state, groups)


@pytest.fixture
def law(tmp_path: Path) -> Law:
    """A law that has seen two iterations, of which the second one's line is not written yet."""
    law = Law(tmp_path / "metrics.jsonl")
    for iteration in (1, 2):
        law.check(sight(iteration))
        law.records.write_text(json.dumps(line(1)) + "\n")
    assert law.durable == 43
    return law


def change(**values: Any) -> Callable[[Sight], None]:
    return lambda seen: seen.state["last_line"].update({key.replace("_", "/", 1): n for key, n in values.items()})


BREAKS: dict[str, Callable[[Sight], None]] = {
    "7 groups consumed, 6 trained": change(reward_groups=3),
    "8 groups issued, 7 trained": change(reward_groups=3, train_groups=3),
    "63 tokens counted, 60 trained, 2 in flight": change(rollout_tokens=21),
    "8 groups issued, 6 trained, 0 dropped, 1 in flight": lambda seen: seen.groups.pop("g7"),  # type: ignore[attr-defined]
    r"after 8 groups \[9\] were created": lambda seen: seen.groups.update(g9=seen.groups.pop("g8")),  # type: ignore[attr-defined]
    r"consumed before, and back: \['g2-0'\]": lambda seen: seen.groups["g8"].update({"g2-0": 1}),  # type: ignore[attr-defined]
    r"durable tokens are lost: \['g6-0'\]": lambda seen: seen.groups["g6"].update({"g6-0": 0}),  # type: ignore[attr-defined]
    r"after 3 the lines are \[1, 2, 4\]": change(iteration=4),
}


def test_a_run_that_loses_nothing_keeps_the_law(law: Law) -> None:
    law.records.write_text("".join(json.dumps(line(iteration)) + "\n" for iteration in (1, 2)))
    law.check(sight(3))
    assert law.durable == 63


@pytest.mark.parametrize("sentence", BREAKS)
def test_a_run_that_breaks_the_law_is_told_so(law: Law, sentence: str) -> None:
    law.records.write_text("".join(json.dumps(line(iteration)) + "\n" for iteration in (1, 2)))
    # As it was seen a moment before.
    law.check(sight(3))
    seen = sight(3)
    BREAKS[sentence](seen)
    with pytest.raises(LawBroken, match=sentence):
        law.check(seen)


def test_an_iteration_that_is_committed_twice_or_no_more_breaks_the_law(law: Law) -> None:
    with pytest.raises(LawBroken, match="iteration 2 was committed, now 1 is"):
        law.check(sight(1))
    law.records.write_text(2 * (json.dumps(line(1)) + "\n"))
    with pytest.raises(LawBroken, match=r"iterations \[1\] have more than one line"):
        law.check(sight(2))


def test_tokens_that_did_not_become_durable_are_counted_over_processes() -> None:
    losses = Losses(allowed=10)
    losses.note("a", 100)
    losses.note("b", 50)
    losses.check(durable=145)
    assert losses.found == 0
    losses.note("a", 30)
    losses.note("b", 60)
    losses.check(durable=180)
    assert losses.found == 5
    with pytest.raises(LawBroken, match="11 tokens are lost, more than 10"):
        losses.check(durable=174)
