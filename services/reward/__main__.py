"""Starts the reward service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from perigee.sandbox.client import SandboxClient
from services.kit.config import load_config
from services.kit.server import App, run
from services.reward.cache import OutcomeCache
from services.reward.config import RewardConfig
from services.reward.images import ImageLimits
from services.reward.requests import ItemLimits
from services.reward.scoring import Scorer
from services.reward.service import FULL_NAME, RewardService
from services.reward.verifiers.base import Parameters, Verifier
from services.reward.verifiers.code import CodeParameters, CodeVerifier
from services.reward.verifiers.math import MathParameters, MathVerifier


@asynccontextmanager
async def lifespan(app: App[RewardConfig]) -> AsyncIterator[None]:
    """The verifiers, for as long as the service runs."""
    config = app.config
    verifiers: dict[type[Parameters], Verifier[Any]] = {
        MathParameters: MathVerifier(config.math),
        CodeParameters: CodeVerifier(config.code, app.connect(SandboxClient, config.sandbox_address)),
    }
    async with AsyncExitStack() as stack:
        for verifier in verifiers.values():
            stack.push_async_callback(verifier.close)
            await verifier.start()
        scorer = Scorer(verifiers, OutcomeCache(config.cache_entries), config.max_queued_items)
        app.add(FULL_NAME, add_RewardServiceServicer_to_server, RewardService(scorer, item_limits(config)))
        app.set_ready(FULL_NAME, True)
        yield


def item_limits(config: RewardConfig) -> ItemLimits:
    """What the configuration says of the size of items."""
    images = ImageLimits(config.max_images, config.max_image_bytes, config.max_image_pixels)
    return ItemLimits(config.max_response_bytes, config.max_prompt_bytes, images)


def main() -> None:
    """The service's process."""
    run(load_config(RewardConfig), lifespan)


if __name__ == "__main__":
    main()
