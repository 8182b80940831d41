"""Pictures that look the same: of one another by another encoding or at another size.

A difference hash (the signs of 256 horizontal differences of grey) finds candidates, and thumbnails in colour settle
them: one place that differs, such as another number or another colour, makes another picture. docs/vision.md has how
well that works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Rows and columns of signs in a hash; rows and columns of a thumbnail.
HASH_SIDE = 16
THUMBNAIL_SIDE = 32
# Largest differences of two pictures that look the same: bits of the hash, values from 0 to 255 of any place of the
# thumbnails, and width to height.
MAX_BITS = 24
MAX_VALUES = 32
MAX_STRETCH = 1.05
# A step of grey that counts: what an encoding leaves on an even ground does not.
MIN_STEP = 2

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """What a picture looks like at a glance."""

    hash: Bytes
    """Shape (32,): 256 bits."""
    thumbnail: Bytes
    """Shape (32, 32, 3)."""
    ratio: float
    """Width to height."""


def look_at(picture: Picture) -> Look:
    """Returns what an RGB picture looks like."""
    from PIL.Image import Resampling

    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    grey = np.asarray(picture.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Resampling.LANCZOS), np.int16)
    thumbnail = np.asarray(picture.resize(size, Resampling.BILINEAR))
    return Look(np.packbits(grey[:, 1:] > grey[:, :-1] + MIN_STEP), thumbnail, picture.width / picture.height)


def find_same(looks: Sequence[Look]) -> list[int]:
    """Returns for each picture the place of the first one that it looks the same as, often its own."""
    first: list[int] = []
    # Those that look like none before them.
    hashes, places = np.empty((len(looks), HASH_SIDE * HASH_SIDE // 8), np.uint8), list[int]()
    for index, look in enumerate(looks):
        bits = np.bitwise_count(hashes[: len(places)] ^ look.hash).sum(axis=1)
        near = (places[place] for place in np.flatnonzero(bits <= MAX_BITS))
        found = next((place for place in near if looks_same(looks[place], look)), index)
        if found == index:
            hashes[len(places)] = look.hash
            places.append(index)
        first.append(found)
    return first


def looks_same(one: Look, other: Look) -> bool:
    """Returns whether two pictures differ in no place of their thumbnails, and not in shape."""
    values = np.abs(one.thumbnail.astype(np.int16) - other.thumbnail).max()
    return bool(values <= MAX_VALUES and 1 / MAX_STRETCH <= one.ratio / other.ratio <= MAX_STRETCH)
