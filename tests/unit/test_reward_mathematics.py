"""Finding, reading and comparing mathematical answers, as far as no algebra is needed."""

from __future__ import annotations

import string
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward.mathematics.algebra import SympyAlgebra
from services.reward.mathematics.answers import find_final_answer
from services.reward.mathematics.comparatives import read_comparatives
from services.reward.mathematics.compare import agree
from services.reward.mathematics.expectations import ANYTHING, Form, expect
from services.reward.mathematics.labels import read_labels
from services.reward.mathematics.normalise import normalise, squeeze
from services.reward.mathematics.number_words import read_number_words
from services.reward.mathematics.numbers import read_number
from services.reward.mathematics.quantities import read_quantity
from services.reward.mathematics.questions import with_question
from services.reward.mathematics.reading import read_shape
from services.reward.mathematics.shapes import Assignment, Group, Matrix, Region, Relation, Scalar
from services.reward.mathematics.units import read_unit
from services.reward.verifiers.math import IN_PROCESS_CHARACTERS, compare_plainly

# What answers are made of, so that arbitrary ones come near real ones.
PIECES = (
    r"\frac \sqrt \boxed{ \text{ \left( \right) \{ \} \pm \pi \cup \infty { } ( ) [ ] $ $$ \( \) \[ \] \\ & , ; : = < "
    r"> \begin{pmatrix} \end{pmatrix} + - * / ^ _ ! % . ° | x y a e i 1 2 10 0.5 1,000 and or not the answer is cm m/s"
)
ANSWERS = st.lists(st.one_of(st.sampled_from(PIECES.split()), st.text(string.printable, max_size=3)), max_size=25).map(
    " ".join
)


@settings(deadline=None, max_examples=400)
@given(ANSWERS, ANSWERS)
def test_no_text_is_too_strange_to_be_compared(reference: str, answer: str) -> None:
    found = find_final_answer(answer)
    for text in (answer, found or "")[: 2 if found else 1]:
        assert compare_plainly(reference[:IN_PROCESS_CHARACTERS], text[:IN_PROCESS_CHARACTERS]) in (True, False, None)


@settings(deadline=None, max_examples=200)
@given(ANSWERS)
def test_an_answer_agrees_with_itself(text: str) -> None:
    if normalise(text):
        assert compare_plainly(text, text) is True


@settings(deadline=None)
@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_integers_agree_exactly_when_they_are_equal(left: int, right: int) -> None:
    assert compare_plainly(str(left), str(right)) is (left == right)
    assert compare_plainly(str(left), f"{left}.0") is True
    assert compare_plainly(str(left), f"{left:,}") is True
    assert compare_plainly(str(left), f"${left}$") is True


@settings(deadline=None)
@given(st.decimals(-(10**6), 10**6, places=4), st.decimals(-(10**6), 10**6, places=4))
def test_decimals_agree_exactly_when_they_are_equal(left: Decimal, right: Decimal) -> None:
    assert compare_plainly(f"{left:f}", f"{right:f}") is (left == right)


@settings(deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_read_in_every_form(up: int, down: int) -> None:
    value = Fraction(up, down)
    forms = [f"{up}/{down}", f"\\frac{{{up}}}{{{down}}}", f"\\dfrac{{{up}}}{{{down}}}", f"${up} / {down}$"]
    numbers = [read_number(normalise(form)) for form in forms]
    assert [number.value if number else None for number in numbers] == [value] * len(forms)


@settings(deadline=None)
@given(st.integers(1, 999), st.integers(1, 50), st.integers(2, 51))
def test_mixed_numbers_are_no_products(whole: int, up: int, down: int) -> None:
    if up >= down:
        up, down = down - 1, up + 1
    for form in (f"{whole} {up}/{down}", f"{whole}\\frac{{{up}}}{{{down}}}"):
        number = read_number(normalise(form))
        assert number is not None
        assert number.value == whole + Fraction(up, down)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_only_numbers_are_read_as_plain_numbers(text: str) -> None:
    number = read_number(text)
    if number is not None and text.isascii() and text.strip().isdigit():
        assert number.value == Fraction(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("twenty-four", Fraction(24)),
        ("three and a half", Fraction(7, 2)),
        ("three quarters", Fraction(3, 4)),
        ("one hundred twenty-three thousand four hundred fifty-six", Fraction(123456)),
        ("1.3 million", Fraction(1_300_000)),
        ("minus eight", Fraction(-8)),
        ("two dozen", Fraction(24)),
        ("five five", None),
        ("the one", None),
        ("million", None),
    ],
)
def test_numbers_in_words(text: str, value: Fraction | None) -> None:
    assert read_number_words(text) == value


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("We get 5.\n\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("First \\boxed{1}, which is wrong. So \\boxed{2}", "2"),
        ("\\boxed{12", None),
        ("\\boxed{}", None),
        ("<think>\\boxed{1}</think>It is \\boxed{2}", "2"),
        ("<think>The answer is 2.", None),
        ("The answer is 3.14.", "3.14"),
        ("The answer is not 5 but 7.", "7"),
        ("The answer is $7$, because $3+4=7$.", "7"),
        ("**Answer:**\n\n$$x = 5$$", "x = 5"),
        ("She pays 3 * $1.25 = $3.75.", "3 * $1.25 = $3.75"),
        ("12 apples less 3 apples leaves 9 apples.", "9"),
        ("The rope is 2.4 m long.", "2.4 m"),
        ("Some work.\n#### 18", "18"),
        ("The answer is", None),
        ("", None),
        ("8!", "8!"),
        ("The answer is 8!.", "8!"),
    ],
)
def test_final_answers_are_found(response: str, answer: str | None) -> None:
    assert find_final_answer(response) == answer


def test_long_responses_are_searched_at_their_end_and_never_cut() -> None:
    filling = "We think about it. " * 10_000
    assert find_final_answer(f"The answer is 5.\n{filling}\nThe answer is 7.") == "7"
    assert find_final_answer(f"\\boxed{{5}}\n{filling}") == "5"
    expression = "+".join(map(str, range(2000)))
    assert find_final_answer(expression) == expression
    assert find_final_answer(expression, marked=True) == expression


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("$\\dfrac12$", "\\frac{1}{2}"),
        ("{1 \\over 2}", "\\frac{1}{2}"),
        ("\\left( 1 ,\\, 2 \\right]", "( 1 , 2 ]"),
        ("86{,}400", "86400"),
        ("86 400", "86400"),
        ("(1,234)", "(1,234)"),
        ("2,3", "2,3"),
        ("3 × 10⁻³", "3 * 10^{-3}"),
        ("√2 + ∛5", "\\sqrt{2} + \\sqrt[3]{5}"),
        ("x <= -2 \\text{ or } x \\geq 2", "x ≤ -2 or x ≥ 2"),
        ("60^\\circ", "60°"),
        ("\\{1, 2\\}", "⦃1, 2⦄"),
        ("2x = 6 \\Rightarrow x = 3", "x = 3"),
        ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1, y=2"),
    ],
)
def test_notations_become_one(text: str, normalised: str) -> None:
    assert squeeze(normalise(text)) == squeeze(normalised)


@settings(deadline=None, max_examples=200)
@given(ANSWERS)
def test_what_is_normalised_stays_so(text: str) -> None:
    once = normalise(text)
    assert compare_plainly(once, text) in (True, None, False)  # and no fault


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("5", Scalar("5")),
        ("1, 2", Group("list", ("1", "2"))),
        ("x = 1 or x = 2", Group("list", ("x = 1", "x = 2"))),
        ("⦃1, 2⦄", Group("set", ("1", "2"))),
        ("(1, 2)", Group("tuple", ("1", "2"), "()")),
        ("x = 5", Assignment("x", "5")),
        ("f(x) = 2x = y", Assignment("f(x)", "y")),
        ("x + y = 5", Relation("x + y", "=", "5")),
    ],
)
def test_answers_are_taken_apart(text: str, shape: object) -> None:
    assert read_shape(text) == shape


def test_intervals_and_inequalities_are_regions_and_arrays_matrices() -> None:
    for text in ("(1, 2]", "1 < x ≤ 2", "x > 1 and x ≤ 2", "x ∈ (1, 2]"):
        region = read_shape(text)
        assert isinstance(region, Region)
        [interval] = region.parts
        assert (interval.low, interval.high, interval.low_open, interval.high_open) == ("1", "2", True, False)
    assert read_shape("[[1, 2], [3, 4]]") == Matrix((("1", "2"), ("3", "4")))
    assert read_shape("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}") == Matrix((("1", "2"), ("3", "4")))


def test_units_are_read_and_converted() -> None:
    speed, other = read_unit("km/h"), read_unit("kilometers per hour")
    assert speed == other
    assert speed is not None
    assert speed.factor == Fraction(5, 18)
    assert read_unit("apples") is None
    compound = read_quantity("2 hours and 30 minutes")
    assert (compound.body, compound.unit) == ("5/2", read_unit("h"))
    assert read_quantity("16 apples").body == "16"


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("16", "sixteen", True),
        ("16", "4+12", False),
        ("16", "32/2", True),
        ("16", "2^4", None),
        ("2.4 m", "240 cm", True),
        ("2.4 m", "2.4 cm", False),
        ("50\\%", "0.5", True),
        ("0.5", "0.5%", False),
        ("3:30 PM", "15:30", True),
        ("3:30 PM", "3:30 AM", False),
        ("\\{1,2\\}", "{2, 1}", True),
        ("(1,2)", "(2,1)", False),
        ("x = 4", "b = 4", False),
        ("x = 4", "4", True),
        ("(1,4]", "[1,4]", False),
        ("0.333333", "1/3", True),
        ("1/3", "0.33", False),
        ("1/3", "0.333...", True),
        ("0.3", "0.30000000000000004", True),
        ("x+1", "1+x", None),
    ],
)
def test_plain_answers_need_no_algebra(reference: str, answer: str, expected: bool | None) -> None:
    assert compare_plainly(reference, answer) is expected


@pytest.mark.parametrize(
    ("reference", "response", "answer"),
    [
        # Checks, remarks and questions after the answer.
        ("8", "**x = 8**\n\n*Check:* left side 42, right side 32 + 10 = 42 ✓", "x = 8"),
        ("8", "x = 7.\n\nCheck: 2 · 7 = 14, which is not 16. So x = 8.", "x = 8"),
        ("14 m", "Each side is 14 m long. (If we wanted to fence it, we would need 56 m.)", "14 m"),
        ("12", "So there are 12 pairs. It would be 24 if the order mattered.", "12"),
        (
            "20",
            "Rosa is 20 years old. The question was how old she is, given that she was 10 ten years ago.",
            "20 years",
        ),
        ("8", "The answer is 13. That's wrong: 15 − 7 = 8, so it is 8.", "8"),
        # What a sentence states, and where, when or of what.
        ("113", "113 is the smallest prime exceeding 110.", "113"),
        ("2", "She gets $2 back from her $50 bill.", "$2"),
        ("16", "There are 16 numbers between 20 and 50 that are divisible by 2.", "16"),
        ("35", "The class has 35 students: 21 girls and 14 boys.", "35"),
        ("324", "**Value after two years: $324**", "$324"),
        ("10", "Therefore you can choose 2 books from 5 in 10 different ways.", "10"),
        # The form that is expected.
        ("(4, -1)", "The circle is centered at (4, −1) and its radius is 5.", "(4, −1)"),
        ("y = 2x", "The line has the equation y = 2x with slope 2.", "y = 2x"),
        ("10:20 PM", "It ends at 10:20 PM, 2 hours after it started at 8:20 PM.", "10:20 PM"),
        ("2, 5", "One root is 2. The other one is 5.", "2, 5"),
        ("quotient 15, remainder 7", "The remainder is 7 and the quotient is 15.", "quotient 15, remainder 7"),
        # Several answers to a question that has one.
        ("2/5", "The probability could be 2/3, or possibly 2/5.", "2/3, 2/5"),
        ("2/5", "The answer is 2/5. It might also be 2/3.", "2/5, 2/3"),
        ("8", "The answer is 7.\n\nThe answer is 8.", "8, 7"),
        ("35", "\\boxed{\\text{There are } 35 \\text{ students}}", "35"),
        # Nothing is stated.
        ("9", "12 − 3 = 9, so Tom has 9. Now we need to", None),
        ("3", "Let me think about the 3 cases separately.", None),
    ],
)
def test_answers_are_what_the_last_statement_says(reference: str, response: str, answer: str | None) -> None:
    assert find_final_answer(response, expectation=expect(reference)) == answer


def test_long_sentences_of_any_kind_take_no_long_time() -> None:
    for piece in ("if were would ", "a of ", "or 1, ", "(x ", "greater than 1 ", "it is wrong ", "no a b c "):
        for reference in ("5", "x > 2", "(1, 2)", "2, 5", "Yes", "no solution"):
            find_final_answer(piece * (2900 // len(piece)), expectation=expect(reference))


@pytest.mark.parametrize(
    ("reference", "form", "count"),
    [
        ("5", Form.SCALAR, 1),
        ("5 m", Form.SCALAR, 1),
        ("(1, 2)", Form.TUPLE, 2),
        ("2, 5", Form.LIST, 2),
        ("x > 2", Form.REGION, 1),
        ("x \\ne 2", Form.REGION, 1),
        ("y = 2x + 1", Form.EQUATION, 1),
        ("5:3", Form.RATIO, 1),
        ("3:30 PM", Form.CLOCK, 1),
        ("\\emptyset", Form.WORDS, 1),
        ("Yes", Form.YES_NO, 1),
    ],
)
def test_references_tell_the_form_of_an_answer(reference: str, form: Form, count: int) -> None:
    expectation = expect(reference)
    assert (expectation.form, expectation.count) == (form, count)


def test_questions_tell_whether_things_or_times_are_asked_for() -> None:
    number = expect("5")
    assert with_question(number, "") is number
    assert with_question(number, "How many notebooks can she buy?").asks_count
    assert with_question(number, "After how many weeks has she 5 dollars?").asks_time is True
    assert with_question(number, "What does it cost?").asks_time is False
    assert with_question(ANYTHING, "How many?") is ANYTHING


@pytest.mark.parametrize(
    ("sentence", "region"),
    [
        ("x must be greater than −2", "(−2, ∞)"),
        ("x is no greater than 3", "(-∞, 3]"),
        ("t is at least 1 and less than 4", "⦃x | 1 ≤ x < 4⦄"),
        ("t lies between 1 and 4, inclusive", "⦃x | 1 ≤ x ≤ 4⦄"),
        ("x is less than 2 or greater than 5", "(-∞, 2) ∪ (5, ∞)"),
        ("all real numbers except 2", "x ≠ 2"),
        ("defined for nonnegative numbers", "[0, ∞)"),
        ("x > 2", None),
        ("x is 5", None),
    ],
)
def test_inequalities_in_words_are_intervals(sentence: str, region: str | None) -> None:
    assert read_comparatives(sentence) == region


def test_labels_tell_values_apart_and_units_do_not() -> None:
    assert read_labels(("11 nickels", "9 dimes")) == {"nickel": "11", "dime": "9"}
    assert read_labels(("quotient 15", "remainder 7")) == {"quotient": "15", "remainder": "7"}
    assert read_labels(("4 cm", "9 cm")) is None


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("n = 5k + 2, k \\in \\mathbb{Z}", "n = 5m - 3", True),
        ("n = 5k + 2, k \\in \\mathbb{Z}", "n = 5m + 3", False),
        ("n = 5k + 2, k \\in \\mathbb{Z}", "n = 10m + 2", False),
        ("n = 5k + 2, k \\in \\mathbb{Z}", "7", False),
        ("n = 5k + 2, k \\in \\mathbb{Z}", "n \\equiv 2 \\pmod 5", True),
        ("x \\equiv 2 \\pmod 5", "x \\equiv 2 \\pmod 7", False),
        ("x = \\frac{\\pi}{2} + n\\pi, n\\in\\mathbb{Z}", "\\frac{(2k+1)\\pi}{2}, k \\in \\mathbb{Z}", True),
        ("(3t, -2t), t\\in\\mathbb{Z}", "(-3k, 2k)", True),
        ("(3t, -2t), t\\in\\mathbb{Z}", "(3k, 2k)", False),
        ("\\frac{\\sin^2 x}{2} + C", "-\\frac{\\cos^2 x}{2} + K", True),
        ("x^2 + C", "x^2 + 2x", False),
        ("x^2 + C", "x^2", False),
        ("y = Ce^{3x}", "y = Ae^{3x}", True),
        ("a + c", "a + b", False),
        ("11 nickels and 9 dimes", "9 nickels and 11 dimes", False),
        ("11 nickels and 9 dimes", "9 dimes and 11 nickels", True),
        ("\\emptyset", "\\{\\}", True),
        ("\\emptyset", "\\{0\\}", False),
        ("23", "\\text{(C) } 23", True),
        ("23", "\\text{(C) } 16", False),
        ("odd", "f is an odd function", True),
        ("odd", "f is neither even nor odd", False),
        ("no solution", "There is no solution other than 2", False),
    ],
)
def test_answers_agree_up_to_the_names_of_what_is_free(reference: str, answer: str, expected: bool) -> None:
    assert agree(reference, answer, SympyAlgebra()) is expected
