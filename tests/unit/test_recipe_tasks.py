"""The arithmetic recipe's tasks: every answer it calls correct is, and every wrong program it foresees is caught."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks import expressions, functions
from tasks.problem import draw_share

seeds = st.integers(0, 2**32)


def split_response(response: str) -> tuple[str, str]:
    """The thoughts of a response and its answer."""
    thoughts, _, answer = response.rpartition("#")
    return thoughts, answer


@given(seeds, st.integers(1, 8))
def test_expression_is_worth_its_answer(seed: int, operations: int) -> None:
    steps = expressions.draw_steps(random.Random(seed), operations)
    problem = expressions.make_problem(steps)
    assert eval(problem.prompt.removesuffix("=")) == int(problem.verification["answer"])
    assert problem.difficulty == operations


@given(seeds, st.integers(1, 8))
def test_written_thoughts_are_true_equations_in_order(seed: int, operations: int) -> None:
    steps = expressions.draw_steps(random.Random(seed), operations)
    thoughts, answer = split_response(expressions.render_response(steps, "written"))
    equations = [thought.split("=") for thought in thoughts.split(";")]
    assert len(equations) == operations
    assert all(eval(left) == int(value) and 0 <= int(value) <= expressions.LARGEST_VALUE for left, value in equations)
    assert int(answer) == int(equations[-1][1])


@given(seeds, st.integers(1, 8))
def test_longer_thoughts_hold_the_written_ones(seed: int, operations: int) -> None:
    steps = expressions.draw_steps(random.Random(seed), operations)
    written, checked, restated = (
        split_response(expressions.render_response(steps, style)) for style in ("written", "checked", "restated")
    )
    assert checked == (f"{written[0]}:{written[0]}", written[1])
    parts = [part.split(":") for part in restated[0].split(";")]
    assert ";".join(part[0] for part in parts) == written[0]
    assert all(eval(left) == int(restated[1]) for _, left in parts[:-1])


@given(seeds, st.integers(1, 8))
def test_direct_answer_is_worth_the_expression(seed: int, operations: int) -> None:
    steps = expressions.draw_steps(random.Random(seed), operations)
    thoughts, answer = split_response(expressions.render_response(steps, "direct"))
    assert thoughts == ""
    assert int(answer) == eval(expressions.render_prompt(steps).removesuffix("="))


@given(seeds, st.integers(1, 5), st.sampled_from(functions.STYLES))
def test_reference_program_passes_its_tests(seed: int, count: int, style: str) -> None:
    steps = functions.draw_steps(random.Random(seed), count)
    _, source = split_response(functions.render_response(steps, style))
    namespace: dict[str, object] = {}
    exec(source, namespace)
    tests = functions.make_problem(steps).verification["tests"]
    assert functions.FEWEST_TESTS <= len(tests) <= functions.MOST_TESTS
    assert len({test["arguments"][0] for test in tests}) == len(tests)
    assert all(namespace["f"](*test["arguments"]) == test["expected"] for test in tests)  # type: ignore[operator]


@given(seeds, st.integers(1, 5))
def test_growing_thoughts_end_in_the_returned_expression(seed: int, count: int) -> None:
    steps = functions.draw_steps(random.Random(seed), count)
    thoughts, source = split_response(functions.render_response(steps, "growing"))
    expressions_of_steps = thoughts.split(";")
    assert len(expressions_of_steps) == count
    assert source == f"def f(x):return {expressions_of_steps[-1]}"
    for length, expression in enumerate(expressions_of_steps, start=1):
        for x in (-7, 0, 58):
            assert eval(expression, {"x": x}) == functions.evaluate(steps[:length], x)


@given(seeds, st.integers(1, 5))
def test_hidden_tests_catch_every_near_miss_that_any_candidate_input_shows(seed: int, count: int) -> None:
    steps = functions.draw_steps(random.Random(seed), count)
    inputs = functions.choose_inputs(steps)
    for miss in functions.list_near_misses(steps):
        if any(functions.evaluate(miss, x) != functions.evaluate(steps, x) for x in functions.CANDIDATE_INPUTS):
            assert any(functions.evaluate(miss, x) != functions.evaluate(steps, x) for x in inputs), miss


def test_unknown_style_is_refused() -> None:
    steps = expressions.draw_steps(random.Random(0), 2)
    with pytest.raises(ValueError, match="style must be one of checked, restated, written, direct"):
        expressions.render_response(steps, "rambling")
    with pytest.raises(ValueError, match="style must be one of growing, direct"):
        functions.render_response([functions.Step("inc")], "rambling")


def test_sizes_are_drawn_by_their_shares() -> None:
    rng = random.Random(0)
    drawn = [draw_share(rng, ((1, 3.0), (2, 1.0))) for _ in range(4000)]
    assert set(drawn) == {1, 2}
    assert 0.72 < drawn.count(1) / len(drawn) < 0.78
