"""perigee.reward.v1.RewardService over a Scorer: requests are checked and become items, outcomes become messages.

Checked are texts, ground truths, and that images are images.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.images import MEDIA_TYPES, ImageLimits, read_image
from perigee.reward.items import TEXT_ALONE, find_parts
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer
from services.reward.config import RewardConfig
from services.reward.scorer import Scored, Scorer
from services.reward.verifiers.base import ImagePart, Item, Verdict, Verifier

FULL_NAME = "perigee.reward.v1.RewardService"
# More would not fit into an error's trailing metadata.
MAX_VIOLATIONS = 20
SCHEMES = ("http", "https", "data")
DATA_URL = re.compile(r"data:(image/[a-z]+);base64,([A-Za-z0-9+/=]+)")
MAX_URL_CHARACTERS = 8192


class RewardService(RewardServiceServicer):
    """Translates protobuf to the scorer and back."""

    def __init__(self, scorer: Scorer, config: RewardConfig) -> None:
        self._scorer = scorer
        self._config = config

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncGenerator[pb.ScoreResponse, None]:
        items = read_items(request, self._scorer.verifiers, self._config)
        async with aclosing(self._scorer.score(items)) as outcomes:
            async for scored in outcomes:
                yield build_response(scored)

    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        verifiers = [
            pb.Verifier(name=verifier.name, version=verifier.version, unavailable=verifier.unavailable)
            for verifier in self._scorer.verifiers.values()
        ]
        return pb.ListVerifiersResponse(verifiers=verifiers)


def build_response(scored: Scored) -> pb.ScoreResponse:
    """Returns the message of one outcome; without a reward when it is FAILED."""
    outcome = scored.outcome
    parts = [
        pb.PartScore(name=name, verdict=write_verdict(part.verdict), reward=part.reward, reason=part.reason)
        for name, part in outcome.parts.items()
    ]
    return pb.ScoreResponse(
        id=scored.item_id,
        verdict=write_verdict(outcome.verdict),
        reward=outcome.reward,
        extracted_answer=outcome.extracted,
        reason=outcome.reason,
        verifier=scored.verifier.name,
        latency_ms=scored.seconds * 1000,
        retryable=outcome.retryable,
        unjudgeable=outcome.is_unjudgeable,
        verifier_version=scored.verifier.version,
        parts=parts,
        retry_after_ms=None if outcome.retry_after_s is None else round(outcome.retry_after_s * 1000),
    )


def write_verdict(verdict: Verdict) -> buffer_pb2.Verdict.ValueType:
    """Returns the contract's verdict."""
    return buffer_pb2.Verdict.Value(f"VERDICT_{verdict.name}")


def read_items(
    request: pb.ScoreRequest, verifiers: Mapping[str, Verifier[Any]], config: RewardConfig
) -> list[Item[Any]]:
    """Returns the request's items.

    Raises InvalidArgumentError with a violation for each wrong field, the first 20 of them.
    """
    items: list[Item[Any]] = []
    violations: list[FieldViolation] = []
    seen: set[str] = set()
    for index, message in enumerate(request.items):
        found = find_violations(message, seen, config)
        seen.add(message.id)
        images, wrong_images = read_images(message, config)
        found += wrong_images
        if message.images and any(isinstance(part, pb.ValueHeadVerifier) for part in find_parts(message)):
            found.append(FieldViolation("images", TEXT_ALONE))
        name = message.WhichOneof("verifier") or ""
        if name in verifiers:
            parameters = getattr(message, name)
            items.append(Item(message.id, message.response, message.answer_marker, parameters, message.prompt, images))
            found += verifiers[name].find_violations(parameters)
        else:
            known = f"one of {', '.join(verifiers)}"
            found.append(
                FieldViolation("verifier", f"{name} is not offered: {known}" if name else f"is required: {known}")
            )
        violations += [FieldViolation(f"items[{index}].{v.field}", v.description) for v in found]
        if len(violations) >= MAX_VIOLATIONS:
            break
    if violations:
        raise InvalidArgumentError.for_fields(violations[:MAX_VIOLATIONS])
    return items


def find_violations(message: pb.ScoreItem, seen: set[str], config: RewardConfig) -> list[FieldViolation]:
    """Returns what is wrong with an item beside its images and its verifier's parameters."""
    violations = []
    if not message.id:
        violations.append(FieldViolation("id", "is required: outcomes are told apart by it"))
    elif message.id in seen:
        violations.append(FieldViolation("id", f"{message.id!r} is used twice in this call"))
    for name, text, most in (
        ("response", message.response, config.max_response_bytes),
        ("prompt", message.prompt, config.max_prompt_bytes),
    ):
        size = len(text.encode())
        if size > most:
            violations.append(FieldViolation(name, f"has {size} bytes, more than {most}"))
    return violations


def read_images(message: pb.ScoreItem, config: RewardConfig) -> tuple[tuple[ImagePart, ...], list[FieldViolation]]:
    """Returns the images of an item that are right, and what is wrong with the others."""
    if len(message.images) > config.max_images:
        text = f"has {len(message.images)} images, more than {config.max_images}"
        return (), [FieldViolation("images", text)]
    images: list[ImagePart] = []
    violations: list[FieldViolation] = []
    for index, image in enumerate(message.images):
        source = image.WhichOneof("source")
        try:
            images.append(read_part(image, f"images[{index}].{source}" if source else f"images[{index}]", config))
        except InvalidArgumentError as error:
            violations += error.violations
    return tuple(images), violations


def read_part(image: pb.Image, field: str, config: RewardConfig) -> ImagePart:
    """Returns an image; raises InvalidArgumentError naming `field`."""
    match image.WhichOneof("source"):
        case "data":
            return ImagePart(image.data, find_media_type(image.data, field, config))
        case "url":
            check_url(image.url, field, config)
            return ImagePart(url=image.url)
    raise InvalidArgumentError.for_field(field, "data or url is required")


def find_media_type(data: bytes, field: str, config: RewardConfig) -> str:
    """Returns the media type that the bytes have; the pixels are not decoded. Raises InvalidArgumentError."""
    limits = ImageLimits(config.max_image_bytes, config.max_image_pixels, tuple(MEDIA_TYPES), animated=True)
    return read_image(data, limits, field).media_type


def check_url(url: str, field: str, config: RewardConfig) -> None:
    """Raises InvalidArgumentError for an address that a judge's endpoint cannot read."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidArgumentError.for_field(field, f"is no URL: {error}") from error
    if parts.scheme not in SCHEMES:
        known = f"{', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}"
        raise InvalidArgumentError.for_field(field, f"must begin with {known}, got {parts.scheme!r}")
    if parts.scheme == "data":
        check_data_url(url, field, config)
    elif not parts.hostname:
        raise InvalidArgumentError.for_field(field, "names no host")
    elif len(url) > MAX_URL_CHARACTERS:
        raise InvalidArgumentError.for_field(field, f"has {len(url)} characters, more than {MAX_URL_CHARACTERS}")


def check_data_url(url: str, field: str, config: RewardConfig) -> None:
    """Raises InvalidArgumentError for a data URL whose content is not the image that it says."""
    match = DATA_URL.fullmatch(url)
    if match is None:
        raise InvalidArgumentError.for_field(field, "must be of the form data:image/png;base64,...")
    try:
        data = base64.b64decode(match[2], validate=True)
    except binascii.Error as error:
        raise InvalidArgumentError.for_field(field, f"is not base64: {error}") from error
    media_type = find_media_type(data, field, config)
    if media_type != match[1]:
        raise InvalidArgumentError.for_field(field, f"says {match[1]} but holds {media_type}")
