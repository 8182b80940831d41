"""`perigee long2short` that is killed in each step in turn makes the same files as one that is not.

Reinforcement learning draws responses anew, so of its step the same iterations are wanted; answers of an evaluation
are kept in the order in which they come.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from perigee.cli.long2short.steps import STEPS_FILE
from perigee.files import read_lines
from tests.fixtures.rollout import make_policy, save_policy
from tests.fixtures.training import processes_below

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long"),
]
# What shows that a step is under way: the command is killed as soon as it is there.
SIGNS = {
    "merge": "merge",
    "samples": "samples/answers.jsonl",
    "pairs": "pairs",
    "rejection": "rejection/checkpoints",
    "dpo": "dpo/checkpoints",
    "rl": "rl/metrics.jsonl",
    "evaluate-long": "evaluate-long/answers.jsonl",
}
STAGE = {"steps": 2, "batch_size": 2, "optimizer": {"learning_rate": 1e-3}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of everything at its smallest, with two policies whose responses often begin with a wanted character."""
    long, short = (save_policy(make_policy(seed), tmp_path / name) for seed, name in ((11, "long"), (12, "short")))
    rule = {"verifier": "regex", "search_response": True, "pattern": "^[0-9a-m]"}
    lines = [{"id": text, "prompt": text, **rule} for text in ("12+34=", "ab", "7*8", "3-1=")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = {
        "name": "kills",
        "model": "{long}",
        "long2short": {
            "long": str(long),
            "short": str(short),
            "samples": {"per_prompt": 6},
            "rejection": STAGE,
            "dpo": STAGE | {"algorithm": {"name": "dpo"}},
            "rl": {"run": {"iterations": 2}},
            "comparison": {"samples": 2},
        },
        "run": {
            "prompts": str(prompts),
            "heldout": str(prompts),
            "iterations": 0,
            "max_live_groups": 4,
            "group_size": 4,
            "rollout": {"max_response_tokens": 24},
            "evaluation": {"every": 0, "samples": 1, "end_problems": 1},
        },
        "rollout": {"dtype": "float32", "kv_cache_bytes": 1 << 24, "max_num_seqs": 16},
        "trainer": {"dtype": "float32"},
    }
    path = tmp_path / "kills.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def shorten(recipe: Path, out: Path, sign: Path | None = None) -> int:
    """Runs the command to its end, or kills it once `sign` is there; returns its exit code."""
    steps = [word for name in SIGNS for word in ("--only", name)]
    command = [
        sys.executable,
        "-m",
        "perigee.cli.main",
        "long2short",
        str(recipe),
        "--out",
        str(out),
        "--plain",
        *steps,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while sign is not None and process.poll() is None and not (sign.exists() and sign.stat().st_size):
            time.sleep(0.02)
        if sign is not None:
            process.kill()
        code = process.wait()
    while processes_below(out):  # the services end with the command that started them
        time.sleep(0.05)
    return code


def read_digests(out: Path) -> dict[str, tuple[str, str | None]]:
    """The digests of each step's inputs and outputs."""
    return {line["step"]: (line["inputs"], line["outputs"]) for line in read_lines(out / STEPS_FILE)}


def read_evaluation(out: Path) -> tuple[list[str], bytes]:
    """The answers of the long model's evaluation, by their text, and its results."""
    folder = out / "evaluate-long"
    return sorted((folder / "answers.jsonl").read_text().splitlines()), (folder / "results.json").read_bytes()


def test_a_kill_in_any_step_changes_no_file(recipe: Path, tmp_path: Path) -> None:
    assert shorten(recipe, tmp_path / "whole") == 0
    out = tmp_path / "killed"
    codes = [shorten(recipe, out, out / sign) for sign in SIGNS.values()]
    assert -signal.SIGKILL in codes
    assert shorten(recipe, out) == 0
    whole, killed = read_digests(tmp_path / "whole"), read_digests(out)
    assert {*SIGNS} < {*whole}
    for step in ("rl", "evaluate-long"):
        assert killed.pop(step)[0] == whole.pop(step)[0]
    assert read_evaluation(out) == read_evaluation(tmp_path / "whole")
    assert [line["iteration"] for line in read_lines(out / "rl" / "metrics.jsonl")] == [1, 2]
    assert killed == whole
