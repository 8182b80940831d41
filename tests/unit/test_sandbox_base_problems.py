"""What the tests of a repository do without a patch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from services.sandbox.judge.repositories import BaseProblems

FAILS = "1 tests of pass_to_pass do not pass without the patch"


def found(*problems: str) -> Callable[[], Awaitable[str]]:
    """Runs of the tests that end so, one after another."""
    left = list(problems)

    async def find() -> str:
        return left.pop(0)

    return find


async def test_a_test_that_fails_now_and_then_does_not_keep_a_repository_from_judging() -> None:
    problems = BaseProblems()
    assert await problems.get(b"a", found(FAILS, "")) == ""
    assert await problems.get(b"a", found()) == ""  # kept
    assert await problems.get(b"b", found(FAILS, FAILS)) == FAILS


async def test_a_problem_is_looked_for_anew_after_a_while() -> None:
    now = 0.0
    problems = BaseProblems(lambda: now)
    assert await problems.get(b"a", found(FAILS, FAILS)) == FAILS
    now = 599.0
    assert await problems.get(b"a", found()) == FAILS
    now = 600.0
    assert await problems.get(b"a", found("")) == ""
