"""Accuracy by `perigee eval` and by lm-evaluation-harness, which ask the same server the same questions.

    .venv/bin/python bench/eval_agreement.py MODEL DATA --lm-eval VENV/bin/lm_eval --out DIR [--limit 300]

Serves MODEL with vLLM, evaluates gsm8k from the folder DATA, has the harness answer the same prompts greedily and judge
them by the last number, and prints how many verdicts agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

import yaml

from perigee.cli.eval.model import serving_model
from perigee.cli.eval.results import GREEDY, read_answers
from perigee.cli.eval.suites import load_suite

TASK = "same_prompts"


def write_task(folder: Path, data: Path, limit: int, max_tokens: int) -> None:
    """Writes the suite's prompts as a task of the harness."""
    problems = load_suite("gsm8k", data, limit).problems
    lines = [
        {"id": each.line.id, "prompt": each.messages[-1]["content"], "answer": each.line.item.math.reference}
        for each in problems
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "prompts.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_tokens},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
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
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task))


async def run(*command: str, **environment: str) -> None:
    """Runs a command to its end; raises RuntimeError when it fails."""
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | environment)
    if code := await process.wait():
        raise RuntimeError(f"{command[0]} ended with {code}")


async def measure(options: argparse.Namespace) -> None:
    """Has both answer, and prints the agreement of their verdicts."""
    out, limit, cap = options.out, str(options.limit), options.max_tokens
    out.mkdir(parents=True, exist_ok=True)
    write_task(out, options.data, options.limit, cap)
    async with serving_model(options.model, out / "vllm.log", 64, options.dtype, print) as endpoint:
        perigee = (sys.executable, "-m", "perigee.cli.main", "eval", "gsm8k", "--data", str(options.data))
        asked = ("--endpoint", endpoint.url, "--model", endpoint.model, "--limit", limit, "--max-tokens", str(cap))
        samples = ("--samples", str(options.samples), "--plain", "--out", str(out / "perigee"))
        await run(*perigee, *asked, *samples)
        arguments = f"model={endpoint.model},base_url={endpoint.url}/chat/completions,num_concurrent=32,max_retries=3"
        harness = (options.lm_eval, "--model", "local-chat-completions", "--model_args", arguments)
        tasks = ("--tasks", TASK, "--include_path", str(out), "--apply_chat_template", "--log_samples")
        key = {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
        await run(*harness, *tasks, "--output_path", str(out / "lm_eval"), **key)
    [samples_path] = sorted((out / "lm_eval").rglob(f"samples_{TASK}_*.jsonl"))[-1:]
    theirs = {
        line["doc"]["id"]: (bool(line["exact_match"]), line["resps"][0][0])
        for line in map(json.loads, samples_path.read_text().splitlines())
    }
    ours = {
        line["id"]: (line["verdict"] == "correct", line["response"], line["answer"])
        for line in read_answers(out / "perigee")
        if line["attempt"] == GREEDY
    }
    apart = [key for key in ours if ours[key][0] != theirs[key][0]]
    same = sum(ours[key][1].strip() == theirs[key][1].strip() for key in ours)
    for name, found in (("perigee", ours), ("lm_eval", theirs)):
        print(f"{name}: {sum(each[0] for each in found.values())} of {len(found)} right")
    print(f"the same response: {same} of {len(ours)}; the same verdict: {len(ours) - len(apart)} of {len(ours)}")
    for key in apart:
        print(f"{key}: perigee {ours[key][0]} ({ours[key][2]!r}), lm_eval {theirs[key][0]}: {ours[key][1][-120:]!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--lm-eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    asyncio.run(measure(parser.parse_args()))
