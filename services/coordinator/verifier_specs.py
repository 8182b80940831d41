"""How a prompt's responses are judged, as its line says: a verifier of the reward service and its ground truth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from services.kit.config import Model


class StdioTest(Model):
    """A test by standard input and output."""

    stdin: str
    expected_stdout: str


class FunctionTest(Model):
    """A test by calling a function."""

    arguments: list[Any]
    expected: Any


class CodeTest(Model):
    """A test by Python that asserts something of the function."""

    code: str = Field(min_length=1)


class CodeLimits(Model):
    """Limits of the program under test; unset ones are the sandbox's defaults."""

    wall_ms: int | None = Field(None, ge=1)
    cpu_ms: int | None = Field(None, ge=1)
    memory_bytes: int | None = Field(None, ge=1)
    processes: int | None = Field(None, ge=1)
    file_bytes: int | None = Field(None, ge=0)
    output_bytes: int | None = Field(None, ge=1)


class MathSpec(Model):
    """The final answer is compared with a reference, as mathematics."""

    verifier: Literal["math"]
    answer: str = Field(min_length=1)
    """The reference."""
    alternatives: list[str] = []
    """Further answers that are as good."""


class CodeSpec(Model):
    """The program is judged on hidden tests."""

    verifier: Literal["code"]
    language: str = "python"
    """A runtime of the sandbox."""
    function: str = ""
    """The function that function and code tests call."""
    tests: list[FunctionTest | StdioTest | CodeTest] = Field(min_length=1)
    """The hidden tests, all of one kind."""
    setup_code: str = ""
    """Python that runs before each code test."""
    partial_credit: bool = False
    """Reward the share of tests passed."""
    limits: CodeLimits = CodeLimits()
    """Limits of the program."""


class ChoiceSpec(Model):
    """One or several letters of a multiple-choice question."""

    verifier: Literal["choice"]
    answer: str = Field(min_length=1)
    """The letters, "B" or "A,C" for instance."""
    options: list[str] = []
    """The options' texts in order."""


class ShortAnswerSpec(Model):
    """A word, a name or a short phrase."""

    verifier: Literal["short_answer"]
    answers: list[str] = Field(min_length=1)
    """Any of them is right."""


class ExactSpec(Model):
    """The answer is the reference, but for white space around it."""

    verifier: Literal["exact"]
    answer: str = Field(min_length=1)
    """The reference."""


class RegexSpec(Model):
    """The answer, or something in the response, matches a regular expression."""

    verifier: Literal["regex"]
    pattern: str = Field(min_length=1)
    """Python's syntax."""
    ignore_case: bool = False
    """Whether letters match in either case."""
    search_response: bool = False
    """Search the whole response instead of matching the whole answer."""


class JsonSpec(Model):
    """The answer is JSON."""

    verifier: Literal["json"]
    json_schema: dict[str, Any] | None = None
    """JSON Schema, draft 2020-12."""
    expected: Any = None
    """The value that is expected; null expects null where it is written."""


class JudgeSpec(Model):
    """A language model reads question, reference and response, and decides."""

    verifier: Literal["judge"]
    answer: str = ""
    """The reference."""
    judge: str = ""
    """A judge of the reward service's configuration; its default unless set."""
    votes: int | None = Field(None, ge=1)
    """Votes to take; the judge's number unless set."""
    rubric: str = ""
    """What the answer must fulfil, beside agreeing with the reference."""


class ValueHeadSpec(Model):
    """A trained model with a scalar head decides."""

    verifier: Literal["value_head"]
    answer: str = ""
    """The reference."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Correct from this probability on; the model's own unless set."""


PartSpec = Annotated[
    MathSpec | CodeSpec | ChoiceSpec | ShortAnswerSpec | ExactSpec | RegexSpec | JsonSpec | JudgeSpec | ValueHeadSpec,
    Field(discriminator="verifier"),
]


class CompositePart(Model):
    """One verifier's share of a composite."""

    name: str = Field(min_length=1)
    """Unique in its composite."""
    weight: float = Field(1.0, ge=0)
    """Share in the reward."""
    gate: bool = False
    """Unless this part is correct, the whole is wrong."""
    judged_by: PartSpec
    """The verifier with its ground truth."""


class CompositeSpec(Model):
    """Several verifiers, weighted."""

    verifier: Literal["composite"]
    parts: list[CompositePart] = Field(min_length=1)
    """The verifiers."""


Spec = (
    MathSpec
    | CodeSpec
    | ChoiceSpec
    | ShortAnswerSpec
    | ExactSpec
    | RegexSpec
    | JsonSpec
    | JudgeSpec
    | ValueHeadSpec
    | CompositeSpec
)
