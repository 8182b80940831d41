"""Conservation law of a run: what holds of its buffer and its records whenever anybody looks, whatever has died.

- Each group that was issued was trained, was dropped with a reason, or is in flight; none that is gone comes back.
- Each token that was counted was trained on or is in flight; no trajectory in flight has fewer than before.
- Iterations are 1, 2, 3 and so on, each once.
- A fault costs at most one chunk of each sequence that it cuts off.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2

CALL_S = 10.0
VERSION_KEY = "train/tokens_by_version/"


class LawBroken(Exception):
    """Raised with the first sentence that does not hold."""


def demand(holds: bool, sentence: str) -> None:
    """Raises LawBroken unless the condition holds."""
    if not holds:
        raise LawBroken(sentence)


@dataclass(frozen=True)
class Sight:
    """What the buffer had committed and held at one moment."""

    iteration: int
    state: Mapping[str, Any]
    # Tokens of each trajectory by id, of each live group by id.
    groups: Mapping[str, Mapping[str, int]]


async def look(buffer: BufferClient, run_id: str) -> Sight:
    """Reads the groups between two looks at the commit; a run that moves on meanwhile is read again."""
    while True:
        run = (await buffer.get_run(buffer_pb2.GetRunRequest(run_id=run_id), timeout_s=CALL_S)).run
        groups = {
            group.group_id: {member.trajectory_id: member.tokens for member in group.trajectories}
            async for page in buffer.list_groups(buffer_pb2.ListGroupsRequest(run_id=run_id), timeout_s=CALL_S)
            for group in page.groups
        }
        again = (await buffer.get_run(buffer_pb2.GetRunRequest(run_id=run_id), timeout_s=CALL_S)).run
        if again.iteration == run.iteration:
            return Sight(run.iteration, json.loads(run.coordinator_state), groups)


@dataclass
class Law:
    """What was seen of a run so far, and what follows from it."""

    records: Path
    """metrics.jsonl of the run."""
    iteration: int = 0
    durable: int = 0
    """Tokens that are trained or in flight."""
    _tokens: dict[str, int] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)

    def check(self, seen: Sight) -> None:
        """Raises LawBroken when what is seen does not follow from what was seen."""
        demand(seen.iteration >= self.iteration, f"iteration {self.iteration} was committed, now {seen.iteration} is")
        self._check_trajectories({key: tokens for group in seen.groups.values() for key, tokens in group.items()})
        self.iteration = seen.iteration
        if seen.iteration:
            lines = self._read_lines(seen)
            check_groups(seen, lines)
            self.durable = check_tokens(seen, lines)

    def _check_trajectories(self, live: dict[str, int]) -> None:
        demand(not self._gone & {*live}, f"consumed before, and back: {sorted(self._gone & {*live})[:3]}")
        fewer = [key for key, tokens in live.items() if tokens < self._tokens.get(key, 0)]
        demand(not fewer, f"durable tokens are lost: {fewer[:3]}")
        self._gone |= {*self._tokens} - {*live}
        self._tokens = live

    def _read_lines(self, seen: Sight) -> list[dict[str, Any]]:
        """Returns the line of each committed iteration; that of the last may be in the coordinator's state alone."""
        text = self.records.read_text(encoding="utf-8") if self.records.exists() else ""
        written = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        twice = [number for number, times in Counter(line["iteration"] for line in written).items() if times > 1]
        demand(not twice, f"iterations {twice} have more than one line")
        lines = [line for line in written if line["iteration"] < seen.iteration] + [seen.state["last_line"]]
        numbers = [line["iteration"] for line in lines]
        demand(numbers == list(range(1, seen.iteration + 1)), f"after {seen.iteration} the lines are {numbers[-5:]}")
        return lines


def check_groups(seen: Sight, lines: Iterable[Mapping[str, Any]]) -> None:
    """Raises LawBroken unless issued = trained + dropped with a reason + in flight."""
    issued = seen.state["next_group"]
    trained = sum(line["train/groups"] for line in lines)
    dropped = sum(line["train/groups_uniform"] + line["train/groups_failed"] for line in lines)
    consumed = sum(line["reward/groups"] for line in lines)
    demand(consumed == trained + dropped, f"{consumed} groups consumed, {trained} trained, {dropped} dropped")
    numbers = sorted(int(group.removeprefix("g")) for group in seen.groups)
    # What follows was created by the iteration under way.
    in_flight = [number for number in numbers if number < issued]
    sentence = f"{issued} groups issued, {trained} trained, {dropped} dropped, {len(in_flight)} in flight"
    demand(issued == trained + dropped + len(in_flight), sentence)
    created = numbers[len(in_flight) :]
    demand(created == list(range(issued, issued + len(created))), f"after {issued} groups {created[:5]} were created")


def check_tokens(seen: Sight, lines: Iterable[Mapping[str, Any]]) -> int:
    """Raises LawBroken unless counted = trained + in flight at the commit; returns the tokens trained or in flight.

    Tokens of what was dropped are in no line: a run that has dropped anything is let pass.
    """
    counted = sum(line["rollout/tokens"] for line in lines)
    trained = sum(n for line in lines for key, n in line.items() if key.startswith(VERSION_KEY))
    held = sum(sum(tokens) for tokens in seen.state["starts"].values())
    if not any(
        line[key] for line in lines for key in ("train/groups_failed", "train/groups_uniform", "reward/failures")
    ):
        demand(counted == trained + held, f"{counted} tokens counted, {trained} trained, {held} in flight")
    # What was counted and is in flight no more was trained or dropped.
    return counted - held + sum(sum(group.values()) for group in seen.groups.values())


@dataclass
class Losses:
    """Tokens that workers had from their engines and that did not become durable, counted while nothing is generated.

    What a process generated between its last count and its end is not known: what is found is at most what was lost.
    """

    allowed: int = 0
    """Tokens of the chunks that faults may have cost."""
    found: int = 0
    """As many are lost since fewest were missing."""
    _counts: dict[str, int] = field(default_factory=dict)
    _ended: int = 0
    _least: int = sys.maxsize

    def note(self, worker_id: str, generated: int) -> None:
        """Takes a worker's count; a lower one than before is that of another process."""
        before = self._counts.get(worker_id, 0)
        self._ended += before if generated < before else 0
        self._counts[worker_id] = generated

    def check(self, durable: int) -> None:
        """Compares counts of all workers; raises LawBroken when more tokens are lost than allowed."""
        missing = self._ended + sum(self._counts.values()) - durable
        self._least = min(self._least, missing)
        self.found = missing - self._least
        demand(self.found <= self.allowed, f"{self.found} tokens are lost, more than {self.allowed}")
