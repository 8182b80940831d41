"""Images of prompts: what counts as one, the name by which it travels, and its pixels.

An image is named by the SHA-256 of its file, which is kept byte for byte. The one way from bytes to pixels is
`decode_image`, so that a rollout worker and the trainer see the same. Pillow is imported with the first image.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from perigee.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
# Beginnings of files that are taken for images, for the messages of errors.
_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG",
}
# A progressive JPEG has about ten; each is a pass over all pixels, which a small file may ask for thousands of times.
_MAX_JPEG_SCANS = 100
_EXIF_ORIENTATION = 0x0112
# Classes of errors of Pillow's decoders on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be at most."""

    max_bytes: int = 10 << 20
    """Bytes of the file."""
    max_pixels: int = 40_000_000
    """Width times height."""
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")
    """Of MEDIA_TYPES."""
    animated: bool = False
    """Whether a file may hold several pictures, of which the first counts."""


@dataclass(frozen=True)
class ImageInfo:
    """What is known of an image without its bytes."""

    digest: str
    """SHA-256 of the file, hexadecimal."""
    media_type: str
    width: int
    """In pixels, the image the right way up: EXIF's orientation counts."""
    height: int
    size_bytes: int
    """Bytes of the file."""


@dataclass(frozen=True)
class Image(ImageInfo):
    """An image that is within the limits, and its file."""

    data: bytes = field(repr=False)

    @property
    def info(self) -> ImageInfo:
        """The image without its bytes."""
        return ImageInfo(**{each.name: getattr(self, each.name) for each in fields(ImageInfo)})


def read_image(data: bytes, limits: ImageLimits, field: str) -> Image:
    """Returns the image that a file holds. Its pixels are not looked at, which `decode_image` does.

    Raises InvalidArgumentError naming `field` for what is no image of the formats, is damaged, moves, or passes the
    limits, before memory is taken for pixels.
    """
    try:
        from PIL.Image import DecompressionBombError
    except ImportError as error:
        raise InvalidArgumentError.for_field(field, "images need the package Pillow: pip install pillow") from error

    if not data:
        raise InvalidArgumentError.for_field(field, "is empty: an image has at least one byte")
    if len(data) > limits.max_bytes:
        raise InvalidArgumentError.for_field(field, f"has {len(data):,} bytes, more than {limits.max_bytes:,}")
    kind = find_format(data)
    if kind not in limits.formats:
        found = f"is {kind}" if kind else "is no image"
        raise InvalidArgumentError.for_field(field, f"{found}: it must be {', '.join(limits.formats)}")
    try:
        picture = _open(data, kind)
        frames = getattr(picture, "n_frames", 1)
        width, height = picture.size
        if _read_orientation(picture) > 4:
            width, height = height, width
        # Of PNG the checksums.
        picture.verify()
    except DecompressionBombError as error:
        raise InvalidArgumentError.for_field(field, f"has more pixels than {limits.max_pixels:,}") from error
    except _DAMAGE as error:
        raise _damaged(field, kind, error) from error
    if frames > 1 and not limits.animated:
        raise InvalidArgumentError.for_field(field, f"is an animated {kind} of {frames} pictures: give one of them")
    if not width or not height:
        raise InvalidArgumentError.for_field(field, f"has {width} x {height} pixels: there is nothing to see")
    if width * height > limits.max_pixels:
        raise InvalidArgumentError.for_field(
            field, f"has {width} x {height} pixels, more than {limits.max_pixels:,}: scale it down"
        )
    return Image(hashlib.sha256(data).hexdigest(), MEDIA_TYPES[kind], width, height, len(data), data)


def decode_image(image: Image, field: str = "image") -> Picture:
    """Returns the pixels of an image in RGB with 8 bits, the right way up by EXIF's orientation.

    What is transparent becomes white; of 16 bits the upper 8 are kept; palettes, greys and CMYK are turned into RGB
    without colour profiles. Raises InvalidArgumentError naming `field` for a damaged or cut file.
    """
    from PIL.Image import Transpose, frombytes, new

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    kind = find_format(image.data)
    try:
        file = _open(image.data, kind)
        orientation = _read_orientation(file)
        file.load()
        picture: Picture = file
        if picture.mode == "I;16":
            picture = frombytes("L", picture.size, picture.tobytes()[1::2])
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            picture = white
        picture = picture.convert("RGB")
        # Its EXIF is that of the file: who reads it would turn the picture once more.
        picture.info.clear()
    except _DAMAGE as error:
        raise _damaged(field, kind, error) from error
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def find_format(data: bytes) -> str:
    """Returns the format that a file begins like, whatever its name says; empty when it is none that is known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return "AVIF or HEIF"
    beginning = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((kind for start, kind in _BEGINNINGS.items() if beginning.startswith(start)), "")


def _open(data: bytes, kind: str) -> ImageFile:
    """Returns the image with its header read, by the reader of its format alone.

    `PIL.Image.open` would print a warning for what is refused here, and take a JPEG of several pictures as animated.
    """
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    if kind == "JPEG" and (scans := data.count(b"\xff\xda")) > _MAX_JPEG_SCANS:
        raise ValueError(f"it has {scans} scans, more than {_MAX_JPEG_SCANS}")
    readers: dict[str, Callable[[io.BytesIO], ImageFile]] = {
        "PNG": PngImageFile,
        "JPEG": JpegImageFile,
        "WEBP": WebPImageFile,
        "GIF": GifImageFile,
    }
    return readers[kind](io.BytesIO(data))


def _read_orientation(picture: ImageFile) -> int:
    """Returns EXIF's orientation, 1 to 8, of what stands before the pixels; 1 where it is not told."""
    from PIL.Image import Exif

    if "exif" not in picture.info:
        return 1
    exif = Exif()
    try:
        exif.load(picture.info["exif"])
        orientation = exif.get(_EXIF_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _damaged(field: str, kind: str, error: Exception) -> InvalidArgumentError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InvalidArgumentError.for_field(field, f"is a damaged or cut {kind}: {reason}")
