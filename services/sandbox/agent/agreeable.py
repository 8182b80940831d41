"""Answers that agree with everything, by which a fault of a test is told from one of the answers to it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from .stand_ins import CallerPeer


class Agreeable:
    """Answer that stands for any other: every operation on it succeeds, it equals everything, and it is empty but as a
    text.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __bytes__(self) -> bytes:
        return self._text.encode()

    __repr__ = __str__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


_RETURNS = {
    "ne": False, "hash": 0, "int": 0, "index": 0, "float": 0.0, "complex": 0j,
    **dict.fromkeys(("bool", "eq", "lt", "le", "gt", "ge", "contains"), True),
}  # fmt: skip
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "and", "or", "xor")
_OTHERS = ("call", "getitem", "neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil", "reversed")


def _return(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


for _name, _value in _RETURNS.items():
    setattr(Agreeable, f"__{_name}__", _return(_value))
for _name in (*_OTHERS, *_BINARY, *(f"r{each}" for each in _BINARY)):
    setattr(Agreeable, f"__{_name}__", lambda self, /, *_, **__: self)


class AgreeingPeer(CallerPeer):
    """The test's side without a submission: whatever can be asked for is answered agreeably."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(), io.BytesIO(), max_reply_bytes=1)
        self._asked = 0
        self._answer = Agreeable(text)

    def send(self, fields: dict[str, Any]) -> None:
        """Checks that a request can be sent."""
        super().send(fields)
        self._asked = fields["id"]

    def receive(self) -> dict[str, Any]:
        """Answers the last request."""
        return {"id": self._asked, "value": self._answer}
