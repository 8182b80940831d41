"""Images on their way between machines: files named by their SHA-256, cut into pieces, joined and verified."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import AbortedError, DataLossError, FailedPreconditionError

# Content of one piece, and of all pieces of one request at most: far below the limit of a message.
PIECE_BYTES = 1 << 20
REQUEST_BYTES = 2 << 20
# Images that one request asks about or reads.
IMAGES_PER_CALL = 1024
# Another writer's damaged pieces, or a pause in which the first ones expired, cost an attempt.
ATTEMPTS = 3


def digest_of(data: bytes) -> str:
    """Returns the name of an image: the SHA-256 of its file, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def cut_images(images: Mapping[str, bytes]) -> Iterator[list[pb.ImagePiece]]:
    """Yields the pieces of images, by digest, in lists that each fit into one request."""
    pieces: list[pb.ImagePiece] = []
    size = 0
    for digest, data in images.items():
        for offset in range(0, len(data), PIECE_BYTES):
            content = data[offset : offset + PIECE_BYTES]
            if pieces and (size + len(content) > REQUEST_BYTES or len(pieces) == IMAGES_PER_CALL):
                yield pieces
                pieces, size = [], 0
            pieces.append(pb.ImagePiece(digest=digest, image_bytes=len(data), offset=offset, content=content))
            size += len(content)
    if pieces:
        yield pieces


async def send_images(
    put: Callable[[Sequence[pb.ImagePiece]], Awaitable[Iterable[str]]], images: Mapping[str, bytes]
) -> None:
    """Sends those of the images, by digest, that `put` does not call whole.

    `put` sends pieces and returns the digests of the whole ones among their images. Raises what it raises, and
    DataLossError when images are not whole after three attempts.
    """
    missing = await _find_missing(put, images)
    for attempt in range(ATTEMPTS):
        if not missing:
            return
        try:
            for pieces in cut_images(missing):
                await put(pieces)
        except (AbortedError, DataLossError, FailedPreconditionError):
            if attempt == ATTEMPTS - 1:
                raise
        missing = await _find_missing(put, missing)
    if missing:
        raise DataLossError(f"image {next(iter(missing))}: not whole after {ATTEMPTS} attempts to send it")


async def _find_missing(
    put: Callable[[Sequence[pb.ImagePiece]], Awaitable[Iterable[str]]], images: Mapping[str, bytes]
) -> dict[str, bytes]:
    whole: set[str] = set()
    for start in range(0, len(digests := list(images)), IMAGES_PER_CALL):
        asked = digests[start : start + IMAGES_PER_CALL]
        whole.update(await put([pb.ImagePiece(digest=each, image_bytes=len(images[each])) for each in asked]))
    return {digest: data for digest, data in images.items() if digest not in whole}


async def join_images(digests: Sequence[str], pieces: AsyncIterable[pb.ImagePiece]) -> AsyncIterator[tuple[str, bytes]]:
    """Yields the images, each with its digest, as soon as its last piece is there, in the order asked for.

    Raises DataLossError for pieces that are missing, out of order, or not those of the digest.
    """
    expected = iter(digests)
    data = bytearray()
    async for piece in pieces:
        data += piece.content
        if len(data) < piece.image_bytes:
            continue
        digest = next(expected, "")
        image, data = bytes(data), bytearray()
        if piece.digest != digest or digest_of(image) != digest:
            raise DataLossError(f"image {digest or piece.digest}: the pieces are not those of its file")
        yield digest, image
    if (missing := next(expected, None)) is not None:
        raise DataLossError(f"image {missing}: its pieces ended early")
