"""Pieces of tensors: cut and registered by their owners, placed in a receiver's image, read back as tensors.

A piece is a rectangle of a Hugging Face tensor, small enough that a relay passes it on before the next one arrives.
"""

from __future__ import annotations

import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

import torch
import xxhash

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.config import WeightsConfig
from services.weights.safetensors import ALIGNMENT, DTYPE_NAMES, DTYPES, NamedTensor
from services.weights.shared_memory import SharedBuffer, remove_leftovers
from services.weights.transport import MooncakeTransport, Transport

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""First index in each dimension, and the one after the last."""
Slices = Mapping[str, Sequence[Rectangle]]
"""Parts of tensors, by name."""
# Fewest bytes of the shared file of a rank that owns nothing.
MIN_BUFFER_BYTES = ALIGNMENT
# Pieces of one announcement, which has to fit into a message.
MAX_HOLDING = 65536


@dataclass(frozen=True)
class TensorSlice:
    """Part of a Hugging Face tensor of `shape` that begins at the indices `lower`.

    It is number `copy` of `copies`, whose owners share its pieces out.
    """

    name: str
    shape: tuple[int, ...]
    lower: tuple[int, ...]
    tensor: torch.Tensor
    copy: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Export:
    """Pieces of one rank in registered memory; they name tensors by index into `tensors`.

    The memory is the file of that name in shared memory, and begins at address `base`.
    """

    tensors: Sequence[pb.TensorSpec]
    pieces: Sequence[pb.Piece]
    addresses: Sequence[int]
    session: str
    holder_id: str
    file: str
    base: int


def cut_slice(part: TensorSlice, block_bytes: int) -> Iterator[TensorSlice]:
    """Yields blocks of whole rows of a slice, of at most `block_bytes`; one larger row is a block of its own."""
    if part.tensor.ndim == 0:
        yield part
        return
    rows = max(1, block_bytes * len(part.tensor) // max(1, part.tensor.nbytes))
    for begin in range(0, len(part.tensor), rows):
        lower = (part.lower[0] + begin, *part.lower[1:])
        yield TensorSlice(part.name, part.shape, lower, part.tensor[begin : begin + rows])


class PieceStore:
    """Pieces that one trainer rank owns, in shared memory that stays registered from one version to the next."""

    def __init__(
        self,
        config: WeightsConfig,
        owner: int = 0,
        open_transport: Callable[[], Transport] | None = None,
    ) -> None:
        self._config = config
        self._owner = owner
        self._open_transport = open_transport or (lambda: MooncakeTransport(config))
        self._holder_id = uuid.uuid4().hex
        self._transport: Transport | None = None
        self._buffer: SharedBuffer | None = None

    def open(self) -> Transport:
        """Returns the transport, which the first call opens; raises FailedPreconditionError when it cannot start."""
        if self._transport is None:
            self._transport = self._open_transport()
        return self._transport

    def fill(self, slices: Callable[[], Iterable[TensorSlice]]) -> Export:
        """Copies the slices into the store, in place of what it held, which nobody may read any more; blocking.

        Raises ResourceExhaustedError when shared memory is full, InternalError when it cannot be registered, and
        FailedPreconditionError without a transport.
        """
        transport = self.open()
        if self._buffer is None:
            # Those of a rank that was killed, on a machine where nobody receives.
            remove_leftovers(self._config.shared_memory_dir)
            size = sum(_padded(block.tensor.nbytes) for block in self._blocks(slices))
            buffer = SharedBuffer.allocate(self._config.shared_memory_dir, max(size, MIN_BUFFER_BYTES))
            try:
                transport.register(buffer.address, buffer.size)
            except BaseException:
                buffer.close()
                raise
            self._buffer = buffer
        tensors: dict[str, pb.TensorSpec] = {}
        index_by_name: dict[str, int] = {}
        pieces: list[pb.Piece] = []
        addresses: list[int] = []
        offset = 0
        with self._buffer.view() as view:
            for block in self._blocks(slices):
                dtype, size = block.tensor.dtype, block.tensor.nbytes
                spec = pb.TensorSpec(name=block.name, dtype=DTYPE_NAMES[dtype], shape=block.shape)
                tensors.setdefault(block.name, spec)
                _view(view, offset, block.tensor.shape, dtype).copy_(block.tensor)
                pieces.append(
                    pb.Piece(
                        tensor=index_by_name.setdefault(block.name, len(index_by_name)),
                        lower=block.lower,
                        upper=[low + n for low, n in zip(block.lower, block.tensor.shape, strict=True)],
                        checksum=xxhash.xxh3_128_digest(view[offset : offset + size]),
                        owner=self._owner,
                    )
                )
                addresses.append(self._buffer.address + offset)
                offset += _padded(size)
        return Export(
            list(tensors.values()),
            pieces,
            addresses,
            transport.session,
            self._holder_id,
            self._buffer.path.name,
            self._buffer.address,
        )

    def close(self) -> None:
        """Gives the memory back."""
        if self._transport is not None:
            self._transport.close()
        if self._buffer is not None:
            self._buffer.close()
        self._transport = self._buffer = None

    def _blocks(self, slices: Callable[[], Iterable[TensorSlice]]) -> Iterator[TensorSlice]:
        for part in slices():
            # Where a slice is one block, its name says whose it is.
            first = (part.copy - crc32(part.name.encode())) % part.copies
            yield from islice(cut_slice(part, self._config.block_bytes), first, None, part.copies)


def join_exports(run_id: str, policy_version: int, exports: Sequence[Export]) -> tuple[pb.Manifest, list[pb.Holding]]:
    """Returns the manifest of a version of which every rank has exported its part, and who holds which pieces."""
    manifest = pb.Manifest(run_id=run_id, policy_version=policy_version)
    index_by_name: dict[str, int] = {}
    holdings: list[pb.Holding] = []
    for export in exports:
        for spec in export.tensors:
            if spec.name not in index_by_name:
                index_by_name[spec.name] = len(index_by_name)
                manifest.tensors.append(spec)
        for number, (exported, address) in enumerate(zip(export.pieces, export.addresses, strict=True)):
            if number % MAX_HOLDING == 0:
                holdings.append(
                    pb.Holding(session=export.session, holder_id=export.holder_id, file=export.file, base=export.base)
                )
            holdings[-1].pieces.append(len(manifest.pieces))
            holdings[-1].addresses.append(address)
            piece = manifest.pieces.add()
            piece.CopyFrom(exported)
            piece.tensor = index_by_name[export.tensors[exported.tensor].name]
    manifest.total_bytes = sum(piece_bytes(manifest, piece) for piece in manifest.pieces)
    check_pieces(manifest)
    return manifest, holdings


def piece_bytes(manifest: pb.Manifest, piece: pb.Piece) -> int:
    """Returns the size of a piece."""
    itemsize = DTYPES[manifest.tensors[piece.tensor].dtype].itemsize
    return math.prod(_extent(piece)) * itemsize


def check_pieces(manifest: pb.Manifest) -> None:
    """Raises InvalidArgumentError naming the first tensor that is unknown to safetensors or not covered by its pieces.

    Each piece must lie within its tensor, and those of a tensor must have as many elements as it has.
    """
    elements: dict[int, int] = defaultdict(int)
    violations = []
    for number, piece in enumerate(manifest.pieces):
        shape = manifest.tensors[piece.tensor].shape if piece.tensor < len(manifest.tensors) else None
        if shape is None or not len(shape) == len(piece.lower) == len(piece.upper):
            violations.append(FieldViolation(f"manifest.pieces[{number}]", "is of no tensor of the manifest"))
        elif not all(low < high <= n for low, high, n in zip(piece.lower, piece.upper, shape, strict=True)):
            violations.append(FieldViolation(f"manifest.pieces[{number}]", "does not lie within its tensor"))
        elements[piece.tensor] += math.prod(_extent(piece))
    for index, spec in enumerate(manifest.tensors):
        if spec.dtype not in DTYPES:
            violations.append(FieldViolation(f"manifest.tensors[{index}].dtype", f"{spec.dtype} is unknown"))
        elif elements[index] != math.prod(spec.shape):
            problem = f"the pieces of {spec.name} have {elements[index]} of its {math.prod(spec.shape)} elements"
            violations.append(FieldViolation("manifest.pieces", problem))
    if violations or not manifest.pieces:
        raise InvalidArgumentError.for_fields(violations or [FieldViolation("manifest.pieces", "is empty")])


def place_pieces(manifest: pb.Manifest, wanted: Slices | None = None) -> pb.Manifest:
    """Returns the manifest of a receiver's image: pieces have offsets, and `total_bytes` is the image's.

    Pieces that touch nothing wanted have no place. Those of a tensor lie one after another, so that blocks of whole
    rows make up the tensor without a copy.
    """
    image = pb.Manifest()
    image.CopyFrom(manifest)
    end, tensor = 0, None
    for piece in sorted(image.pieces, key=lambda piece: (piece.tensor, list(piece.lower))):
        if wanted is not None and not _touches(piece, wanted.get(image.tensors[piece.tensor].name, ())):
            continue
        piece.offset = end if piece.tensor == tensor else _padded(end)
        end, tensor = piece.offset + piece_bytes(image, piece), piece.tensor
    image.total_bytes = end
    return image


def digest_tensors(manifest: pb.Manifest) -> dict[str, bytes]:
    """Returns a checksum of each tensor that is in pieces, the same for the same bytes in the same pieces."""
    hashers = {piece.tensor: xxhash.xxh3_128() for piece in manifest.pieces}
    for piece in sorted(manifest.pieces, key=lambda piece: list(piece.lower)):
        hashers[piece.tensor].update(repr((*piece.lower, *piece.upper)).encode() + piece.checksum)
    return {manifest.tensors[index].name: hasher.digest() for index, hasher in hashers.items()}


def read_pieces(image: memoryview, manifest: pb.Manifest, wanted: Slices | None = None) -> Iterator[NamedTensor]:
    """Yields the tensors of an image of which anything is wanted, in the manifest's order.

    A tensor in blocks of whole rows is a view of the image. Any other is put together in memory of its own, where
    elements are undefined that lie in no piece of the image, or in one that touches nothing wanted.
    """
    by_tensor: dict[int, list[pb.Piece]] = defaultdict(list)
    for piece in manifest.pieces:
        if piece.HasField("offset"):
            by_tensor[piece.tensor].append(piece)
    for index, spec in enumerate(manifest.tensors):
        if wanted is not None and not wanted.get(spec.name):
            continue
        pieces = sorted(by_tensor[index], key=lambda piece: piece.offset)
        shape, dtype = tuple(spec.shape), DTYPES[spec.dtype]
        if _is_whole(manifest, spec, pieces):
            yield spec.name, _view(image, pieces[0].offset, shape, dtype)
            continue
        tensor = torch.empty(shape, dtype=dtype)
        for piece in pieces:
            if wanted is not None and not _touches(piece, wanted[spec.name]):
                continue
            part = tensor[tuple(slice(low, high) for low, high in zip(piece.lower, piece.upper, strict=True))]
            part.copy_(_view(image, piece.offset, _extent(piece), dtype))
        yield spec.name, tensor


def _is_whole(manifest: pb.Manifest, spec: pb.TensorSpec, pieces: Sequence[pb.Piece]) -> bool:
    """Returns whether pieces that lie one after another are the tensor's bytes in order."""
    row = 0
    end = pieces[0].offset if pieces else 0
    for piece in pieces:
        whole_rows = not spec.shape or (piece.lower[0] == row and _extent(piece)[1:] == tuple(spec.shape[1:]))
        if not whole_rows or piece.offset != end:
            return False
        row, end = piece.upper[0] if spec.shape else 1, end + piece_bytes(manifest, piece)
    return bool(pieces) and row == (spec.shape[0] if spec.shape else 1)


def _view(image: memoryview, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    elements: int = math.prod(shape)
    return torch.frombuffer(image, dtype=dtype, count=elements, offset=offset).view(shape)


def _touches(piece: pb.Piece, rectangles: Iterable[Rectangle]) -> bool:
    return any(
        all(
            max(low, wanted_low) < min(high, wanted_high)
            for low, high, wanted_low, wanted_high in zip(piece.lower, piece.upper, *rectangle, strict=True)
        )
        for rectangle in rectangles
    )


def _extent(piece: pb.Piece) -> tuple[int, ...]:
    return tuple(high - low for low, high in zip(piece.lower, piece.upper, strict=False))


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT
