"""`perigee train` at a coordinator that goes away: every iteration and every held-out accuracy is told once."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import yaml

from perigee.cli.ending import Interrupt
from perigee.cli.recipe import Recipe
from perigee.cli.run_folder import RunFolder
from perigee.cli.stack import pick_ports
from perigee.cli.train import Cursor, Recorder, TrainOptions, open_run, send_files, start_run, train, watch_run
from perigee.cli.view import PlainView
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import CancelledError, NotFoundError, UnavailableError
from perigee.files import read_lines
from perigee.report.records import read_records
from services.coordinator import runs
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.config import ServerConfig
from services.kit.hf import open_tokenizer
from services.kit.server import serving
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import FakePeers, FakeWorker, fake_peers, worker_in_service

ITERATIONS = 9


@asynccontextmanager
async def coordinator(
    peers: FakePeers, worker: FakeWorker, port: int = 0, run_path: Path | None = None
) -> AsyncIterator[None]:
    """A coordinator with one worker; leaving the block cuts its connections."""
    config = CoordinatorConfig(
        **peers.settings(),
        run_path=None if run_path is None else str(run_path),
        server=ServerConfig(port=port, drain_seconds=0.0),
    )
    async with serving(config, lifespan) as app, worker_in_service(worker, app.address):
        yield


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, files and output tell nobody
            await asyncio.sleep(0.02)


async def follow(options: TrainOptions, run: RunFolder, recipe: Recipe, output: io.StringIO) -> None:
    task = asyncio.current_task()
    assert task is not None
    await train(options, run, recipe, PlainView(output), Interrupt(task))


def recorded(run: RunFolder) -> int:
    path = run.path / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def results(output: io.StringIO) -> list[str]:
    """What was told of iterations and held-out accuracies, without the figures."""
    pattern = rf"(iteration \d+ of {ITERATIONS}  reward|held-out accuracy at iteration \d+)"
    return re.findall(f"^{pattern}", output.getvalue(), re.MULTILINE)


def expected(first: int, last: int) -> list[str]:
    """Iterations `first` to `last`, each with the evaluation after it."""
    lines = []
    for number in range(first, last + 1):
        lines += [f"iteration {number} of {ITERATIONS}  reward"] if number else []
        lines += [f"held-out accuracy at iteration {number}"] if number % 3 == 0 else []
    return lines


def write_recipe(folder: Path, iterations: int) -> Path:
    section = yaml.safe_load(
        write_run_section(folder, iterations=iterations, evaluation={"every": 3, "samples": 1, "problems": 5})
    )
    model = {"model": section["model"]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "told", "run": section, "trainer": model, "rollout": model}))
    return path


async def test_what_ends_during_an_outage_is_shown_later(buffer_address: str, tmp_path: Path) -> None:
    port, output = pick_ports(1)[0], io.StringIO()
    options = TrainOptions(
        write_recipe(tmp_path, ITERATIONS), None, [], tmp_path / "runs", coordinator=f"127.0.0.1:{port}"
    )
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    run, recipe = open_run(options)
    async with fake_peers(buffer_address) as peers, asyncio.TaskGroup() as tasks:
        worker = peers.add_worker("a", tokenizer, call_seconds=0.05)
        async with coordinator(peers, worker, port):
            training = tasks.create_task(follow(options, run, recipe, output))
            await wait_until(lambda: "iteration 2 of" in output.getvalue())
        # At another port, where the command does not find it.
        async with coordinator(peers, worker, run_path=run.path):
            await wait_until(lambda: recorded(run) >= 5)
        async with coordinator(peers, worker, port, run_path=run.path):
            await training
    assert "watching the run again" in output.getvalue()
    assert results(output) == expected(0, ITERATIONS)


async def test_a_run_that_is_interrupted_while_it_starts_is_stopped(
    buffer_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, output = f"127.0.0.1:{pick_ports(1)[0]}", io.StringIO()
    options = TrainOptions(write_recipe(tmp_path, 3), None, [], tmp_path / "runs", coordinator=address)
    run, recipe = open_run(options)
    reading, may_end = threading.Event(), threading.Event()

    def read(*_: object) -> None:
        reading.set()
        may_end.wait(60)

    monkeypatch.setattr(runs, "read_inputs", read)
    async with fake_peers(buffer_address) as peers, CoordinatorClient.connect(address) as client:
        worker = peers.add_worker("a", open_tokenizer(tmp_path / "model", "run.model"))
        async with coordinator(peers, worker, int(address.rpartition(":")[2])):
            training = asyncio.create_task(follow(options, run, recipe, output))
            assert await asyncio.to_thread(reading.wait, 60)
            training.cancel()
            await asyncio.wait([training])
            may_end.set()
            assert training.cancelled()
            assert output.getvalue().endswith("stopping the run\n")
            with pytest.raises(NotFoundError):
                await client.stop_run(pb.StopRunRequest(run_id=run.run_id))


async def test_a_coordinator_that_is_started_again_before_it_took_the_run_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Exception | pb.StartRunResponse] = [
        pb.StartRunResponse(resumed=True),
        CancelledError("it ended"),
        UnavailableError("nobody listens"),
    ]

    class Client:
        async def start_run(self, request: pb.StartRunRequest, *, timeout_s: float) -> pb.StartRunResponse:
            answer = answers.pop()
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr("perigee.cli.train.RECONNECT_S", 0.0)
    client = cast(CoordinatorClient, Client())
    assert await start_run(client, pb.StartRunRequest(), print, away_s=60)
    answers.append(UnavailableError("nobody listens"))
    with pytest.raises(UnavailableError):
        await start_run(client, pb.StartRunRequest(), print)


async def test_a_resumed_run_is_shown_from_there(buffer_address: str, tmp_path: Path) -> None:
    port = pick_ports(1)[0]
    options = TrainOptions(write_recipe(tmp_path, 3), None, [], tmp_path / "runs", coordinator=f"127.0.0.1:{port}")
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    run, recipe = open_run(options)
    async with fake_peers(buffer_address) as peers:
        worker = peers.add_worker("a", tokenizer)
        async with coordinator(peers, worker, port):
            await follow(options, run, recipe, io.StringIO())
            again = replace(options, recipe_path=None, resume=run.run_id, overrides=[f"run.iterations={ITERATIONS}"])
            run, recipe = open_run(again)
            output = io.StringIO()
            await follow(again, run, recipe, output)
    assert f"going on with {run.run_id}" in output.getvalue()
    # The evaluation that ended the first part is of iteration 3, and so is the one in the middle of the run.
    assert results(output) == ["held-out accuracy at iteration 3", *expected(4, ITERATIONS)]


async def test_a_run_without_a_shared_folder_is_recorded_here(buffer_address: str, tmp_path: Path) -> None:
    here, own = tmp_path / "here", tmp_path / "own"
    here.mkdir()
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 100_000)
    stage = {"dataset": str(tmp_path / "sft.jsonl"), "steps": 1}
    section = yaml.safe_load(write_run_section(tmp_path, iterations=2, sft=[stage]))
    request = pb.StartRunRequest(run_id=f"run-{uuid.uuid4().hex}")
    port = pick_ports(1)[0]
    async with fake_peers(buffer_address) as peers, CoordinatorClient.connect(f"127.0.0.1:{port}") as client:
        worker = peers.add_worker("a", open_tokenizer(tmp_path / "model", "run.model"))
        # The trainer has the model, under a path of its own.
        peers.trainer.model = (tmp_path / "model").rename(tmp_path / "base")
        async with coordinator(peers, worker, port, run_path=own):
            sent = await send_files(client, request, section)
            for name in ("prompts", "heldout", "sft"):
                (tmp_path / f"{name}.jsonl").unlink()
            request.config_yaml = yaml.safe_dump(sent)
            await client.start_run(request)
            recorder = Recorder(here)
            async for event in watch_run(client, request, Cursor(), print):
                recorder.add(event)
    there = own / "runs" / request.run_id
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_lines(here / name) == read_lines(there / name)
    assert (here / "summary.json").read_text() == (there / "summary.json").read_text()
    assert [row.number for row in read_records(here).iterations] == [1, 2]
    [fine_tuned] = peers.trainer.fine_tuned
    assert fine_tuned.dataset_path == f"/files/{Path(sent['sft'][0]['dataset']).name}"
    assert peers.trainer.exported == [""]
