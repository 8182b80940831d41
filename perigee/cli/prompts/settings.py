"""Settings of a curation: all that its result depends on, beside the prompts and the weights of the model."""

from __future__ import annotations

from pydantic import Field

from services.kit.config import Model

GUESS_TEMPLATE = "{prompt}\nGive the final answer at once, without any reasoning.\n{answer_marker}"


class SamplingSettings(Model):
    """How a model is asked about each prompt."""

    samples: int = Field(10, ge=1)
    """Answers per prompt whose pass rate tells its difficulty."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the report's is a high one."""
    response_tokens: int = Field(1024, ge=1)
    """Tokens of an answer."""
    trivial_pass_rate: float | None = Field(1.0, gt=0, le=1)
    """Prompts solved at least this often are dropped; null keeps them."""
    guesses: int = Field(8, ge=0)
    """Guesses without reasoning per prompt; 0 asks for none."""
    guess_tokens: int = Field(32, ge=1)
    """Tokens of a guess."""
    guess_template: str = GUESS_TEMPLATE
    """How a guess is asked for, with {prompt} and, where the answer follows a marker, {answer_marker}."""
    min_judged: float = Field(0.8, gt=0, le=1)
    """Share of a prompt's samples that must have been judged; with less it is put aside."""


class CurationSettings(Model):
    """What a curation does."""

    near_duplicates: float = Field(0.7, ge=0, le=1)
    """Jaccard similarity of word n-grams from which two prompts are near duplicates; 0 looks for exact ones alone."""
    drop_question_kinds: bool = True
    """Drop multiple-choice, true-or-false and proof questions."""
    sampling: SamplingSettings | None = None
    """Null asks no model: difficulties are those of the input and nothing is dropped for them."""
    buckets: int = Field(5, ge=1)
    """Buckets of difficulty."""
    cap: int | None = Field(None, ge=1)
    """Prompts kept per domain and bucket; null keeps all."""
    seed: int = Field(0, ge=0)
    """Seed of samples and draws."""
