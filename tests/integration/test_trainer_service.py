"""The trainer through its gRPC service: fine-tuning, iterations, checkpoints, export, and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from perigee.buffer.client import BufferClient
from perigee.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from perigee.trainer.v1 import trainer_pb2 as pb
from tests.fixtures.trainer import (
    EOS,
    TrainerAt,
    make_groups,
    store_groups,
    train_request,
    write_dataset,
)

RUN = "trainer-run"


def fine_tune_request(dataset: Path, **fields: object) -> pb.FineTuneRequest:
    settings = {
        "steps": 30,
        "batch_size": 8,
        "max_tokens_per_microbatch": 64,
        "new_version": 1,
        "optimizer": pb.Optimizer(learning_rate=3e-3, beta1=0.9, beta2=0.98, max_grad_norm=1.0, warmup_steps=5),
    } | fields
    return pb.FineTuneRequest(run_id=RUN, dataset_path=str(dataset), **settings)


async def reload_base(trainer: TrainerAt) -> None:
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))


async def train(trainer: TrainerAt, request: pb.TrainRequest) -> pb.TrainResult:
    responses = [response async for response in trainer.client.train(request, timeout_s=60)]
    return responses[-1].result


async def test_fine_tuning_lowers_the_loss_and_repeats_its_answer(trainer: TrainerAt, tmp_path: Path) -> None:
    await reload_base(trainer)
    request = fine_tune_request(write_dataset(tmp_path / "easy.jsonl", 50), steps=60)
    first = [response async for response in trainer.client.fine_tune(request, timeout_s=60)]
    assert first[-1].done
    assert first[-1].step == first[-1].steps == 60
    again = [response async for response in trainer.client.fine_tune(request, timeout_s=60)]
    assert again == first[-1:]
    longer = fine_tune_request(tmp_path / "easy.jsonl", steps=30, new_version=2)
    second = [response async for response in trainer.client.fine_tune(longer, timeout_s=60)]
    assert second[-1].loss < first[-1].loss < 4.0
    assert (await trainer.client.get_state(pb.GetStateRequest())).policy_version == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1="}', "line 2: response is missing"),
        ("{not json", "line 2 is not JSON"),
        ('{"prompt": "", "response": "2"}', "line 2: the prompt is empty"),
        ('{"prompt": "1", "response": "%s"}' % ("2" * 200), "line 2: 202 tokens are more than the context of 128"),
    ],
)
async def test_a_malformed_line_is_named(trainer: TrainerAt, tmp_path: Path, line: str, message: str) -> None:
    await reload_base(trainer)
    path = write_dataset(tmp_path / "bad.jsonl", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        [_ async for _ in trainer.client.fine_tune(fine_tune_request(path), timeout_s=60)]
    assert caught.value.violations[0].field == "dataset_path"
    assert str(path) in caught.value.message


async def test_an_iteration_raises_the_rewarded_and_lowers_the_others(
    trainer: TrainerAt, buffer_client: BufferClient
) -> None:
    await reload_base(trainer)
    groups = make_groups("up", 1, groups=6, k=4, spans=[[(0, 12)]])
    await store_groups(buffer_client, RUN, groups)
    request = train_request(RUN, groups, [1.0, 0.0, 0.0, 0.0], minibatches=3)
    result = await train(trainer, request)
    assert (result.groups, result.trajectories, result.tokens, result.trained_tokens) == (6, 24, 288, 288)
    assert result.policy_version == 1
    assert result.trajectories_multi_version == 0
    assert result.gradient_norm > 0
    # Random log-probabilities were stored in place of the engine's.
    assert result.max_logprob_difference > 1
    assert await train(trainer, request) == result
    with pytest.raises(FailedPreconditionError, match="already holds version 1"):
        await train(trainer, train_request(RUN, groups, [1.0, 0.0, 0.0, 0.0], minibatches=2))
    with pytest.raises(FailedPreconditionError, match="base_version is 7, but the trainer holds version 1"):
        await train(trainer, train_request(RUN, groups, [1.0, 0.0, 0.0, 0.0], base=7))


async def test_engine_logprobs_are_compared_on_tokens_of_the_base_version_only(
    trainer: TrainerAt, trainer_model: Path, buffer_client: BufferClient
) -> None:
    from transformers import AutoModelForCausalLM

    await reload_base(trainer)
    temperature = 0.7
    model = AutoModelForCausalLM.from_pretrained(trainer_model, dtype=torch.float64)
    groups = make_groups("diff", 2, groups=2, k=2, spans=[[(0, 9)]])
    for made in groups.values():
        for item in made:
            ids = torch.tensor([item.prompt + item.tokens])
            with torch.no_grad():
                logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1)
            item.logprobs[:] = logprobs_TV.gather(1, ids[0, 1:, None])[len(item.prompt) - 1 :, 0].tolist()
    await store_groups(buffer_client, RUN, groups)
    result = await train(trainer, train_request(RUN, groups, [1.0, 0.0], temperature=temperature))
    assert result.max_logprob_difference < 1e-5


async def test_checkpoints_restore_every_bit_and_are_kept_n_deep(
    trainer: TrainerAt, buffer_client: BufferClient, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    await reload_base(trainer)
    groups = make_groups("ckpt", 3, groups=2, k=2, spans=[[(0, 8)]])
    await store_groups(buffer_client, RUN, groups)
    saved: dict[int, dict[str, torch.Tensor]] = {}
    for base in range(3):
        await train(trainer, train_request(RUN, groups, [1.0, 0.0], base=base, max_staleness=9))
        response = await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=base + 1))
        saved[base + 1] = load_file(Path(response.path) / "model.safetensors")
    state = await trainer.client.get_state(pb.GetStateRequest())
    assert list(state.checkpoints) == [2, 3]
    assert any(not torch.equal(saved[2][name], saved[3][name]) for name in saved[2])
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=2))
    await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == saved[2].keys()
    assert all(torch.equal(exported[name], saved[2][name]) for name in exported)
    newest = await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN))
    assert newest.policy_version == 3
    with pytest.raises(NotFoundError, match="no checkpoint of version 1"):
        await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=1))
    with pytest.raises(FailedPreconditionError, match=f"serves run {RUN}, not other"):
        await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id="other", policy_version=2))
    with pytest.raises(FailedPreconditionError, match="policy_version is 2, but the trainer holds version 3"):
        await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=2))


async def test_the_export_loads_in_transformers(trainer: TrainerAt, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    await reload_base(trainer)
    await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / "out")))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.eos_token_id == EOS
    assert (tmp_path / "out" / "tokenizer.json").exists()


async def test_a_second_job_is_refused_and_a_left_one_stops(trainer: TrainerAt, tmp_path: Path) -> None:
    await reload_base(trainer)
    request = fine_tune_request(write_dataset(tmp_path / "long.jsonl", 50), steps=100_000)
    job = trainer.client.fine_tune(request, timeout_s=60)
    await anext(job)
    assert (await trainer.client.get_state(pb.GetStateRequest())).busy
    with pytest.raises(FailedPreconditionError, match="runs another job"):
        await reload_base(trainer)
    await job.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        while (await trainer.client.get_state(pb.GetStateRequest())).busy:  # noqa: ASYNC110 # only polling tells
            await asyncio.sleep(0.05)
    assert (await trainer.client.get_state(pb.GetStateRequest())).policy_version == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("token_scale", 0.0), ("minibatches", 0), ("tau", -1.0), ("baseline", 0)],
)
async def test_settings_out_of_range_are_named(trainer: TrainerAt, field: str, value: float) -> None:
    await reload_base(trainer)
    request = train_request(RUN, make_groups("bad", 4, 1, 2, [[(0, 4)]]), [1.0, 0.0], **{field: value})
    with pytest.raises(InvalidArgumentError) as caught:
        await train(trainer, request)
    assert caught.value.violations[0].field == f"algorithm.{field}"
