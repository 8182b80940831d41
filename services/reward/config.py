"""Configuration of the reward service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.kit.config import Model, ServiceConfig


class ChecksConfig(Model):
    """Checks in processes that may be killed."""

    workers: int = Field(2, ge=1)
    """Processes that check; each takes one after the other."""
    check_timeout_s: float = Field(5.0, gt=0)
    """Time of one check; past it its process is killed and the item FAILED."""
    memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Memory of one check; past it its process is killed and the item FAILED."""
    start_timeout_s: float = Field(60.0, gt=0)
    """Time for a worker process to get ready."""
    slow_check_s: float = Field(0.25, gt=0)
    """A check that takes longer while others wait goes on beside them."""
    slow_checks: int = Field(4, ge=0)
    """Checks that may go on beside the others, in each worker."""


class MathConfig(ChecksConfig):
    """The math verifier; its checks are comparisons of expressions, plain numbers need none."""


class PatternConfig(ChecksConfig):
    """The regex and json verifiers; their checks are matches and validations."""

    workers: int = Field(1, ge=1)
    check_timeout_s: float = Field(2.0, gt=0)


class CodeConfig(Model):
    """The code verifier."""

    concurrency: int = Field(16, ge=1)
    """Programs at the sandbox at once; more wait here."""
    timeout_s: float = Field(60.0, gt=0)
    """Time of one program at the sandbox, retries included; past it the item is FAILED."""


class RewardConfig(ServiceConfig):
    """The reward service's section of a recipe."""

    section: ClassVar[str] = "reward"

    sandbox_address: str = "127.0.0.1:50056"
    """The sandbox that runs programs."""
    math: MathConfig = MathConfig()
    """The math verifier."""
    pattern: PatternConfig = PatternConfig()
    """The regex and json verifiers."""
    code: CodeConfig = CodeConfig()
    """The code verifier."""
    cache_entries: int = Field(100_000, ge=0)
    """Outcomes kept, so that the same response to the same prompt is judged once; the oldest make room."""
    max_queued_items: int = Field(16_384, ge=1)
    """Items of one verifier under way in all calls; a call that would exceed it is refused with RESOURCE_EXHAUSTED."""
    max_response_bytes: int = Field(1 << 20, ge=1)
    """Largest response of an item, in UTF-8."""
    max_prompt_bytes: int = Field(1 << 20, ge=1)
    """Largest prompt of an item, in UTF-8."""
    max_images: int = Field(16, ge=0)
    """Most images of an item."""
    max_image_bytes: int = Field(8 << 20, ge=1)
    """Largest image, in bytes."""
    max_image_pixels: int = Field(40_000_000, ge=1)
    """Largest image, in pixels."""
    max_request_bytes: int = Field(64 << 20, ge=4 << 20)
    """Largest call; below it, an item that is too large is told by its field."""

    @property
    def message_bytes(self) -> int:
        """As configured: batches of long responses and images are larger than most calls."""
        return self.max_request_bytes
