"""Selection of training data from judged samples: responses to fine-tune on, and pairs of a better and a worse one.

A sample is a line of samples.jsonl, which has the keys of answers.jsonl. Every sample of a selection is used or counted
under the reason why it was dropped. A response that was cut is never one to learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from perigee.cli.eval.results import FAILED, Answer, is_correct
from perigee.errors import FailedPreconditionError
from perigee.image_sources import keep_images
from perigee.reward.items import PromptLine
from perigee.statistics import clustered_interval

SHORTEST, PAIRS, ALL = "shortest", "pairs", "all"
WRONG_LONGER, CORRECT_LONGER = "wrong_longer", "correct_longer"

# Reasons why a sample is dropped.
NO_VERDICT = "no verdict"
EMPTY = "empty"
CUT = "cut at the maximum of tokens"
REPEATED = "the same text as another"
LONGER = "longer than the shortest correct one"
NOT_LONGER = "wrong, and not longer than the chosen one"
NOT_MUCH_LONGER = "correct, and not longer by the factor"
# Reasons why a prompt is dropped.
NO_CORRECT = "no correct response"
NO_WHOLE_CORRECT = "no correct response that is whole"
NOTHING_JUDGED = "no response with a verdict"
NOTHING_REJECTED = "no response to reject"

Measure = Callable[[Answer], int]


@dataclass(frozen=True)
class PromptSamples:
    """Samples of one prompt, in the order of their attempts."""

    line: PromptLine
    samples: Sequence[Answer]


@dataclass(frozen=True)
class PairRules:
    """Responses that are rejected beside the shortest correct one."""

    wrong_longer: bool = True
    """Wrong ones that are longer."""
    correct_longer: float | None = 1.5
    """Correct ones of at least this many times its length; None for none."""


@dataclass(frozen=True)
class Selection:
    """Lines of a file, and what its report says."""

    lines: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any]


def choose_measure(groups: Iterable[PromptSamples]) -> tuple[str, Measure]:
    """Returns the unit of lengths and how they are measured: tokens, or characters where some are not counted."""
    if any(sample["tokens"] is None for group in groups for sample in group.samples if sample["verdict"] != FAILED):
        return "characters", lambda sample: len(sample["response"])
    return "tokens", lambda sample: int(sample["tokens"])


def select(kind: str, groups: Sequence[PromptSamples], rules: PairRules) -> Selection:
    """Returns what is selected of the samples: `shortest`, `pairs` or `all`.

    Raises FailedPreconditionError when that is nothing.
    """
    _, measure = choose_measure(groups)
    if kind == PAIRS:
        return select_pairs(groups, measure, rules)
    return select_correct(groups, measure, only_shortest=kind == SHORTEST)


def select_correct(groups: Sequence[PromptSamples], measure: Measure, *, only_shortest: bool) -> Selection:
    """Returns the correct responses of each prompt, or the shortest of them, as a supervised set."""
    chosen: list[tuple[PromptSamples, Answer]] = []
    dropped, prompts = Counter[str](), Counter[str]()
    for group in groups:
        usable = find_usable(group, dropped)
        if not usable:
            prompts[explain_loss(group)] += 1
            continue
        kept = [min(usable, key=measure)] if only_shortest else usable
        dropped[LONGER] += len(usable) - len(kept)
        chosen += ((group, sample) for sample in kept)
    if not chosen:
        raise no_correct(groups)
    lengths = [measure(sample) for _, sample in chosen]
    report = {
        "examples": len(chosen),
        "prompts": len(groups) - prompts.total(),
        "length": summarize_lengths(lengths),
        "dropped_prompts": dict(prompts),
        "dropped_responses": dict(+dropped),
    }
    return Selection([write_asked(group) | {"response": sample["response"]} for group, sample in chosen], report)


def find_usable(group: PromptSamples, dropped: Counter[str]) -> list[Answer]:
    """Returns the correct responses to learn from; each other one is counted under the reason why it is none."""
    found: dict[str, Answer] = {}
    for sample in group.samples:
        text = sample["response"].strip()
        if reason := REPEATED if text in found and is_correct(sample) else explain_unusable(sample, text):
            dropped[reason] += 1
        else:
            found[text] = sample
    return list(found.values())


def explain_unusable(sample: Answer, text: str) -> str:
    """Returns why a response is none to learn from, "" when it is one."""
    if sample["verdict"] == FAILED:
        return NO_VERDICT
    if not is_correct(sample):
        return str(sample["verdict"])
    return CUT if sample["truncated"] else "" if text else EMPTY


def select_pairs(groups: Sequence[PromptSamples], measure: Measure, rules: PairRules) -> Selection:
    """Returns pairs of the shortest correct response to a prompt and one that the rules reject beside it."""
    pairs: list[tuple[PromptSamples, Answer, Answer]] = []
    outcomes, prompts = Counter[str](), Counter[str]()
    for group in groups:
        usable = find_usable(group, Counter())
        if not usable:
            reason = explain_loss(group)
            prompts[reason] += 1
            outcomes[f"{reason} to its prompt"] += len(group.samples)
            continue
        chosen = min(usable, key=measure)
        rejected = find_rejected(group, chosen, measure, rules, outcomes)
        pairs += ((group, chosen, sample) for sample in rejected)
        prompts[NOTHING_REJECTED] += not rejected
    if not pairs and not prompts[NOTHING_REJECTED]:
        raise no_correct(groups)
    if not pairs:
        raise FailedPreconditionError(
            "no response is to be rejected beside the shortest correct one to its prompt: draw more samples (-n), or "
            "change the rules (--reject-wrong, --reject-longer)"
        )
    report = {
        "rules": asdict(rules),
        "pairs": len(pairs),
        "prompts": len(groups) - prompts.total(),
        "rejected": {rule: outcomes.pop(rule, 0) for rule in (WRONG_LONGER, CORRECT_LONGER)},
        "chosen_length": summarize_lengths([measure(chosen) for _, chosen, _ in pairs]),
        "rejected_length": summarize_lengths([measure(rejected) for *_, rejected in pairs]),
        "dropped_prompts": dict(+prompts),
        "dropped_responses": dict(outcomes),
    }
    lines = [
        write_asked(group) | {"chosen": chosen["response"], "rejected": rejected["response"]}
        for group, chosen, rejected in pairs
    ]
    return Selection(lines, report)


def find_rejected(
    group: PromptSamples, chosen: Answer, measure: Measure, rules: PairRules, outcomes: Counter[str]
) -> list[Answer]:
    """Returns the responses to reject beside the chosen one; counts all others, too, by rule or reason."""
    found: dict[str, Answer] = {}
    for sample in group.samples:
        if sample is chosen:
            continue
        text = sample["response"].strip()
        outcome = compare(sample, chosen, measure, rules)
        if outcome in (WRONG_LONGER, CORRECT_LONGER):
            outcome = REPEATED if text in found else outcome
            found.setdefault(text, sample)
        outcomes[outcome] += 1
    return list(found.values())


def compare(sample: Answer, chosen: Answer, measure: Measure, rules: PairRules) -> str:
    """Returns the rule by which a response is rejected beside the chosen one, or the reason why it is not."""
    text = sample["response"].strip()
    if sample["verdict"] == FAILED:
        return NO_VERDICT
    if not text or text == chosen["response"].strip():
        return REPEATED if text else EMPTY
    length, least = measure(sample), measure(chosen)
    if is_correct(sample):
        factor = rules.correct_longer
        return CORRECT_LONGER if factor is not None and length >= factor * least else NOT_MUCH_LONGER
    return WRONG_LONGER if rules.wrong_longer and length > least else NOT_LONGER


def explain_loss(group: PromptSamples) -> str:
    """Returns why no response to a prompt can be learned from."""
    if any(map(is_correct, group.samples)):
        return NO_WHOLE_CORRECT
    return NOTHING_JUDGED if all(sample["verdict"] == FAILED for sample in group.samples) else NO_CORRECT


def no_correct(groups: Sequence[PromptSamples]) -> FailedPreconditionError:
    """Returns the error of samples of which none can be learned from."""
    reasons = Counter(map(explain_loss, groups))
    words = ", ".join(f"{count:,} have {reason}" for reason, count in reasons.items())
    advice = "draw more samples (-n), allow more tokens (--max-tokens), or take easier prompts or another model"
    failures = count_failures(groups)
    if {*reasons} == {NOTHING_JUDGED} and failures:
        words += f", most often because {next(iter(failures))}"
        advice = "mend that, and the same command goes on"
    return FailedPreconditionError(
        f"nothing can be selected for any of the {len(groups):,} prompts ({words}): {advice}"
    )


def count_failures(groups: Sequence[PromptSamples]) -> dict[str, int]:
    """Returns the reasons why samples have no verdict, the most frequent first."""
    return dict(Counter(s["reason"] for group in groups for s in group.samples if s["verdict"] == FAILED).most_common())


def write_asked(group: PromptSamples) -> dict[str, Any]:
    """Returns the prompt of a line of training data, as the prompt file has it; its images are in a folder beside."""
    line = group.line
    asked = {"messages": list(line.messages)} if line.messages else {"prompt": line.item.prompt}
    return keep_images({"id": line.id, **asked}, line.messages, line.images)


def describe_samples(groups: Sequence[PromptSamples]) -> dict[str, Any]:
    """Returns counts by verdict, accuracy and lengths of all samples."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [sample for sample in samples if sample["verdict"] != FAILED]
    unit, measure = choose_measure(groups)
    rights = [[is_correct(each) for each in group.samples if each["verdict"] != FAILED] for group in groups]
    verdicts = Counter(sample["verdict"] for sample in samples)
    return {
        "prompts": len(groups),
        "responses": len(samples),
        "verdicts": {verdict: verdicts[verdict] for verdict in ("correct", "wrong", "ungradable", FAILED)},
        "failures": count_failures(groups),
        "truncated": sum(sample["truncated"] for sample in judged),
        "accuracy": asdict(clustered_interval([each for each in rights if each])) if judged else None,
        "length_unit": unit,
        "length": {
            name: summarize_lengths([measure(each) for each in some])
            for name, some in (
                ("all", judged),
                ("correct", [each for each in judged if is_correct(each)]),
                ("not_correct", [each for each in judged if not is_correct(each)]),
            )
        },
    }


def summarize_lengths(lengths: Sequence[int]) -> dict[str, float] | None:
    """Returns mean, median, least and greatest of some lengths; None of none."""
    if not lengths:
        return None
    return {
        "mean": round(fmean(lengths), 2),
        "median": median(lengths),
        "min": min(lengths),
        "max": max(lengths),
    }
