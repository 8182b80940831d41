"""Model folders and checkpoints in S3: read by digest, whole or absent, and told when an upload fails."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from perigee.cli.train import Cursor, send_files, watch_run
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as start
from perigee.errors import DataLossError, InvalidArgumentError, NotFoundError, UnavailableError
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from services.buffer.config import OffloadConfig
from services.coordinator.__main__ import lifespan as coordinator_lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit import storage
from services.kit.hf import fetch_model, open_model_folder, open_tokenizer
from services.kit.server import App, serving
from services.rollout.config import RolloutConfig
from services.rollout.model import open_policy
from services.rollout.service import find_model
from services.trainer.checkpoints import META_FILE, Checkpoints
from services.trainer.config import TrainerConfig
from services.trainer.hf import TensorReader
from services.trainer.service import lifespan
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, worker_in_service
from tests.integration.test_buffer_files import check_a_front_alone


def tensors(value: float) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(5):
        yield f"t{i}", torch.full((100,), value)


@pytest.fixture
def machine(s3_store: str, trainer_model: Path, tmp_path: Path) -> Callable[[str], Checkpoints]:
    """Makes the checkpoints of a trainer with a disk of its own, all published to one place; a shard per tensor."""

    def make(name: str) -> Checkpoints:
        folder = tmp_path / name / "checkpoints"
        return Checkpoints(folder, trainer_model, 2, 400, f"{s3_store}/{tmp_path.name}")

    return make


def test_another_machine_reads_what_was_published(machine: Callable[[str], Checkpoints]) -> None:
    first, second = machine("first"), machine("second")
    for version in (1, 2, 3):
        first.write("a/b", version, tensors(version))
        assert first.publish("a/b", version) == ""
    assert second.versions("a/b") == [2, 3]
    assert second.find("a/b", None) == 3
    with ThreadPoolExecutor(4) as ranks:
        # Ranks of one machine load together: one of them downloads.
        found = list(ranks.map(lambda _: (path := second.fetch("a/b", 3), path.stat().st_ino), range(4)))
    [(path, _)] = set(found)
    assert path.is_relative_to(second.folder)
    assert len(list(path.glob("*.safetensors"))) == 5
    assert TensorReader(path).read("t4")[0] == 3
    assert open_model_folder(path, "model").open_tokenizer().get_vocab_size() > 0
    with pytest.raises(NotFoundError, match=r"s3://.*a%2Fb holds no checkpoint of version 1, only \[2, 3\]"):
        second.find("a/b", 1)


def test_a_version_that_was_trained_anew_replaces_the_copy(machine: Callable[[str], Checkpoints]) -> None:
    first, second = machine("first"), machine("second")
    for checkpoints, value in ((first, 1.0), (second, 2.0)):
        checkpoints.write("r", 1, tensors(value))
        assert checkpoints.publish("r", 1) == ""
    assert TensorReader(first.fetch("r", 1)).read("t0")[0] == 2


def test_a_crash_between_shards_leaves_no_checkpoint(
    machine: Callable[[str], Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = machine("first"), machine("second")
    first.write("r", 1, tensors(1))
    assert first.publish("r", 1) == ""
    first.write("r", 2, tensors(2))
    uploaded: list[Path] = []

    def crash(path: Path, url: str, field: str) -> None:
        if len(uploaded) == 3:
            raise KeyboardInterrupt
        uploaded.append(path)
        publish_file(path, url, field)

    publish_file = storage.publish_file
    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish_file", crash)
        with pytest.raises(KeyboardInterrupt):
            first.publish("r", 2)
    assert len(storage.list_files(second.name_of("r", 2), "field")) == 3
    assert second.versions("r") == [1]
    with pytest.raises(DataLossError, match="v000002 is damaged or missing"):
        second.fetch("r", 2)
    # The trainer that was restarted publishes it with the next one.
    first.write("r", 3, tensors(3))
    assert first.publish("r", 3) == ""
    assert second.versions("r") == [2, 3]
    assert TensorReader(second.fetch("r", 2)).read("t0")[0] == 2


def refuse(path: Path, url: str, field: str) -> None:
    """Storage that takes no file."""
    raise UnavailableError("refused")


def test_an_upload_that_fails_is_told_and_made_good_later(
    machine: Callable[[str], Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine("first")
    first.write("r", 1, tensors(1))
    lost = replace(first, url="s3://none/r")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        patch.setitem(storage._OBJECT_STORE_OPTIONS, "retry_config", {"max_retries": 0})
        assert "s3://none/r/r cannot be reached; check network, address and credentials" in lost.publish("r", 1)
    assert first.versions("r") == [1]
    first.write("r", 2, tensors(2))
    assert first.publish("r", 2) == ""
    assert machine("second").versions("r") == [1, 2]
    # One that is pinned afterwards is not sent again, and is the same for others, if only with a later one.
    first.pin("r", 1)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "publish_file", refuse)
        assert first.publish("r", 1) == "refused"
    first.fetch("r", 1)
    with monkeypatch.context() as patched:
        patched.delattr(storage, "publish_folder")
        assert first.publish("r", 2) == ""
    for version in (3, 4, 5):
        first.write("r", version, tensors(version))
        assert first.publish("r", version) == ""
    assert machine("second").versions("r")[0] == 1


async def test_a_trainer_resumes_from_s3_on_another_machine(
    s3_store: str, trainer_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{s3_store}/{tmp_path.name}"
    storage.publish_folder(trainer_model, f"{place}/base", "model", "config.json")
    config = TrainerConfig(model=fetch_model(f"{place}/base", "trainer.model", weights=True), run_path=place, threads=1)
    async with serving(config, lifespan) as app, TrainerClient.connect(app.address) as client:
        await client.load_checkpoint(pb.LoadCheckpointRequest(run_id="r"))
        saved = await client.save_checkpoint(pb.SaveCheckpointRequest(run_id="r", policy_version=0))
        assert (saved.path, saved.upload_error) == (f"{place}/checkpoints/r/v000000", "")
        exported = await client.export_model(pb.ExportModelRequest(run_id="r", path=f"{place}/model"))
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    async with serving(config, lifespan) as app, TrainerClient.connect(app.address) as client:
        assert list((await client.get_state(pb.GetStateRequest(run_id="r"))).checkpoints) == [0]
        await client.load_checkpoint(pb.LoadCheckpointRequest(run_id="r", policy_version=0))
    assert len(list((tmp_path / "elsewhere").glob("checkpoints-*/r/v000000/model.safetensors"))) == 1
    base, copy = TensorReader(trainer_model), TensorReader(Path(fetch_model(exported.path, "model", weights=True)))
    assert torch.equal(copy.read("model.norm.weight"), base.read("model.norm.weight"))
    assert not list(cache.glob("outgoing-*"))  # noqa: ASYNC240


async def test_a_coordinator_goes_on_with_a_run_of_s3_on_another_machine(
    s3_store: str, buffer_address: str, cache: Path, tmp_path: Path
) -> None:
    place, request = f"{s3_store}/{tmp_path.name}", start.StartRunRequest(run_id=f"run-{uuid.uuid4().hex}")
    section = yaml.safe_load(write_run_section(tmp_path))
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with fake_peers(buffer_address) as peers:
        peers.trainer.model = tmp_path / "model"
        worker = peers.add_worker("a", tokenizer)
        config = CoordinatorConfig(**peers.settings(), run_path=place)
        for iterations in (1, 2):
            # A new machine has an empty cache.
            shutil.rmtree(cache, ignore_errors=True)
            async with (
                serving(config, coordinator_lifespan) as app,
                worker_in_service(worker, app.address),
                CoordinatorClient.connect(app.address) as client,
            ):
                sent = await send_files(client, request, section | {"iterations": iterations})
                request.config_yaml = yaml.safe_dump(sent)
                assert (await client.start_run(request)).resumed == (iterations == 2)
                events = [event async for event in watch_run(client, request, Cursor(), print)]
            assert events[-1].run.phase == start.RUN_PHASE_FINISHED
    run = f"runs/{request.run_id}"
    assert {"last_run.json", *(f"{run}/{name}" for name in ("run.json", "metrics.jsonl", "summary.json"))} <= set(
        storage.list_files(place, "place")
    )
    lines = (storage.read_file(f"{place}/{run}/metrics.jsonl", "place") or b"").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]
    assert peers.trainer.exported == [f"{place}/{run}/model"] * 2


async def test_a_worker_without_a_model_folder_asks_the_trainer(
    buffer_address: str, trainer_model: Path, cache: Path
) -> None:
    found: list[str] = []

    @asynccontextmanager
    async def finding(app: App[RolloutConfig]) -> AsyncIterator[None]:
        found.append(await find_model(app))
        yield

    async with fake_peers(buffer_address) as peers:
        peers.trainer.model = trainer_model
        config = RolloutConfig(trainer_address=peers.settings()["trainer_address"], coordinator_address=None)
        async with serving(config, finding):
            policy, base = open_policy(found[0], None), open_policy(str(trainer_model), None)
    assert Path(found[0]).is_relative_to(cache)
    assert (policy.stop_token_ids, policy.context_tokens) == (base.stop_token_ids, base.context_tokens)
    assert policy.tokenizer.to_str() == base.tokenizer.to_str()
    assert {path.suffix for path in policy.path.iterdir()} == {".json"}


def test_a_model_is_copied_once_for_each_digest(
    s3_store: str, trainer_model: Path, cache: Path, tmp_path: Path
) -> None:
    url = f"{s3_store}/{tmp_path.name}"
    model = shutil.copytree(trainer_model, tmp_path / "model")
    storage.publish_folder(model, url, "model", "config.json")
    light = Path(fetch_model(url, "rollout.model"))
    assert light.is_relative_to(cache)
    assert {path.suffix for path in light.iterdir()} == {".json"}
    whole = fetch_model(f"{url}/", "trainer.model", weights=True)
    assert TensorReader(Path(whole)).read("model.norm.weight").shape == (32,)
    assert fetch_model(url, "rollout.model") == str(light)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    storage.publish_folder(model, url, "model", "config.json")
    changed = fetch_model(url, "rollout.model")
    assert changed != str(light)
    assert open_model_folder(changed, "rollout.model").context_tokens == 64
    assert storage.local_file(f"{url}/config.json", "file").read_bytes() == (model / "config.json").read_bytes()


def test_what_cannot_be_read_is_named(s3_store: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage._OBJECT_STORE_OPTIONS, "retry_config", {"max_retries": 1})
    for url, error, message in (
        (f"{s3_store}/none", InvalidArgumentError, "m: s3://bucket/none does not exist"),
        ("s3://nowhere/none", UnavailableError, "s3://nowhere/none cannot be reached; check .*NoSuchBucket"),
        ("nothing://a/b", InvalidArgumentError, "m: nothing://a/b cannot be opened: Protocol not known"),
    ):
        with pytest.raises(error, match=message):
            fetch_model(url, "m")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setitem(storage._OBJECT_STORE_OPTIONS, "retry_config", {"max_retries": 0})
    with pytest.raises(UnavailableError, match="SignatureDoesNotMatch"):
        fetch_model(f"{s3_store}/none", "m")
    assert META_FILE not in str(list(cache.rglob("*")))


async def test_finished_trajectories_wait_in_s3(s3_store: str, cache: Path, tmp_path: Path) -> None:
    offload = OffloadConfig(location=f"{s3_store}/trajectories", min_tokens=8, retired_s=0, abandoned_s=1)
    await check_a_front_alone(tmp_path / "data", offload)
