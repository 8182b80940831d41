"""Problems to make test cases for, and the rules by which they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from perigee.errors import InvalidArgumentError
from perigee.sandbox.compare import Comparison, Tolerance, find_difference
from perigee.sandbox.v1 import sandbox_pb2 as pb

# Called with an output and the expected one.
SameOutput = Callable[[bytes, bytes], bool]


def compare_by(comparator: Comparison | Tolerance) -> SameOutput:
    """Returns a function that tells whether an output is the expected one."""

    def same(actual: bytes, expected: bytes) -> bool:
        return find_difference(actual, expected, comparator) is None

    return same


@dataclass(frozen=True)
class Program:
    """Generator or known solution; `name` is its path in the problem's folder."""

    name: str
    language: str
    source: bytes


@dataclass(frozen=True)
class Plan:
    """Numbers of candidates to make and to keep; the defaults are those of section 2.3.5 of the k1.5 report."""

    seed: int = 0
    candidates: int = 50
    # Cases that must be left.
    minimum: int = 40
    # Known solutions that a problem must bring.
    solutions: int = 10
    # Fraction of the known solutions that must agree on a case's output.
    agree_fraction: Fraction = Fraction(7, 10)
    # Fraction of the known solutions that must pass all cases.
    pass_fraction: Fraction = Fraction(9, 10)
    # Programs sent to the sandbox at once.
    jobs: int = 8

    def check(self) -> None:
        """Raises InvalidArgumentError naming the option that is wrong."""
        if not 1 <= self.minimum <= self.candidates:
            raise InvalidArgumentError.for_field("--minimum", f"must be from 1 to --candidates, {self.candidates}")
        if not Fraction(1, 2) < self.agree_fraction <= 1:
            raise InvalidArgumentError.for_field(
                "--agree-fraction", "must be above 0.5, for one output to win, and at most 1"
            )
        if not 0 < self.pass_fraction <= 1:
            raise InvalidArgumentError.for_field("--pass-fraction", "must be above 0 and at most 1")

    def names(self) -> list[str]:
        """Returns the candidates' names in their order: 001, 002, ..."""
        width = max(3, len(str(self.candidates)))
        return [f"{index:0{width}}" for index in range(1, self.candidates + 1)]


@dataclass(frozen=True)
class Problem:
    """Problem for which test cases can be made."""

    generator: Program
    known: tuple[Program, ...]
    # Of the known solutions; the generator has the sandbox's defaults.
    limits: pb.Limits
    same: SameOutput


def candidate_seed(seed: int, index: int) -> int:
    """Returns the seed of one candidate, from 0 to 2**32 - 1, which does not depend on the number of candidates."""
    return int.from_bytes(hashlib.sha256(f"perigee make-tests {seed} {index}".encode()).digest()[:4], "big")


def digest(*parts: bytes) -> str:
    """Returns the SHA-256 of the parts, each with its length, so that no two lists of parts share one."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()
