"""The examples for other pipelines as they stand there, on a real reward service."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from tests.fixtures.reward import running_gateway

ROOT = Path(__file__).parents[2]


async def run_example(name: str, *arguments: str) -> tuple[int, list[str]]:
    """An example's exit code and the lines that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / "clients" / name), *arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    stdout, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode().splitlines()


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
