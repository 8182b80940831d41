"""Choice of a policy version by accuracy and response length, from a run's evaluations.

The rule: of the versions whose sampled accuracy is at most `max_loss` below the highest, the one with the shortest
sampled responses; of equally long ones the most accurate, and of these the earliest. So a second phase, such as
long2short reinforcement learning (k1.5 section 2.4), starts where short answers cost no accuracy to speak of.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import InvalidArgumentError
from perigee.files import read_lines
from perigee.statistics import Interval

MAX_LOSS = 0.02


@dataclass(frozen=True)
class Candidate:
    """An evaluated policy version; accuracy and mean response tokens are those of its samples."""

    policy_version: int
    iteration: int
    problems: int
    accuracy: Interval
    response_tokens: float


@dataclass(frozen=True)
class Choice:
    """The chosen version among all candidates, by version; those without a checkpoint are in `lost`."""

    candidates: list[Candidate]
    chosen: Candidate
    least_accuracy: float
    lost: list[Candidate]

    def lines(self) -> list[str]:
        """Returns the table and the rule's outcome, for a terminal."""
        head = "version  iteration  problems  sampled accuracy        response tokens"
        rows = []
        for each in sorted([*self.candidates, *self.lost], key=lambda each: each.policy_version):
            note = "no checkpoint" if each in self.lost else "" if self._is_near(each) else "less accurate"
            note = "chosen" if each == self.chosen else note
            columns = (f"{each.policy_version:7}  {each.iteration:9}  {each.problems:8}", f"{each.accuracy!s:22}")
            rows.append("  ".join((*columns, f"{each.response_tokens:15.1f}", note)).rstrip())
        found = (
            f"version {self.chosen.policy_version}: the shortest responses among versions of at least "
            f"{self.least_accuracy:.3f} sampled accuracy"
        )
        hint = ["run.evaluation.keep_checkpoints keeps the checkpoints of all evaluated versions"] if self.lost else []
        return [head, *rows, found, *hint]

    def _is_near(self, candidate: Candidate) -> bool:
        return candidate.accuracy.mean >= self.least_accuracy


def choose_version(
    evaluated: Sequence[Candidate], max_loss: float = MAX_LOSS, kept: Container[int] | None = None
) -> Choice:
    """Chooses among the evaluated versions, or among those that are `kept`.

    Raises InvalidArgumentError when no version can be chosen.
    """
    if not 0 <= max_loss < 1:
        raise InvalidArgumentError.for_field("--max-loss", f"must be at least 0 and below 1, is {max_loss:g}")
    candidates = [each for each in evaluated if kept is None or each.policy_version in kept]
    if not candidates:
        reason = "are there: set run.evaluation.every, and train"
        if evaluated:
            reason = "have a checkpoint: set run.evaluation.keep_checkpoints"
        raise InvalidArgumentError.for_field("evaluations.jsonl", f"no evaluated versions {reason}")
    # Accuracies are multiples of 1 / responses: a difference of exactly `max_loss` counts.
    least = max(each.accuracy.mean for each in candidates) - max_loss - 1e-9
    near = [each for each in candidates if each.accuracy.mean >= least]
    chosen = min(near, key=lambda each: (each.response_tokens, -each.accuracy.mean, each.policy_version))
    return Choice(candidates, chosen, least, [each for each in evaluated if each not in candidates])


def read_candidates(run_path: Path) -> list[Candidate]:
    """Returns the evaluated versions of a run by version; of one that was evaluated twice the figures on more problems.

    Those of which no sample was judged are left out. Raises DataLossError naming a line that cannot be read.
    """
    found: dict[int, Candidate] = {}
    for line in read_lines(run_path / "evaluations.jsonl"):
        accuracy, tokens = line["accuracy"]["overall"]["sampled"], line["response_tokens"]["sampled"]
        if accuracy["mean"] is None or tokens is None:
            continue
        candidate = Candidate(
            line["policy_version"], line["iteration"], line["problems"], Interval(**accuracy), float(tokens)
        )
        known = found.get(candidate.policy_version)
        if known is None or candidate.problems > known.problems:
            found[candidate.policy_version] = candidate
    return [found[version] for version in sorted(found)]
