"""Reading and comparing mathematical answers."""

from __future__ import annotations

import string
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward.math.algebra import SympyAlgebra
from services.reward.math.check import check
from services.reward.math.compare import agree
from services.reward.math.form import find_fault
from services.reward.math.notation import MAX_DEPTH, normalise, squeeze
from services.reward.math.numbers import read_number, read_number_words
from services.reward.math.parse import Assignment, Group, Matrix, Region, Relation, Scalar, read_shape
from services.reward.math.reference import Asked, check_reference, describe
from services.reward.math.units import read_quantity, read_unit
from services.reward.math.words import words_agree
from services.reward.verifiers.math import IN_PROCESS_CHARACTERS, compare_plainly

# What answers are made of, so that arbitrary ones come near real ones.
PIECES = (
    r"\frac \sqrt \binom \text{ \left( \right) \{ \} \pm \pi \cup \infty \neq \in { } ( ) [ ] $ $$ \( \) \[ \] \\ & , ;"
    r" : = < > \begin{pmatrix} \end{pmatrix} + - * / ^ _ ! % . ° | x y a e i 1 2 10 0.5 1,000 and or not cm m/s ≠ ≤"
)
ANSWERS = st.lists(st.one_of(st.sampled_from(PIECES.split()), st.text(string.printable, max_size=3)), max_size=25).map(
    " ".join
)
ALGEBRA = SympyAlgebra()


def decide(reference: str, answer: str) -> bool | None:
    """Returns whether the answer is the reference, with algebra; None where the check says anything else."""
    plain = compare_plainly(reference, answer)
    if plain is not None:
        return plain
    return {"equal": True, "different": False}.get(check({"references": [reference], "answer": answer})["status"])


@settings(deadline=None, max_examples=400)
@given(ANSWERS, ANSWERS)
def test_no_text_is_too_strange_to_be_compared(reference: str, answer: str) -> None:
    texts = reference[:IN_PROCESS_CHARACTERS], answer[:IN_PROCESS_CHARACTERS]
    assert compare_plainly(*texts) in (True, False, None)
    assert isinstance(find_fault(*texts, f"Simplify {reference}."), str)
    assert isinstance(check_reference(reference), str)
    assert describe(reference).parts >= 1


@settings(deadline=None, max_examples=200)
@given(ANSWERS)
def test_an_answer_agrees_with_itself(text: str) -> None:
    assert compare_plainly(text, text) is True


@pytest.mark.parametrize("text", ["3 \\neq x", "x-1 \\neq 0", "\\{x|x \\neq 1\\}", "x \\neq y", "1 \\neq 2", "\\neq"])
@pytest.mark.parametrize("other", ["x \\neq 3", "5", "x < 1", "(1, 2)"])
def test_inequalities_of_every_kind_are_no_fault(text: str, other: str) -> None:
    for reference, answer in ((text, other), (other, text)):
        assert check({"references": [reference], "answer": answer})["status"] in ("equal", "different", "unreadable")
    assert decide(text, text) is True


@pytest.mark.parametrize("opening", ["\\sqrt{", "(", "\\frac{1}{", "\\{", "x \\in ", "-("])
def test_nesting_without_end_is_no_fault(opening: str) -> None:
    for depth in (MAX_DEPTH + 5, 3000):
        text = opening * depth + "7" + "}" * depth
        assert check({"references": ["\\sqrt{7}"], "answer": text})["status"] in ("different", "unreadable")
        assert "deep" in check_reference(text) or ("(" not in opening and "{" not in opening)


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
    forms = [f"{up}/{down}", f"\\frac{{{up}}}{{{down}}}", f"\\dfrac{{{up}}}{{{down}}}", f"${up} / {down} $"]
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
        ("one hundred and five", Fraction(105)),
        ("one hundred twenty-three thousand four hundred fifty-six", Fraction(123456)),
        ("1.3 million", Fraction(1_300_000)),
        ("minus eight", Fraction(-8)),
        ("a half", Fraction(1, 2)),
        ("five five", None),
        ("the one", None),
        ("million", None),
    ],
)
def test_numbers_in_words(text: str, value: Fraction | None) -> None:
    assert read_number_words(text) == value


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("$\\dfrac12$", "\\frac{1}{2}"),
        ("\\frac 59", "\\frac{5}{9}"),
        ("$\\frac{7}{12} $", "\\frac{7}{12}"),
        ("\\\\frac{1}{2}", "\\frac{1}{2}"),
        ("$8$,$4$", "8,4"),
        ("{1 \\over 2}", "\\frac{1}{2}"),
        ("\\left( 1 ,\\, 2 \\right]", "( 1 , 2 ]"),
        ("86{,}400", "86400"),
        ("86 400", "86400"),
        ("11,\\! 111,\\! 100", "11111100"),
        ("185\\", "185"),
        ("52_{\\text{eight}}", "52_8"),
        ("(1,234)", "(1,234)"),
        ("2,3", "2,3"),
        ("3 × 10⁻³", "3 * 10^{-3}"),
        ("√2 + ∛5", "\\sqrt{2} + \\sqrt[3]{5}"),
        ("x <= -2 \\text{ or } x \\geq 2", "x ≤ -2 or x ≥ 2"),
        ("60^\\circ", "60°"),
        ("\\{1, 2\\}", "⦃1, 2⦄"),
        ("4:30 \\text{ p.m.}", "4:30 pm"),
        ("2x = 6 \\Rightarrow x = 3", "x = 3"),
        ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1, y=2"),
        ("\\begin{align*}y&=1+1\\\\&=2\\end{align*}", "=2"),
    ],
)
def test_notations_become_one(text: str, normalised: str) -> None:
    assert squeeze(normalise(text)) == squeeze(normalised)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("5", Scalar("5")),
        ("1, 2", Group("list", ("1", "2"))),
        ("x = 1 or x = 2", Group("list", ("x = 1", "x = 2"))),
        ("⦃1, 2⦄", Group("set", ("1", "2"))),
        ("(1, 2)", Group("tuple", ("1", "2"), "()")),
        ("x = 5", Assignment("x", "5")),
        ("5 = x", Assignment("x", "5")),
        ("f(x) = 2x = y", Assignment("f(x)", "y")),
        ("x + y = 5", Relation("x + y", "=", "5")),
        ("[[1, 2], [3, 4]]", Matrix((("1", "2"), ("3", "4")))),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", Matrix((("1", "2"), ("3", "4")))),
    ],
)
def test_answers_are_taken_apart(text: str, shape: object) -> None:
    assert read_shape(text) == shape


@pytest.mark.parametrize("text", ["(1, 2]", "1 < x ≤ 2", "x > 1 and x ≤ 2", "x ∈ (1, 2]", "⦃x | 1 < x ≤ 2⦄"])
def test_intervals_and_inequalities_are_regions(text: str) -> None:
    region = read_shape(text)
    assert isinstance(region, Region)
    [interval] = region.parts
    assert (interval.low, interval.high, interval.low_open, interval.high_open) == ("1", "2", True, False)


def test_units_are_read_and_converted() -> None:
    speed, other = read_unit("km/h"), read_unit("kilometers per hour")
    assert speed == other
    assert speed is not None
    assert speed.factor == Fraction(5, 18)
    assert read_unit("apples") is None
    assert read_quantity("16 apples").body == "16"
    assert read_quantity("350$").body == read_quantity("$350").body == "350"
    assert read_quantity(normalise("1,000.99€")).body == "1000.99"


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
        ("3:30 PM", "3:30 p.m.", True),
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
        ("32348", "\\$32{,}348", True),
        ("\\text{even}", "even", True),
        ("23", "\\text{(C) } 23", True),
        ("23", "\\text{(C) } 16", False),
        ("x=\\pm 3", "x=3 \\text{ or } x=-3", True),
        ("x \\equiv 2 \\pmod 5", "x \\equiv 2 \\pmod 7", False),
        ("11 nickels and 9 dimes", "9 nickels and 11 dimes", False),
        ("\\emptyset", "\\{\\}", True),
        ("\\emptyset", "\\{0\\}", False),
        ("(-\\infty, \\infty)", "all real numbers", True),
        # A pair in round brackets is no closed interval; where it cannot be an interval, brackets do not matter.
        ("(-3, 5)", "[-3, 5]", False),
        ("(5, -3)", "[5, -3]", True),
        ("x = 4", "S = \\{-4\\}", False),
        ("a = 1, b = 2", "b = 2, a = 1", True),
        ("a = 1, b = 2", "x = 1, y = 2", False),
        ("-3 < x < 5", "S = (-3, 5)", True),
        # Several answers to a question that has one.
        ("7", "5, 6, 7", False),
        ("37", "\\begin{cases}37\\\\38\\end{cases}", False),
        ("37", "[37,37]", False),
        ("37", "37\\pm 5", False),
        ("37", "x \\neq 37", False),
    ],
)
def test_plain_answers_need_no_algebra(reference: str, answer: str, expected: bool | None) -> None:
    assert compare_plainly(reference, answer) is expected


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("2m + 3", "3 + 2m dollars", True),
        ("2m + 3", "3 + 2n dollars", False),
        ("(3, 4)", "3 + 4i", False),
        ("0.\\overline{45}", "2x", False),
        ("\\frac{50}{11}", "4.\\overline{54}", True),
        ("90^\\circ", "\\frac{\\pi}{2}", True),
        ("x^2+C", "x^2+c", True),
        ("x^2+C", "x^2", False),
        ("y=2x+1", "2x-y+1=0", True),
        ("y=2x+1", "2x-y+2=0", False),
        ("y=2x", "y-y=0", False),
        ("x^2+y^2=1", "0=0", False),
        ("0.5x+1", "\\frac{x}{2}+1", True),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1, 2)", True),
        ("3 + 4i", "4i + 3", True),
        ("3 + 4i", "3 - 4i", False),
        ("F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}", "F_n = \\sum_{k=0}^{n-1} F_{n-k-1} F_k", True),
    ],
)
def test_expressions_are_compared_by_value(reference: str, answer: str, expected: bool) -> None:
    assert agree(reference, answer, ALGEBRA) is expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("2^{1005}", "2^{1005}-1"),
        ("100!", "100!+1"),
        ("7^{7^{7}}", "7^{7^{7}}+1"),
        ("10^{30}", "10^{30}+1"),
        ("\\frac{1}{2^{61}}", "\\frac{1}{2^{60}}"),
        ("\\left(\\frac12\\right)^{100}", "\\left(\\frac13\\right)^{100}"),
        ("\\frac{1}{52!}", "0"),
        ("0", "10^{-400}"),
        ("0", "1e-40"),
        ("e^{-60}", "e^{-50}"),
        ("x", "x+10^{-20}"),
        ("\\sqrt{10^{60}+1}", "10^{30}"),
        ("2^{1005}\\sqrt{2}", "(2^{1005}-1)\\sqrt{2}"),
        ("x+y=10^{20}", "x+y=10^{20}+1"),
        ("12345678901", "12345678901.5"),
        ("(10^{20}, 1)", "(10^{20}+1, 1)"),
    ],
)
def test_values_of_any_size_are_told_apart(left: str, right: str) -> None:
    assert decide(left, right) is decide(right, left) is False
    assert decide(left, left) is decide(right, right) is True


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("2^{1005}", "2 \\cdot 2^{1004}"),
        ("\\sqrt{10^{60}}", "10^{30}"),
        ("e^{-60}", "\\frac{1}{e^{60}}"),
        ("\\sin^2 x + \\cos^2 x - 1", "0"),
        ("(\\sqrt2+\\sqrt3)^2", "5+2\\sqrt6"),
        ("\\frac{1}{52!}", "\\frac{1}{52 \\cdot 51!}"),
    ],
)
def test_values_of_any_size_are_recognised(left: str, right: str) -> None:
    assert decide(left, right) is decide(right, left) is True


@pytest.mark.parametrize(
    ("prompt", "reference", "answer"),
    [
        ("", "\\frac13", "\\int_0^1 x^2dx"),
        ("", "6", "\\gcd(12,18)"),
        ("", "3", "\\log_2 8"),
        ("", "120", "\\binom{10}{3}"),
        ("", "1024", "2^{10}"),
        ("", "6\\sqrt2", "\\sqrt{72}"),
        ("", "3", "10 \\bmod 7"),
        ("", "-2", "\\det\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
        ("", "5050", "\\sum_{k=1}^{100} k"),
        ("", "\\frac12", "\\sin 30^\\circ"),
        ("", "37", "37+0n"),
        ("Write 50/100 in lowest terms.", "\\frac12", "\\frac{50}{100}"),
        ("What is it, as a common fraction?", "\\frac12", "\\frac{2}{4}"),
        ("Factor $x^2-5x+6$.", "(x-2)(x-3)", "x^2-5x+6"),
        ("Factor $x^2-5x+6$.", "(x-2)(x-3)", "6-5x+x^2"),
        ("Simplify \\frac{x^2-1}{x-1}.", "x+1", "\\frac{x^2-1}{x-1}"),
        ("Write 3/8 as a percent.", "37.5\\%", "\\frac38"),
        ("Give the prime factorization of 24.", "2^3\\cdot 3", "24"),
        ("Write 320000 in scientific notation.", "3.2\\times10^5", "320000"),
        ("How many apples?", "5", "5\\%"),
    ],
)
def test_the_question_again_has_the_value_and_not_the_form(prompt: str, reference: str, answer: str) -> None:
    assert find_fault(reference, answer, prompt)
    assert not find_fault(reference, reference, prompt)


@pytest.mark.parametrize(
    ("prompt", "reference", "answer"),
    [
        ("", "2^{10}", "1024"),
        ("", "\\sqrt2", "2^{1/2}"),
        ("", "x^2-5x+6", "(x-2)(x-3)"),
        ("", "\\frac12", "0.5"),
        ("", "\\frac12", "\\frac24"),
        ("", "320000", "3.2 \\times 10^5"),
        ("", "\\sqrt{2+\\sqrt3}", "\\frac{\\sqrt6+\\sqrt2}{2}"),
        ("", "0.8660254037844386", "\\frac{\\sqrt3}{2}"),
        ("", "2x+4y-3=0", "y=-\\frac12x+\\frac34"),
        ("", "[1/2, \\infty)", "x \\in [0.5, \\infty)"),
        ("", "362880", "9! = 362880"),
        ("Tom has 12 pens and gives away 7.", "5", "5"),
        ("What percent are red?", "25", "25\\%"),
        ("Which of 1/2 and 0.6 is larger?", "\\frac{6}{10}", "0.6"),
    ],
)
def test_other_forms_of_an_answer_are_answers(prompt: str, reference: str, answer: str) -> None:
    assert find_fault(reference, answer, prompt) == ""


@pytest.mark.parametrize(
    "reference",
    [
        "\\frac 59",
        "$\\frac{7}{12} $",
        "$8$,$4$",
        "11,\\! 111",
        "350$",
        "1,000.99€",
        "52_{\\text{eight}}",
        "Proof omitted",
    ],
)
def test_references_that_can_be_matched_are_no_fault(reference: str) -> None:
    assert check_reference(reference) == ""


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        (" ", "empty"),
        ("\\; .", "no value"),
        ("$$", "no value"),
        ("\\frac{}{2}", "argument"),
        ("\\frac{1}{2", "braces"),
        ("(" * 100 + "1" + ")" * 100, "deep"),
    ],
)
def test_references_that_nobody_can_match_are_said(reference: str, fault: str) -> None:
    assert fault in check_reference(reference)


@pytest.mark.parametrize(
    ("reference", "asked"),
    [
        ("5 meters", Asked()),
        ("x = 5", Asked()),
        ("2, 5", Asked(parts=2)),
        ("(1, 2, 3)", Asked(parts=3)),
        ("no solution", Asked(is_verbal=True)),
        ("\\text{Monday}", Asked(is_verbal=True)),
        ("\\emptyset", Asked(is_verbal=True)),
        ("twelve", Asked()),
    ],
)
def test_references_tell_what_is_asked_for(reference: str, asked: Asked) -> None:
    assert describe(reference) == asked


@pytest.mark.parametrize(
    ("expected", "found", "says_so"),
    [
        ("converge", "converges", True),
        ("converge", "It does not converge", False),
        ("converge", "diverges", False),
        ("Thursday", "So it is on Thursday", True),
        ("Thursday", "It is Thursday or Friday", False),
        ("yes", "Yes, it is.", True),
        ("yes", "Yes and no.", False),
        ("yes", "Yes, or maybe no.", False),
        ("no solution", "There are no real solutions", True),
        ("no solution", "There is no solution other than 2", False),
        ("does not exist", "The limit is undefined", True),
    ],
)
def test_words_in_sentences(expected: str, found: str, says_so: bool) -> None:
    assert words_agree(expected, found) is says_so


@pytest.mark.parametrize("reference", ["\\text{no solution}", "even, 3", "\\text{Monday at } 3", "n is any odd number"])
@pytest.mark.parametrize("answer", ["infinitely many, $(5-3t, t)$ for any real number $t$", "x + 1", "7", "n = 2k + 1"])
def test_words_as_a_reference_are_never_a_failure(reference: str, answer: str) -> None:
    assert check({"references": [reference], "answer": answer})["status"] in ("different", "unreadable")


def test_a_reference_that_is_no_mathematics_is_a_failure_of_its_own() -> None:
    assert check({"references": ["\\frac{1}{"], "answer": "x + 1"})["status"] == "error"


@pytest.mark.parametrize(
    "piece", ["1+", "(x", "\\frac", "\\sqrt", "a ", "1,", "x and ", "$", "{", "|x|<", "1:", "- ", "5 m "]
)
def test_long_answers_take_linear_time(piece: str) -> None:
    answer = piece * (10_000 // len(piece))
    begin = time.process_time()
    normalise(answer)
    compare_plainly(answer[:IN_PROCESS_CHARACTERS], "5")
    find_fault("5", answer, answer)
    assert time.process_time() - begin < 2
