"""Images of prompts: what is one, and what is refused."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import RewardConfig
from services.reward.service import read_images

CONFIG = RewardConfig(max_images=3, max_image_bytes=20_000, max_image_pixels=10_000)


def picture(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PNG = picture("PNG")


def read(*images: pb.Image) -> tuple[list[str], list[tuple[str, str]]]:
    parts, violations = read_images(pb.ScoreItem(images=images), CONFIG)
    return [part.media_type or part.url for part in parts], [(v.field, v.description) for v in violations]


@pytest.mark.parametrize(
    ("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")]
)
def test_images_are_known_by_their_bytes(kind: str, media_type: str) -> None:
    assert read(pb.Image(data=picture(kind))) == ([media_type], [])


def test_addresses_are_passed_on() -> None:
    urls = ["https://example.org/a.png", "http://host:80/b", data_url("image/png", PNG)]
    assert read(*(pb.Image(url=url) for url in urls)) == (urls, [])


@pytest.mark.parametrize(
    ("image", "field", "words"),
    [
        (pb.Image(), "images[0]", "data or url is required"),
        (pb.Image(data=b""), "images[0].data", "is empty"),
        (pb.Image(data=b"not an image"), "images[0].data", "is no image"),
        (pb.Image(data=picture("BMP")), "images[0].data", "is BMP"),
        (pb.Image(data=PNG[:-20]), "images[0].data", "damaged"),
        (pb.Image(data=PNG.replace(b"IDAT", b"IDAT\0\0", 1)), "images[0].data", "damaged"),
        (pb.Image(data=PNG + b" " * 20_000), "images[0].data", "more than 20,000"),
        (pb.Image(data=picture("PNG", (200, 100))), "images[0].data", "200 x 100 pixels"),
        (pb.Image(url=""), "images[0].url", "must begin with"),
        (pb.Image(url="file:///etc/passwd"), "images[0].url", "must begin with http, https or data"),
        (pb.Image(url="http:///nowhere"), "images[0].url", "no host"),
        (pb.Image(url="http://[half"), "images[0].url", "no URL"),
        (pb.Image(url="http://a/" + "b" * 9000), "images[0].url", "more than 8192"),
        (pb.Image(url="data:text/plain,hello"), "images[0].url", "of the form"),
        (pb.Image(url=data_url("image/png", b"hello")), "images[0].url", "is no image"),
        (pb.Image(url=data_url("image/jpeg", PNG)), "images[0].url", "says image/jpeg but holds image/png"),
        (pb.Image(url="data:image/png;base64,AAA"), "images[0].url", "not base64"),
    ],
)
def test_what_is_no_image_is_refused_by_its_field(image: pb.Image, field: str, words: str) -> None:
    parts, [(found, description)] = read(image)
    assert parts == []
    assert found == field
    assert words in description


def test_too_many_images_are_refused_together() -> None:
    parts, [(field, description)] = read(*[pb.Image(data=PNG)] * 4)
    assert (parts, field) == ([], "images")
    assert "4 images, more than 3" in description


def test_one_bad_image_does_not_hide_another() -> None:
    parts, violations = read(pb.Image(data=b"x"), pb.Image(data=PNG), pb.Image(url="ftp://a"))
    assert parts == ["image/png"]
    assert [field for field, _ in violations] == ["images[0].data", "images[2].url"]
