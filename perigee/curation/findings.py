"""What a stage is given and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Question:
    """A prompt as the stages see it."""

    id: str
    text: str
    kind: str
    """Its verifier: math, code, ..."""
    reference: str = ""
    """The answer, where it is one text."""
    domain: str = ""
    """Empty: nobody has said."""
    difficulty: float | None = None
    """Of the input, or 1 - pass rate once that is measured."""


class Decision(Enum):
    """KEEP and DROP are decided; ASIDE: nobody knows."""

    KEEP = "keep"
    DROP = "drop"
    ASIDE = "aside"


@dataclass(frozen=True)
class Finding:
    """What a stage found of one prompt: whether it stays, why not, and the evidence as JSON values."""

    id: str
    decision: Decision = Decision.KEEP
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"id": self.id, "decision": self.decision.value, "reason": self.reason, "details": dict(self.details)}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Finding:
        """The finding that `to_line` wrote."""
        return cls(line["id"], Decision(line["decision"]), line["reason"], line["details"])
