"""The examples for other pipelines as they stand there, on a real reward service."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from perigee.rpc import ChannelOptions
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.config import HttpConfig
from services.kit.server import serving
from services.reward.__main__ import lifespan as reward_lifespan
from services.reward.config import MathConfig, RewardConfig
from services.sandbox.__main__ import lifespan as sandbox_lifespan
from services.sandbox.config import SandboxConfig
from tests.fixtures.certificates import Certificates
from tests.fixtures.packaging import Environment
from tests.fixtures.reward import running_gateway

ROOT = Path(__file__).parents[2]


CLIENTS = ROOT / "examples" / "clients"
TYPESCRIPT = CLIENTS / "typescript"
CALLER = {"tokens": ["team"], "audiences": ["reward", "sandbox"], "quota": {"max_in_flight": 1}}
JUDGED = ["a VERDICT_CORRECT 1", "b VERDICT_WRONG 0", "square TEST_VERDICT_ACCEPTED 2 of 2 tests"]


async def run_example(name: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """An example's exit code and the lines that it prints."""
    return await run(sys.executable, CLIENTS / name, *arguments, PYTHONPATH=str(ROOT), **environment)


async def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> tuple[int, list[str]]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=cwd, env=os.environ | environment
    )
    stdout, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode().splitlines()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def team(certificates: Certificates) -> AsyncIterator[dict[str, str]]:
    """What another team is given to reach a reward service and a sandbox: addresses, a token, and the authority."""
    shared: dict[str, Any] = {
        "server": {
            "callers": {"team": CALLER},
            "tls_cert_file": certificates.certificate,
            "tls_key_file": certificates.key,
        },
        "http": HttpConfig(port=0),
    }
    with tempfile.TemporaryDirectory() as state_path:
        # Programs run under a uid of their own where the service is root.
        Path(state_path).chmod(0o755)  # noqa: ASYNC240
        sandbox_config = SandboxConfig(isolation="process", slots=1, state_path=state_path, **shared)
        async with (
            serving(RewardConfig(math=MathConfig(workers=1), **shared), reward_lifespan) as reward,
            serving(sandbox_config, sandbox_lifespan) as sandbox,
        ):
            assert reward.http_address
            assert sandbox.http_address
            yield {
                "PERIGEE_REWARD_ADDRESS": reward.address,
                "PERIGEE_REWARD_HTTP": reward.http_address,
                "PERIGEE_SANDBOX_ADDRESS": sandbox.address,
                "PERIGEE_SANDBOX_HTTP": sandbox.http_address,
                "PERIGEE_TOKEN": "team",
                "PERIGEE_CA_FILE": certificates.ca,
            }


async def run_beyond_quota(example: Awaitable[tuple[int, list[str]]], team: dict[str, str]) -> tuple[int, list[str]]:
    """Runs an example whose first call to the sandbox is refused with a hint, since the team's quota is used up."""
    options = ChannelOptions(token=team["PERIGEE_TOKEN"], ca_file=team["PERIGEE_CA_FILE"])
    program = pb.ExecuteRequest(language="python", source=b"import time\nprint(flush=True)\ntime.sleep(60)")
    async with SandboxClient(team["PERIGEE_SANDBOX_ADDRESS"], options) as client:
        call = client.execute_stream(program)
        await anext(call)
        refused = count_refusals()
        running = asyncio.ensure_future(example)
        while count_refusals() == refused and not running.done():  # noqa: ASYNC110 -- other processes set no event
            await asyncio.sleep(0.02)
        await call.aclose()  # type: ignore[attr-defined]
    return await running


def count_refusals() -> float:
    """Calls over gRPC and HTTP that the sandbox refused because a quota was used up."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name in ("perigee_sandbox_request_seconds", "perigee_sandbox_http_request_seconds")
        for sample in metric.samples
        if sample.name.endswith("_count") and sample.labels["code"] == "RESOURCE_EXHAUSTED"
    )


@pytest.mark.parametrize("program", ["asynchronous.py", "blocking.py"])
async def test_the_wheel_alone_calls_over_tls_with_a_token(
    program: str, client_environment: Environment, team: dict[str, str]
) -> None:
    example = run(client_environment.bin / "python", CLIENTS / "python" / program, **team)
    assert await run_beyond_quota(example, team) == (0, JUDGED)


async def test_curl_calls_over_tls_with_a_token(team: dict[str, str]) -> None:
    code, lines = await run_beyond_quota(run(CLIENTS / "curl" / "judge.sh", **team), team)
    assert code == 0
    scored, judged = map(json.loads, lines)
    assert [(each["id"], each["verdict"], each["reward"]) for each in scored["outcomes"]] == [
        ("a", "correct", 1),
        ("b", "wrong", 0),
    ]
    assert (judged["verdict"], judged["passed"]) == ("accepted", 2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def typescript() -> None:
    """The TypeScript example, built; skipped by name where something that it needs is not there."""
    if not all(map(shutil.which, ("node", "npm"))):
        pytest.skip("needs node and npm: they build the TypeScript example")
    installed, locked = TYPESCRIPT / "node_modules/.package-lock.json", TYPESCRIPT / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < locked.stat().st_mtime:
        code, _ = await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=TYPESCRIPT)
        if code:
            pytest.skip("needs a registry of npm packages: it has those of the TypeScript example")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert await run("npm", "run", "--silent", "build", cwd=TYPESCRIPT, PATH=path) == (0, [])


@pytest.mark.usefixtures("typescript")
async def test_typescript_calls_over_tls_with_a_token(team: dict[str, str]) -> None:
    example = run("node", "build/judge.js", cwd=TYPESCRIPT, **team)
    assert await run_beyond_quota(example, team) == (0, JUDGED)


def write_parquet(path: Path, truths: list[str]) -> Path:
    """Rows as verl's preprocessing writes them."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "1+1="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": "train", "index": index, "question": "1+1="},
        }
        for index, truth in enumerate(truths)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


async def test_a_data_set_of_verls_is_checked(tmp_path: Path) -> None:
    async with running_gateway() as (client, _):
        arguments = ("--reward", client.target, "--answer-marker", "####", "--data")
        good = write_parquet(tmp_path / "good.parquet", ["18", "1/2", "1,000", '{"exact": {"reference": "x"}}'])
        assert await run_example("verl/check.py", *arguments, str(good)) == (0, ["3 of 3 ground truths score 1"])
        bad = write_parquet(tmp_path / "bad.parquet", ["18", "5 #### 6"])
        code, lines = await run_example("verl/check.py", *arguments, str(bad))
    assert code == 1
    assert lines[0].startswith("openai/gsm8k: '5 #### 6': a response could not be judged and has no score")
    assert lines[1:] == ["1 of 2 ground truths score 1"]


async def test_a_data_set_for_openrlhf_is_checked(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    labels = ["18", "1/2", '{"exact": {"reference": "x"}}']
    data.write_text("".join(json.dumps({"input": "1+1=", "answer": label}) + "\n" for label in labels))
    async with running_gateway() as (_, http):
        url = f"{http.base_url}/v1/compat/openrlhf?verifier=math&answer_marker=%23%23%23%23&end=%3Ceos%3E"
        arguments = ("--url", url, "--data", str(data))
        assert await run_example("openrlhf/check.py", *arguments) == (0, ["2 of 2 labels have the reward 1"])
        data.write_text(json.dumps({"input": "1+1=", "answer": "5 #### 6"}) + "\n")
        code, lines = await run_example("openrlhf/check.py", *arguments)
        assert code == 1
        assert lines[0].startswith("'1+1=': '5 #### 6': 422 ")
        assert lines[1:] == ["0 of 1 labels have the reward 1"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: runs the example of Ray Data")
async def test_ray_data_scores_over_tls_with_a_token(team: dict[str, str]) -> None:
    code, lines = await run_example("ray/score.py", "--workers", "1", **team)
    assert code == 0
    assert sorted(lines) == [r"\boxed{2/5} VERDICT_WRONG 0.0", r"\boxed{5/6} VERDICT_CORRECT 1.0"]
