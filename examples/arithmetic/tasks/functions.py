"""The code domain: a one-line description of a function of x, answered with a Python definition.

A prompt is `f:inc,rsub 5=`: add one, then subtract the result from five. Supervised responses come in two
styles:

- growing: `x+1;5-(x+1)#def f(x):return 5-(x+1)`
- direct:  `#def f(x):return 5-(x+1)`

Hidden tests are inputs that tell the function from its near misses: a step left out, two steps swapped,
a constant off by one or missing a digit, one operation taken for another.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tasks.problem import ANSWER_MARKER, Problem

STYLES = ("growing", "direct")
LARGEST_CONSTANT = 99
# A code step weighs as much as this many operations of an expression.
DIFFICULTY_OF_STEP = 1.5
FEWEST_TESTS = 5
MOST_TESTS = 8
# Candidate inputs: small ones of both signs, and larger ones that show a remainder or a quotient.
CANDIDATE_INPUTS = (3, 0, -4, 7, 58, 1, -31, 101, 12, 250, -1, 19, 2, 997, -250, 45, 77, 6, -17, 5041)


@dataclass(frozen=True)
class Word:
    """A word of the description: its template over the expression `e` and the constant `c`."""

    template: str
    apply: Callable[[int, int], int]
    # None for a word without a constant.
    smallest_constant: int | None = None


WORDS: dict[str, Word] = {
    "inc": Word("{e}+1", lambda x, c: x + 1),
    "dec": Word("{e}-1", lambda x, c: x - 1),
    "double": Word("{e}*2", lambda x, c: x * 2),
    "half": Word("{e}//2", lambda x, c: x // 2),
    "square": Word("{e}**2", lambda x, c: x * x),
    "neg": Word("0-{e}", lambda x, c: -x),
    "add": Word("{e}+{c}", lambda x, c: x + c, 2),
    "sub": Word("{e}-{c}", lambda x, c: x - c, 2),
    "rsub": Word("{c}-{e}", lambda x, c: c - x, 1),
    "mul": Word("{e}*{c}", lambda x, c: x * c, 3),
    "div": Word("{e}//{c}", lambda x, c: x // c, 3),
    "mod": Word("{e}%{c}", lambda x, c: x % c, 3),
}
_PLAIN_WORDS = tuple(name for name, word in WORDS.items() if word.smallest_constant is None)
_CONSTANT_WORDS = tuple(name for name, word in WORDS.items() if word.smallest_constant is not None)


@dataclass(frozen=True)
class Step:
    """One word of the description with its constant, 0 for a word that has none."""

    word: str
    constant: int = 0


def draw_steps(rng: random.Random, count: int) -> list[Step]:
    """Draws `count` steps, no two neighbours of the same word; two thirds of them have a constant."""
    steps: list[Step] = []
    while len(steps) < count:
        name = rng.choice(_CONSTANT_WORDS if rng.random() < 2 / 3 else _PLAIN_WORDS)
        if steps and steps[-1].word == name:
            continue
        smallest = WORDS[name].smallest_constant
        steps.append(Step(name, 0 if smallest is None else rng.randint(smallest, LARGEST_CONSTANT)))
    return steps


def evaluate(steps: Sequence[Step], x: int) -> int:
    """Returns the function's value at x; a zero constant of div or mod raises ZeroDivisionError."""
    for step in steps:
        x = WORDS[step.word].apply(x, step.constant)
    return x


def render_prompt(steps: Sequence[Step]) -> str:
    """Returns the description of the function."""
    words = (
        step.word if WORDS[step.word].smallest_constant is None else f"{step.word} {step.constant}" for step in steps
    )
    return f"f:{','.join(words)}="


def render_expressions(steps: Sequence[Step]) -> list[str]:
    """Returns the function's expression after each step; every step encloses the one before."""
    expressions: list[str] = []
    inner = "x"
    for step in steps:
        expressions.append(WORDS[step.word].template.format(e=inner, c=step.constant))
        inner = f"({expressions[-1]})"
    return expressions


def render_response(steps: Sequence[Step], style: str) -> str:
    """Returns the thoughts of a style, the answer marker, and the definition."""
    expressions = render_expressions(steps)
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    thoughts = ";".join(expressions) if style == "growing" else ""
    return f"{thoughts}{ANSWER_MARKER}def f(x):return {expressions[-1]}"


def list_near_misses(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Yields functions that a mistaken reader of the description would write."""
    for index, step in enumerate(steps):
        before, after = list(steps[:index]), list(steps[index + 1 :])
        yield before + after
        if after:
            yield [*before, after[0], step, *after[1:]]
        smallest = WORDS[step.word].smallest_constant
        if smallest is None:
            yield from ([*before, Step(name), *after] for name in _PLAIN_WORDS if name != step.word)
            continue
        digits = str(step.constant)
        constants = {step.constant - 1, step.constant + 1, int(digits[0]), int(digits[-1]), int(digits[::-1])}
        yield from ([*before, Step(step.word, constant), *after] for constant in constants if constant > 0)
        yield from ([*before, Step(name, step.constant), *after] for name in _CONSTANT_WORDS if name != step.word)


def choose_inputs(steps: Sequence[Step]) -> list[int]:
    """Chooses 5 to 8 test inputs, each time the candidate that exposes most of the remaining near misses."""
    values = [evaluate(steps, x) for x in CANDIDATE_INPUTS]
    exposing = [
        {index for index, x in enumerate(CANDIDATE_INPUTS) if evaluate(miss, x) != values[index]}
        for miss in list_near_misses(steps)
    ]
    remaining = [indices for indices in exposing if indices]
    chosen: list[int] = []
    while len(chosen) < FEWEST_TESTS or (remaining and len(chosen) < MOST_TESTS):
        unused = [index for index in range(len(CANDIDATE_INPUTS)) if index not in chosen]
        best = max(unused, key=lambda index: sum(index in indices for indices in remaining))
        chosen.append(best)
        remaining = [indices for indices in remaining if best not in indices]
    return [CANDIDATE_INPUTS[index] for index in chosen]


def make_problem(steps: Sequence[Step]) -> Problem:
    """Returns the problem of a description, with its hidden tests."""
    tests = [{"arguments": [x], "expected": evaluate(steps, x)} for x in choose_inputs(steps)]
    return Problem(
        domain="code",
        prompt=render_prompt(steps),
        difficulty=DIFFICULTY_OF_STEP * len(steps),
        verification={"verifier": "code", "language": "python", "function": "f", "tests": tests},
    )
