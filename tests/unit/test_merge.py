"""Merged models: the arithmetic against float64, folders that fit and those that do not, and a write that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from perigee.cli.merge import folders
from perigee.cli.merge.methods import Blocks, MergeSettings, Method, find_threshold, merge_tensor, slerp_weights
from perigee.errors import InvalidArgumentError
from tests.fixtures.cli import invoke
from tests.fixtures.trainer import write_model

# Threads that wait for one another on tiny blocks take many times what these cost.
pytestmark = pytest.mark.usefixtures("one_thread")
Array = np.ndarray[Any, np.dtype[np.float64]]
EPS = 2.0**-23


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_blocks(values_N: Array, block: int = 7) -> Blocks:
    """A tensor in blocks."""
    tensor_N = torch.tensor(values_N, dtype=torch.float32)
    return lambda: iter(tensor_N.split(block))


def joined(blocks: Iterator[torch.Tensor]) -> Array:
    return torch.cat(list(blocks)).double().numpy()


@st.composite
def models(draw: st.DrawFn, least: int = 2) -> tuple[list[Array], Array, list[float]]:
    """Models near a base as fine-tuning leaves them, the base, and weights; all of them float32 numbers."""
    count, size = draw(st.integers(least, 4)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1e-4, 0.1, 1.0]))
    base_N = generator.standard_normal(size).astype(np.float32)
    some = [(base_N + spread * generator.standard_normal(size)).astype(np.float32) for _ in range(count)]
    weights = draw(st.lists(st.sampled_from([0.25, 0.3, 1.0, 2.0]), min_size=count, max_size=count))
    return [x_N.astype(np.float64) for x_N in some], base_N.astype(np.float64), weights


def merged(method: Method, xs: Sequence[Array], base_N: Array, weights: Sequence[float], **more: float) -> Array:
    based = method in ("ties", "task_arithmetic")
    chosen = MergeSettings(method, tuple(weights), **more)
    return joined(merge_tensor(chosen, [as_blocks(x_N) for x_N in xs], as_blocks(base_N) if based else None))


def bound(xs: Sequence[Array], base_N: Array, weights: Sequence[float], scale: float = 1.0) -> Array:
    """What rounding in float32 may add up to."""
    total = sum((1 + scale) * (1 + w) * (np.abs(x_N) + np.abs(base_N)) for w, x_N in zip(weights, xs, strict=True))
    return np.asarray(8 * EPS * total)


@given(models())
def test_linear_is_the_weighted_mean(case: tuple[list[Array], Array, list[float]]) -> None:
    xs, base_N, weights = case
    expected_N = sum(w * x_N for w, x_N in zip(weights, xs, strict=True)) / sum(weights)
    assert np.all(np.abs(merged("linear", xs, base_N, weights) - expected_N) <= bound(xs, base_N, weights))


@given(models(), st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_task_arithmetic_adds_task_vectors(case: tuple[list[Array], Array, list[float]], scale: float) -> None:
    xs, base_N, weights = case
    expected_N = base_N + scale * sum(w * (x_N - base_N) for w, x_N in zip(weights, xs, strict=True))
    found_N = merged("task_arithmetic", xs, base_N, weights, scale=scale)
    assert np.all(np.abs(found_N - expected_N) <= bound(xs, base_N, weights, scale))


@given(models(), st.sampled_from([0.0, 0.25, 0.9]))
def test_slerp_goes_along_the_great_circle(case: tuple[list[Array], Array, list[float]], t: float) -> None:
    (a_N, b_N, *_), base_N, _ = case
    cosine = a_N @ b_N / np.linalg.norm(a_N) / np.linalg.norm(b_N)
    expected_N = (1 - t) * a_N + t * b_N
    if abs(cosine) <= 0.9995:
        angle = np.arccos(cosine)
        expected_N = (np.sin((1 - t) * angle) * a_N + np.sin(t * angle) * b_N) / np.sin(angle)
    found_N = merged("slerp", [a_N, b_N], base_N, [1 - t, t])
    assert np.allclose(found_N, expected_N, rtol=1e-5, atol=1e-5)


def ties(xs: Sequence[Array], base_N: Array, weights: Sequence[float], density: float, scale: float) -> Array:
    """The paper's three steps, one after the other: trim, elect a sign, and merge what agrees with it."""
    trimmed = []
    for x_N in xs:
        delta_N = (x_N.astype(np.float32) - base_N.astype(np.float32)).astype(np.float64)
        kept = max(1, int(density * len(delta_N)))
        least = np.sort(np.abs(delta_N))[::-1][kept - 1]
        trimmed.append(np.where(np.abs(delta_N) >= least, delta_N, 0.0))
    merged_N = base_N.copy()
    for n in range(len(base_N)):
        sign = 1.0 if np.float32(sum(w * d_N[n] for w, d_N in zip(weights, trimmed, strict=True))) >= 0 else -1.0
        agreeing = [(w, d_N[n]) for w, d_N in zip(weights, trimmed, strict=True) if np.sign(d_N[n]) == sign]
        if agreeing:
            merged_N[n] += scale * sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing)
    return merged_N


@given(models(), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([1.0, 0.7]))
def test_ties_trims_elects_and_merges(
    case: tuple[list[Array], Array, list[float]], density: float, scale: float
) -> None:
    xs, base_N, weights = case
    found_N = merged("ties", xs, base_N, weights, density=density, scale=scale)
    expected_N = ties(xs, base_N, weights, density, scale)
    assert np.all(np.abs(found_N - expected_N) <= bound(xs, base_N, weights, scale))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.floats(0.01, 1))
def test_the_threshold_is_that_of_a_sort(values: list[float], density: float) -> None:
    values_N = np.array(values)
    kept = max(1, int(density * len(values)))
    found = find_threshold(as_blocks(values_N), as_blocks(np.zeros(len(values))), density)
    assert found == np.sort(np.abs(values_N))[::-1][kept - 1]


def test_slerp_of_opposite_and_of_empty_tensors_is_linear() -> None:
    one_N = np.array([1.0, 2.0])
    for other_N in (-one_N, 0 * one_N):
        assert slerp_weights(as_blocks(one_N), as_blocks(other_N), 0.25) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"method": "median", "weights": (1, 1)}, "median is none of linear, slerp"),
        ({"method": "linear", "weights": (0, 0)}, "is 0 for every model"),
        ({"method": "linear", "weights": (1, -1)}, "must not be negative for linear"),
        ({"method": "linear", "weights": (1, float("nan"))}, "must be finite"),
        ({"method": "slerp", "weights": (1, 1, 1)}, "slerp merges two models, and 3 are given"),
        ({"method": "ties", "weights": (1, 1), "density": 0}, "--density: must be above 0"),
    ],
)
def test_numbers_without_a_result_are_refused(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        MergeSettings(**given_settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with other weights."""
    folder = tmp_path_factory.mktemp("pair")
    return write_model(folder / "one", seed=1), write_model(folder / "two", seed=2)


def copied(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Replaces tensors of a folder, or takes them out; names have two underscores for a dot."""
    weights = load_file(folder / "model.safetensors")
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder: Path, dtype: torch.dtype) -> Path:
    """Writes the weights of a folder anew, as two shards of another type."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def merge(out: Path, *arguments: str | Path) -> str:
    """Merges; returns what was said on standard error, empty when it went well."""
    ended = invoke(("merge", *map(str, arguments), "--out", str(out)), None, None, {})
    assert (ended.code == 0) == (not ended.stderr)
    return ended.stderr


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_weights_1_and_0_give_the_first_model_to_the_byte(pair: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    one, two = (write_shards(copied(model, tmp_path / model.name), torch.bfloat16) for model in pair)
    base = ["--base", two] if method == "task_arithmetic" else []
    assert merge(tmp_path / "out", one, two, "--method", method, "--weight", "1", "--weight", "0", *base) == ""
    for file in one.glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in one.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()} - {
        "README.md",
        "merge.json",
    }


def test_ties_of_one_whole_task_vector_is_its_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    options = ["--method", "ties", "--base", two, "--weight", "1", "--weight", "0", "--density", "1"]
    assert merge(tmp_path / "out", one, two, *options) == ""
    expected, found = load_file(one / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_mean_keeps_types_and_loads_in_transformers(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(folders, "BLOCK", 100)  # several blocks of each matrix
    one, two = write_shards(copied(pair[0], tmp_path / "one"), torch.bfloat16), pair[1]
    assert merge(tmp_path / "out", one, two) == ""
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    first = AutoModelForCausalLM.from_pretrained(one, dtype="auto").state_dict()
    second = load_file(two / "model.safetensors")
    for name, tensor in second.items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], (0.5 * first[name].float() + 0.5 * tensor).to(torch.bfloat16))
    card, note = ((tmp_path / "out" / name).read_text() for name in ("README.md", "merge.json"))
    described = json.loads(note)
    assert described["method"] == "linear"
    assert [model["model"] for model in described["models"]] == [str(one), str(two)]
    assert {*described["models"][0]["sha256"]} == {"config.json", "model-1.safetensors", "model-2.safetensors"}
    assert str(two) in card


def test_models_with_images_merge_with_their_towers(vision_model: Path, tmp_path: Path) -> None:
    tower, embedding = "model.connector.modality_projection.proj.weight", "model.text_model.embed_tokens.weight"
    weights = load_file(vision_model / "model.safetensors")
    other = copied(vision_model, tmp_path / "other")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert merge(tmp_path / "out", vision_model, other) == ""
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == weights.keys()
    assert all(torch.allclose(merged[name], 2 * weights[name]) for name in (tower, embedding))
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (
        vision_model / "preprocessor_config.json"
    ).read_bytes()
    (other / "preprocessor_config.json").write_text("{}")
    assert "their preprocessor_config.json differ" in merge(tmp_path / "refused", vision_model, other)
    config = json.loads((other / "config.json").read_text())
    narrow = config | {"vision_config": config["vision_config"] | {"patch_size": 7}}
    (other / "config.json").write_text(json.dumps(narrow))
    assert "vision_config.patch_size is 14 in the one and 7 in the other" in merge(
        tmp_path / "refused", vision_model, other
    )


def test_the_same_merge_again_is_done_and_another_one_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert merge(tmp_path / "out", *pair) == ""
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert merge(tmp_path / "out", shutil.copytree(pair[0], tmp_path / "moved"), pair[1]) == ""
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    refused = merge(tmp_path / "out", *pair, "--weight", "1", "--weight", "2")
    assert "exists and was not merged from this" in refused
    assert len(refused.splitlines()) == 1
    (tmp_path / "out" / "merge.json").write_text("{")
    assert "exists and was not merged from this" in merge(tmp_path / "out", *pair)


def test_a_killed_merge_leaves_a_hidden_folder_that_the_next_one_clears(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".out.0123abcd", ".other.0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert merge(tmp_path / "out", *pair) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.0123abcd"}

    def fill_up(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(folders, "_write_shard", fill_up)
    assert "No space left" in merge(tmp_path / "second", *pair)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.0123abcd"}


def test_a_second_merge_into_one_folder_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard, refusals = folders._write_shard, []

    def meet_another(*arguments: Any) -> None:
        refusals.append(merge(tmp_path / "out", *pair))
        write_shard(*arguments)

    monkeypatch.setattr(folders, "_write_shard", meet_another)
    assert merge(tmp_path / "out", *pair) == ""
    assert refusals == [f"perigee: {tmp_path / 'out'} is being written by another process: wait until it ends\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_cancelled_merge_ends_before_the_next_shard(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_shards(copied(pair[0], tmp_path / "one"), torch.bfloat16)
    write_shard, cancelled, written = folders._write_shard, Event(), []

    def cancel(plan: folders.MergePlan, source: Path, target: Path) -> None:
        write_shard(plan, source, target)
        written.append(source.name)
        cancelled.set()

    monkeypatch.setattr(folders, "_write_shard", cancel)
    plan = folders.plan_merge([str(one), str(pair[1])], None, MergeSettings("linear", (1, 1)))
    with pytest.raises(CancelledError):
        folders.write_merged(plan, tmp_path / "out", print, cancelled)
    assert written == ["model-1.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def other_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"+"', '"&"'))


def other_split(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Isolated"', '"Removed"'))


def with_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def with_infinity(folder: Path) -> None:
    change_weights(folder, model__norm__weight=torch.full((32,), torch.inf))


def without_norm(folder: Path) -> None:
    change_weights(folder, model__norm__weight=None)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"num_hidden_layers": 3}, "num_hidden_layers is 2 in the one and 3 in the other"),
        (None, {"tie_word_embeddings": False}, "tie_word_embeddings is True in the one and False"),
        (None, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope is"),
        (None, {"eos_token_id": 5}, "eos_token_id is 1 in the one and 5 in the other"),
        (without_norm, {}, "has the tensor model.norm.weight"),
        (other_token, {}, "token '&' is none in the one and 12 in the other"),
        (other_split, {}, "their tokenizers differ in pre_tokenizer"),
        (with_template, {}, "their chat templates differ"),
        (with_infinity, {}, "model.norm.weight has an element that is infinite or no number"),
        (cut_short, {}, "model.safetensors cannot be read"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_one_sentence(
    pair: tuple[Path, Path], tmp_path: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    other = copied(pair[1], tmp_path / "other", **config)
    if change is not None:
        change(other)
    refused = merge(tmp_path / "out", pair[0], other)
    assert message in refused
    assert len(refused.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_templates_and_stop_tokens_may_differ_where_that_is_allowed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = copied(pair[1], tmp_path / "other", eos_token_id=5)
    with_template(other)
    assert merge(tmp_path / "out", pair[0], other, "--allow-different-templates") == ""
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert merge(tmp_path / "based", pair[0], pair[1], "--method", "ties", "--base", other) == ""


def test_a_tied_head_may_be_stored_or_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one = copied(pair[0], tmp_path / "one")
    head = load_file(one / "model.safetensors")["model.embed_tokens.weight"].clone()
    change_weights(one, lm_head__weight=head)
    assert merge(tmp_path / "out", one, pair[1]) == ""
    assert merge(tmp_path / "turned", pair[1], one) == ""
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert "lm_head.weight" not in load_file(tmp_path / "turned" / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ties"], "--base: is required by ties"),
        (["--base", "x"], "--base: is for ties and task_arithmetic only"),
        (["--weight", "1"], "--weight: is given 1 times for 2 models"),
        (["--lambda", "0.5"], "--lambda: is for ties and task_arithmetic only"),
        (["--density", "0.5", "--method", "task_arithmetic"], "--density: is for ties only"),
    ],
)
def test_what_a_method_needs_is_asked_for(
    pair: tuple[Path, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in merge(tmp_path / "out", *pair, *options)
