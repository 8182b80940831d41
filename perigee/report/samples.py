"""Samples of a run: responses kept whole in samples.jsonl, some per iteration and evaluation, for people to read."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from perigee.files import read_lines
from perigee.image_sources import IMAGES_FOLDER

SAMPLES_FILE = "samples.jsonl"
# Kinds of responses, in the order in which they are chosen and shown.
KINDS = ("right", "wrong", "ungradable", "capped", "repeated", "failed")


@dataclass
class Sample:
    """Response with what became of it: a line of samples.jsonl."""

    iteration: int
    # baseline, periodic or final; empty for a response of the iteration's rollout.
    evaluation: str
    id: str
    prompt_id: str
    domain: str
    prompt: str
    response: str
    # Response tokens, and the policy versions that sampled them, oldest first.
    tokens: int
    policy_versions: list[int]
    finish_reason: str
    verdict: str = ""
    # The verifier's, before shaping; None when judging failed.
    reward: float | None = None
    extracted_answer: str = ""
    reason: str = ""
    # Digests of the prompt's images; their files are in the run's folder.
    images: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """One of KINDS: how the response ended if that was early, else its verdict."""
        early = {"max_response_tokens": "capped", "repetition": "repeated"}
        return early.get(self.finish_reason) or {"correct": "right"}.get(self.verdict, self.verdict)


@dataclass(frozen=True)
class SampleFilter:
    """Samples to show; None stands for all."""

    # A verdict or one of KINDS.
    verdict: str | None = None
    domain: str | None = None
    iteration: int | None = None
    # baseline, periodic, final, any, or none: of training only.
    evaluation: str | None = None

    def matches(self, sample: Sample) -> bool:
        """Returns whether a sample is shown."""
        evaluations = {"any": bool(sample.evaluation), "none": not sample.evaluation}
        return (
            self.verdict in (None, sample.verdict, sample.kind)
            and self.domain in (None, sample.domain)
            and self.iteration in (None, sample.iteration)
            and (self.evaluation is None or evaluations.get(self.evaluation, self.evaluation == sample.evaluation))
        )


def choose(samples: Iterable[Sample], count: int, seed: int) -> list[Sample]:
    """Returns `count` samples at most, kinds in turn; the seed and the ids decide, not the order."""
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: rank(sample, seed)):
        by_kind[sample.kind].append(sample)
    kinds = [by_kind[kind] for kind in KINDS if by_kind[kind]]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return list(itertools.islice((sample for sample in turns if sample is not None), count))


def rank(sample: Sample, seed: int) -> bytes:
    """Returns a sample's place in the order of choice."""
    return hashlib.sha256(f"{seed}/{sample.iteration}/{sample.id}".encode()).digest()


def shorten(text: str, max_bytes: int) -> str:
    """Returns beginning and end of a text that is longer than `max_bytes` of UTF-8, and says what is left out."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    half = max_bytes // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[-half:]))
    return f"{head}\n[... {len(data) - 2 * half:,} bytes left out ...]\n{tail}"


def to_line(sample: Sample) -> dict[str, Any]:
    """Returns the line of a sample, its kind included."""
    return asdict(sample) | {"kind": sample.kind}


def read_sample(line: dict[str, Any]) -> Sample:
    """Reads a line; keys of other versions are left out."""
    names = {each.name for each in fields(Sample)}
    return Sample(**{name: value for name, value in line.items() if name in names})


def read_samples(run_path: Path) -> list[Sample]:
    """Reads the samples in a run folder; none where there is no file. Raises DataLossError naming a broken line.

    What is made again after a crash is written again: the later line stands.
    """
    samples = map(read_sample, read_lines(run_path / SAMPLES_FILE))
    return list({(sample.evaluation, sample.iteration, sample.id): sample for sample in samples}.values())


def text_lines(sample: Sample) -> list[str]:
    """Returns a sample as lines for a terminal."""
    where = f"{sample.evaluation} evaluation, " if sample.evaluation else ""
    versions = ", ".join(map(str, sample.policy_versions))
    reward = "no reward" if sample.reward is None else f"reward {sample.reward:g}"
    return [
        f"--- {sample.kind} · {sample.verdict}, {reward} · {where}iteration {sample.iteration} · {sample.domain} · "
        f"{sample.id} · {sample.tokens:,} tokens, {sample.finish_reason} · policy version {versions}",
        *(f"  {IMAGES_FOLDER}/{digest}" for digest in sample.images),
        *(f"  {printable(line)}" for line in sample.prompt.splitlines()),
        *(f"> {printable(line)}" for line in (sample.response.splitlines() or ["(an empty response)"])),
        *(f"answer: {printable(line)}" for line in sample.extracted_answer.splitlines()),
        *(f"reason: {printable(line)}" for line in sample.reason.splitlines()),
    ]


def printable(text: str) -> str:
    """Returns a text without what a terminal would take for commands."""
    return "".join(letter if letter.isprintable() or letter == "\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def pick_each_kind(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the newest sample of each kind there is, in the order of KINDS."""
    newest = {sample.kind: sample for sample in samples}
    return [newest[kind] for kind in KINDS if kind in newest]
