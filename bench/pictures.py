"""How well near duplicates among pictures are found: python -m bench.pictures FOLDER

FOLDER holds pictures, and beside them perhaps scikit-learn's digits.csv.gz and scikit-image's lfw_subset.npy. Each
picture is encoded anew and scaled, which should change nothing, and has one small place painted over, which should; and
all pairs of pictures are compared.
"""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Image as Picture
from PIL.Image import Resampling

from perigee.curation.pictures import MAX_BITS, Look, find_same, look_at, looks_same

# Side to which larger pictures are scaled first, and every so many scans of digits that are changed.
SIDE = 700
SCANS_CHANGED = 10


def read_pictures(folder: Path) -> dict[str, list[Picture]]:
    """Returns the pictures of a folder by kind."""
    found: dict[str, list[Picture]] = {"pictures": [], "faces": [], "digits": []}
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg")):
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        white.thumbnail((SIDE, SIDE))
        found["pictures"].append(white)
    if (path := folder / "lfw_subset.npy").exists():
        faces = (np.load(path) * 255).astype(np.uint8)
        found["faces"] = [Image.fromarray(face).resize((100, 100)).convert("RGB") for face in faces]
    if (path := folder / "digits.csv.gz").exists():
        with gzip.open(path) as file:
            scans = np.loadtxt(file, delimiter=",")[:, :64].reshape(-1, 8, 8) * 255 / 16
        found["digits"] = [Image.fromarray(scan).resize((56, 56)).convert("RGB") for scan in scans.astype(np.uint8)]
    return found


def encode(picture: Picture, kind: str, quality: int) -> Picture:
    """Returns a picture after a file of another format."""
    file = io.BytesIO()
    picture.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def scale(picture: Picture, factor: float, how: Resampling = Resampling.LANCZOS) -> Picture:
    """Returns a picture of another size."""
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), how)


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "JPEG, quality 75": lambda picture: encode(picture, "JPEG", 75),
    "JPEG, quality 30": lambda picture: encode(picture, "JPEG", 30),
    "WebP, quality 50": lambda picture: encode(picture, "WEBP", 50),
    "palette of 64 colours": lambda picture: picture.quantize(64).convert("RGB"),
    "half the size": lambda picture: scale(picture, 0.5),
    "half the size, bilinear": lambda picture: scale(picture, 0.5, Resampling.BILINEAR),
    "double the size": lambda picture: scale(picture, 2),
    "half the size, then JPEG, quality 75": lambda picture: encode(scale(picture, 0.5), "JPEG", 75),
}


def paint(picture: Picture, part: int, random: np.random.Generator) -> Picture:
    """Returns a picture with a place of 1/`part` of its width and height in a colour far from what was there."""
    width, height = picture.width // part, picture.height // part
    left = int(random.integers(0, picture.width - width + 1))
    top = int(random.integers(0, picture.height - height + 1))
    box = (left, top, left + width, top + height)
    mean = np.asarray(picture.crop(box)).mean(axis=(0, 1))
    painted = picture.copy()
    painted.paste(tuple(0 if value > 127 else 255 for value in mean), box)
    return painted


def is_found(one: Look, other: Look) -> bool:
    """Returns whether two pictures count as one."""
    return bool(np.bitwise_count(one.hash ^ other.hash).sum() <= MAX_BITS) and looks_same(one, other)


def main() -> None:
    """Prints the shares found, by kind of picture and of change."""
    kinds = read_pictures(Path(sys.argv[1]))
    looks = {kind: [look_at(picture) for picture in pictures] for kind, pictures in kinds.items()}
    every = {kind: SCANS_CHANGED if kind == "digits" else 1 for kind in kinds}
    random = np.random.default_rng(0)
    edits = {f"1/{n} of width and height painted": lambda picture, n=n: paint(picture, n, random) for n in (8, 16, 32)}
    print(
        f"| same as | {' | '.join(f'{kind} ({len(pictures[:: every[kind]])})' for kind, pictures in kinds.items())} |"
    )
    for name, change in {**CHANGES, **edits}.items():
        shares = [
            np.mean([
                is_found(look, look_at(change(picture)))
                for look, picture in zip(looks[kind][:: every[kind]], pictures[:: every[kind]], strict=True)
            ])
            for kind, pictures in kinds.items()
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)
    for kind, some in looks.items():
        same = sum(first != place for place, first in enumerate(find_same(some)))
        print(f"{kind}: {len(some) * (len(some) - 1) // 2:,} pairs of different ones, {same} taken for another")


if __name__ == "__main__":
    main()
