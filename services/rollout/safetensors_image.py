"""Reads safetensors files from memory without a copy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from perigee.errors import InvalidArgumentError

HEADER_LENGTH_BYTES = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: where its bytes lie after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: memoryview) -> tuple[list[TensorEntry], int]:
    """The tensors of a safetensors file and the offset of their data.

    Raises InvalidArgumentError when the bytes are no safetensors file.
    """
    length = int.from_bytes(file[:HEADER_LENGTH_BYTES], "little")
    data = HEADER_LENGTH_BYTES + length
    if len(file) < HEADER_LENGTH_BYTES or data > len(file):
        raise InvalidArgumentError.of("manifest.shards", "a shard is shorter than its safetensors header says")
    try:
        header = json.loads(bytes(file[HEADER_LENGTH_BYTES:data]))
        entries = [
            TensorEntry(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError.of("manifest.shards", "a shard has no valid safetensors header") from error
    for entry in entries:
        _check_entry(entry, len(file) - data)
    return entries, data


def read_tensors(file: memoryview) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, as views of its bytes."""
    entries, data = read_header(file)
    for entry in entries:
        dtype = DTYPES[entry.dtype]
        if entry.begin == entry.end:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(file[data + entry.begin : data + entry.end], dtype=torch.uint8)
        # A view of another type needs its bytes aligned to that type.
        aligned = flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()
        yield entry.name, aligned.view(dtype).view(entry.shape)


def _check_entry(entry: TensorEntry, data_bytes: int) -> None:
    if entry.dtype not in DTYPES:
        raise InvalidArgumentError.of("manifest.shards", f"tensor {entry.name} has the unknown type {entry.dtype}")
    expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if not 0 <= entry.begin <= entry.end <= data_bytes or entry.end - entry.begin != expected:
        raise InvalidArgumentError.of("manifest.shards", f"tensor {entry.name} does not lie within its shard")
