"""`perigee init`: prompts and a commented recipe for a model folder and a data set of questions and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.cli.check import check_model
from perigee.cli.doctor import NVIDIA
from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically, write_lines
from perigee.reward.items import read_lines, read_object, read_prompt_line

# Names that data sets give their columns.
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
ANSWERS = ("answer", "final_answer", "solution", "expected_answer", "target", "output")
# GSM8K has its answers after this.
ANSWER_AFTER = "####"
MOST_HELD_OUT = 200
INSTRUCTION = "\n\nThink step by step and put the final answer in \\boxed{}."
RECIPE = """\
# Written by `perigee init`; docs/recipes.md explains every line. Next: perigee check {folder}, perigee train {folder}
name: {name}
model: {model}                      # Hugging Face folder; run, rollout and trainer take it from here

run:
  prompts: "{{recipe}}/prompts.jsonl"   # {train} problems to train on
  heldout: "{{recipe}}/heldout.jsonl"   # {heldout} problems for accuracy alone
  iterations: 100
  group_size: 8                     # responses per problem, compared with one another
  max_live_groups: {groups}               # problems in work at once
  rollout:
    max_response_tokens: {cap}        # prompt and response fit the context of {context} tokens
    token_budget: {budget}               # tokens that a response may grow by in one iteration
  optimizer: {{learning_rate: {rate}}}  # halve it when run.evaluation falls or policy_kl leaps
  update: {{minibatches: 2, max_tokens_per_microbatch: {tokens}, max_staleness: 4, token_scale: {cap}.0}}
  evaluation: {{every: 10, samples: 2, problems: 100}}

rollout:
  dtype: {dtype}
  max_num_seqs: {sequences}
trainer:
  dtype: {dtype}
  recompute: {recompute}                  # true takes less memory and a third more time
# trackers: {{wandb: {{project: {name}}}}}
"""


@dataclass(frozen=True)
class Columns:
    """Where a data set has its questions and answers."""

    question: str
    answer: str
    answer_after: str


def init(folder: Path, model_path: str, data: Path) -> list[str]:
    """Writes prompts.jsonl, heldout.jsonl and recipe.yaml into a new folder; returns what was found, for people.

    Lines that are prompts already stay as they are. Raises InvalidArgumentError for a model that cannot be trained, a
    data set without questions and answers, and a folder that has a recipe.
    """
    if (folder / "recipe.yaml").exists():
        raise InvalidArgumentError.for_field(str(folder), "has a recipe.yaml already; name another folder")
    model, parameters = check_model(model_path, "--model")
    rows = [read_object(text, place) for place, text in read_lines(data, "--prompts")]
    if len(rows) < 2:
        raise InvalidArgumentError.for_field("--prompts", f"{data} has fewer than the two problems that a run needs")
    template = has_chat_template(model.path)
    if "verifier" in rows[0]:
        lines, found = rows, "prompt lines with verifiers"
        for number, line in enumerate(lines, start=1):
            read_prompt_line(line, f"{data}:{number}")
    else:
        columns = find_columns(rows, data)
        lines = [to_line(row, columns, f"{data}:{number}", number) for number, row in enumerate(rows, start=1)]
        found = f"questions in {columns.question}, answers in {columns.answer}"
        found += f" after {columns.answer_after}" if columns.answer_after else ""
        if template:
            lines = render_chats(model.path, lines)
    random.Random(0).shuffle(lines)
    held_out = min(MOST_HELD_OUT, max(1, len(lines) // 10))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "heldout.jsonl", lines[:held_out])
    write_lines(folder / "prompts.jsonl", lines[held_out:])
    name = "".join(c if c.isalnum() else "-" for c in folder.absolute().name.lower()).strip("-") or "run"
    values = {"folder": folder, "name": name, "model": json.dumps(str(Path(model_path).absolute()))}
    sizes = {"train": len(lines) - held_out, "heldout": held_out, "context": model.context_tokens}
    text = RECIPE.format(**values, **sizes, **choose_settings(model.context_tokens, parameters))
    write_atomically(folder / "recipe.yaml", text.encode())
    return [
        f"model: {parameters / 1e6:,.1f}M parameters, {'with a' if template else 'without'} chat template",
        f"data: {found}; {len(lines) - held_out} to train on, {held_out} held out",
        f"next: perigee check {folder}",
    ]


def choose_settings(context: int, parameters: int) -> dict[str, Any]:
    """Returns settings for the device here: small and in float32 on a CPU, in bfloat16 on a GPU."""
    gpu = any(NVIDIA.glob("*"))
    cap = max(1, min(context // 2, 2048 if gpu else 256))
    return {
        "cap": cap,
        "budget": max(1, cap // 2),
        "groups": 256 if gpu else 32,
        "tokens": 16384 if gpu else 2048,
        "sequences": 512 if gpu else 64,
        "dtype": "bfloat16" if gpu else "float32",
        "recompute": "true" if gpu and parameters > 1_000_000_000 else "false",
        # A policy of a few layers bears more than a pretrained one of billions.
        "rate": "1.0e-6" if parameters > 1_000_000_000 else "5.0e-6",
    }


def find_columns(rows: Sequence[Mapping[str, Any]], data: Path) -> Columns:
    """Returns the columns by their usual names; raises InvalidArgumentError with those there are."""
    question, answer = (next((name for name in names if name in rows[0]), "") for names in (QUESTIONS, ANSWERS))
    if not question or not answer:
        lacking = "question" if not question else "answer"
        names = QUESTIONS if not question else ANSWERS
        raise InvalidArgumentError.for_field(
            f"{data}:1", f"has no column for the {lacking} ({', '.join(names)}), only {', '.join(rows[0])}: rename one"
        )
    has_marker = all(ANSWER_AFTER in str(row.get(answer)) for row in rows)
    return Columns(question, answer, ANSWER_AFTER if has_marker else "")


def to_line(row: Mapping[str, Any], columns: Columns, place: str, number: int) -> dict[str, Any]:
    """Returns a row as a line of a prompt file, judged as mathematics."""
    for name in (columns.question, columns.answer):
        if row.get(name) in (None, ""):
            raise InvalidArgumentError.for_field(f"{place}: {name}", "is empty")
    answer = str(row[columns.answer])
    if columns.answer_after:
        answer = answer.rpartition(columns.answer_after)[2].strip()
    line = {"id": str(row.get("id", number)), "prompt": str(row[columns.question]) + INSTRUCTION}
    return line | {"verifier": "math", "answer": answer}


def has_chat_template(model: Path) -> bool:
    """Returns whether a model folder has a chat template."""
    config = model / "tokenizer_config.json"
    return (model / "chat_template.jinja").is_file() or (
        config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
    )


def render_chats(model: Path, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines with their prompts as the user's message in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return [{**line, "prompt": render(line["prompt"])} for line in lines]
