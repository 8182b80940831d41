"""Images of prompts: what is taken, what is refused before it costs memory, and pixels."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil

from perigee.errors import InvalidArgumentError
from perigee.images import ImageLimits, decode_image, read_image

LIMITS = ImageLimits()
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def draw(
    kind: str, size: tuple[int, int] = (8, 6), mode: str = "RGB", color: object = "red", **options: object
) -> bytes:
    buffer = io.BytesIO()
    pil.new(mode, size, color).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def animate(kind: str) -> bytes:
    first, *others = (pil.new("RGB", (8, 8), color) for color in ("red", "green", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so; its pixels are those of another."""
    data = bytearray(draw("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    data = bytearray(draw("WEBP", exif=pil.Exif().tobytes()))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def reason(data: bytes, limits: ImageLimits = LIMITS) -> str:
    """Why an image is refused, at the latest when it is decoded."""
    with pytest.raises(InvalidArgumentError) as caught:
        decode_image(read_image(data, limits, "messages[0]"), "messages[0]")
    [violation] = caught.value.violations
    assert violation.field == "messages[0]"
    return violation.description


@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_an_image_is_known_by_its_bytes(kind: str) -> None:
    data = draw(kind)
    image = read_image(data, LIMITS, "image")
    assert (image.media_type, image.width, image.height, image.size_bytes) == (MEDIA_TYPES[kind], 8, 6, len(data))
    assert len(image.digest) == 64
    assert image.data is data
    assert not hasattr(image.info, "data")
    assert decode_image(image).getpixel((3, 3))[0] > 250  # type: ignore[index]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "is no image: it must be PNG, JPEG, WEBP"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut PNG"),
        (b"RIFF\x04\0\0\0WEBP", "damaged or cut WEBP"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is SVG"),
        (b'\n<?xml version="1.0"?><svg/>', "is SVG"),
        (draw("GIF"), "is GIF"),
        (draw("BMP"), "is BMP"),
        (draw("TIFF"), "is TIFF"),
        (animate("GIF"), "is GIF"),
        (animate("PNG"), "is an animated PNG of 3 pictures"),
        (animate("WEBP"), "is an animated WEBP of 3 pictures"),
        (draw("PNG")[:-20], "damaged or cut PNG"),
        (draw("PNG", (300, 300))[:200], "damaged or cut PNG"),
        (draw("JPEG", (300, 300))[:-60], "damaged or cut JPEG"),
        (draw("WEBP", (300, 300))[:-60], "damaged or cut WEBP"),
        (draw("PNG").replace(b"IDAT", b"IDAT\0\0", 1), "damaged or cut PNG"),
        (draw("JPEG").replace(b"\xff\xda", b"\xff\xda" * 200), "scans"),
        (png_of_size(0, 5), "damaged or cut PNG"),
        (png_of_size(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647 pixels, more than 40,000,000"),
        (webp_of_size(16_383, 16_383), "more pixels than 40,000,000"),
        (webp_of_size(9_000, 9_000), "damaged or cut WEBP"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, words: str) -> None:
    assert words in reason(data)


def test_a_bomb_is_refused_before_it_takes_memory(recwarn: pytest.WarningsRecorder) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000 * 1_251))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert len(bomb) < 40_000
    before = pil.core.get_stats()["new_count"]
    assert "has 10000 x 10000 pixels, more than 40,000,000: scale it down" in reason(bomb)
    assert pil.core.get_stats()["new_count"] == before
    decode_image(read_image(draw("PNG"), LIMITS, "image"))
    assert pil.core.get_stats()["new_count"] > before
    assert not recwarn.list


def test_limits_are_the_callers() -> None:
    assert "has 8 x 6 pixels, more than 47" in reason(draw("PNG"), ImageLimits(max_pixels=47))
    assert "bytes, more than 20" in reason(draw("PNG"), ImageLimits(max_bytes=20))
    gif = read_image(animate("GIF"), ImageLimits(formats=("GIF",), animated=True), "image")
    assert decode_image(gif).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (draw("PNG", mode="RGBA", color=(255, 0, 0, 0)), (255, 255, 255)),
        (draw("PNG", mode="LA", color=(0, 128)), (127, 127, 127)),
        (draw("PNG", mode="P", color=0, transparency=0), (255, 255, 255)),
        (draw("PNG", mode="RGB", color="red", transparency=(255, 0, 0)), (255, 255, 255)),
        (draw("PNG", mode="I;16", color=0x80FF), (128, 128, 128)),
        (draw("PNG", mode="1", color=1), (255, 255, 255)),
        (draw("PNG", mode="L", color=7), (7, 7, 7)),
        (draw("JPEG", mode="CMYK", color=(0, 0, 0, 0)), (255, 255, 255)),
    ],
)
def test_all_kinds_of_pixels_become_rgb(data: bytes, pixel: tuple[int, int, int]) -> None:
    picture = decode_image(read_image(data, LIMITS, "image"))
    assert (picture.mode, picture.size, picture.getpixel((2, 2))) == ("RGB", (8, 6), pixel)


@pytest.mark.parametrize("kind", MEDIA_TYPES)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 9])
def test_an_image_is_turned_the_right_way_up(kind: str, orientation: int) -> None:
    picture = pil.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))
    exif = pil.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif)
    image = read_image(buffer.getvalue(), LIMITS, "image")
    found = decode_image(image)
    assert found.size == (image.width, image.height) == ((16, 32) if orientation in (6, 8) else (32, 16))
    assert not found.getexif()
    dark = {3: (24, 8), 6: (8, 8), 8: (8, 24)}.get(orientation, (8, 8))
    assert found.getpixel(dark)[0] < 9  # type: ignore[index]


@given(st.sampled_from(sorted(MEDIA_TYPES)), st.data())
def test_damage_is_refused_or_harmless(kind: str, data: st.DataObject) -> None:
    """Bytes changed, left out or put in: an image of its size, or a refusal, and nothing else."""
    file = bytearray(draw(kind, (17, 11)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1))
        file[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(InvalidArgumentError):
        image = read_image(bytes(file), ImageLimits(max_pixels=10_000), "image")
        assert decode_image(image).size == (image.width, image.height)
