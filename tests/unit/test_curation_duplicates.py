"""Duplicates: exact ones after normalization, near ones by shared words, with the same numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.cli.prompts.duplicates import (
    choose_rows,
    find_duplicates,
    hash_grams,
    jaccard,
    normalize,
    numbers,
    signature,
    tokens,
)
from perigee.curation.findings import Decision, Question

STORY = (
    "A baker makes 24 rolls every morning and sells them for 3 dollars each at the market. On Sundays he also bakes "
    "12 cakes and sells each of them for 15 dollars. He gives away 4 rolls a day to the school next door. How many "
    "dollars does the baker take in over a week in which every roll and every cake that is not given away is sold?"
)


def dropped(*texts: str, threshold: float = 0.7) -> dict[str, tuple[str, str]]:
    questions = [Question(str(i), text, "math") for i, text in enumerate(texts)]
    findings = list(find_duplicates(questions, threshold))
    assert [finding.id for finding in findings] == [question.id for question in questions]
    return {
        finding.id: (finding.reason, finding.details["duplicate_of"])
        for finding in findings
        if finding.decision is Decision.DROP
    }


def test_exact_duplicates_after_normalization() -> None:
    assert dropped("What is  2+3?", "what is 2+3", "What is 2-3?", "WHAT IS\n2+3 ?") == {
        "1": ("exact duplicate", "0"),
        "3": ("exact duplicate", "0"),
    }


def test_a_reworded_story_is_a_near_duplicate() -> None:
    assert dropped(STORY, STORY.replace("the school next door", "the school nearby")) == {"1": ("near duplicate", "0")}


def test_the_same_story_with_other_numbers_is_another_question() -> None:
    assert dropped(STORY, STORY.replace("24 rolls", "36 rolls")) == {}


def test_short_expressions_are_not_near_duplicates() -> None:
    assert dropped("((4+5)*3)-6=", "((4+5)-3)*6=", "((4*5)+3)-6=") == {}


def test_a_duplicate_of_a_duplicate_is_one_of_the_first() -> None:
    second = STORY.replace("next door", "nearby")
    third = second.replace("take in", "earn")
    assert dropped(STORY, second, third) == {"1": ("near duplicate", "0"), "2": ("near duplicate", "0")}


def test_a_threshold_of_0_looks_for_exact_ones_alone() -> None:
    assert dropped(STORY, STORY.replace("next door", "nearby"), STORY.upper(), threshold=0) == {
        "2": ("exact duplicate", "0")
    }


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_almost_all_pairs_at_the_threshold(threshold: float) -> None:
    def recall(rows: int) -> float:
        return 1 - float((1 - threshold**rows) ** (128 // rows))

    rows = choose_rows(threshold)
    assert recall(rows) >= 0.999
    assert all(recall(more) < 0.999 for more in range(rows + 1, 129))


def test_signatures_agree_as_often_as_texts_are_alike() -> None:
    rng = random.Random(5)
    errors = []
    for _ in range(60):
        words = [f"w{rng.randrange(400)}" for _ in range(200)]
        other = [word if rng.random() > 0.05 else f"x{rng.randrange(400)}" for word in words]
        one, two = hash_grams(" ".join(words)), hash_grams(" ".join(other))
        errors.append(float(np.mean(signature(one) == signature(two))) - jaccard(one, two))
    # 60 x 128 comparisons: the mean is within five standard errors of 0.
    assert abs(float(np.mean(errors))) < 5 * 0.5 / (60 * 128) ** 0.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=30), min_size=1, max_size=25), st.sampled_from([0.5, 0.8]))
def test_what_stays_has_no_duplicate_left_and_what_goes_has_one(texts: list[str], threshold: float) -> None:
    questions = [Question(str(i), text, "math") for i, text in enumerate(texts)]
    kept: list[Question] = []
    for question, finding in zip(questions, find_duplicates(questions, threshold), strict=True):
        similar = {
            other.id: jaccard(hash_grams(normalize(question.text)), hash_grams(normalize(other.text))) for other in kept
        }
        if finding.decision is Decision.KEEP:
            assert all(normalize(other.text) != normalize(question.text) for other in kept)
            kept.append(question)
        else:
            assert similar[finding.details["duplicate_of"]] >= threshold


def test_words_and_numbers() -> None:
    text = normalize("Find  x² if\n3.5x_1 = \\frac{1}{2}!")
    assert text == "find x2 if 3.5x_1 = \\frac{1}{2}"
    assert tokens(text) == [
        "find",
        "x",
        "2",
        "if",
        "3.5",
        "x",
        "_",
        "1",
        "=",
        "\\",
        "frac",
        "{",
        "1",
        "}",
        "{",
        "2",
        "}",
    ]
    assert numbers(text) == ["1", "1", "2", "2", "3.5"]
