"""TrainerService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.trainer.v1.trainer_pb2_grpc import TrainerServiceServicer
from services.trainer.fine_tune import FineTuneProgress, FineTuning
from services.trainer.mirror_descent import Baseline
from services.trainer.optimizer import AdamW
from services.trainer.train_iteration import MirrorDescent
from services.trainer.trainer import Iteration, Trainer

_BASELINES = {pb.BASELINE_MEAN: Baseline.MEAN, pb.BASELINE_LOG_MEAN_EXP: Baseline.LOG_MEAN_EXP}
Context = grpc.aio.ServicerContext[Any, Any]


class TrainerService(TrainerServiceServicer):
    """Serves one trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """See the contract."""
        trainer = self._trainer
        return pb.GetStateResponse(
            run_id=trainer.held.run_id,
            policy_version=trainer.held.version,
            checkpoints=trainer.checkpoints.versions(),
            parameters=trainer.engine.parameters,
            world_size=trainer.config.world,
            tensor_parallel=trainer.config.tensor_parallel,
            pipeline_parallel=trainer.config.pipeline_parallel,
            data_parallel=trainer.config.data_parallel,
            busy=trainer.busy,
        )

    async def FineTune(self, request: pb.FineTuneRequest, context: Context) -> AsyncIterator[pb.FineTuneResponse]:
        """See the contract."""
        settings = FineTuning(
            steps=request.steps,
            batch_size=request.batch_size,
            max_tokens_per_microbatch=request.max_tokens_per_microbatch,
            seed=request.seed,
            optimizer=_read_optimizer(request.optimizer),
        )
        progress: FineTuneProgress
        async for progress in self._trainer.fine_tune(
            request.run_id, _key_of(request), Path(request.dataset_path), settings, request.new_version
        ):
            yield pb.FineTuneResponse(**asdict(progress), done=progress.step == progress.steps)

    async def Train(self, request: pb.TrainRequest, context: Context) -> AsyncIterator[pb.TrainResponse]:
        """See the contract."""
        async for update in self._trainer.train(
            request.run_id,
            _key_of(request),
            request.iteration,
            _read_rewards(request),
            _read_algorithm(request.algorithm),
            request.base_version,
            request.new_version,
        ):
            if isinstance(update, Iteration):
                steps = min(request.algorithm.minibatches, len(request.groups))
                yield pb.TrainResponse(step=steps, steps=steps, result=_write_result(update))
            else:
                yield pb.TrainResponse(step=update[0], steps=update[1])

    async def PushWeights(self, request: pb.PushWeightsRequest, context: Context) -> pb.PushWeightsResponse:
        """See the contract."""
        push = await self._trainer.push_weights(request.run_id, request.policy_version, request.targets)
        return pb.PushWeightsResponse(outcomes=push.outcomes, export_seconds=push.export_seconds, bytes=push.bytes)

    async def SaveCheckpoint(self, request: pb.SaveCheckpointRequest, context: Context) -> pb.SaveCheckpointResponse:
        """See the contract."""
        path, size = await self._trainer.save_checkpoint(request.run_id, request.policy_version)
        return pb.SaveCheckpointResponse(path=str(path), bytes=size)

    async def LoadCheckpoint(self, request: pb.LoadCheckpointRequest, context: Context) -> pb.LoadCheckpointResponse:
        """See the contract."""
        version = request.policy_version if request.HasField("policy_version") else None
        return pb.LoadCheckpointResponse(policy_version=await self._trainer.load_checkpoint(request.run_id, version))

    async def ExportModel(self, request: pb.ExportModelRequest, context: Context) -> pb.ExportModelResponse:
        """See the contract."""
        if not request.path:
            raise InvalidArgumentError.of("path", "is empty")
        path = await self._trainer.export_model(request.run_id, Path(request.path))
        return pb.ExportModelResponse(path=str(path))


def _key_of(request: pb.TrainRequest | pb.FineTuneRequest) -> bytes:
    return request.SerializeToString(deterministic=True)


def _read_optimizer(message: pb.Optimizer) -> AdamW:
    return AdamW(
        learning_rate=message.learning_rate,
        beta1=message.beta1,
        beta2=message.beta2,
        weight_decay=message.weight_decay,
        max_grad_norm=message.max_grad_norm,
        warmup_steps=message.warmup_steps,
        min_lr_ratio=message.min_lr_ratio,
    )


def _read_algorithm(message: pb.PolicyMirrorDescent) -> MirrorDescent:
    if message.baseline not in _BASELINES:
        raise InvalidArgumentError.of("algorithm.baseline", "has to be BASELINE_MEAN or BASELINE_LOG_MEAN_EXP")
    return MirrorDescent(
        tau=message.tau,
        baseline=_BASELINES[message.baseline],
        minibatches=message.minibatches,
        max_tokens_per_microbatch=message.max_tokens_per_microbatch,
        max_staleness=message.max_staleness,
        token_scale=message.token_scale,
        temperature=message.temperature,
        tis_cap=message.tis_cap,
        optimizer=_read_optimizer(message.optimizer),
    )


def _read_rewards(request: pb.TrainRequest) -> dict[str, dict[str, float]]:
    """Rewards by trajectory by group; InvalidArgumentError for what is empty, comes twice or is not finite."""
    if not request.groups:
        raise InvalidArgumentError.of("groups", "is empty; an iteration without a group has nothing to train")
    rewards_by_group: dict[str, dict[str, float]] = {}
    seen: set[str] = set()
    for i, group in enumerate(request.groups):
        rewards = {item.trajectory_id: item.reward for item in group.trajectories}
        if not rewards:
            raise InvalidArgumentError.of(f"groups[{i}].trajectories", f"group {group.group_id} has no trajectory")
        if group.group_id in rewards_by_group or len(rewards) < len(group.trajectories) or seen & rewards.keys():
            raise InvalidArgumentError.of(f"groups[{i}]", f"group {group.group_id} or a trajectory of it comes twice")
        for trajectory_id, reward in rewards.items():
            if not math.isfinite(reward):
                raise InvalidArgumentError.of(f"groups[{i}].trajectories", f"the reward of {trajectory_id} is {reward}")
        seen |= rewards.keys()
        rewards_by_group[group.group_id] = rewards
    return rewards_by_group


def _write_result(iteration: Iteration) -> pb.TrainResult:
    return pb.TrainResult(
        policy_version=iteration.policy_version,
        groups=iteration.groups,
        read_seconds=iteration.read_seconds,
        **asdict(iteration.figures),
    )
