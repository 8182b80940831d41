"""Image tokens of prompts: how many an image takes in a model's context, and which, from its folder and without torch.

A prompt as it travels has one placeholder for each image. The engine puts the tokens of the image in its place, as the
model's processor of Hugging Face's transformers does, whose arithmetic is repeated here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from perigee.errors import InvalidArgumentError
from services.kit.hf import CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, ModelFolder, read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Width and height, pixels.
Size: TypeAlias = tuple[int, int]

# Idefics3's processor scales no image beyond it.
IDEFICS3_LARGEST_EDGE = 4096
IDEFICS3_DEFAULTS = {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}}
IDEFICS3_DEFAULT_TILE_TOKENS = 169
QWEN_DEFAULTS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
# The processor of Qwen-VL refuses images that are longer than this by their shorter side.
QWEN_LARGEST_ASPECT = 200


@dataclass(frozen=True)
class VisionModel(ABC):
    """Model that takes images in its prompts."""

    image_token_id: int
    """Placeholder of an image in a prompt, and what its features stand on once the prompt is expanded."""

    @abstractmethod
    def image_tokens(self, size: Size) -> Sequence[int]:
        """Returns the tokens that take the place of an image; raises InvalidArgumentError."""

    @abstractmethod
    def grid(self, size: Size) -> tuple[int, int] | None:
        """Returns rows and columns of an image's features; None where the image has no shape of its own."""

    def count_tokens(self, size: Size) -> int:
        """Returns the number of an image's features, which is that of image tokens among its tokens."""
        return self.image_tokens(size).count(self.image_token_id)

    def check_count(self, prompt_ids: Sequence[int], images: int, field: str) -> None:
        """Raises InvalidArgumentError unless a prompt has a placeholder for each of its images."""
        placeholders = sum(token == self.image_token_id for token in prompt_ids)
        if placeholders != images:
            reason = f"the prompt has {placeholders} image tokens ({self.image_token_id}) for {images} images"
            raise InvalidArgumentError.for_field(field, f"{reason}: give one for each")

    def expand(self, prompt_ids: Sequence[int], sizes: Sequence[Size], field: str = "image_digests") -> list[int]:
        """Returns a prompt with the tokens of its images, of (width, height) pixels each, for their placeholders.

        The prompt must not have been expanded before. Raises InvalidArgumentError naming the field when images and
        placeholders are not as many, and for an image that the model's processor refuses.
        """
        self.check_count(prompt_ids, len(sizes), field)
        images = iter(sizes)
        expanded: list[int] = []
        for token in prompt_ids:
            expanded += self.image_tokens(next(images)) if token == self.image_token_id else (token,)
        return expanded

    def image_positions(self, expanded_ids: Sequence[int]) -> list[int]:
        """Returns where the features of images stand in an expanded prompt, those of the first image first.

        Of the prompt alone: an image token that the model samples is text.
        """
        return [position for position, token in enumerate(expanded_ids) if token == self.image_token_id]


@dataclass(frozen=True)
class Idefics3(VisionModel):
    """Idefics3 and SmolVLM: tiles of one size and the whole image as another, each in words of its own."""

    tile_tokens: int
    """Image tokens of a tile."""
    tile_edge: int
    """Pixels of a tile's edge."""
    longest_edge: int
    """Pixels that the longer side is scaled to before it is cut into tiles."""
    splits: bool
    tokenizer: Tokenizer

    def image_tokens(self, size: Size) -> Sequence[int]:
        """Returns the tokens of the tiles, row by row, and of the whole image."""
        return self._tokens_of_grid(*(self._count_tiles(size) if self.splits else (0, 0)))

    def grid(self, size: Size) -> None:
        """Returns None: each tile is a square of features, and their places in the text are those of text."""

    def _count_tiles(self, size: Size) -> tuple[int, int]:
        """Returns rows and columns of tiles, (0, 0) for an image that is one tile."""
        width, height = _scale_below(_scale_to(size, self.longest_edge), IDEFICS3_LARGEST_EDGE)
        rows, columns = math.ceil(height / self.tile_edge), math.ceil(width / self.tile_edge)
        return (rows, columns) if rows > 1 or columns > 1 else (0, 0)

    def _tokens_of_grid(self, rows: int, columns: int) -> Sequence[int]:
        found = self._known_grids.get((rows, columns))
        if found is None:
            text = self._write_grid(rows, columns)
            found = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
            self._known_grids[rows, columns] = found
        return found

    def _write_grid(self, rows: int, columns: int) -> str:
        """Returns the text of an image: line ends may join others into one token, so that it is encoded as one."""
        features = "<image>" * self.tile_tokens
        tiles = [
            "".join(f"<fake_token_around_image><row_{row}_col_{column}>{features}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        ]
        return (
            "".join(f"{line}\n" for line in tiles)
            + "\n" * bool(tiles)
            + f"<fake_token_around_image><global-img>{features}<fake_token_around_image>"
        )

    @cached_property
    def _known_grids(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Tokens by rows and columns, of which an image has at most `longest_edge / tile_edge`, rounded up."""
        return {}


@dataclass(frozen=True)
class QwenVL(VisionModel):
    """Qwen2-VL and Qwen2.5-VL: an image keeps its shape, and has as many tokens as its area asks for."""

    patch_edge: int
    """Pixels of the edge of what one token sees."""
    min_pixels: int
    max_pixels: int

    def image_tokens(self, size: Size) -> Sequence[int]:
        """Returns the image token for each feature."""
        rows, columns = self.grid(size)
        return (self.image_token_id,) * (rows * columns)

    def grid(self, size: Size) -> tuple[int, int]:
        """Returns rows and columns of the patches of the resized image (`smart_resize` of the processor)."""
        width, height = size
        if max(width, height) > QWEN_LARGEST_ASPECT * min(width, height):
            reason = f"an image of {width} x {height} pixels is longer than {QWEN_LARGEST_ASPECT} times its other side"
            raise InvalidArgumentError.for_field("images", reason)
        edge = self.patch_edge
        rows, columns = round(height / edge), round(width / edge)
        pixels = rows * columns * edge * edge
        if pixels > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / edge)) for side in (height, width))
        elif pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / edge) for side in (height, width))
        return rows, columns


def open_vision(folder: ModelFolder) -> VisionModel | None:
    """Returns how a model takes images; None for one that takes none.

    Raises InvalidArgumentError that names the file for an architecture whose images are not known here, and for
    settings that contradict each other.
    """
    if "vision_config" not in folder.config:
        return None
    kind = folder.config.get("model_type")
    if kind not in VISION_MODELS:
        raise folder.error(CONFIG_FILE, f"has model_type {kind}; images are known of {', '.join(VISION_MODELS)}")
    image_token_id = folder.config.get("image_token_id")
    if not isinstance(image_token_id, int):
        raise folder.error(CONFIG_FILE, "has no image_token_id")
    processor = _read_optional(folder, PROCESSOR_FILE)
    # transformers 5 writes one file, earlier ones two; the one file counts where there are both.
    settings = processor.get("image_processor") or _read_optional(folder, PREPROCESSOR_FILE)
    if settings.get("do_resize") is False:
        raise folder.error(PREPROCESSOR_FILE, "has do_resize false, with which images do not fit the model")
    return VISION_MODELS[kind](folder, image_token_id, processor, settings)


def _open_idefics3(
    folder: ModelFolder, image_token_id: int, processor: dict[str, Any], settings: dict[str, Any]
) -> VisionModel:
    tile, longest = (
        (IDEFICS3_DEFAULTS[key] | (settings.get(key) or {}))["longest_edge"] for key in ("max_image_size", "size")
    )
    model = Idefics3(
        image_token_id=image_token_id,
        tile_tokens=processor.get("image_seq_len", IDEFICS3_DEFAULT_TILE_TOKENS),
        tile_edge=tile,
        longest_edge=longest,
        splits=settings.get("do_image_splitting", True),
        tokenizer=folder.open_tokenizer(),
    )
    patch = folder.config["vision_config"].get("patch_size", 32)
    features = (tile // patch) ** 2 // folder.config.get("scale_factor", 2) ** 2
    if model.tile_tokens != features:
        reason = f"has image_seq_len {model.tile_tokens}, and a tile of {tile} pixels has {features} features"
        raise folder.error(PROCESSOR_FILE, reason)
    if model.splits and longest % tile:
        reason = f"has size.longest_edge {longest}, which is no multiple of max_image_size.longest_edge {tile}"
        raise folder.error(PREPROCESSOR_FILE, reason)
    if (found := model.tokenizer.token_to_id("<image>")) != image_token_id:
        raise folder.error(CONFIG_FILE, f"has image_token_id {image_token_id}, and <image> of the tokenizer is {found}")
    return model


def _open_qwen_vl(
    folder: ModelFolder, image_token_id: int, processor: dict[str, Any], settings: dict[str, Any]
) -> VisionModel:
    size = QWEN_DEFAULTS | (settings.get("size") or {})
    return QwenVL(
        image_token_id=image_token_id,
        patch_edge=settings.get("patch_size", 14) * settings.get("merge_size", 2),
        min_pixels=settings.get("min_pixels") or size["shortest_edge"],
        max_pixels=settings.get("max_pixels") or size["longest_edge"],
    )


def _read_optional(folder: ModelFolder, file: str) -> dict[str, Any]:
    """Returns what a file of the folder holds, nothing without it."""
    return read_json_object(folder.path / file, folder.field) if (folder.path / file).exists() else {}


def _scale_to(size: Size, edge: int) -> Size:
    """Returns a size whose longer side is `edge`; the other one is even, or 1."""
    width, height = size
    aspect = width / height
    if width >= height:
        return edge, max(1, _make_even(int(edge / aspect)))
    return max(1, _make_even(int(edge * aspect))), edge


def _make_even(pixels: int) -> int:
    return pixels + pixels % 2


def _scale_below(size: Size, edge: int) -> Size:
    """Returns a size whose longer side is `edge` at most."""
    width, height = size
    aspect = width / height
    if width >= height and width > edge:
        width, height = edge, int(edge / aspect)
    elif height > width and height > edge:
        width, height = int(edge * aspect), edge
    return max(1, width), max(1, height)


VISION_MODELS: dict[str, Callable[[ModelFolder, int, dict[str, Any], dict[str, Any]], VisionModel]] = {
    "idefics3": _open_idefics3,
    "qwen2_vl": _open_qwen_vl,
    "qwen2_5_vl": _open_qwen_vl,
}
