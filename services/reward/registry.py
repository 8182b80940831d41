"""The verifiers that the service offers; a new one adds its line here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from perigee.sandbox.client import SandboxClient
from services.reward.config import RewardConfig
from services.reward.pool.workers import CheckPool
from services.reward.scorer import Scorer
from services.reward.verifiers.base import Verifier
from services.reward.verifiers.choice import ChoiceVerifier
from services.reward.verifiers.code import CodeVerifier
from services.reward.verifiers.composite import CompositeVerifier
from services.reward.verifiers.judge import JudgeVerifier
from services.reward.verifiers.math import MathVerifier
from services.reward.verifiers.patch import PatchVerifier
from services.reward.verifiers.patterns import JsonVerifier, RegexVerifier
from services.reward.verifiers.text import ExactVerifier, ShortAnswerVerifier
from services.reward.verifiers.value_head import ValueHeadVerifier


@asynccontextmanager
async def open_scorer(config: RewardConfig, sandbox: SandboxClient) -> AsyncIterator[Scorer]:
    """Starts the verifiers and what they share, and ends them behind the block."""
    scorer = Scorer(config.cache_entries, config.max_queued_items)
    math_checks, pattern_checks = CheckPool("math", config.math), CheckPool("pattern", config.pattern)
    verifiers: list[Verifier[Any]] = [
        MathVerifier(math_checks),
        CodeVerifier(config.code, sandbox),
        PatchVerifier(config.code, sandbox),
        ChoiceVerifier(),
        ShortAnswerVerifier(),
        ExactVerifier(),
        RegexVerifier(config.pattern, pattern_checks),
        JsonVerifier(pattern_checks),
        JudgeVerifier(config.judge),
        ValueHeadVerifier(config.value_head),
        CompositeVerifier(scorer),
    ]
    async with AsyncExitStack() as stack:
        parts: list[CheckPool | Verifier[Any]] = [math_checks, pattern_checks, *verifiers]
        for part in parts:
            stack.push_async_callback(part.close)
            await part.start()
        scorer.verifiers |= {verifier.name: verifier for verifier in verifiers}
        yield scorer
