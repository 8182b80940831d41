"""The penalty of responses that come near their cap, for long2short (k1.5 section 2.4)."""

from __future__ import annotations


def overlong_penalty(tokens: int, cap: int, buffer: int) -> float:
    """0 up to `cap - buffer` tokens, then falling linearly to -1 at `cap` and beyond.

    It is the soft overlong punishment of DAPO (arXiv 2503.14476), whatever the verdict. Unlike the length reward it
    does not compare a response with its group, so that a group of long responses is pulled down, too.
    """
    return -min(1.0, max(0, tokens - (cap - buffer)) / buffer)
