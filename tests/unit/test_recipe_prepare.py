"""The folder that the arithmetic recipe prepares: complete, disjoint, deterministic, and loadable."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from tokenizers import Tokenizer

from perigee.cli.recipe import load_recipe
from perigee.cli.run_folder import RunFolder

RECIPE = Path(__file__).parents[2] / "examples" / "arithmetic"


# With smaller sets, which take a tenth of the time.
SMALL = "import {0} as p; p.HELDOUT_SIZE, p.POOL_SIZE, p.SFT_SIZE = 64, 256, 1000; p.main(p.prepare)"


def run_prepare(out: Path, seed: int, *program: str) -> Path:
    """Runs prepare.py as the CLI does, or another program in its folder."""
    arguments = [*(program or ("prepare.py",)), "--out", str(out), "--seed", str(seed)]
    subprocess.run([sys.executable, *arguments], cwd=RECIPE, check=True, timeout=60)
    return out


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_prepare(tmp_path_factory.mktemp("prepared") / "data", seed=7)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest_files(folder: Path) -> dict[str, str]:
    """The digest of each file below a folder, by its name there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("script", "trained"), [("prepare", ("sft_easy", "sft_full")), ("prepare_styles", ("sft_styles", "sft_short"))]
)
def test_the_same_seed_prepares_the_same_bytes_and_another_seed_others(
    tmp_path: Path, script: str, trained: tuple[str, ...]
) -> None:
    seeds = {"first": 7, "again": 7, "other": 8}
    program = ("-c", SMALL.format(script))
    first, again, other = (digest_files(run_prepare(tmp_path / out, seeds[out], *program)) for out in seeds)
    assert again == first
    differing = {name for name, digest in other.items() if digest != first[name]}
    assert differing == {f"{name}.jsonl" for name in ("heldout", "prompts", *trained)} | {"model/model.safetensors"}
    heldout, *others = (
        {line["prompt"] for line in read_lines(tmp_path / "first" / f"{name}.jsonl")}
        for name in ("heldout", "prompts", *trained)
    )
    assert len(heldout) == 64
    assert not any(heldout & prompts for prompts in others)


def test_heldout_problems_occur_in_no_training_set(prepared: Path) -> None:
    heldout = [line["prompt"] for line in read_lines(prepared / "heldout.jsonl")]
    training_sets = ("prompts", "sft_easy", "sft_full")
    trained = {line["prompt"] for name in training_sets for line in read_lines(prepared / f"{name}.jsonl")}
    assert len(set(heldout)) == len(heldout) >= 512
    assert not trained & set(heldout)


@pytest.mark.parametrize("name", ["heldout", "prompts"])
def test_problems_are_half_math_half_code_and_long_tailed(prepared: Path, name: str) -> None:
    lines = read_lines(prepared / f"{name}.jsonl")
    assert len({line["id"] for line in lines}) == len({line["prompt"] for line in lines}) == len(lines)
    assert sum(line["domain"] == "math" for line in lines) * 2 == len(lines)
    for domain, longest in (("math", 8.0), ("code", 7.5)):
        difficulties = [line["difficulty"] for line in lines if line["domain"] == domain]
        assert max(difficulties) == longest
        assert 0.05 < sum(value > longest * 2 / 3 for value in difficulties) / len(difficulties) < 0.25


def test_problem_lines_carry_what_their_verifier_needs(prepared: Path) -> None:
    common = {"id", "domain", "prompt", "difficulty", "verifier", "answer_marker"}
    keys = {"math": common | {"answer"}, "code": common | {"language", "function", "tests"}}
    for line in read_lines(prepared / "prompts.jsonl"):
        assert set(line) == keys[line["domain"]]
        assert line["verifier"] == line["domain"]


def test_every_text_is_made_of_known_characters_and_fits_the_context(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "model" / "tokenizer.json"))
    unknown = tokenizer.token_to_id(tiny_model.UNKNOWN)
    examples = [*read_lines(prepared / "sft_easy.jsonl"), *read_lines(prepared / "sft_full.jsonl")]
    prompts = [*read_lines(prepared / "prompts.jsonl"), *read_lines(prepared / "heldout.jsonl")]
    texts = [line["prompt"] + line["response"] for line in examples] + [line["prompt"] for line in prompts]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    for text, ids in zip(texts, encoded, strict=True):
        assert unknown not in ids
        assert len(ids) == len(text) < tiny_model.CONTEXT
    assert tokenizer.decode_batch(encoded) == texts


def test_tokenizer_keeps_special_tokens_out_of_text() -> None:
    tokenizer = tiny_model.make_tokenizer()
    ids = [tokenizer.token_to_id(token) for token in (tiny_model.PAD, tiny_model.EOS, tiny_model.UNKNOWN)]
    assert ids == [tiny_model.PAD_ID, tiny_model.EOS_ID, 2]
    assert tokenizer.decode([*tokenizer.encode("4+5=9").ids, 1, 0]) == "4+5=9"
    assert tokenizer.encode("A").ids == [2]


def test_transformers_loads_the_model_folder(prepared: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared / "model")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(prepared / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 745_600
    assert model.config.eos_token_id == tokenizer.eos_token_id == tiny_model.EOS_ID
    encoded = tokenizer("((4+5)*3)-6=", return_tensors="pt")
    assert model(**encoded).logits.shape == (1, 12, tokenizer.vocab_size)
    assert tokenizer.decode(encoded["input_ids"][0]) == "((4+5)*3)-6="


def test_recipe_is_valid_and_names_the_files_that_prepare_writes(prepared: Path, tmp_path: Path) -> None:
    run = load_recipe(RECIPE / "recipe.yaml").expand(RunFolder(tmp_path)).values["run"]
    named = [run["model"], run["prompts"], run["heldout"], *(stage["dataset"] for stage in run["sft"])]
    for path in map(Path, named):
        assert (prepared / path.relative_to(tmp_path / "data")).exists()
    longest = max(len(line["prompt"]) for line in read_lines(prepared / "prompts.jsonl"))
    assert longest + run["rollout"]["max_response_tokens"] <= tiny_model.CONTEXT
    examples = read_lines(prepared / "sft_full.jsonl")
    assert max(len(line["response"]) for line in examples) < run["rollout"]["max_response_tokens"]
