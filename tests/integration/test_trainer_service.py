"""The trainer through its gRPC service: fine-tuning, iterations, checkpoints, export, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from perigee.buffer.client import BufferClient
from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import open_model_folder
from tests.fixtures.curl import call, control_calls
from tests.fixtures.trainer import (
    EOS,
    TrainerAt,
    make_groups,
    store_groups,
    train_request,
    write_dataset,
)

RUN = "trainer-run"
METRICS = {
    *(f"train/{name}" for name in ("loss", "grad_norm", "entropy", "kl_k1", "kl_k3", "clip_share", "mask_share")),
    *(f"train/train_infer_{name}" for name in ("logprob_diff_mean", "logprob_diff_max", "kl")),
    *("train/tokens_per_second", "train/peak_memory_bytes"),
    *("train/activation_bytes_per_token", "train/max_microbatch_tokens"),
    *(
        f"train/{copy}_bytes"
        for copy in ("weights", "gradients", "moments", "main_weights", "undo_snapshot", "push_image")
    ),
    *("time/read_seconds", "time/reference_seconds", "time/update_seconds"),
}


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


def inodes(folder: Path) -> dict[str, int]:
    """A file that is written anew is another one."""
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


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


async def test_a_stage_has_a_rope_and_a_length_of_its_own(
    trainer: TrainerAt, trainer_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    await reload_base(trainer)
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16.0}
    dataset = tmp_path / "two.jsonl"
    lines = [{"prompt": "1+2=", "response": "3" * 90}, {"prompt": "7", "response": "#4"}]
    dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = fine_tune_request(dataset, steps=1, batch_size=2, max_tokens_per_microbatch=256)
    plain = [response.loss async for response in trainer.client.fine_tune(request, timeout_s=60)]
    await reload_base(trainer)
    request.rope.update({"theta": 5e4, "scaling": yarn})
    [changed] = [response.loss async for response in trainer.client.fine_tune(request, timeout_s=60)]
    saved = await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=1))
    # The checkpoint says what it was trained with, and by that the base model has the stage's loss in transformers.
    config = json.loads((Path(saved.path) / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    folder = tmp_path / "model"
    shutil.copytree(trainer_model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = open_model_folder(folder, "model").open_tokenizer()
    losses = []
    for line in lines:
        ids = torch.tensor([[*tokenizer.encode(line["prompt"] + line["response"]).ids, EOS]])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1], -1)
        losses += (-logprobs_TV.gather(1, ids[0, 1:, None])[len(line["prompt"]) - 1 :, 0]).tolist()
    assert changed == pytest.approx(np.mean(losses), rel=1e-5)
    assert plain != pytest.approx([changed], rel=1e-3)
    # The next stage has the model's own again.
    await reload_base(trainer)
    request.ClearField("rope")
    assert [response.loss async for response in trainer.client.fine_tune(request, timeout_s=60)] == plain
    request.new_version, request.max_sequence_length = 2, 94
    with pytest.raises(InvalidArgumentError, match="95 tokens are more than the context of 94"):
        [_ async for _ in trainer.client.fine_tune(request, timeout_s=60)]
    request.rope.update({"scaling": {"type": "yarn"}})
    with pytest.raises(InvalidArgumentError, match=r"rope\.scaling: factor is required"):
        [_ async for _ in trainer.client.fine_tune(request, timeout_s=60)]


async def test_an_update_on_no_token_has_no_loss(trainer: TrainerAt, buffer_client: BufferClient) -> None:
    await reload_base(trainer)
    groups = make_groups("none-kept", 1, groups=2, k=2, spans=[[(0, 12)]])
    await store_groups(buffer_client, RUN, groups)
    request = train_request(RUN, groups, [0.0, 0.0], minibatches=2)
    request.algorithm.CopyFrom(pb.Algorithm(name="rest"))
    result = await train(trainer, request)
    assert (result.tokens, result.trained_tokens, result.metrics["train/mask_share"]) == (48, 0, 1)
    unknown = ("loss", "grad_norm", "entropy", "kl_k3", "train_infer_kl", "clip_share")
    assert all(math.isnan(result.metrics[f"train/{name}"]) for name in unknown)


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ('{"prompt": "1+1="}', ":2: response", "is empty"),
        ("{not json", ":2", "is not JSON"),
        ('{"prompt": "", "response": "2"}', ":2: prompt", "must be a text.* the prompt is empty"),
        ('{"prompt": "1", "response": "%s"}' % ("2" * 200), ":2", "202 tokens are more than the context of 128"),
    ],
)
async def test_a_malformed_line_is_named(
    trainer: TrainerAt, tmp_path: Path, line: str, place: str, message: str
) -> None:
    await reload_base(trainer)
    path = write_dataset(tmp_path / "bad.jsonl", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        [_ async for _ in trainer.client.fine_tune(fine_tune_request(path), timeout_s=60)]
    assert caught.value.violations[0].field == f"dataset_path: {path}{place}"


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
    assert result.metrics["train/grad_norm"] > 0
    # Random log-probabilities were stored in place of the engine's.
    assert result.metrics["train/train_infer_logprob_diff_max"] > 1
    assert set(result.metrics) == METRICS
    assert result.metrics["train/entropy"] > 0
    assert result.metrics["train/kl_k3"] > 0
    assert result.metrics["train/mask_share"] == result.metrics["train/clip_share"] == 0
    assert result.metrics["train/tokens_per_second"] > 0
    assert result.metrics["train/peak_memory_bytes"] > 1 << 20
    copies = [result.metrics[f"train/{copy}_bytes"] for copy in ("weights", "gradients", "moments", "main_weights")]
    assert copies == [copies[0], copies[0], 2 * copies[0], 0]
    # The base model's folder holds the weights that a failure goes back to.
    assert result.metrics["train/undo_snapshot_bytes"] == 0
    assert await train(trainer, request) == result
    with pytest.raises(FailedPreconditionError, match="already has version 1 loaded"):
        await train(trainer, train_request(RUN, groups, [1.0, 0.0, 0.0, 0.0], minibatches=2))
    with pytest.raises(FailedPreconditionError, match="base_version is 7, but the trainer has version 1 loaded"):
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
    assert result.metrics["train/train_infer_logprob_diff_max"] < 1e-5
    assert 0 <= result.metrics["train/train_infer_kl"] < 1e-9
    # Of one step the KL is unknown, which is not the same as 0.
    assert math.isnan(result.metrics["train/kl_k3"])


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
    files = inodes(Path(response.path))
    again = await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=3, pinned=True))
    assert again.path == response.path
    assert {name for name, inode in inodes(Path(again.path)).items() if inode != files[name]} == {"perigee.json"}
    state = await trainer.client.get_state(pb.GetStateRequest())
    assert list(state.checkpoints) == [2, 3]
    assert any(not torch.equal(saved[2][name], saved[3][name]) for name in saved[2])
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=2))
    elsewhere = await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / "none/model")))
    assert elsewhere.path == str(trainer.run_path / "models" / RUN)
    await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == saved[2].keys()
    assert all(torch.equal(exported[name], saved[2][name]) for name in exported)
    newest = await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN))
    assert newest.policy_version == 3
    with pytest.raises(NotFoundError, match="no checkpoint of version 1"):
        await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=1))
    with pytest.raises(NotFoundError, match="no checkpoint of version 2"):
        await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id="other", policy_version=2))
    with pytest.raises(FailedPreconditionError, match=f"has run {RUN} loaded, not other"):
        await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id="other", policy_version=3))
    with pytest.raises(FailedPreconditionError, match="policy_version is 2, but the trainer has version 3 loaded"):
        await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=2))


async def test_an_operator_has_it_leave_memory_over_http(trainer: TrainerAt) -> None:
    state, offload, onload = control_calls("onload")
    await reload_base(trainer)
    for _ in range(2):
        left = await call(offload, trainer.http_address)
        assert left["shelved_bytes"] > 0
        assert (await call(state, trainer.http_address))["offloaded"]
    assert "seconds" in await call(onload, trainer.http_address)
    assert not (await call(state, trainer.http_address))["offloaded"]
    refused = await call(offload.replace('"iteration": 7', '"iteration": 6'), trainer.http_address)
    assert refused["error"]["code"] == "FAILED_PRECONDITION"
    assert "is in iteration 7, not 6" in refused["error"]["message"]


async def test_an_offloaded_trainer_comes_back_bit_for_bit(
    trainer: TrainerAt, buffer_client: BufferClient, tmp_path: Path
) -> None:
    async def export(name: str) -> bytes:
        await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / name)))
        return (tmp_path / name / "model.safetensors").read_bytes()

    await reload_base(trainer)
    groups = make_groups("shelf", 5, groups=2, k=2, spans=[[(0, 8)]])
    await store_groups(buffer_client, RUN, groups)
    first = await train(trainer, train_request(RUN, groups, [1.0, 0.0], max_staleness=9))
    weights = int(first.metrics["train/weights_bytes"])
    before = await export("before")
    for _ in range(2):
        offloaded = await trainer.client.offload(pb.OffloadRequest(run_id=RUN, iteration=1))
        # A refused call brings nothing back.
        with pytest.raises(NotFoundError):
            await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=99))
        assert (await trainer.client.get_state(pb.GetStateRequest())).offloaded
        assert offloaded.shelved_bytes == weights
        # Gradients, two moments, and the number of a step for each tensor.
        assert 3 * weights <= offloaded.dropped_bytes < 3 * weights + 1024
    await trainer.client.onload(pb.OnloadRequest(run_id=RUN, iteration=2))
    assert not (await trainer.client.get_state(pb.GetStateRequest())).offloaded
    assert await export("after") == before
    # What needs the weights brings them back, and training goes on as if nothing had been.
    request = train_request(RUN, groups, [1.0, 0.0], base=1, max_staleness=9)
    undisturbed = await train(trainer, request)
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))
    await train(trainer, train_request(RUN, groups, [1.0, 0.0], max_staleness=9))
    await trainer.client.offload(pb.OffloadRequest(run_id=RUN, iteration=2))
    with pytest.raises(FailedPreconditionError, match="is in iteration 2, not 1"):
        await trainer.client.onload(pb.OnloadRequest(run_id=RUN, iteration=1))
    disturbed = await train(trainer, request)
    for name in ("train/loss", "train/grad_norm", "train/entropy"):
        assert disturbed.metrics[name] == undisturbed.metrics[name]


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
    async with asyncio.timeout(60):
        while (await trainer.client.get_state(pb.GetStateRequest())).busy:  # noqa: ASYNC110 # only polling tells
            await asyncio.sleep(0.05)
    assert (await trainer.client.get_state(pb.GetStateRequest())).policy_version == 0


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("token_scale", 0.0), ("minibatches", 0)])
async def test_settings_out_of_range_are_named(trainer: TrainerAt, field: str, value: float) -> None:
    await reload_base(trainer)
    request = train_request(RUN, make_groups("bad", 4, 1, 2, [[(0, 4)]]), [1.0, 0.0], **{field: value})
    with pytest.raises(InvalidArgumentError) as caught:
        await train(trainer, request)
    assert [violation.field for violation in caught.value.violations] == [f"update.{field}"]


@pytest.mark.parametrize(("field", "value"), [("tau", -1.0), ("baseline", "median"), ("clip", 0.2)])
async def test_settings_of_an_algorithm_are_checked_without_training(
    trainer: TrainerAt, field: str, value: float | str
) -> None:
    request = pb.CheckAlgorithmRequest(algorithm=pb.Algorithm(name="policy_mirror_descent"))
    request.update.CopyFrom(
        pb.UpdateSettings(minibatches=1, max_tokens_per_microbatch=8, temperature=1.0, token_scale=1.0)
    )
    request.optimizer.learning_rate = 1e-3
    checked = await trainer.client.check_algorithm(request)
    assert dict(checked.algorithm.settings) == {"tau": 0.1, "baseline": "mean"}
    assert not checked.skips_zero_advantages
    rest = pb.CheckAlgorithmRequest(
        algorithm=pb.Algorithm(name="rest"), update=request.update, optimizer=request.optimizer
    )
    assert (await trainer.client.check_algorithm(rest)).skips_zero_advantages
    request.longest_sequence = 129
    with pytest.raises(InvalidArgumentError, match=r"rollout\.max_response_tokens: 129 .* than the 128"):
        await trainer.client.check_algorithm(request)
    request.longest_sequence = 128
    request.algorithm.settings.update({field: value})
    with pytest.raises(InvalidArgumentError) as caught:
        await trainer.client.check_algorithm(request)
    assert [violation.field for violation in caught.value.violations] == [f"algorithm.settings.{field}"]


async def test_a_trajectory_that_is_not_as_described_is_refused(
    trainer: TrainerAt, buffer_client: BufferClient
) -> None:
    await reload_base(trainer)
    groups = make_groups("differs", 5, groups=1, k=2, spans=[[(0, 4)]])
    await store_groups(buffer_client, RUN, groups)
    request = train_request(RUN, groups, [1.0, 0.0])
    request.groups[0].trajectories[1].tokens_by_version[0] = 3
    with pytest.raises(DataLossError, match="differs-g0-t1: the buffer holds"):
        await train(trainer, request)
    request.groups[0].trajectories[1].tokens_by_version[0] = 400
    with pytest.raises(InvalidArgumentError, match="differs-g0-t1 has 4"):
        await train(trainer, request)


async def test_another_run_takes_the_trainer_over_by_loading(trainer: TrainerAt) -> None:
    for run_id in ("other", RUN):
        loaded = await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=run_id, policy_version=0))
        assert loaded.policy_version == 0
        assert (await trainer.client.get_state(pb.GetStateRequest())).run_id == run_id
