"""Images of a run's prompts in Redis: put in pieces, verified once they are whole, kept as long as a group names them.

No change waits for the disk: an append-only file keeps the order of changes, so a group that outlives a crash has its
images, and one that was not created has them put again.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence

from prometheus_client import Counter

from perigee.buffer.images import PIECE_BYTES, digest_of
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from services.buffer.config import ImagesConfig
from services.buffer.scripts import Arguments, ScriptRunner, load_script

PUT_IMAGES = load_script("put_images")
FINISH_IMAGE = load_script("finish_image")
SWEEP_IMAGES = load_script("sweep_images")
IMAGE_SIZES = load_script("image_sizes")
READ_IMAGES = load_script("read_images")

# Images that one script call deletes: bounds the time that it occupies the server.
SWEPT_PER_CALL = 512

IMAGES = Counter("perigee_buffer_images_total", "Images stored, deleted, and dropped as damaged.", ["event"])
IMAGE_BYTES = Counter("perigee_buffer_image_bytes_total", "Bytes of images stored, deleted, and read.", ["event"])


async def put_images(scripts: ScriptRunner, request: pb.PutImagesRequest, config: ImagesConfig) -> list[str]:
    """Takes pieces of images; returns the digests of those that are whole.

    Raises InvalidArgumentError for a whole file of another digest, DataLossError for pieces that do not make the file
    of their digest, which are dropped, FailedPreconditionError for one before which others are missing, and
    ResourceExhaustedError when the run has no room for an image.
    """
    arguments: Arguments = [config.max_bytes, config.unreferenced_s]
    for index, piece in enumerate(request.pieces):
        arguments += (piece.digest, piece.image_bytes, piece.offset, piece.content, int(_is_verified(index, piece)))
    await sweep_images(scripts, request.run_id)
    _, outcomes = await scripts.run(PUT_IMAGES, request.run_id, *arguments)
    whole: dict[str, None] = {}
    for index, (piece, outcome) in enumerate(zip(request.pieces, outcomes, strict=True)):
        word, _, number = outcome.decode().partition(" ")
        if word == "stored":
            _count_stored(piece)
        elif word not in ("whole", "partial", "complete"):
            _refuse(word, int(number or 0), index, request, config)
        if word != "partial" and (word != "complete" or await _verify(scripts, request.run_id, piece, number)):
            whole[piece.digest] = None
    return list(whole)


async def sweep_images(scripts: ScriptRunner, run_id: str) -> None:
    """Deletes the images of a run that no group names and whose time is over."""
    seen = SWEPT_PER_CALL
    while seen == SWEPT_PER_CALL:
        _, seen, deleted, freed = await scripts.run(SWEEP_IMAGES, run_id, SWEPT_PER_CALL)
        IMAGES.labels("deleted").inc(deleted)
        IMAGE_BYTES.labels("deleted").inc(freed)


async def read_images(
    scripts: ScriptRunner, request: pb.ReadImagesRequest
) -> AsyncGenerator[pb.ReadImagesResponse, None]:
    """Reads images in pieces of at most 1 MiB, in the order asked for.

    Raises NotFoundError for an image that is not whole, AbortedError when one is deleted while it is read.
    """
    _, sizes = await scripts.run(IMAGE_SIZES, request.run_id, *request.digests)
    for pieces in _batch(request.digests, [int(size) for size in sizes]):
        await _read_batch(scripts, request.run_id, pieces)
        IMAGE_BYTES.labels("read").inc(sum(len(piece.content) for piece, _ in pieces))
        yield pb.ReadImagesResponse(pieces=[piece for piece, _ in pieces])


def _is_verified(index: int, piece: pb.ImagePiece) -> bool:
    """Returns whether the piece is a whole image; raises InvalidArgumentError when it is one of another digest."""
    if len(piece.content) < piece.image_bytes:
        return False
    if (digest := digest_of(piece.content)) != piece.digest:
        raise InvalidArgumentError.for_field(
            f"pieces[{index}].digest", f"is not that of the content, whose SHA-256 is {digest}"
        )
    return True


async def _verify(scripts: ScriptRunner, run_id: str, piece: pb.ImagePiece, serial: str) -> bool:
    """Makes an image whole whose last piece is here; returns whether it is.

    Raises DataLossError when it is another file, which is dropped.
    """
    sha256 = hashlib.sha256()
    for pieces in _batch([piece.digest], [piece.image_bytes]):
        await _read_batch(scripts, run_id, pieces)
        sha256.update(pieces[0][0].content)
    is_right = sha256.hexdigest() == piece.digest
    _, done, is_whole = await scripts.run(FINISH_IMAGE, run_id, piece.digest, serial, int(is_right))
    if not is_right:
        IMAGES.labels("damaged").inc(done)
        raise DataLossError(
            f"image {piece.digest}: the pieces make a file whose SHA-256 is {sha256.hexdigest()}: send it again"
        )
    if done:
        _count_stored(piece)
    return bool(is_whole)


def _count_stored(piece: pb.ImagePiece) -> None:
    IMAGES.labels("stored").inc()
    IMAGE_BYTES.labels("stored").inc(piece.image_bytes)


def _refuse(word: str, number: int, index: int, request: pb.PutImagesRequest, config: ImagesConfig) -> None:
    """Raises the error of a piece that the script refused."""
    piece = request.pieces[index]
    if word == "full":
        raise ResourceExhaustedError(
            f"run {request.run_id!r} has no room for an image of {piece.image_bytes} bytes, its images take {number} "
            f"of {config.max_bytes}: raise buffer.images.max_bytes, or have fewer groups live"
        )
    if word == "size":
        raise InvalidArgumentError.for_field(
            f"pieces[{index}].image_bytes", f"is {piece.image_bytes}, other pieces of the image said {number}"
        )
    if word == "gap":
        raise FailedPreconditionError(
            f"image {piece.digest}: the piece at offset {piece.offset} came where offset {number} was due: send the "
            "pieces in order"
        )
    IMAGES.labels("damaged").inc()
    raise DataLossError(
        f"image {piece.digest}: two pieces differ at offset {piece.offset}: send it again from its start"
    )


def _batch(digests: Sequence[str], sizes: Sequence[int]) -> Iterator[list[tuple[pb.ImagePiece, int]]]:
    """Yields pieces without their content, each with its bytes, in batches of at most 1 MiB."""
    batch: list[tuple[pb.ImagePiece, int]] = []
    room = PIECE_BYTES
    for digest, image_bytes in zip(digests, sizes, strict=True):
        for offset in range(0, image_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, image_bytes - offset)
            if size > room:
                yield batch
                batch, room = [], PIECE_BYTES
            batch.append((pb.ImagePiece(digest=digest, image_bytes=image_bytes, offset=offset), size))
            room -= size
    yield batch


async def _read_batch(scripts: ScriptRunner, run_id: str, pieces: Sequence[tuple[pb.ImagePiece, int]]) -> None:
    """Fills in the content of pieces; raises AbortedError when it is not there any more."""
    arguments: Arguments = []
    for piece, size in pieces:
        arguments += (piece.digest, piece.offset, piece.offset + size - 1)
    _, contents = await scripts.run(READ_IMAGES, run_id, *arguments)
    for (piece, size), content in zip(pieces, contents, strict=True):
        if len(content) != size:
            raise AbortedError(f"image {piece.digest} of run {run_id!r} was deleted while it was read")
        piece.content = content
