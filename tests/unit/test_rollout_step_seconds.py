"""Seconds of an engine's steps, by what they computed."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from services.rollout.step_seconds import count_step_seconds, count_tokens


def test_tokens_that_follow_on_sampled_ones_are_decoded() -> None:
    requests = {name: SimpleNamespace(num_output_tokens=tokens) for name, tokens in (("a", 0), ("b", 3), ("c", 5))}
    # The last token of a prompt, one that follows, keys and values that were lost, and requests that have ended: by
    # their last token, and in their prompt.
    assert count_tokens({"a": 1, "b": 1, "c": 40, "gone": 1, "left": 30}, requests) == (71, 2)


def test_steps_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scheduler:
        def __init__(self) -> None:
            self.requests = {"a": SimpleNamespace(num_output_tokens=1), "b": SimpleNamespace(num_output_tokens=0)}

        def schedule(self, **tokens: int) -> SimpleNamespace:
            return SimpleNamespace(num_scheduled_tokens=tokens)

        def update_from_output(self, output: SimpleNamespace) -> str:
            return "found"

    core_class, clock = type("Core", (), {}), SimpleNamespace(now=0.0)
    count_step_seconds(core_class, Scheduler)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    core, scheduler = core_class(), Scheduler()
    core.scheduler = scheduler
    assert core.read_step_seconds() == (0.0, 0.0)
    first = scheduler.schedule(a=1, b=3)
    clock.now = 2.0
    second = scheduler.schedule(a=1)
    clock.now = 4.0
    assert scheduler.update_from_output(first) == "found"
    assert core.read_step_seconds() == (3.0, 1.0)
    clock.now = 5.0
    scheduler.update_from_output(second)
    # Nothing is scheduled for a while.
    clock.now = 10.0
    third = scheduler.schedule(b=2)
    clock.now = 11.0
    scheduler.update_from_output(third)
    assert core.read_step_seconds() == (4.0, 2.0)
