"""What to make test cases for, and by which rules."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.comparison import Comparison


@dataclass(frozen=True)
class Program:
    """A generator or a known solution; `name` is its path in the problem's folder."""

    name: str
    language: str
    source: bytes


@dataclass(frozen=True)
class Plan:
    """How many candidates to make and what to keep; the defaults are those of section 2.3.5 of the k1.5 report."""

    seed: int = 0
    candidates: int = 50
    # Cases that must be left.
    minimum: int = 40
    # Known solutions that a problem must bring.
    solutions: int = 10
    # Share of the known solutions that must agree on a case's output.
    agree_share: Fraction = Fraction(7, 10)
    # Share of the known solutions that must pass all cases.
    pass_share: Fraction = Fraction(9, 10)
    # Programs sent to the sandbox at once.
    jobs: int = 8

    def check(self) -> None:
        """Raises InvalidArgumentError naming the option that is wrong."""
        if not 1 <= self.minimum <= self.candidates:
            raise InvalidArgumentError.of("--minimum", f"must be from 1 to --candidates, {self.candidates}")
        if not Fraction(1, 2) < self.agree_share <= 1:
            raise InvalidArgumentError.of("--agree-share", "must be above 0.5, for one output to win, and at most 1")
        if not 0 < self.pass_share <= 1:
            raise InvalidArgumentError.of("--pass-share", "must be above 0 and at most 1")

    def names(self) -> list[str]:
        """The candidates' names in their order: 001, 002, ..."""
        width = max(3, len(str(self.candidates)))
        return [f"{index:0{width}}" for index in range(1, self.candidates + 1)]


@dataclass(frozen=True)
class Problem:
    """A problem that test cases can be made for."""

    generator: Program
    known: tuple[Program, ...]
    # Of the known solutions; the generator has the sandbox's defaults.
    limits: pb.Limits
    same: Comparison


def candidate_seed(seed: int, index: int) -> int:
    """The seed of one candidate, from 0 to 2**32 - 1; each index has its own, whatever the number of candidates."""
    return int.from_bytes(hashlib.sha256(f"perigee make-tests {seed} {index}".encode()).digest()[:4], "big")


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts, each with its length, so that no two lists of parts share one."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()
