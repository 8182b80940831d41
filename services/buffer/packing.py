"""Packed forms: tokens and logprobs as little-endian 32-bit values, version spans as text.

`version:stop,version:stop` names the policy version of the tokens up to each response offset, so that spans can be
compared, cut and joined without counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from services.buffer.types import Span

ITEM_BYTES = 4

TokensT = npt.NDArray[np.uint32]
LogprobsT = npt.NDArray[np.float32]


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit integers."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Log-probabilities as little-endian 32-bit floats."""
    return np.asarray(logprobs, dtype="<f4").tobytes()


def unpack_tokens(packed: bytes) -> TokensT:
    """The inverse of `pack_tokens`."""
    return np.frombuffer(packed, dtype="<u4")


def unpack_logprobs(packed: bytes) -> LogprobsT:
    """The inverse of `pack_logprobs`."""
    return np.frombuffer(packed, dtype="<f4")


def are_finite(packed: bytes) -> bool:
    """Whether packed logprobs hold neither infinities nor NaN."""
    return bool(np.all(np.isfinite(unpack_logprobs(packed))))


def pack_spans(spans: Iterable[Span], offset: int) -> str:
    """Spans that begin at a response offset as `version:stop,...`, empty ones left out."""
    pieces = []
    for span in spans:
        offset += span.tokens
        if span.tokens:
            pieces.append(f"{span.policy_version}:{offset}")
    return ",".join(pieces)


def unpack_spans(versions: str, first: int, last: int) -> list[Span]:
    """The spans of the tokens from `first` up to `last`; `pack_spans` with offset `first` is the inverse."""
    spans: list[Span] = []
    at = first
    for piece in versions.split(",") if versions else ():
        version, _, stop_text = piece.partition(":")
        stop = min(int(stop_text), last)
        if stop > at:
            spans.append(Span(int(version), stop - at))
            at = stop
    return spans
