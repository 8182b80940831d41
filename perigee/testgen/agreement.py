"""Agreement: which of the outputs that solutions gave for one input is the expected one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from perigee.testgen.comparison import Comparison


@dataclass(frozen=True)
class Agreement:
    """The output that most agree on, and the positions of the outputs that are the same as it."""

    output: bytes
    members: tuple[int, ...]


def find_agreement(outputs: Sequence[bytes | None], same: Comparison) -> Agreement | None:
    """The output that the most outputs are the same as, the earliest at a tie; None where no solution gave one.

    Within tolerances sameness is not transitive, so each output in turn is taken for the expected one. A solution
    without an output, None, agrees with nobody.
    """
    best: Agreement | None = None
    for expected in dict.fromkeys(outputs):
        if expected is None:
            continue
        # What is the same byte for byte is compared once.
        equal = {output: same(output, expected) for output in dict.fromkeys(outputs) if output is not None}
        members = tuple(index for index, output in enumerate(outputs) if output is not None and equal[output])
        if best is None or len(members) > len(best.members):
            best = Agreement(expected, members)
    return best


def needed(share: Fraction, count: int) -> int:
    """How many of `count` are at least `share` of them."""
    return math.ceil(share * count)
