"""`perigee init`: a commented recipe for a model folder and a data set of questions and answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perigee.cli.check import check_model
from perigee.cli.doctor import NVIDIA
from perigee.cli.recipe import RECIPE_FILE
from perigee.config import validate
from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically
from perigee.reward.items import PromptLine, read_object
from perigee.reward.sources import Columns, read_data, read_source
from services.coordinator.prompts import fetch_source
from services.coordinator.run_config import PromptSource
from services.kit.chat import open_chat_template
from services.kit.storage import is_url

# Names that data sets give their columns, after a prompt line's own.
QUESTIONS = ("prompt", "messages", "question", "problem", "query", "instruction", "input")
ANSWERS = ("answer", "final_answer", "expected_answer", "solution", "target", "output")
# GSM8K has its answers after this.
ANSWER_AFTER = "####"
MOST_HELD_OUT = 200
INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."
RECIPE = """\
# Written by `perigee init`; docs/recipes.md explains every line, docs/configuration.md lists all keys.
# Next: perigee check {folder}, perigee prompts preview {folder}, perigee train {folder}
name: {name}
model: {model}  # a Hugging Face folder or URL; run, rollout and trainer take it from here

run:
  prompts:{source}
  heldout: {{count: {held_out}, seed: 0}}  # of {lines} problems, for accuracy alone
  chat: {chat}  # always: the model's chat template makes a user's message of each prompt
  instruction: {instruction}  # follows each question
  iterations: 100
  group_size: 8  # responses per problem, compared with one another
  max_live_groups: {groups}  # problems in work at once
  rollout:
    max_response_tokens: {cap}  # a longer response is cut; with its prompt it fits the context of {context} tokens
    token_budget: {budget}  # tokens that a response may grow by in one iteration
  optimizer: {{learning_rate: {rate}}}  # halve it when accuracy on held-out problems falls
  update: {{minibatches: 2, max_tokens_per_microbatch: {tokens}, max_staleness: 4}}
  evaluation: {{every: 10, samples: 2, problems: 100}}

rollout:
  dtype: {dtype}
  max_num_seqs: {sequences}
trainer:
  dtype: {dtype}
  recompute: {recompute}  # true takes less memory and a third more time
# trackers: {{wandb: {{project: {name}}}}}
"""


def init(folder: Path, model_path: str, given: Mapping[str, Any]) -> list[str]:
    """Writes recipe.yaml into a folder; `given` is what is known of the prompts' source. Returns what was found.

    Raises InvalidArgumentError for a model that cannot be trained, a data set without questions and answers, a line
    that is wrong, and a folder that has a recipe.
    """
    if (folder / RECIPE_FILE).exists():
        raise InvalidArgumentError.for_field(str(folder), f"has a {RECIPE_FILE} already; name another folder")
    model, parameters = check_model(model_path, "--model")
    source, lines = read_prompts(validate(PromptSource, given, "--prompts", ""))
    template = open_chat_template(model.path, "--model") is not None
    if not template and any(line.messages for line in lines):
        raise InvalidArgumentError.for_field("--prompts", f"holds messages, and {model_path} has no chat template")
    verifiers = sorted({str(line.item.WhichOneof("verifier")) for line in lines})
    boxed = verifiers == ["math"] and not any(line.item.answer_marker for line in lines)
    settings = {
        "folder": folder,
        "name": "".join(c if c.isalnum() else "-" for c in folder.absolute().name.lower()).strip("-") or "run",
        "model": write_value(make_absolute(model_path)),
        "source": "".join(f"\n    {key}: {write_value(value)}" for key, value in source.items()),
        "lines": len(lines),
        "held_out": min(MOST_HELD_OUT, max(1, len(lines) // 10)),
        "chat": "always" if template else "never",
        "instruction": write_value(INSTRUCTION if boxed else ""),
        "context": model.context_tokens,
        **choose_settings(model.context_tokens, parameters),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECIPE_FILE, RECIPE.format(**settings).encode())
    return [
        f"model: {parameters / 1e6:,.1f}M parameters, {'with a' if template else 'without'} chat template",
        f"prompts: {len(lines)}, judged by {', '.join(verifiers)}",
        f"wrote {folder / RECIPE_FILE}; next: perigee check {folder}",
    ]


def read_prompts(source: PromptSource) -> tuple[dict[str, Any], list[PromptLine]]:
    """Returns the source as a recipe names it, with the columns found, and its prompts."""
    path = fetch_source(source, "--prompts")
    rows = [
        read_object(row, place) if isinstance(row, str) else row
        for place, row in itertools.islice(read_data(path, source.split, "--prompts"), 100)
    ]
    columns, answer_after = dict(source.columns), source.answer_after
    if rows and not columns and "verifier" not in rows[0]:
        columns, answer_after = find_columns(rows, path, answer_after)
    renames = {column: name for name, column in columns.items()}
    reading = Columns(renames, source.defaults_with_verifier, answer_after, source.split)
    lines = read_source(path, reading, "--prompts", source.name or Path(source.path).stem)
    if len(lines) < 2:
        raise InvalidArgumentError.for_field("--prompts", f"{source.path} has fewer than the two problems of a run")
    found = {"path": make_absolute(source.path), "columns": columns, "answer_after": answer_after}
    rest = source.model_dump(exclude_defaults=True, exclude={"path", "columns", "answer_after"})
    return {key: value for key, value in found.items() if value} | rest, lines


def find_columns(rows: Sequence[Mapping[str, Any]], path: Path, answer_after: str) -> tuple[dict[str, str], str]:
    """Returns the column of question and answer by their usual names, and what stands before the answers.

    Raises InvalidArgumentError with the columns that there are.
    """
    question, answer = (next((name for name in names if name in rows[0]), "") for names in (QUESTIONS, ANSWERS))
    for what, found, names in (("question", question, QUESTIONS), ("answer", answer, ANSWERS)):
        if not found:
            known = ", ".join(rows[0])
            raise InvalidArgumentError.for_field(
                f"{path}: {what}", f"no column is named {', '.join(names)}; --column names one of {known}"
            )
    marked = all(ANSWER_AFTER in str(row.get(answer)) for row in rows)
    columns = {"messages" if question == "messages" else "prompt": question, "answer": answer}
    return columns, answer_after or (ANSWER_AFTER if marked else "")


def make_absolute(path: str) -> str:
    """Returns a path that does not depend on the folder of the caller; a URL as it is."""
    return path if is_url(path) else str(Path(path).absolute())


def write_value(value: Any) -> str:
    """Returns a value as YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


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
        "rate": "1.0e-6" if parameters > 1_000_000_000 else "2.0e-6",
    }
