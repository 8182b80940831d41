"""Supervised fine-tuning before the iterations: stages that make the policy versions 1, 2, ..., each checkpointed."""

from __future__ import annotations

import asyncio
import time

from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import InternalError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.context import RunContext
from services.coordinator.run_config import SftStage
from services.coordinator.trainer_state import hold_version, wait_until_free
from services.coordinator.training_batch import make_optimizer


async def fine_tune_base(context: RunContext) -> int:
    """Does the stages that have no checkpoint yet, and returns the policy version that the first iteration starts from.

    Version 0 is the base model, version i the result of stage i.
    """
    stages = context.config.sft
    state = await wait_until_free(context)
    done = max((version for version in state.checkpoints if version <= len(stages)), default=0)
    await hold_version(context, done)
    for number, stage in enumerate(stages[done:], start=done + 1):
        context.board.policy_version = number - 1
        started = time.monotonic()
        last = await fine_tune(context, stage, number)
        await save(context, number)
        line = {
            "stage": number,
            "policy_version": number,
            "steps": last.steps,
            "tokens": last.tokens,
            "loss": last.loss,
            "seconds": round(time.monotonic() - started, 3),
        }
        await asyncio.to_thread(context.records.add_sft_stage, line)
    return len(stages)


async def fine_tune(context: RunContext, stage: SftStage, number: int) -> pb.FineTuneResponse:
    """One stage; returns the trainer's last message."""
    request = pb.FineTuneRequest(
        run_id=context.run_id,
        dataset_path=stage.dataset,
        steps=stage.steps,
        batch_size=stage.batch_size,
        max_tokens_per_microbatch=stage.max_tokens_per_microbatch,
        optimizer=make_optimizer(stage.optimizer),
        seed=context.config.seed + number,
        new_version=number,
    )
    board = context.board
    board.enter(coordinator_pb2.RUN_PHASE_SFT, stage.steps)
    steps_before = sum(earlier.steps for earlier in context.config.sft[: number - 1])
    last: pb.FineTuneResponse | None = None
    # To the stream's end: until then the trainer is busy and refuses the checkpoint.
    async for response in context.peers.trainer.fine_tune(request, timeout_s=context.settings.train_timeout_s):
        board.done, board.total = response.step, response.steps
        values = {"loss": response.loss, "gradient_norm": response.grad_norm}
        board.metrics = {f"sft/{name}": value for name, value in values.items()} | {"sft/stage": number}
        context.records.add_sft_step(steps_before + response.step, values)
        last = response
    if last is None or not last.done:
        raise InternalError(
            f"The trainer ended stage {number} of the supervised fine-tuning without saying so: look at its log."
        )
    return last


async def save(context: RunContext, version: int) -> None:
    """Has the trainer checkpoint the version it holds."""
    await context.peers.trainer.save_checkpoint(
        pb.SaveCheckpointRequest(run_id=context.run_id, policy_version=version),
        timeout_s=context.settings.checkpoint_timeout_s,
    )
