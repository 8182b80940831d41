"""Accuracy by `perigee eval` and by lm-evaluation-harness, which ask a rollout worker the same questions.

    .venv/bin/python bench/eval_agreement.py MODEL DATA --lm-eval VENV/bin/lm_eval --out DIR [--limit 300]

Pushes MODEL's weights to a rollout worker, evaluates gsm8k from the folder DATA and 300 sums over its
OpenAI-compatible endpoint, has the harness answer the same prompts there greedily and judge
them by the last number, and prints how many verdicts agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from rollout_stack import rollout_stack

from perigee.chat import read_question
from perigee.cli.eval.results import GREEDY, read_answers
from perigee.cli.eval.suites import load_suite
from perigee.cli.stack import HOST, pick_ports
from services.rollout.config import RolloutConfig

SUMS = "sums"


def write_sums(path: Path) -> None:
    """Writes a prompt file of 300 questions that a small model has right at times."""
    sums = [*((number, 1) for number in range(1, 201)), *((number, number) for number in range(1, 101))]
    lines = [
        {"id": f"{a}+{b}-{index}", "prompt": f"What is {a} + {b}?", "answer": str(a + b), "extraction": "prose"}
        for index, (a, b) in enumerate(sums)
    ]
    path.write_text("".join(f"{json.dumps(line | {'verifier': 'math'})}\n" for line in lines))


def write_task(folder: Path, suite: str, data: Path, limit: int, max_tokens: int) -> str:
    """Writes the suite's prompts as a task of the harness; returns its name."""
    loaded = load_suite(suite, data, limit)
    name = f"same_{loaded.name}"
    lines = [
        {
            "id": each.line.id,
            "prompt": each.asked if isinstance(each.asked, str) else read_question(each.asked),
            "answer": each.line.item.math.reference,
        }
        for each in loaded.problems
    ]
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    last_number = {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_tokens},
        "filter_list": [{"name": "flexible-extract", "filter": [last_number, {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",", r"\$", r"\.$"],
            }
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return name


async def run(*command: str, **environment: str) -> None:
    """Runs a command to its end; raises RuntimeError when it fails."""
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | environment)
    if code := await process.wait():
        raise RuntimeError(f"{command[0]} ended with {code}")


async def evaluate(options: argparse.Namespace, url: str, suites: list[str], samples: int) -> None:
    """Has `perigee eval` ask the endpoint what it has not asked yet."""
    perigee = (sys.executable, "-m", "perigee.cli.main", "eval", *suites, "--data", str(options.data), "--plain")
    asked = ("--endpoint", url, "--model", "policy", "--limit", str(options.limit))
    sampling = ("--max-tokens", str(options.max_tokens), "--samples", str(samples))
    await run(*perigee, *asked, *sampling, "--out", str(options.out / "perigee"))


async def ask_harness(options: argparse.Namespace, url: str, tasks: list[str]) -> None:
    """Has the harness ask the endpoint."""
    out = options.out.absolute()
    arguments = f"model=policy,base_url={url}/chat/completions,num_concurrent=32,max_retries=3"
    harness = (options.lm_eval, "--model", "local-chat-completions", "--model_args", arguments, "--log_samples")
    asked = ("--tasks", ",".join(tasks), "--include_path", str(out), "--apply_chat_template")
    key = {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    await run(*harness, *asked, "--output_path", str(out / "lm_eval"), **key)


def show_agreement(out: Path, suite: str, task: str) -> None:
    """Prints the accuracies of both and on how many verdicts they agree, then those on which they do not."""
    [samples_path] = sorted((out / "lm_eval").rglob(f"samples_{task}_*.jsonl"))[-1:]
    samples = map(json.loads, samples_path.read_text().splitlines())
    theirs = {line["doc"]["id"]: (bool(line["exact_match"]), line["resps"][0][0].strip()) for line in samples}
    ours: dict[str, Any] = {
        line["id"]: line
        for line in read_answers(out / "perigee")
        if (line["suite"], line["attempt"]) == (suite, GREEDY)
    }
    right = {key: line["verdict"] == "correct" for key, line in ours.items()}
    apart = [key for key in ours if right[key] != theirs[key][0]]
    same = [key for key, line in ours.items() if line["response"].strip() == theirs[key][1]]
    print(
        f"{suite}: of {len(ours)} perigee has {sum(right.values())} right, lm_eval {sum(r for r, _ in theirs.values())}"
    )
    print(f"  the same verdict: {len(ours) - len(apart)} of {len(ours)}")
    print(f"  the same response: {len(same)}, of these the same verdict: {len(set(same) - set(apart))}")
    for key in apart:
        response = ours[key]["response"]
        print(f"  {key}{'' if key in same else ', other text'}: perigee {right[key]} ({ours[key]['answer']!r})", end="")
        print(f", lm_eval {theirs[key][0]}: {response[-160:]!r} | {theirs[key][1][-160:]!r}")


async def measure(options: argparse.Namespace) -> None:
    """Has both answer, and prints the agreement of their verdicts."""
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_sums(out / f"{SUMS}.jsonl")
    suites = ["gsm8k", str(out / f"{SUMS}.jsonl")]
    tasks = [write_task(out, suite, options.data, options.limit, options.max_tokens) for suite in suites]
    [port] = pick_ports(1)
    config = RolloutConfig(
        model=str(options.model.absolute()),
        dtype=options.dtype,
        max_num_seqs=64,
        max_model_len=2048,
        http={"port": port},
    )
    async with rollout_stack(out, config, "agreement"):
        url = f"http://{HOST}:{port}/v1"
        await evaluate(options, url, suites, 0)
        await ask_harness(options, url, tasks)
        for suite, task in zip(("gsm8k", SUMS), tasks, strict=True):
            show_agreement(out, suite, task)
        await evaluate(options, url, suites, options.samples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--lm-eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    asyncio.run(measure(parser.parse_args()))
