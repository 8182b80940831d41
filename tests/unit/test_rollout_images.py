"""Images that a rollout worker holds: pieces, limits, and what makes room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from perigee.buffer.images import digest_of, send_images
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1.buffer_pb2 import ImagePiece
from perigee.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from services.rollout.images import ImageStore
from services.rollout.model import open_policy
from tests.fixtures.rollout import rollout_config
from tests.fixtures.vision import make_picture

PICTURES = {digest_of(picture): picture for picture in (make_picture(seed, 56, 56) for seed in range(4))}
DIGESTS = list(PICTURES)
PROMPT = pack_token_ids([5, 9, 10])


@pytest.fixture
def make_store(vision_model: Path) -> Callable[..., ImageStore]:
    """A function that makes an empty store with the settings given."""

    def make(**images: int) -> ImageStore:
        return ImageStore(rollout_config(vision_model, "", images=images), open_policy(str(vision_model), None))

    return make


def cut(digest: str, begin: int = 0, end: int | None = None) -> ImagePiece:
    data = PICTURES[digest]
    return ImagePiece(digest=digest, image_bytes=len(data), offset=begin, content=data[begin:end])


def test_pieces_become_an_image_whatever_comes_twice(make_store: Callable[..., ImageStore]) -> None:
    store, digest = make_store(), DIGESTS[0]
    question = ImagePiece(digest=digest, image_bytes=len(PICTURES[digest]))
    assert store.put([question]) == []
    assert store.put([cut(digest, 0, 40), cut(digest, 0, 40)]) == []
    with pytest.raises(FailedPreconditionError, match=r"byte 60 of image .* came where byte 40 is due"):
        store.put([cut(digest, 60)])
    assert store.put([cut(digest, 20, 40), cut(digest, 40)]) == [digest]
    assert store.put([question, cut(digest, 0, 40)]) == [digest]
    image, again = store.find([digest, digest])
    assert image is again
    assert (image.width, image.height, image.size_bytes) == (56, 56, len(PICTURES[digest]))


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (ImagePiece(digest="d", image_bytes=3, content=b"GIF"), r"pieces\[0\]\.content: is no image"),
        (
            ImagePiece(digest="d", image_bytes=len(PICTURES[DIGESTS[0]]), content=PICTURES[DIGESTS[0]]),
            rf"pieces\[0\]\.digest: d is not the SHA-256 of the file, {DIGESTS[0]} is",
        ),
        (ImagePiece(digest="d", image_bytes=2, content=b"GIF"), r"pieces\[0\]\.offset: bytes 0 to 3 of 2 are none"),
        (ImagePiece(digest="d", image_bytes=1 << 30, content=b"G"), r"pieces\[0\]\.image_bytes: 1,073,741,824 is not"),
    ],
)
def test_what_is_no_image_leaves_nothing(
    make_store: Callable[..., ImageStore], piece: ImagePiece, message: str
) -> None:
    store = make_store()
    with pytest.raises(InvalidArgumentError, match=message):
        store.put([piece])
    with pytest.raises(FailedPreconditionError, match="put d by PutImages first"):
        store.find(["d"])


def test_images_asked_for_least_recently_make_room(make_store: Callable[..., ImageStore]) -> None:
    sizes = [len(PICTURES[digest]) for digest in DIGESTS]
    store = make_store(store_bytes=sum(sizes) - 1)
    for digest in DIGESTS[:3]:
        assert store.put([cut(digest)]) == [digest]
    store.find(DIGESTS[:1])
    store.put([cut(DIGESTS[3])])
    with pytest.raises(FailedPreconditionError, match=DIGESTS[1]):
        store.find(DIGESTS)
    assert len(store.find([DIGESTS[0], *DIGESTS[2:]])) == 3


def test_images_of_calls_under_way_stay(make_store: Callable[..., ImageStore]) -> None:
    first, second, *_ = DIGESTS
    store = make_store(store_bytes=max(len(PICTURES[first]), len(PICTURES[second])) + 10)
    store.put([cut(first)])
    with store.hold([first, first]):
        with pytest.raises(ResourceExhaustedError, match=r"rollout\.images\.store_bytes"):
            store.put([cut(second)])
        store.find([first])
    assert store.put([cut(second)]) == [second]


async def test_a_sender_sends_what_is_missing(make_store: Callable[..., ImageStore]) -> None:
    store = make_store()
    sent: list[str] = []

    async def put(pieces: list[ImagePiece]) -> list[str]:
        sent.extend(piece.digest for piece in pieces if piece.content)
        return store.put(pieces)

    store.put([cut(DIGESTS[0])])
    await send_images(put, PICTURES)  # type: ignore[arg-type]
    assert sent == DIGESTS[1:]
    assert len(store.find(DIGESTS)) == 4


async def test_an_image_is_read_and_decoded_once_for_all_who_ask(make_store: Callable[..., ImageStore]) -> None:
    store, digest = make_store(), DIGESTS[0]
    reads: list[str] = []

    async def read(digest: str) -> bytes:
        reads.append(digest)
        return PICTURES[digest]

    async def prepare() -> list[int]:
        async with store.prepared(PROMPT, [digest], read) as prompt:
            assert [image.digest for image in prompt.images] == [digest]
            return list(prompt.expanded_ids)

    prompts = await asyncio.gather(*(prepare() for _ in range(8)))
    assert reads == [digest]
    # Four features between the tokens that Idefics3 has around an image.
    assert prompts == [[3, 4, 5, 5, 5, 5, 3, 9, 10]] * 8


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ([], r"image_digests: the prompt has 1 image tokens \(5\) for 0 images"),
        (DIGESTS[:2], r"image_digests: the prompt has 1 image tokens \(5\) for 2 images"),
    ],
)
async def test_images_and_placeholders_are_as_many(
    make_store: Callable[..., ImageStore], digests: list[str], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        async with make_store().prepared(PROMPT, digests):
            pass


async def test_a_model_of_text_takes_no_images(policy_folder: Path) -> None:
    store = ImageStore(rollout_config(policy_folder, ""), open_policy(str(policy_folder), None))
    with pytest.raises(InvalidArgumentError, match=r"image_digests: the model of .* takes no images"):
        async with store.prepared(PROMPT, DIGESTS[:1]):
            pass
    async with store.prepared(PROMPT, []) as prompt:
        assert list(prompt.expanded_ids) == [5, 9, 10]
