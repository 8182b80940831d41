"""JSON values, as functions return them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from perigee.sandbox.comparisons.numbers import Tolerance, is_close

_SHOWN = 80

Step = tuple[str, Any, Any]


def find_value_difference(actual: Any, expected: Any, tolerance: Tolerance | None = None) -> str | None:
    """The first place where two JSON values differ, as a sentence: 1 and 1.0 are equal, True and 1 are not, NaN equals
    itself. Numbers may differ by the tolerance where one is given.

    Nesting is bounded by memory alone.
    """
    pending: list[Iterator[Step]] = [iter([("result", actual, expected)])]
    path: list[str] = [""]
    while pending:
        step = next(pending[-1], None)
        if step is None:
            pending.pop()
            path.pop()
            continue
        path[-1], value, expected_value = step
        if (reason := _differ(value, expected_value, tolerance)) is not None:
            return f"{_cut(''.join(path))} {reason}"
        if isinstance(value, dict):
            pending.append(iter([(f"[{_show(key)}]", value[key], expected_value[key]) for key in value]))
            path.append("")
        elif isinstance(value, list):
            pending.append((f"[{index}]", *pair) for index, pair in enumerate(zip(value, expected_value, strict=True)))
            path.append("")
    return None


def _differ(actual: Any, expected: Any, tolerance: Tolerance | None) -> str | None:
    """How two values differ without a look into them, or None."""
    if isinstance(actual, bool) or isinstance(expected, bool):
        same = actual is expected
    elif isinstance(actual, int | float) and isinstance(expected, int | float):
        if tolerance is None:
            same = actual == expected or (actual != actual and expected != expected)
        else:
            same = is_close(actual, expected, tolerance)
    elif isinstance(actual, list) and isinstance(expected, list):
        if len(actual) != len(expected):
            return f"has {len(actual)} items, expected {len(expected)}"
        return None
    elif isinstance(actual, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in actual:
                return f"lacks the key {_show(key)}"
        for key in actual:
            if key not in expected:
                return f"has the key {_show(key)}, which is not expected"
        return None
    else:
        same = type(actual) is type(expected) and bool(actual == expected)
    return None if same else f"is {_show(actual)}, expected {_show(expected)}"


def _show(value: Any) -> str:
    """The value as JSON; of a list or an object only what it is, so that nothing large or deep is written out."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return _cut(json.dumps(value[: _SHOWN + 1] if isinstance(value, str) else value, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
