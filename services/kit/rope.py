"""Rotary embedding (RoPE) of a model by its config.json, and the change of it by a recipe; no torch.

Base and scaling are read as transformers and vLLM read them. What these two would read differently, or the trainer does
not compute, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from perigee.config import Model

DEFAULT_THETA = 10000.0
# Of Qwen2-VL and Qwen2.5-VL, by the beginning of their model_type.
VISION_THETAS = {"qwen2_vl": 1e6, "qwen2_5_vl": 1e6}
# Settings that each type must have, and those that it may have.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "default": ("mrope_section",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
# Of every type.
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_NO_NUMBERS = ("rope_type", "type", "mrope_section", "truncate")


class RopeScaling(Model):
    """Scaling of the frequencies, by which a model reads on beyond the positions that it was trained on."""

    type: Literal["default", "linear", "llama3", "yarn"]
    """default: none. linear: all frequencies are divided by `factor`. llama3: the low ones are. yarn (arXiv
    2309.00071): those that turn less than `beta_slow` times within the original positions are, those that turn more
    than `beta_fast` times stay, and attention is sharpened by `attention_factor`. Dynamic scaling, whose frequencies
    change with the length, is not among them: engines fix them for all lengths."""
    factor: float | None = Field(None, ge=1)
    """Factor by which the context grows."""
    original_max_position_embeddings: int | None = Field(None, ge=1)
    """llama3, yarn: positions that the model was trained on before."""
    low_freq_factor: float | None = Field(None, gt=0)
    """llama3: frequencies that turn less often than this within the original positions are divided."""
    high_freq_factor: float | None = Field(None, gt=0)
    """llama3: frequencies that turn more often than this stay."""
    beta_fast: float | None = Field(None, gt=0)
    """yarn: turns within the original positions above which a frequency stays; 32 when unset."""
    beta_slow: float | None = Field(None, gt=0)
    """yarn: turns below which a frequency is divided by the factor; 1 when unset."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: factor of queries and of keys; 0.1 ln(factor) + 1 when unset."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        given = self.model_dump(exclude={"type"}, exclude_none=True)
        known = (*REQUIRED[self.type], *OPTIONAL.get(self.type, ()))
        for key in REQUIRED[self.type]:
            if key not in given:
                raise ValueError(f"{key} is required with type {self.type}")
        for key in given:
            if key not in known:
                raise ValueError(f"{key} is no setting of type {self.type}: leave it out")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low:g} and {high:g}")
        return self

    def settings(self) -> dict[str, Any]:
        """Returns what config.json says of it."""
        return {"rope_type": self.type, **self.model_dump(exclude={"type"}, exclude_none=True)}


class RopeConfig(Model):
    """Rotary embedding in the place of that of the model's config.json; what is unset stays the model's own."""

    theta: float | None = Field(None, gt=1)
    """Base of the frequencies (rope_theta). The k1.5 report raises it to 1,000,000 for its long contexts (section
    2.2)."""
    scaling: RopeScaling | None = None
    """Scaling of the frequencies; {type: default} takes the model's away."""
    max_position_embeddings: int | None = Field(None, ge=1)
    """Prompt and response tokens that a sequence may have; when unset factor x original_max_position_embeddings of a
    yarn or llama3 `scaling`, else the model's own."""

    @property
    def positions(self) -> int | None:
        """Prompt and response tokens that a sequence may have; None leaves it to the model."""
        scaling = self.scaling
        if self.max_position_embeddings is None and scaling is not None and scaling.original_max_position_embeddings:
            return int((scaling.factor or 1.0) * scaling.original_max_position_embeddings)
        return self.max_position_embeddings


@dataclass(frozen=True)
class Rope:
    """Rotary embedding that a config.json describes."""

    type: str
    """A key of REQUIRED."""
    theta: float
    settings: Mapping[str, Any]
    """Those of the type, under the names of config.json."""


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Returns the rotary embedding of the part of a config.json on the language model.

    Raises ValueError, in a clause that goes on after the file's name, for one that is not computed here, or that
    transformers and vLLM would read differently.
    """
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        raise ValueError(
            "has other rope_parameters than rope_scaling, which transformers takes in their place: drop one"
        )
    settings = dict(scaling or parameters)
    kind = _read_type(settings)
    known = (*_COMMON, *REQUIRED[kind], *OPTIONAL.get(kind, ()))
    for key, value in settings.items():
        if key == "mrope_section" and kind != "default":
            raise ValueError(
                f"has mrope_section with rope type {kind}, which vLLM computes in another way: drop {kind}"
            )
        if key not in known:
            raise ValueError(f"has the setting {key} of rope type {kind}, which is none of {', '.join(known)}")
        if key not in _NO_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"has {key} {value!r} of rope type {kind}, which is no number")
    for key in REQUIRED[kind]:
        if key not in settings:
            raise ValueError(f"has rope type {kind} without {key}")
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ValueError(
            f"has low_freq_factor {settings['low_freq_factor']}, not below high_freq_factor "
            f"{settings['high_freq_factor']}, which transformers and vLLM compute in different ways"
        )
    # vLLM takes a whole number for a list of factors.
    if kind == "linear" and not isinstance(settings["factor"], float):
        raise ValueError(f"has factor {settings['factor']} of rope type linear: write it as {settings['factor']}.0")
    rotated = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if rotated != 1:
        raise ValueError(f"has partial_rotary_factor {rotated}, of which only 1 is supported")
    _check_positions(kind, settings, config)
    model_type = str(config.get("model_type"))
    default = next((theta for name, theta in VISION_THETAS.items() if model_type.startswith(name)), DEFAULT_THETA)
    theta = settings.get("rope_theta") or config.get("rope_theta") or default
    return Rope(kind, float(theta), {key: value for key, value in settings.items() if key not in _COMMON})


def _read_type(settings: Mapping[str, Any]) -> str:
    """Returns the type of the scaling; raises what `read_rope` raises."""
    kinds = [str(settings[key]) for key in ("rope_type", "type") if settings.get(key) is not None]
    if "mrope_section" in settings:
        # What transformers 4 calls the plain embedding of positions on three axes.
        kinds = ["default" if kind == "mrope" else kind for kind in kinds]
    if len({*kinds}) > 1:
        raise ValueError(f"has rope_type {kinds[0]} and type {kinds[1]}: drop one")
    kind = kinds[0] if kinds else "default"
    if kind not in REQUIRED:
        raise ValueError(f"has rope type {kind}, which is not one of {', '.join(REQUIRED)}")
    return kind


def _check_positions(kind: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers of positions that contradict each other."""
    if (original := settings.get("original_max_position_embeddings")) is None:
        return
    outside = config.get("original_max_position_embeddings", original)
    if outside != original:
        raise ValueError(
            f"has original_max_position_embeddings {original} of rope type {kind} and {outside} besides: drop one"
        )
    positions = config.get("max_position_embeddings")
    if kind == "yarn" and isinstance(positions, int) and positions > settings["factor"] * original:
        raise ValueError(
            f"has max_position_embeddings {positions}, more than the {settings['factor'] * original:g} of factor x "
            "original_max_position_embeddings: raise the factor"
        )


def change_rope(config: Mapping[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """Returns the contents of a config.json with another rotary embedding, under the keys that the file has.

    Raises ValueError as `read_rope` does, for what is there before and for what comes of it.
    """
    nested = config.get("text_config")
    text = dict(nested if isinstance(nested, dict) else config)
    before = read_rope(text)
    theta = rope.theta or before.theta
    settings = {"rope_type": before.type, **before.settings}
    if rope.scaling is not None:
        kept = {key: value for key, value in before.settings.items() if key == "mrope_section"}
        settings = kept | rope.scaling.settings()
    if text.get("rope_parameters"):
        text.pop("rope_scaling", None)
        text.pop("rope_theta", None)
        text["rope_parameters"] = settings | {"rope_theta": theta}
    else:
        text |= {"rope_theta": theta, "rope_scaling": None if settings == {"rope_type": "default"} else settings}
    text.pop("original_max_position_embeddings", None)
    if rope.positions is not None:
        text["max_position_embeddings"] = rope.positions
    read_rope(text)
    return {**config, "text_config": text} if isinstance(nested, dict) else text
