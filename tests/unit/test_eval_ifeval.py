"""IFEval: each kind of instruction, followed and not, and a record that becomes a prompt with its verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import regex

from perigee.cli.eval.ifeval import PATTERNS, read_ifeval
from perigee.cli.eval.suites import load_suite
from perigee.errors import InvalidArgumentError
from tests.unit.test_eval_suites import write_data

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "a dog and\na CAT", "a dog"),
    ("keywords:frequency", {"keyword": "star ", "frequency": 2, "relation": "at least"}, "Star\nstars", "one star"),
    ("keywords:frequency", {"keyword": "star", "frequency": 2, "relation": "less than"}, "one star", "star star"),
    ("keywords:forbidden_words", {"forbidden_words": ["bad", "ugly"]}, "badly", "so BAD."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 3, "let_relation": "less than"}, "qq", "qQq"),
    ("language:response_language", {"language": "de"}, "Das ist gut und schön.", "This is good and fine."),
    ("language:response_language", {"language": "hi"}, "1. नमस्ते", "Hello"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        'A. "B!" C',
        "It is 3.5. So.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "It is 3.5. So.",
        "A. B? C!",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b-c", "a b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "weekend"},
        "A b\nc\n\nWeekend, is\n\n\nd",
        "A\n\nweekends\n\nc",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "hi"},
        '"Hi there\n\nb\n',
        "Hi\n\nb\n\nc",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a\n]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np.s. hi", "PS hi"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S hi", "P.S. hi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "x\n* a\n - b\n**c**", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "**a** ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "SECTION 1 SECTION 2",
    ),
    ("detectable_format:title", {}, "<<joy>>\nx", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nab", "a\n******\na"),
    ("combination:two_responses", {}, "a\n******\nb\n******", "a ****** b ****** c"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why (so)?"}, "why (so)? Because", "Because"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'x. Any questions?"\n', "Any questions? No."),
    ("startend:quotation", {}, ' "a\nb" ', '"a'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA is A-1",
        "Nasa IS here",
    ),
    ("change_case:english_capital", {}, "HI!", "Hi"),
    ("change_case:english_lowercase", {}, "hi 1!", "Hi"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


def test_every_kind_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(PATTERNS)


@pytest.mark.parametrize(("name", "values", "followed", "broken"), CASES)
def test_a_pattern_tells_what_follows_the_instruction(
    name: str, values: dict[str, Any], followed: str, broken: str
) -> None:
    pattern = regex.compile(PATTERNS[name](values))
    assert pattern.search(followed)
    assert not pattern.search(broken)


def test_a_record_becomes_a_prompt(tmp_path: Path) -> None:
    # Tables have a null for each argument that only other instructions take.
    values = [{"num_words": 3, "relation": "at least", "keywords": None}, {"num_words": None, "relation": None}]
    record = {
        "key": 1000,
        "prompt": "Write JSON.",
        "instruction_id_list": ["length_constraints:number_words", "detectable_format:json_format"],
        "kwargs": values,
    }
    write_data(tmp_path, "ifeval", record)
    [problem] = load_suite("ifeval", tmp_path).problems
    assert problem.line.id == "1000"
    words, form = problem.line.item.composite.parts
    assert words.verifier.regex.search_response
    assert form.verifier.json.schema_json == "{}"
    with pytest.raises(InvalidArgumentError, match=r"poem:rhyme is not known"):
        read_ifeval(record | {"instruction_id_list": ["poem:rhyme", "poem:rhyme"]})
