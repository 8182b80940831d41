"""Seconds that vLLM's engine process spends on prefill and on decoding."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

# Name of the method of vLLM's engine core that returns the seconds of prefill and of decoding since its start.
READ_STEP_SECONDS = "read_step_seconds"


def count_step_seconds(core_class: Any, scheduler_class: Any) -> None:
    """Has the scheduler add up the seconds of steps, from their scheduling or the end of the step before.

    A step that computes prompts beside tokens that follow is divided by the numbers of its tokens.
    """
    schedule, update = scheduler_class.schedule, scheduler_class.update_from_output

    def schedule_and_note(self: Any, *arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        output = schedule(self, *arguments, **options)
        output.began = began
        return output

    def update_and_add(self: Any, output: Any, *arguments: Any, **options: Any) -> Any:
        prefilled, decoded = count_tokens(output.num_scheduled_tokens, self.requests)
        found = update(self, output, *arguments, **options)
        now = time.monotonic()
        # Where steps overlap, each has the time after the one before.
        began = max(output.began, self.__dict__.get("last_step_end", 0.0))
        self.last_step_end = now
        if prefilled + decoded:
            share = prefilled / (prefilled + decoded)
            prefill_s, decode_s = self.__dict__.get("step_seconds", (0.0, 0.0))
            self.step_seconds = (prefill_s + share * (now - began), decode_s + (1 - share) * (now - began))
        return found

    def read_step_seconds(self: Any) -> tuple[float, float]:
        found: tuple[float, float] = self.scheduler.__dict__.get("step_seconds", (0.0, 0.0))
        return found

    scheduler_class.schedule, scheduler_class.update_from_output = schedule_and_note, update_and_add
    setattr(core_class, READ_STEP_SECONDS, read_step_seconds)


def count_tokens(scheduled: Mapping[str, int], requests: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the tokens of a step that are prefilled, and those that follow on sampled ones.

    A request that has sampled is scheduled by one token, unless it lost its keys and values and computes them again. So
    is one that has ended: where steps overlap, it ends after the next step has been scheduled.
    """
    decoded = sum(
        1
        for name, tokens in scheduled.items()
        if tokens == 1 and (name not in requests or requests[name].num_output_tokens)
    )
    return sum(scheduled.values()) - decoded, decoded
