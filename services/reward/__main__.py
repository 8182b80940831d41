"""Starts the reward service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from perigee.sandbox.client import SandboxClient
from services.kit.config import load_config
from services.kit.http import http_serving
from services.kit.server import App, run
from services.reward.cache import OutcomeCache
from services.reward.check_pool import CheckPool
from services.reward.compat.openrlhf import openrlhf_api
from services.reward.config import RewardConfig
from services.reward.http_routes import ROUTES, ServicerScores, collecting_api
from services.reward.images import ImageLimits
from services.reward.panel import Panel
from services.reward.requests import ItemLimits
from services.reward.scoring import Scorer
from services.reward.service import FULL_NAME, RewardService
from services.reward.verifiers.base import Parameters, Verifier
from services.reward.verifiers.choice import ChoiceParameters, ChoiceVerifier
from services.reward.verifiers.code import CodeParameters, CodeVerifier
from services.reward.verifiers.composite import CompositeParameters, CompositeVerifier
from services.reward.verifiers.exact import ExactParameters, ExactVerifier
from services.reward.verifiers.json import JsonParameters, JsonVerifier
from services.reward.verifiers.judge import JudgeParameters, JudgeVerifier
from services.reward.verifiers.math import MathParameters, MathVerifier
from services.reward.verifiers.regex import RegexParameters, RegexVerifier
from services.reward.verifiers.short_answer import ShortAnswerParameters, ShortAnswerVerifier
from services.reward.verifiers.value_head import ValueHeadParameters, ValueHeadVerifier


@asynccontextmanager
async def lifespan(app: App[RewardConfig]) -> AsyncIterator[None]:
    """The verifiers, for as long as the service runs."""
    config = app.config
    math_checks, pattern_checks = CheckPool("math", config.math), CheckPool("pattern", config.pattern)
    verifiers: dict[type[Parameters], Verifier[Any]] = {
        MathParameters: MathVerifier(math_checks),
        CodeParameters: CodeVerifier(config.code, app.connect(SandboxClient, config.sandbox_address)),
        ChoiceParameters: ChoiceVerifier(),
        ShortAnswerParameters: ShortAnswerVerifier(),
        ExactParameters: ExactVerifier(),
        RegexParameters: RegexVerifier(config.pattern, pattern_checks),
        JsonParameters: JsonVerifier(pattern_checks),
        JudgeParameters: JudgeVerifier(config.judge),
        ValueHeadParameters: ValueHeadVerifier(config.value_head),
    }
    panel = Panel(verifiers, OutcomeCache(config.cache_entries))
    panel.verifiers[CompositeParameters] = CompositeVerifier(panel.verifiers, panel.judge_part)
    async with AsyncExitStack() as stack:
        parts: list[CheckPool | Verifier[Any]] = [math_checks, pattern_checks, *panel.verifiers.values()]
        for part in parts:
            stack.push_async_callback(part.close)
            await part.start()
        service = RewardService(Scorer(panel, config.max_queued_items), item_limits(config))
        app.add(FULL_NAME, add_RewardServiceServicer_to_server, service)
        foreign = (collecting_api(service), openrlhf_api(ServicerScores(service)))
        await stack.enter_async_context(http_serving(app, config.http, ROUTES, service, foreign))
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
