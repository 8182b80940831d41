"""Images of prompts: files that callers put, pixels that sequences share, and prompts made ready for the engine."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from prometheus_client import Gauge

from perigee.buffer.packing import unpack_token_ids
from perigee.buffer.v1.buffer_pb2 import ImagePiece
from perigee.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from perigee.images import Image, ImageInfo, ImageLimits, decode_image, read_image
from services.kit.single_flight import SingleFlightCache
from services.rollout.config import RolloutConfig
from services.rollout.engine import PromptImage
from services.rollout.model import PolicyModel

STORED_BYTES = Gauge("perigee_rollout_stored_image_bytes", "Bytes of the images' files that callers have put.")

MAX_DECODED = 4096
ReadFile = Callable[[str], Awaitable[bytes]]


@dataclass(frozen=True)
class PreparedPrompt:
    """Prompt whose images are decoded."""

    expanded_ids: Sequence[int]
    """Its tokens with those that the engine puts for the images."""
    images: tuple[PromptImage, ...]


@dataclass(eq=False)
class _Partial:
    """File of which pieces are still to come."""

    size: int
    content: bytearray = field(default_factory=bytearray)


class ImageStore:
    """Images that a worker holds: files within `images.store_bytes`, pixels within `images.cache_bytes`."""

    def __init__(self, config: RolloutConfig, model: PolicyModel) -> None:
        self._config = config.images
        self._model = model
        self.limits = ImageLimits(max_bytes=config.images.max_bytes, max_pixels=config.images.max_pixels)
        # By last use.
        self._files: OrderedDict[str, Image | _Partial] = OrderedDict()
        self._bytes = 0
        self._users: Counter[str] = Counter()
        self._pictures: SingleFlightCache[str, PromptImage] = SingleFlightCache(
            MAX_DECODED,
            total_bytes=config.images.cache_bytes,
            size_of=lambda image: 3 * image.picture.width * image.picture.height,
        )
        # Sequences beyond wait without their pixels; the engine has some in store.
        self._places = asyncio.Semaphore(2 * config.max_num_seqs)

    def put(self, pieces: Sequence[ImagePiece]) -> list[str]:
        """Takes pieces of files; returns the digests of those of the files that are whole.

        Raises InvalidArgumentError naming the piece that fits no file or completes one that is no image,
        FailedPreconditionError when pieces before it are not here (any more), and ResourceExhaustedError when images
        of calls under way leave no room.
        """
        for index, piece in enumerate(pieces):
            self._put_piece(piece, f"pieces[{index}]")
        digests = dict.fromkeys(piece.digest for piece in pieces)
        return [digest for digest in digests if isinstance(self._files.get(digest), Image)]

    def add(self, images: Iterable[Image]) -> None:
        """Takes whole images; raises ResourceExhaustedError."""
        for image in images:
            if not isinstance(self._files.get(image.digest), Image):
                self._make_room(image.size_bytes, keep=image.digest)
                self._replace(image.digest, image)

    def find(self, digests: Iterable[str]) -> list[ImageInfo]:
        """Returns images that are here, in order; raises FailedPreconditionError that names the others."""
        found: list[ImageInfo] = []
        missing: list[str] = []
        for digest in digests:
            file = self._files.get(digest)
            if isinstance(file, Image):
                found.append(file)
                self._files.move_to_end(digest)
            else:
                missing.append(digest)
        if missing:
            names = ", ".join(dict.fromkeys(missing))
            raise FailedPreconditionError(f"Images are not here: put {names} by PutImages first.")
        return found

    @contextmanager
    def hold(self, digests: Sequence[str]) -> Iterator[None]:
        """Keeps images that are here from making room for others."""
        self._users.update(digests)
        try:
            yield
        finally:
            self._users.subtract(digests)
            self._users += Counter()

    @asynccontextmanager
    async def prepared(
        self, prompt_token_ids: bytes, digests: Sequence[str], read: ReadFile | None = None
    ) -> AsyncIterator[PreparedPrompt]:
        """Has a prompt and its images ready for the block, of which there are as many as the engine has use for.

        Files that are not here are `read` by their digests. Raises InvalidArgumentError for an image that is none, for
        more or fewer than the prompt has places for, and for a model that takes none.
        """
        prompt = unpack_token_ids(prompt_token_ids)
        if not digests and self._model.vision is None:
            yield PreparedPrompt(prompt, ())
            return
        vision = self._model.require_vision()
        vision.check_count(prompt, len(digests), "image_digests")
        if not digests:
            yield PreparedPrompt(prompt, ())
            return
        async with self._places:
            images = tuple([await self._decode(digest, read) for digest in digests])
            yield PreparedPrompt(vision.expand(prompt, [image.picture.size for image in images]), images)

    async def _decode(self, digest: str, read: ReadFile | None) -> PromptImage:
        """Returns an image with its pixels, which are decoded once for all who ask at the same time."""

        async def work() -> PromptImage:
            file = self._files.get(digest)
            if not isinstance(file, Image):
                if read is None:
                    raise FailedPreconditionError(f"Image {digest} is not here: put it by PutImages first.")
                file = read_image(await read(digest), self.limits, f"image {digest}")
            return PromptImage(digest, await asyncio.to_thread(decode_image, file, f"image {digest}"))

        image, _ = await self._pictures.get(digest, work)
        return image

    async def close(self) -> None:
        """Ends what is being decoded."""
        await self._pictures.close()

    def _put_piece(self, piece: ImagePiece, field: str) -> None:
        """Adds a piece to its file, unless it is there or has no content."""
        file = self._files.get(piece.digest)
        if isinstance(file, Image) or not piece.content:
            if file is not None:
                self._files.move_to_end(piece.digest)
            return
        if not 0 < piece.image_bytes <= self.limits.max_bytes:
            reason = f"{piece.image_bytes:,} is not between 1 and {self.limits.max_bytes:,}"
            raise InvalidArgumentError.for_field(f"{field}.image_bytes", reason)
        file = file or _Partial(piece.image_bytes)
        end = piece.offset + len(piece.content)
        if end > file.size or piece.image_bytes != file.size:
            reason = f"bytes {piece.offset} to {end} of {piece.image_bytes} are none of an image of {file.size} bytes"
            raise InvalidArgumentError.for_field(f"{field}.offset", reason)
        if end <= len(file.content):
            return
        if piece.offset != len(file.content):
            raise FailedPreconditionError(
                f"{field}: byte {piece.offset} of image {piece.digest} came where byte {len(file.content)} is due: "
                f"send it from there."
            )
        self._make_room(len(piece.content), keep=piece.digest)
        file.content += piece.content
        self._bytes += len(piece.content)
        self._files[piece.digest] = file
        if len(file.content) == file.size:
            self._complete(piece.digest, bytes(file.content), field)

    def _complete(self, digest: str, data: bytes, field: str) -> None:
        """Replaces a partial file by the image that it is; forgets one that is none or another one."""
        self._drop(digest)
        image = read_image(data, self.limits, f"{field}.content")
        if image.digest != digest:
            reason = f"{digest} is not the SHA-256 of the file, {image.digest} is"
            raise InvalidArgumentError.for_field(f"{field}.digest", reason)
        self._replace(digest, image)

    def _replace(self, digest: str, image: Image) -> None:
        self._drop(digest)
        self._files[digest] = image
        self._bytes += image.size_bytes
        STORED_BYTES.set(self._bytes)

    def _drop(self, digest: str) -> None:
        file = self._files.pop(digest, None)
        if file is not None:
            self._bytes -= file.size_bytes if isinstance(file, Image) else len(file.content)
            STORED_BYTES.set(self._bytes)

    def _make_room(self, size: int, keep: str = "") -> None:
        """Drops files that were asked for least recently; raises ResourceExhaustedError when that is not enough."""
        limit = self._config.store_bytes
        droppable = [digest for digest in self._files if digest != keep and not self._users[digest]]
        for digest in droppable:
            if self._bytes + size <= limit:
                break
            self._drop(digest)
        if self._bytes + size > limit:
            message = f"Images of calls under way take {self._bytes:,} of {limit:,} bytes (rollout.images.store_bytes)."
            raise ResourceExhaustedError(message, retry_after_s=1.0)
