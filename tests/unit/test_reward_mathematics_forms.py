"""Answers in other forms than the reference: regions, vectors, units, ranks, denials, words."""

from __future__ import annotations

import pytest

from services.reward.mathematics.algebra import SympyAlgebra
from services.reward.mathematics.answers import find_final_answer
from services.reward.mathematics.basis import read_basis
from services.reward.mathematics.check import check
from services.reward.mathematics.clauses import clause_about
from services.reward.mathematics.compare import agree
from services.reward.mathematics.expectations import Form, expect
from services.reward.mathematics.formulas import name_repeating
from services.reward.mathematics.number_words import read_rank
from services.reward.mathematics.parts import name_part
from services.reward.mathematics.quantities import express_in, read_clock
from services.reward.mathematics.questions import find_asked_unit, with_question
from services.reward.mathematics.sentences import split_sentences
from services.reward.mathematics.words import words_agree


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("(-1, 1)", "|a| < 1", True),
        ("[-1, 1]", "|a| < 1", False),
        ("(1, 5)", "|x - 3| < 2", True),
        ("(1, 5)", "|x + 3| < 2", False),
        ("(-\\infty, -2) \\cup (2, \\infty)", "|x| > 2", True),
        ("(-\\infty, -2) \\cup (2, \\infty)", "|x| < 2", False),
        ("(-\\infty, \\infty)", "all real numbers", True),
        ("(-\\infty, \\infty)", "all positive numbers", False),
        # A pair in round brackets is no closed interval; where it cannot be an interval, brackets do not matter.
        ("(-3, 5)", "[-3, 5]", False),
        ("(5, -3)", "[5, -3]", True),
        # The name of a set is not the name of what is in it.
        ("x = 4", "S = \\{4\\}", True),
        ("x = 4", "S = \\{-4\\}", False),
        ("x = 4", "y = 4", False),
        ("-3 < x < 5", "S = (-3, 5)", True),
        ("\\langle 3, -4 \\rangle", "3\\mathbf{i} - 4\\mathbf{j}", True),
        ("\\langle 3, -4 \\rangle", "3\\mathbf{i} + 4\\mathbf{j}", False),
        ("(3, 4)", "3 + 4i", False),
        ("2m + 3", "3 + 2m dollars", True),
        ("2m + 3", "3 + 2n dollars", False),
        ("11", "11th day", True),
        ("11", "11st day", False),
        ("0.\\overline{45}", "2x", False),
        ("5E_{16}", "133 per week", False),
    ],
)
def test_answers_in_other_notations(reference: str, answer: str, expected: bool) -> None:
    assert agree(reference, answer, SympyAlgebra()) is expected


@pytest.mark.parametrize("reference", ["\\text{no solution}", "even, 3", "\\text{Monday at } 3", "n is any odd number"])
@pytest.mark.parametrize("answer", ["infinitely many, $(5-3t, t)$ for any real number $t$", "x + 1", "7", "n = 2k + 1"])
def test_words_as_a_reference_are_never_a_failure(reference: str, answer: str) -> None:
    assert check({"references": [reference], "answer": answer})["status"] in ("different", "unreadable")


def test_a_reference_that_is_no_mathematics_is_a_failure() -> None:
    assert check({"references": ["\\frac{1}{"], "answer": "x + 1"})["status"] == "error"


@pytest.mark.parametrize(
    ("reference", "question", "response", "answer"),
    [
        # What is denied is no answer, and what may be another one is none either.
        ("9", "", "One would answer 9, but the answer is not 9, since some count twice.", None),
        ("12", "", "The answer is not 9. There are 12.", "12"),
        ("12", "", "The answer is not 9 but 12.", "12"),
        ("\\pi", "", "The answer is π, unless it is 4π.", "π, 4π"),
        ("\\pi", "", "It is π, but 2π is possible as well.", "π, 2π"),
        # A condition is a setting, unless it is what is asked for.
        ("[-3, 3]", "", "Since |x| ≤ 3, the root is defined precisely when -3 ≤ x ≤ 3.", "-3 ≤ x ≤ 3"),
        ("(-\\infty, -3) \\cup [1, \\infty)", "", "So it consists of all x with x < -3 or x ≥ 1.", "x < -3 or x ≥ 1"),
        ("(-\\infty, \\infty)", "", "x² + 1 ≥ 1 > 0. So it holds for all real numbers x.", "ℝ"),
        ("(-3, 5)", "For which x is it true?", "It holds for -3 < x < 5.", "-3 < x < 5"),
        # What a sentence is about, and what it is a part of.
        ("2900", "", "Exactly 2900 grams are what is left of her supply of 5 kg.", "2900 grams"),
        ("1/4", "", "That leaves 12.5 miles of the 50, so one quarter of the route is left.", "1/4"),
        ("10", "", "The solution is 0.3·40 = 12 litres.\n\nSo x = 10.\n\nTherefore 10 litres are added.", "10 litres"),
        ("i", "", "The conjugate of 1/i is i.", "i"),
        ("3:01:12 pm", "", "As 72 seconds is 1 minute and 12 seconds, it is at 3:01:12 PM.", "3:01:12 PM"),
        ("14:55", "", "Adding this to 13:20 gives **14:55** (2:55 pm).", "14:55, 2:55 pm"),
        ("11", "On which day is it?", "On day 3 it holds 60, so it is empty on the eleventh day.", "11"),
        ("25", "What percent are red?", "The answer is 1/4, which is 25%.", "25%"),
    ],
)
def test_what_a_sentence_states(reference: str, question: str, response: str, answer: str | None) -> None:
    assert find_final_answer(response, expectation=with_question(expect(reference), question)) == answer


def test_questions_tell_intervals_from_points() -> None:
    pair = expect("(-3, 5)")
    assert with_question(pair, "Solve the inequality.").form is Form.REGION
    assert with_question(pair, "For which x do the points lie inside?").form is Form.TUPLE
    assert with_question(expect("(5, -3)"), "Solve the inequality.").form is Form.TUPLE


def test_amounts_are_expressed_in_the_unit_that_is_asked_for() -> None:
    asked = find_asked_unit("How many minutes does it take?")
    assert asked is not None
    assert express_in("2 hours 15 minutes", *asked) == "135 minutes"
    assert express_in("135", *asked) == "135"
    assert express_in("135 minutes", *asked) == "135 minutes"
    assert express_in("135 km", *asked) == "135 km"
    assert find_asked_unit("How many hours and how many minutes?") is None
    assert with_question(expect("2 h"), "How many minutes?").asked_unit is None


def test_numbers_in_words_that_are_ranks_or_parts() -> None:
    assert read_rank("He reads it on the twenty-first day.", "day") == "He reads it on day 21."
    assert read_rank("the last day, the third row", "day") == "the last day, the third row"
    assert name_part("So a third of the race is left") == "So 1/3 of the race is left"
    assert name_part("So half of the 20 is 10") == "So half of the 20 is 10"


def test_repeating_digits_in_words() -> None:
    assert name_repeating("0.58333... (repeating 3)") == "0.58\\overline{3}"
    assert name_repeating("0.416, with the 16 repeating") == "0.4\\overline{16}"
    assert name_repeating("0.416, with the 5 repeating") == "0.416, with the 5 repeating"
    assert [sentence.text for sentence in split_sentences("So it is 0.5833... (3 again).")] == [
        "So it is 0.5833... (3 again)."
    ]


def test_vectors_of_unit_vectors() -> None:
    assert read_basis("-j + 2i", 2) == ("2", "-1")
    assert read_basis("2i", 2) is None
    assert read_basis("3i + 4k", 2) is None
    assert read_basis("xj + jk", 3) is None


def test_times_with_seconds_are_no_ratios() -> None:
    assert read_clock("3:01:12") is None
    clock = read_clock("3:01:12 pm")
    assert clock is not None
    assert (clock.hour, clock.minute, clock.second) == (3, 1, 12)
    assert read_clock("noon") == read_clock("12:00 pm")


@pytest.mark.parametrize(
    ("expected", "found", "says_so"),
    [
        ("converge", "converges", True),
        ("converge", "It does not converge", False),
        ("converge", "diverges", False),
        ("Birch", "the cheapest oranges are sold by Birch", True),
        ("Birch", "the cheapest oranges are not sold by Birch", False),
        ("Birch", "Alder is first and is followed by Birch", False),
    ],
)
def test_words_in_sentences(expected: str, found: str, says_so: bool) -> None:
    assert words_agree(expected, found) is says_so


def test_the_clause_about_whom_the_question_asks() -> None:
    sentence = "Abe is a knight and Bea is a knave"
    assert clause_about("Bea", sentence) == "Bea is a knave"
    assert clause_about("Cid", sentence) == sentence
    assert clause_about("Abe", "Abe is a knight and strong") == "Abe is a knight and strong"
