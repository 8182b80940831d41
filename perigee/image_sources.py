"""Where images of prompts come from: paths, URLs, data URLs and bytes in a line, read once and kept by digest.

{"type": "image", "image": "figures/a.png"}                        below the folder of the prompt file
{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
{"bytes": ..., "path": null}                                       a column of the feature Image of `datasets`
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from perigee.chat import ChatMessage, ImagePart, TextPart
from perigee.errors import DataLossError, InvalidArgumentError, UnavailableError
from perigee.files import write_atomically
from perigee.images import Image, ImageInfo, ImageLimits, decode_image, read_image
from perigee.json_codec import name_type

# In the folder of a run, or beside a prompt file: the images of its prompts, by digest.
IMAGES_FOLDER = "images"
# Bytes of images that are in memory while they are sent.
MAX_BYTES_AT_ONCE = 32 << 20
# Keys that say where an image is, in parts of messages and in columns; the first that has a value counts.
SOURCE_KEYS = ("image", "image_url", "bytes", "data", "base64", "url", "path")
_BASE64_KEYS = ("bytes", "data", "base64")
_WEB = ("http://", "https://")
_FETCH_S = 60.0
_BLOCK_BYTES = 256 << 10
_SHOWN_CHARACTERS = 200


class ImageStore:
    """Folder of images by digest, so that a prompt set's bytes are on disk and not in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Returns where an image is, or would be."""
        return self.folder / digest

    def add(self, image: Image) -> None:
        """Keeps an image; one that is there is left alone."""
        if not self.has(image):
            write_atomically(self.path(image.digest), image.data)

    def has(self, info: ImageInfo) -> bool:
        """Returns whether an image is there."""
        path = self.path(info.digest)
        return path.is_file() and path.stat().st_size == info.size_bytes

    def read(self, info: ImageInfo) -> Image:
        """Returns an image with its bytes; raises DataLossError when they are not what was kept."""
        path = self.path(info.digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataLossError(
                f"{path} cannot be read: {error.strerror}: start the run again to restore it."
            ) from error
        if hashlib.sha256(data).hexdigest() != info.digest:
            raise DataLossError(f"{path} is not what it was: remove it and start the run again.")
        return Image(info.digest, info.media_type, info.width, info.height, info.size_bytes, data)

    def read_all(self, infos: Iterable[ImageInfo]) -> dict[str, bytes]:
        """Returns the files of images by digest; raises what `read` raises."""
        return {info.digest: self.read(info).data for info in infos}


def split_images(images: Iterable[ImageInfo]) -> list[list[ImageInfo]]:
    """Returns images in parts of at most MAX_BYTES_AT_ONCE; a larger one is a part of its own."""
    parts: list[list[ImageInfo]] = []
    room = 0
    for image in images:
        if image.size_bytes > room:
            parts.append([])
            room = MAX_BYTES_AT_ONCE
        parts[-1].append(image)
        room -= image.size_bytes
    return parts


@dataclass(frozen=True)
class ImageReader:
    """Reads the images that lines name, checks them to the last pixel, and keeps them."""

    base: str = ""
    """Path or URL of the folder that relative paths are below."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    allow_urls: bool = False
    """Whether images may come from http:// and https:// addresses."""
    store: ImageStore | None = None
    """Where images are kept; without one they are only checked."""
    read_storage: Callable[[str, str, int], bytes | None] | None = None
    """Reads a URL such as s3://bucket/file for a field, up to so many bytes; None where there is no such file."""

    def __call__(self, value: object, field: str) -> ImageInfo:
        """Returns what is known of the image that a line names in `field`; its bytes are kept by the store.

        Raises InvalidArgumentError naming the field.
        """
        image = self.load(value, field)
        if self.store is None or not self.store.has(image):
            decode_image(image, field)
        if self.store is not None:
            self.store.add(image)
        return image.info

    def load(self, value: object, field: str) -> Image:
        """Returns the image with its bytes, whose pixels are not looked at; raises InvalidArgumentError."""
        key, source = find_source(value)
        if isinstance(source, bytes):
            return read_image(source, self.limits, field)
        if not isinstance(source, str) or not source:
            raise InvalidArgumentError.for_field(field, f"must be a path, a data URL or bytes, got {name_type(source)}")
        if source.startswith("data:"):
            key, source = "base64", source.partition(",")[2]
        if key in _BASE64_KEYS:
            return read_image(self._decode(source, field), self.limits, field)
        try:
            return read_image(self._read(source, field), self.limits, field)
        except InvalidArgumentError as error:
            [violation] = error.violations
            shown = source if len(source) <= _SHOWN_CHARACTERS else f"{source[:_SHOWN_CHARACTERS]}..."
            raise InvalidArgumentError.for_field(field, f"{shown} {violation.description}") from error

    def _decode(self, text: str, field: str) -> bytes:
        """Returns the bytes of base64 text."""
        if len(text) > self.limits.max_bytes * 4 // 3 + 4:
            raise InvalidArgumentError.for_field(field, f"has more than {self.limits.max_bytes:,} bytes")
        try:
            # Lines are broken by some writers.
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidArgumentError.for_field(field, f"is not base64: {error}") from error

    def _read(self, name: str, field: str) -> bytes:
        """Returns the bytes of a file at a path or a URL, at most one more than an image may have."""
        if name.startswith(_WEB):
            if not self.allow_urls:
                raise InvalidArgumentError.for_field(
                    field, "is an address of the web: set run.images.allow_urls to read those, or give a file"
                )
            return fetch_web(name, field, self.limits.max_bytes)
        if "://" not in name and "://" in self.base:
            name = f"{self.base.rstrip('/')}/{name}"
        if "://" not in name:
            return self._read_path(Path(self.base, name), field)
        if self.read_storage is None:
            raise InvalidArgumentError.for_field(field, "is a URL, and only files are read here")
        content = self.read_storage(name, field, self.limits.max_bytes)
        if content is None:
            raise InvalidArgumentError.for_field(field, "does not exist")
        return content

    def _read_path(self, path: Path, field: str) -> bytes:
        try:
            if not path.is_file():
                missing = "is no file" if path.exists() else f"does not exist below {self.base or '.'}"
                raise InvalidArgumentError.for_field(field, missing)
            with path.open("rb") as file:
                return file.read(self.limits.max_bytes + 1)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError.for_field(field, f"cannot be read: {error}") from error


def keep_images(
    values: Mapping[str, Any], messages: Sequence[ChatMessage], images: Sequence[ImageInfo]
) -> dict[str, Any]:
    """Returns a line that names its images as files of IMAGES_FOLDER, beside the prompt file."""
    if not images:
        return dict(values)
    line = {key: value for key, value in values.items() if key not in ("messages", "images")}
    if not messages:
        return line | {"images": [f"{IMAGES_FOLDER}/{image.digest}" for image in images]}
    return line | {"messages": [{**message, "content": _keep_content(message["content"])} for message in messages]}


def _keep_content(content: str | list[TextPart | ImagePart]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_keep_part(part) for part in content]


def _keep_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if part["type"] == "text":
        return dict(part)
    return {"type": "image", "image": f"{IMAGES_FOLDER}/{part['image'].digest}"}


def find_source(value: object) -> tuple[str, object]:
    """Returns what names an image in a value, at whatever depth it is, and the key that it stands under."""
    key = ""
    while isinstance(value, Mapping):
        key, value = next(((key, value[key]) for key in SOURCE_KEYS if value.get(key) is not None), ("", None))
    return key, value


def embed_images(
    path: Path, read: ImageReader, field: str, target: Path, columns: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Returns a file of JSON Lines that needs no other file: `path`, or `target` with its images as data URLs.

    `columns` has names by field where a line has others. Images at URLs are left where `read` does not allow them, and
    so is a file that is no JSON Lines. Raises InvalidArgumentError naming line and field of an image that is none.
    """
    names = (columns.get("messages", "messages"), columns.get("images", "images"))
    if not any(name in line for _, line in _read_text(path) for name in (b'"image', f'"{names[1]}"'.encode())):
        return path

    def embed(line: bytes, place: str) -> bytes:
        try:
            values = json.loads(line)
            parts_of_messages = [message["content"] for message in values.get(names[0]) or []]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return line  # who reads the lines says what is wrong with this one
        for parts in parts_of_messages:
            for index, part in enumerate(parts if isinstance(parts, list) else []):
                if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                    parts[index] = _embed_part(part, read, f"{place}: {names[0]}")
        if (images := values.get(names[1])) is not None:
            listed = images if isinstance(images, list) else [images]
            values[names[1]] = [_embed(image, read, f"{place}: {names[1]}") for image in listed]
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"

    write_atomically(target, (embed(line, f"{field}: {path}:{number}") for number, line in _read_text(path)))
    return target


def _read_text(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the numbered lines of JSON Lines that are not empty; none of a file of another kind."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and not line.lstrip().startswith(b"{"):
                return
            if line.strip():
                yield number, line


def _embed_part(part: Mapping[str, Any], read: ImageReader, field: str) -> Mapping[str, Any]:
    """Returns a part with its image as a data URL; as it is where it names none, or one that is left."""
    image = _embed(part, read, field)
    return part if image is part else {"type": "image", "image": image}


def _embed(value: object, read: ImageReader, field: str) -> object:
    key, source = find_source(value)
    is_left = isinstance(source, str) and "://" in source and not read.allow_urls
    if key in _BASE64_KEYS or not isinstance(source, str) or source.startswith("data:") or is_left:
        return value
    image = read.load(value, field)
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"


def fetch_web(url: str, field: str, max_bytes: int) -> bytes:
    """Returns what is at an address of the web, at most one byte more than `max_bytes`.

    Raises InvalidArgumentError naming `field` when the server has no such file, UnavailableError when it is away.
    """
    deadline = time.monotonic() + _FETCH_S
    request = urllib.request.Request(url, headers={"User-Agent": "perigee"})
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=_FETCH_S / 2) as response:
            while len(content) <= max_bytes and (block := response.read(_BLOCK_BYTES)):
                content += block
                if time.monotonic() > deadline:
                    raise TimeoutError(f"more than {_FETCH_S:g} s")
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise InvalidArgumentError.for_field(field, f"cannot be had: {error}") from error
        raise UnavailableError(f"{field}: {url} cannot be had: {error}") from error
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{field}: {url} cannot be had: {error}") from error
    return bytes(content[: max_bytes + 1])
