"""Packed token ids and log-probabilities: 4 bytes for each token, little-endian, end to end.

Expert choices are packed, too: for each token, layers times experts per token integers of `choice_bytes`.

Unpacking copies nothing: the views read the bytes in place. numpy reads the same bytes with
`np.frombuffer(packed, dtype="<u4")` and `np.frombuffer(packed, dtype="<f4")`.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable
from typing import Any

ITEM_BYTES = 4


def pack_token_ids(token_ids: Iterable[int]) -> bytes:
    """Packs token ids as unsigned 32-bit integers; raises OverflowError for one outside that range."""
    return _swap_on_big_endian(array("I", token_ids)).tobytes()


def pack_logprobs(logprobs: Iterable[float]) -> bytes:
    """Packs log-probabilities as 32-bit floats."""
    return _swap_on_big_endian(array("f", logprobs)).tobytes()


def unpack_token_ids(packed: bytes) -> memoryview[int]:
    """Returns a view of packed token ids; raises TypeError when the length is not a multiple of 4 bytes."""
    view: memoryview[int] = _view("I", packed)
    return view


def unpack_logprobs(packed: bytes) -> memoryview[float]:
    """Returns a view of packed log-probabilities; raises TypeError when the length is not a multiple of 4 bytes."""
    view: memoryview[float] = _view("f", packed)
    return view


def count_tokens(packed: bytes) -> int:
    """Returns the number of tokens in packed token ids or log-probabilities."""
    return len(packed) // ITEM_BYTES


def choice_bytes(experts: int) -> int:
    """Returns the bytes of one packed expert choice among so many experts of a layer."""
    return 1 if experts <= 256 else 2


def all_finite(packed_logprobs: bytes) -> bool:
    """Returns whether packed log-probabilities hold neither an infinity nor a NaN."""
    # A sum of doubles cannot overflow on 32-bit floats, so it is finite if and only if every term is.
    return math.isfinite(sum(unpack_logprobs(packed_logprobs)))


def _view(code: str, packed: bytes) -> Any:
    if sys.byteorder == "little":
        return memoryview(packed).cast(code)  # type: ignore[call-overload]
    return memoryview(_swap_on_big_endian(array(code, packed)))


def _swap_on_big_endian(values: array) -> array:  # type: ignore[type-arg]
    if sys.byteorder == "big":
        values.byteswap()
    return values
