"""Safetensors files in memory: built in pieces to be written, and read without a copy.

A file is the length of its header as 8 bytes little-endian, the header as JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from perigee.errors import InvalidArgumentError

# Headers end at multiples of this, so that mapped tensors are aligned.
ALIGNMENT = 64
HEADER_LENGTH_BYTES = 8
FIELD = "manifest.shards"

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its bytes are [begin, end) after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_file(tensors: Sequence[NamedTensor]) -> Iterator[memoryview]:
    """Yields the bytes of a file that holds these tensors: the header, then each tensor's."""
    yield memoryview(_encode_header(tensors))
    for _, tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().flatten()
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an ndarray is a buffer


def cut_into_shards(tensors: Iterable[NamedTensor], max_shard_bytes: int) -> Iterator[list[NamedTensor]]:
    """Yields the tensors of each shard of at most `max_shard_bytes`; one larger tensor is a shard of its own."""
    shard: list[NamedTensor] = []
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append((name, tensor))
        shard_bytes += tensor.nbytes
    if shard:
        yield shard


def read_header(file: memoryview) -> tuple[list[TensorEntry], int]:
    """Returns the tensors of a file and the offset of their data.

    Raises InvalidArgumentError when the bytes are no safetensors file.
    """
    length = int.from_bytes(file[:HEADER_LENGTH_BYTES], "little")
    data = HEADER_LENGTH_BYTES + length
    if len(file) < HEADER_LENGTH_BYTES or data > len(file):
        raise InvalidArgumentError.for_field(FIELD, "a shard is shorter than its safetensors header says")
    try:
        header = json.loads(bytes(file[HEADER_LENGTH_BYTES:data]))
        entries = [
            TensorEntry(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError.for_field(FIELD, "a shard has no valid safetensors header") from error
    for entry in entries:
        _check_entry(entry, len(file) - data)
    return entries, data


def read_tensors(file: memoryview) -> Iterator[NamedTensor]:
    """Yields the tensors of a file, as views of its bytes; raises what `read_header` raises."""
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


def _encode_header(tensors: Sequence[NamedTensor]) -> bytes:
    """Returns the header with its length, padded so that the data are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(HEADER_LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _check_entry(entry: TensorEntry, data_bytes: int) -> None:
    """Raises InvalidArgumentError for a tensor of unknown type or outside its shard."""
    if entry.dtype not in DTYPES:
        raise InvalidArgumentError.for_field(FIELD, f"tensor {entry.name} has the unknown type {entry.dtype}")
    expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if not 0 <= entry.begin <= entry.end <= data_bytes or entry.end - entry.begin != expected:
        raise InvalidArgumentError.for_field(FIELD, f"tensor {entry.name} does not lie within its shard")
