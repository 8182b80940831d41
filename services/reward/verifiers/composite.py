"""Several verifiers on one response, weighted, some of them gates."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.scorer import Scorer
from services.reward.verifiers.base import AGREEMENTS, Item, Outcome, Verdict, Verifier, graded_whole

MAX_PARTS = 16


class CompositeVerifier(Verifier[pb.CompositeVerifier]):
    """The weighted mean of its parts; correct when every gate and every weighted part is.

    Gates are judged first: one that is not correct makes the whole wrong with reward 0, and the rest is not judged. A
    gate or weighted part that FAILED makes the whole FAILED unless a gate decided. Parts that were judged are reported.
    """

    name: ClassVar[str] = "composite"
    version: ClassVar[str] = "2"

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def find_violations(self, parameters: pb.CompositeVerifier) -> list[FieldViolation]:
        parts = parameters.parts
        if not 1 <= len(parts) <= MAX_PARTS:
            return [FieldViolation("composite.parts", f"has {len(parts)} parts: between 1 and {MAX_PARTS} are allowed")]
        violations = []
        names: set[str] = set()
        for index, part in enumerate(parts):
            violations += [
                FieldViolation(f"composite.parts[{index}].{violation.field}", violation.description)
                for violation in self._find_part_violations(part, names)
            ]
            names.add(part.name)
        if not violations and not sum(part.weight for part in parts) > 0:
            violations.append(FieldViolation("composite.parts", "at least one weight must be positive"))
        return violations

    def _find_part_violations(self, part: pb.CompositePart, names: set[str]) -> list[FieldViolation]:
        violations = []
        if not part.name or part.name in names:
            violations.append(FieldViolation("name", "is required, and different for each part"))
        if not math.isfinite(part.weight) or part.weight < 0:
            violations.append(FieldViolation("weight", f"must be a number from 0, got {part.weight}"))
        verifier = self._scorer.verifiers.get(part.verifier.WhichOneof("kind") or "")
        if verifier is None:
            return [*violations, FieldViolation("verifier", "must be one of those that are offered")]
        inner = verifier.find_violations(parameters_of(part))
        return violations + [FieldViolation(f"verifier.{each.field}", each.description) for each in inner]

    def graded_text(self, item: Item[pb.CompositeVerifier]) -> str | None:
        return graded_whole(item)

    async def judge(self, item: Item[pb.CompositeVerifier]) -> Outcome:
        parts = item.parameters.parts
        gates = [part for part in parts if part.gate]
        outcomes = await self._judge_parts(item, gates)
        closed = [part for part in gates if outcomes[part.name].verdict in (Verdict.WRONG, Verdict.UNGRADABLE)]
        if closed:
            outcome = outcomes[closed[0].name]
            reason = f"gate {closed[0].name}: {outcome.reason or outcome.verdict.value}"
            return report(parts, outcomes, Outcome.wrong(first_extracted(parts, outcomes), reason))
        if not any(outcome.verdict is Verdict.FAILED for outcome in outcomes.values()):
            outcomes |= await self._judge_parts(item, [part for part in parts if not part.gate])
            count_agreements(parts, outcomes)
        return report(parts, outcomes, combine(parts, outcomes))

    async def _judge_parts(
        self, item: Item[pb.CompositeVerifier], parts: Sequence[pb.CompositePart]
    ) -> dict[str, Outcome]:
        judged = await asyncio.gather(
            *(self._scorer.judge(replace(item, parameters=parameters_of(part))) for part in parts)
        )
        return {part.name: scored.outcome for part, scored in zip(parts, judged, strict=True)}


def parameters_of(part: pb.CompositePart) -> Any:
    """Returns the parameters of a part's verifier, the message that is set."""
    return getattr(part.verifier, str(part.verifier.WhichOneof("kind")))


def counts(part: pb.CompositePart) -> bool:
    """Returns whether verdict and reward depend on the part; without weight and gate it is only reported."""
    return part.gate or part.weight > 0


def combine(parts: Sequence[pb.CompositePart], outcomes: Mapping[str, Outcome]) -> Outcome:
    """Returns the whole's outcome once no gate has decided."""
    extracted = first_extracted(parts, outcomes)
    counted = [part for part in parts if counts(part)]
    failed = [(part, outcomes[part.name]) for part in counted if is_failed(outcomes.get(part.name))]
    if failed:
        reason = "; ".join(f"part {part.name}: {outcome.reason}" for part, outcome in failed)
        return Outcome.failed_for([outcome for _, outcome in failed], reason, extracted)
    total = sum(part.weight for part in parts)
    reward = sum(part.weight * (outcomes[part.name].reward or 0.0) for part in parts) / total
    missed = [part for part in counted if outcomes[part.name].verdict is not Verdict.CORRECT]
    if not missed:
        return Outcome(Verdict.CORRECT, reward, extracted)
    if all(outcomes[part.name].verdict is Verdict.UNGRADABLE for part in counted):
        return Outcome.ungradable(outcomes[missed[0].name].reason, extracted)
    reason = "; ".join(f"part {part.name}: {outcomes[part.name].reason or 'wrong'}" for part in missed)
    return Outcome.wrong(extracted, reason, reward=reward)


def report(parts: Sequence[pb.CompositePart], outcomes: Mapping[str, Outcome], whole: Outcome) -> Outcome:
    """Returns the whole with the parts that were judged."""
    return replace(whole, parts={part.name: outcomes[part.name] for part in parts if part.name in outcomes})


def is_failed(outcome: Outcome | None) -> bool:
    """Returns whether a part was judged and FAILED."""
    return outcome is not None and outcome.verdict is Verdict.FAILED


def first_extracted(parts: Sequence[pb.CompositePart], outcomes: Mapping[str, Outcome]) -> str:
    """Returns the answer that the first part that found one found."""
    found = [outcomes[part.name].extracted for part in parts if part.name in outcomes]
    return next((extracted for extracted in found if extracted), "")


def count_agreements(parts: Sequence[pb.CompositePart], outcomes: Mapping[str, Outcome]) -> None:
    """Counts, for each pair of verifiers that gave a verdict, whether both found the response correct or neither."""
    judged = [
        (str(part.verifier.WhichOneof("kind")), outcomes[part.name].verdict is Verdict.CORRECT)
        for part in parts
        if not is_failed(outcomes.get(part.name))
    ]
    for pair in itertools.combinations(sorted(judged), 2):
        result = "agree" if pair[0][1] == pair[1][1] else "disagree"
        AGREEMENTS.labels(pair[0][0], pair[1][0], result).inc()
