"""The parts of the value head: losses by hand, figures by brute force, what is read, and in which batches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from services.reward.value_head.data import (
    Example,
    LabelledResponse,
    Preference,
    draw_steps,
    encode_examples,
    read_examples,
    split_by_question,
    split_by_tokens,
)
from services.reward.value_head.folder import (
    TEMPLATE,
    Description,
    Encoder,
    load_tokenizer,
    read_description,
    write_description,
    writing_folder,
)
from services.reward.value_head.network import pad, pairwise_loss, pointwise_loss
from services.reward.value_head.training import area_under_curve, fit_threshold, scheduled_rate, sigmoid
from tests.fixtures.value_head import EOS, training_config, write_lines, write_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder / "tokenizer.json")
    return Encoder(load_tokenizer(folder), 40, EOS)


def test_the_pointwise_loss_and_its_gradient_are_those_worked_out_by_hand() -> None:
    scores = torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64, requires_grad=True)
    loss = pointwise_loss(scores, torch.tensor([True, True, True]))
    # p = 1/2, 3/4, 1/4
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3) + math.log(4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-1 / 2, -1 / 4, -3 / 4])
    scores.grad = None
    pointwise_loss(scores, torch.tensor([False, False, False])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad.tolist() == pytest.approx([1 / 2, 3 / 4, 1 / 4])


def test_the_pairwise_loss_and_its_gradient_are_those_worked_out_by_hand() -> None:
    chosen = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([5.0, 1.0 - math.log(3), math.log(3)], dtype=torch.float64, requires_grad=True)
    loss = pairwise_loss(chosen, rejected)
    # p(chosen preferred) = 1/2, 3/4, 1/4
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3) + math.log(4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-1 / 2, -1 / 4, -3 / 4])
    assert rejected.grad.tolist() == pytest.approx([1 / 2, 1 / 4, 3 / 4])


def test_losses_of_far_scores_are_finite() -> None:
    far = torch.tensor([1e4, -1e4])
    assert pointwise_loss(far, torch.tensor([False, True])).item() == pytest.approx(2e4)
    assert pairwise_loss(far[1:], far[:1]).item() == pytest.approx(2e4)


scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


@given(scored)
def test_the_area_under_the_curve_is_that_of_all_pairs(pairs: list[tuple[int, bool]]) -> None:
    wins = [
        1.0 if right > wrong else 0.5 if right == wrong else 0.0
        for right, is_right in pairs
        for wrong, is_wrong in pairs
        if is_right and not is_wrong
    ]
    scores = np.array([score for score, _ in pairs], dtype=np.float64)
    labels = np.array([label for _, label in pairs])
    assert area_under_curve(scores, labels) == pytest.approx(sum(wins) / len(wins))


@given(scored)
def test_no_threshold_is_better_than_the_fitted_one(pairs: list[tuple[int, bool]]) -> None:
    probabilities = sigmoid(np.array([score for score, _ in pairs], dtype=np.float64))
    labels = np.array([label for _, label in pairs])
    threshold, accuracy = fit_threshold(probabilities, labels)
    assert np.mean((probabilities >= threshold) == labels) == pytest.approx(accuracy)
    others = [np.mean((probabilities >= other) == labels) for other in [0.0, 1.0, *(probabilities + 1e-9)]]
    assert accuracy >= max(others) - 1e-12


def test_the_threshold_lies_half_way_between_right_and_wrong() -> None:
    threshold, accuracy = fit_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True]))
    assert (threshold, accuracy) == (pytest.approx(0.5), 1.0)


def test_probabilities_of_far_scores_do_not_overflow() -> None:
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=60))
@settings(max_examples=200)
def test_an_input_keeps_the_end_of_its_response(encoder: Encoder, question: str, reference: str, response: str) -> None:
    tokens = encoder.encode(question, reference, response)
    head = encoder.tokenizer.encode(
        TEMPLATE.removesuffix("{response}").format(question=question, reference=reference)
    ).ids
    tail = encoder.tokenizer.encode(response).ids
    assert tokens[-1] == EOS
    assert len(tokens) == min(encoder.max_tokens, len(head) + len(tail) + 1)
    if len(tokens) < encoder.max_tokens:
        assert tokens == [*head, *tail, EOS]
    room = encoder.max_tokens - 1
    kept = min(len(tail), max(room - len(head), room // 2))
    assert tokens[len(tokens) - 1 - kept : -1] == tail[len(tail) - kept :]
    front = tokens[: len(tokens) - 1 - kept]
    assert front == head[len(head) - len(front) :]
    # The question gives way only to half of the room.
    assert len(front) == len(head) or kept <= room // 2 + 1


def test_braces_and_special_tokens_in_texts_are_text(encoder: Encoder) -> None:
    tokens = encoder.encode("{reference}", "{0}", "<eos>")
    assert tokens.count(EOS) == 1
    assert encoder.tokenizer.decode(tokens).endswith("{reference}\n\nReference answer:\n{0}\n\nResponse:\n<eos>")


LABELLED = {"question": "q", "reference": "r", "response": "a", "label": 1, "source": "left alone"}
PREFERENCE = {"question": "q", "reference": "r", "chosen": "a", "rejected": "b"}


def test_both_kinds_of_lines_are_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        [
            LABELLED,
            PREFERENCE,
            LABELLED | {"response": "chosen", "label": False},
            *(LABELLED | {"label": label} for label in ("correct", "wrong", "ungradable")),
        ],
    )
    assert read_examples(path) == [
        LabelledResponse(question="q", reference="r", response="a", label=True),
        Preference(question="q", reference="r", chosen="a", rejected="b"),
        LabelledResponse(question="q", reference="r", response="chosen", label=False),
        *(LabelledResponse(question="q", reference="r", response="a", label=label) for label in (True, False, False)),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "a line holds"),
        (json.dumps({"question": "q", "reference": "r", "response": "a"}), "label: Field required"),
        (json.dumps(LABELLED | {"label": 0.5}), "label"),
        (json.dumps(LABELLED | {"label": "failed"}), "label"),
        (json.dumps({"question": "q", "chosen": "a", "rejected": "b"}), "reference: Field required"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(LABELLED) + "\n\n" + line + "\n")
    with pytest.raises(InvalidArgumentError, match=r"data\.jsonl:3") as raised:
        read_examples(path)
    assert reason in raised.value.message


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda q: len(set(q)) > 1), st.floats(0.01, 0.99))
def test_no_question_is_on_both_sides_of_the_split(questions: list[str], share: float) -> None:
    examples: list[Example] = [Preference(question=q, reference="", chosen="", rejected="") for q in questions]
    training, evaluation = split_by_question(examples, share, seed=3)
    assert training
    assert evaluation
    assert len(training) + len(evaluation) == len(examples)
    assert not {example.question for example in training} & {example.question for example in evaluation}
    assert split_by_question(examples, share, seed=3) == (training, evaluation)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=20))
def test_responses_are_paired_within_their_question_and_none_is_left_out(
    encoder: Encoder, responses: list[tuple[str, bool]]
) -> None:
    examples: list[Example] = [
        LabelledResponse(question=question, reference="", response=str(number), label=label)
        for number, (question, label) in enumerate(responses)
    ]
    data = encode_examples(examples, encoder, seed=0)
    for right, wrong in data.pairs:
        assert responses[right] == (responses[wrong][0], True)
        assert not responses[wrong][1]
    paired = {index for pair in data.pairs for index in pair}
    for question in "abc":
        own = {index for index, (other, _) in enumerate(responses) if other == question}
        kinds = {responses[index][1] for index in own}
        assert own & paired == (own if len(kinds) == 2 else set())
    assert {index for unit in data.units("both") for index in unit} == set(range(len(responses)))
    assert data.units("pairwise") == data.pairs
    assert data.units("pointwise") == [(index,) for index in range(len(responses))]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 8))
def test_an_epoch_has_every_unit_once_and_a_seed_one_order(lengths: list[int], batch_size: int) -> None:
    steps = draw_steps(lengths, batch_size, seed=1, epoch=0)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    assert len(steps) == math.ceil(len(lengths) / batch_size)
    assert all(len(step) <= batch_size for step in steps)
    assert draw_steps(lengths, batch_size, seed=1, epoch=0) == steps


def test_epochs_differ_and_steps_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 512).tolist()
    steps = draw_steps(lengths, 16, seed=1, epoch=0)
    assert draw_steps(lengths, 16, seed=1, epoch=1) != steps
    spreads = [max(lengths[index] for index in step) - min(lengths[index] for index in step) for step in steps]
    assert max(spreads) < 200


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 2)), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_unit_within_their_tokens(units: list[tuple[int, int]], max_tokens: int) -> None:
    lengths, sizes = [length for length, _ in units], [size for _, size in units]
    batches = list(split_by_tokens(range(len(units)), lengths, sizes, max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(units)))
    for batch in batches:
        padded = sum(sizes[index] for index in batch) * max(lengths[index] for index in batch)
        assert padded <= max_tokens or len(batch) == 1


def test_padding_is_masked() -> None:
    rows = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    ids, mask = pad(rows, 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_rate_rises_and_falls_in_straight_lines(tmp_path: Path) -> None:
    config = training_config(tmp_path, tmp_path, learning_rate=1.0, warmup_share=0.2)
    rates = [scheduled_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with writing_folder(target) as staging:
        (staging / "a").write_text("old")

    def break_off() -> None:
        with writing_folder(target) as staging:
            (staging / "a").write_text("new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        break_off()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "old"
    with writing_folder(target) as staging:
        (staging / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_digest_names_all_that_matters(tmp_path: Path) -> None:
    description = Description(template=TEMPLATE, max_tokens=8, end_token_id=None, pad_token_id=0, threshold=0.5)

    def digest(weights: str, described: Description = description) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)
        write_description(folder, described)
        return read_description(folder).digest

    digests = [digest("a"), digest("b"), digest("a", description.model_copy(update={"threshold": 0.6}))]
    assert len(set(digests)) == 3
    assert digest("a") == digests[0]


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "No such file"), ("{", "Invalid JSON"), ("{}", "template: Field required")]
)
def test_a_folder_that_is_no_value_head_is_named(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "perigee_value_head.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"perigee_value_head\.json") as raised:
        read_description(tmp_path)
    assert reason in raised.value.message
