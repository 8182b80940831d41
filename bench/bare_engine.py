"""vLLM's AsyncLLM by itself: in this process, its EngineCore in one of its own, as in the rollout service."""

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from services.rollout.config import RolloutConfig
from services.rollout.model import open_policy

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SHUTDOWN_S = 5.0

_numbers = itertools.count()


@asynccontextmanager
async def bare_engine(config: RolloutConfig) -> "AsyncIterator[AsyncLLM]":
    """Starts an engine with the arguments and processes of the rollout service, with the folder's weights."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from services.rollout.vllm_engine import engine_arguments, prepare_vllm

    prepare_vllm(config)
    model = open_policy(config.model, config.max_model_len)
    engine = AsyncLLM.from_engine_args(replace(engine_arguments(config, model), load_format="auto"))
    try:
        yield engine
    finally:
        # In this thread: the reader of its outputs must be gone before EngineCore is.
        engine.shutdown(SHUTDOWN_S)
        # Its finalizer shuts it down again, which fails once the interpreter ends.
        del engine
        gc.collect()


async def generate_all(engine: "AsyncLLM", model: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Generates from all prompts at once, logprobs included; returns tokens per second."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=1.0,
        max_tokens=max_tokens,
        stop_token_ids=list(open_policy(str(model), None).stop_token_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def generate(prompt: Sequence[int]) -> int:
        tokens = 0
        prompt_tokens = TokensPrompt(prompt_token_ids=list(prompt))
        async for output in engine.generate(prompt_tokens, params, request_id=f"r{next(_numbers)}"):
            tokens = len(output.outputs[0].token_ids)
        return tokens

    begin = time.perf_counter()
    tokens = sum(await asyncio.gather(*map(generate, prompts)))
    return tokens / (time.perf_counter() - begin)
