"""A value head from labelled sums to verdicts: trained, interrupted, saved, loaded, served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import ValueHeadConfig
from services.reward.value_head.data import Prepared, prepare
from services.reward.value_head.folder import Encoder, load_tokenizer, read_description
from services.reward.value_head.network import BatchScorer, ValueHead, pad
from services.reward.value_head.training import Summary, Training, sigmoid, train
from services.reward.verifiers.base import Item, Outcome, Verdict
from services.reward.verifiers.value_head import ValueHeadVerifier
from tests.fixtures.value_head import (
    CONTEXT,
    Sum,
    labelled_lines,
    make_sums,
    preference_lines,
    training_config,
    write_backbone,
    write_lines,
)

pytestmark = pytest.mark.timeout(300)  # the first test waits for a model to be trained


@pytest.fixture(scope="module")
def held_out(value_head_folder: Path) -> list[Sum]:
    """Sums whose questions the model has never seen."""
    lines = (value_head_folder.parents[1] / "data.jsonl").read_text().splitlines()
    seen = {json.loads(line)["question"] for line in lines}
    return [each for each in make_sums(400, seed=7) if each.question not in seen][:200]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def verifier(value_head_folder: Path) -> AsyncIterator[ValueHeadVerifier]:
    """A verifier that serves the trained model."""
    config = ValueHeadConfig(path=str(value_head_folder), device="cpu", max_batch_tokens=1024, max_batch_items=7)
    verifier = ValueHeadVerifier(config)
    await verifier.start()
    try:
        yield verifier
    finally:
        await verifier.close()


def item(each: Sum, response: str, marker: str = "", threshold: float | None = None) -> Item[pb.ValueHeadVerifier]:
    parameters = pb.ValueHeadVerifier(reference=each.reference, threshold=threshold)
    return Item("a", response, marker, parameters, prompt=each.question)


async def test_held_out_answers_are_told_apart_far_better_than_by_chance(
    verifier: ValueHeadVerifier, held_out: list[Sum]
) -> None:
    rights = await asyncio.gather(*(verifier.judge(item(each, each.right)) for each in held_out))
    wrongs = await asyncio.gather(*(verifier.judge(item(each, each.wrong)) for each in held_out))
    hits = sum(outcome.verdict is Verdict.CORRECT for outcome in rights)
    hits += sum(outcome.verdict is Verdict.WRONG for outcome in wrongs)
    assert len(held_out) == 200
    assert hits / 400 >= 0.85
    for outcome in (*rights, *wrongs):
        assert outcome.reward == (1.0 if outcome.verdict is Verdict.CORRECT else 0.0)


async def test_scores_of_a_batch_are_those_of_single_responses(value_head_folder: Path, held_out: list[Sum]) -> None:
    scorer = BatchScorer(value_head_folder, torch.device("cpu"))
    encoder = make_encoder(value_head_folder)
    texts = [(each, "so " * (number % 20) + each.right) for number, each in enumerate(held_out[:64])]
    sequences = [encoder.encode(each.question, each.reference, text) for each, text in texts]
    assert len({len(sequence) for sequence in sequences}) > 10
    alone = [scorer.score([sequence])[0] for sequence in sequences]
    assert scorer.score(sequences) == pytest.approx(alone, abs=1e-5)


def test_padding_is_not_seen_by_a_model_that_looks_both_ways() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = ValueHead(BertModel(BertConfig(vocab_size=50, **sizes))).eval()
    sequences = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 9, 5)]
    with torch.no_grad():
        batched = network(*pad(sequences, 0, torch.device("cpu")))
        alone = torch.cat([network(*pad([sequence], 0, torch.device("cpu"))) for sequence in sequences])
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)
    assert len(set(alone.tolist())) == 3


async def test_served_probabilities_are_the_models(
    verifier: ValueHeadVerifier, value_head_folder: Path, held_out: list[Sum], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verifier.unavailable == ""
    monkeypatch.setattr(verifier, "_config", verifier._config.model_copy(update={"reward": "probability"}))
    outcomes = await asyncio.gather(*(verifier.judge(item(each, each.wrong)) for each in held_out[:50]))
    scorer, encoder = BatchScorer(value_head_folder, torch.device("cpu")), make_encoder(value_head_folder)
    scores = [scorer.score([encoder.encode(each.question, each.reference, each.wrong)])[0] for each in held_out[:50]]
    expected = sigmoid(np.array(scores))
    assert [outcome.reward for outcome in outcomes] == pytest.approx(expected.tolist(), abs=1e-5)
    threshold = read_description(value_head_folder).threshold
    assert [outcome.verdict is Verdict.CORRECT for outcome in outcomes] == (expected >= threshold).tolist()
    assert f"threshold {threshold:.4f}" in outcomes[0].reason


async def test_a_threshold_of_the_item_decides(verifier: ValueHeadVerifier, held_out: list[Sum]) -> None:
    async def judge(threshold: float) -> Outcome:
        return await verifier.judge(item(held_out[0], held_out[0].right, threshold=threshold))

    assert (await judge(0.0)).verdict is Verdict.CORRECT
    assert (await judge(1.0)).verdict is Verdict.WRONG
    assert (
        verifier.find_violations(pb.ValueHeadVerifier(reference="4", threshold=1.5))[0].field == "value_head.threshold"
    )
    assert verifier.find_violations(pb.ValueHeadVerifier(reference="4", threshold=0.5)) == []


async def test_what_follows_the_marker_is_judged(verifier: ValueHeadVerifier, held_out: list[Sum]) -> None:
    each = held_out[0]
    whole = await verifier.judge(item(each, each.right))
    marked = await verifier.judge(item(each, f"thinking #{each.right}", marker="#"))
    assert (marked.verdict, marked.reason, marked.extracted) == (whole.verdict, whole.reason, each.right)
    assert (await verifier.judge(item(each, each.right, marker="#"))).verdict is Verdict.UNGRADABLE
    assert (await verifier.judge(item(each, "thinking #", marker="#"))).verdict is Verdict.UNGRADABLE


async def test_the_version_names_the_model(verifier: ValueHeadVerifier, value_head_folder: Path) -> None:
    assert verifier.version == f"1-{read_description(value_head_folder).digest[:12]}"


def test_the_folder_says_how_good_the_model_is(value_head_folder: Path) -> None:
    description = read_description(value_head_folder)
    assert description.max_tokens == CONTEXT
    assert description.evaluation["accuracy"] >= 0.85
    assert description.evaluation["auc"] >= 0.85
    assert description.training["loss"] == "both"
    history = json.loads((value_head_folder.parent / "evaluations.json").read_text())
    best = max(history, key=lambda entry: (entry["auc"], -entry["loss"]))
    assert {key: best[key] for key in description.evaluation} == description.evaluation


def small_training(folder: Path, backbone: Path, **fields: Any) -> Summary:
    """30 steps on 100 sums; always with three evaluations unless told otherwise."""
    write_lines(folder / "data.jsonl", [*labelled_lines(make_sums(60, 2)), *preference_lines(make_sums(40, 3))])
    defaults: dict[str, Any] = {"batch_size": 8, "epochs": 3, "eval_share": 0.2, "patience": 99}
    return train(training_config(folder, backbone, **(defaults | fields)))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a value head."""
    return load_file(folder / "model.safetensors") | load_file(folder / "head.safetensors")


@pytest.mark.parametrize(("loss", "epochs"), [("pointwise", 20), ("pairwise", 10), ("both", 10)])
def test_each_loss_falls_on_both_kinds_of_examples(
    tmp_path: Path, value_head_backbone: Path, loss: str, epochs: int
) -> None:
    small_training(tmp_path, value_head_backbone, loss=loss, epochs=epochs)
    history = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert len(history) == epochs
    assert history[-1]["training_loss"] < 0.7 * history[0]["training_loss"]


def test_gradients_of_micro_batches_add_up_to_those_of_the_mean_losses(
    tmp_path: Path, value_head_backbone: Path
) -> None:
    # Every fourth labelled response is missing: its partner is in no pair.
    lines = [line for number, line in enumerate(labelled_lines(make_sums(24, 2))) if number % 4]
    write_lines(tmp_path / "data.jsonl", [*lines, *preference_lines(make_sums(12, 3))])
    fields: dict[str, Any] = {"max_gradient_norm": 1e9, "pairwise_weight": 3.0, "eval_share": 0.1}
    prepared = prepare(training_config(tmp_path, value_head_backbone))
    units = range(0, len(prepared.units), 2)
    assert {len(prepared.units[unit]) for unit in units} == {1, 2}
    found = []
    for number, max_microbatch_tokens in enumerate((100_000, 100, 1)):
        torch.manual_seed(0)
        config = training_config(
            tmp_path,
            value_head_backbone,
            out=str(tmp_path / str(number)),
            max_microbatch_tokens=max_microbatch_tokens,
            **fields,
        )
        training = Training(config, prepared)
        if number == 0:
            found.append(mean_loss_gradients(training, prepared, units, pairwise_weight=3.0))
        loss = training.train_step(units)
        found.append((loss, {name: p.grad for name, p in training.network.named_parameters() if p.grad is not None}))
    (expected_loss, expected), *others = found
    assert len(expected) > 20
    for loss, gradients in others:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def mean_loss_gradients(
    training: Training, prepared: Prepared, units: Sequence[int], pairwise_weight: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients response by response, in plain arithmetic."""
    data = prepared.training
    chosen = [prepared.units[unit] for unit in units]
    rows = sorted({index for unit in chosen for index in unit})
    assert len(rows) == sum(len(unit) for unit in chosen)
    scores = {
        row: training.network(
            torch.from_numpy(data.tokens[row]).long()[None], torch.ones(1, len(data.tokens[row])).long()
        )[0]
        for row in rows
    }
    points = [-torch.log(torch.sigmoid(scores[row] if data.correct_N[row] else -scores[row])) for row in rows]
    pairs = [-torch.log(torch.sigmoid(scores[u[0]] - scores[u[1]])) for u in chosen if len(u) == 2]
    loss = sum(points) / len(points) + pairwise_weight * sum(pairs) / len(pairs)
    assert isinstance(loss, torch.Tensor)
    names, parameters = zip(*training.network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), dict(zip(names, gradients, strict=True))


def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone", dropout=0.1)  # so that random numbers matter
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = small_training(tmp_path / "whole", backbone)
    config = training_config(tmp_path / "parts", backbone, batch_size=8, epochs=3, eval_share=0.2, patience=99)
    (tmp_path / "parts" / "data.jsonl").write_text((tmp_path / "whole" / "data.jsonl").read_text())
    calls = 0

    def after(steps: int) -> Any:
        def should_stop() -> bool:
            nonlocal calls
            calls += 1
            return calls == steps

        return should_stop

    stopped = train(config, should_stop=after(4))
    assert (stopped.reason, stopped.step) == ("interrupted", 4)
    with pytest.raises(FailedPreconditionError, match="--resume"):
        train(config)
    calls = 0
    stopped = train(config.model_copy(update={"resume": True}), should_stop=after(13))
    assert (stopped.reason, stopped.step) == ("interrupted", 17)
    ended = train(config.model_copy(update={"resume": True}))
    assert (ended.reason, ended.step, ended.best) == (whole.reason, whole.step, whole.best)
    before, after_all = tensors(whole.model), tensors(ended.model)
    assert all(torch.equal(before[name], after_all[name]) for name in before)
    assert read_description(ended.model).digest == read_description(whole.model).digest
    # Ended trainings resume to their end at once.
    assert train(config.model_copy(update={"resume": True})).step == whole.step


def test_other_settings_are_not_resumed(tmp_path: Path, value_head_backbone: Path) -> None:
    small_training(tmp_path, value_head_backbone, epochs=1)
    with pytest.raises(FailedPreconditionError, match="other settings or data"):
        small_training(tmp_path, value_head_backbone, epochs=1, seed=5, resume=True)


def test_training_stops_when_it_gets_no_better(tmp_path: Path, value_head_backbone: Path) -> None:
    # A rate of next to nothing: the figures stay what they are.
    summary = small_training(tmp_path, value_head_backbone, epochs=50, patience=2, learning_rate=1e-12)
    history = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert summary.reason == "stopped early"
    best = max(range(len(history)), key=lambda index: (history[index]["auc"], -history[index]["loss"]))
    assert len(history) == best + 1 + 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_tokens": CONTEXT + 1}, f"at most {CONTEXT} tokens"),
        ({"data": "missing.jsonl"}, "missing.jsonl cannot be read"),
        ({"backbone": Path("missing")}, "missing is not a folder"),
    ],
)
def test_settings_that_cannot_be_are_named(
    tmp_path: Path, value_head_backbone: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        small_training(tmp_path, **({"backbone": value_head_backbone} | fields))


def test_examples_of_one_kind_are_refused(tmp_path: Path, value_head_backbone: Path) -> None:
    lines = [line | {"label": True} for line in labelled_lines(make_sums(10, 1))]
    write_lines(tmp_path / "data.jsonl", lines)
    with pytest.raises(InvalidArgumentError, match="all right or all wrong"):
        train(training_config(tmp_path, value_head_backbone))
    write_lines(tmp_path / "eval.jsonl", labelled_lines(make_sums(10, 2)))
    with pytest.raises(InvalidArgumentError, match="a right and a wrong response"):
        train(training_config(tmp_path, value_head_backbone, eval_data=str(tmp_path / "eval.jsonl"), loss="pairwise"))


def make_encoder(folder: Path) -> Encoder:
    """The encoder of a value head's folder."""
    described = read_description(folder)
    return Encoder(load_tokenizer(folder), described.max_tokens, described.end_token_id, described.template)
