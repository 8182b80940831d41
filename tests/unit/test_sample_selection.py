"""Selection of training data from judged samples: which are used, and why the others are dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.chat import ChatMessage, read_example
from perigee.cli.sample.app import check_selections, check_source
from perigee.cli.sample.run import COT_PATH, group_samples, read_samples, read_template, wrap
from perigee.cli.sample.selection import ALL, PAIRS, SHORTEST, PairRules, PromptSamples, describe_samples, select
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.reward.items import read_prompt_line

RULES = PairRules()


def group(*samples: dict[str, Any], **prompt: Any) -> PromptSamples:
    """The samples of one prompt."""
    values = {"id": "a", "verifier": "math", "answer": "2", **(prompt or {"prompt": "1+1="})}
    return PromptSamples(read_prompt_line(values, "here"), samples)


def sample(verdict: str, tokens: int | None = 1, response: str | None = None, **values: Any) -> dict[str, Any]:
    """A sample whose text tells verdict and length."""
    text = f"{verdict} {tokens}" if response is None else response
    line = {"id": "a", "response": text, "verdict": verdict, "tokens": tokens, "truncated": False, "reason": "lost"}
    return line | values


SAMPLES = st.builds(
    sample,
    st.sampled_from(["correct", "correct", "wrong", "ungradable", "failed"]),
    st.integers(0, 9),
    st.sampled_from(["", " ", "x", "x ", "y", "z"]),
    truncated=st.booleans(),
)
SETS = st.lists(st.lists(SAMPLES, min_size=1, max_size=8), min_size=1, max_size=4)


def number(samples: Sequence[Sequence[dict[str, Any]]]) -> list[PromptSamples]:
    """Groups of several prompts."""
    return [group(*some, id=str(index), prompt="1+1=") for index, some in enumerate(samples)]


@given(SETS, st.sampled_from([SHORTEST, ALL]))
def test_examples_are_correct_and_whole_and_all_others_are_counted(samples: list[Any], kind: str) -> None:
    groups = number(samples)
    usable = {
        (each.line.id, one["response"].strip()): one["tokens"]
        for each in groups
        for one in reversed(each.samples)
        if one["verdict"] == "correct" and not one["truncated"] and one["response"].strip()
    }
    if not usable:
        with pytest.raises(FailedPreconditionError, match="nothing can be selected"):
            select(kind, groups, RULES)
        return
    selection = select(kind, groups, RULES)
    found = [(line["id"], line["response"].strip()) for line in selection.lines]
    assert len(set(found)) == len(found)
    if kind == ALL:
        assert set(found) == usable.keys()
    else:
        least: dict[str, int] = {}
        for (prompt, _), tokens in usable.items():
            least[prompt] = min(tokens, least.get(prompt, tokens))
        assert {prompt: usable[prompt, text] for prompt, text in found} == least
    report = selection.report
    assert report["examples"] + sum(report["dropped_responses"].values()) == sum(map(len, samples))
    assert report["prompts"] + sum(report["dropped_prompts"].values()) == len(samples)


@given(SETS, st.booleans(), st.sampled_from([None, 1.0, 1.5, 3.0]))
def test_pairs_hold_their_rules_and_all_others_are_counted(
    samples: list[Any], wrong_longer: bool, correct_longer: float | None
) -> None:
    # Each text says what its sample is, unless it is repeated or empty.
    for some in samples:
        for index, one in enumerate(some):
            one["response"] = one["response"] and f"{one['verdict']} {one['tokens']} {index % 6}"
    groups = number(samples)
    try:
        selection = select(PAIRS, groups, PairRules(wrong_longer, correct_longer))
    except FailedPreconditionError:
        return
    shortest = {line["id"]: line["response"] for line in select(SHORTEST, groups, RULES).lines}
    for line in selection.lines:
        assert line["chosen"] == shortest[line["id"]]
        assert line["rejected"].strip() != line["chosen"].strip()
        (_, least, _), (verdict, length, _) = line["chosen"].split(), line["rejected"].split()
        if verdict == "correct":
            assert correct_longer is not None
            assert int(length) >= correct_longer * int(least)
        else:
            assert wrong_longer
            assert int(length) > int(least)
            assert verdict != "failed"
    report = selection.report
    dropped = sum(report["dropped_responses"].values())
    assert len(shortest) + report["pairs"] + dropped == sum(map(len, samples))
    assert report["prompts"] + sum(report["dropped_prompts"].values()) == len(samples)
    assert sum(report["rejected"].values()) == report["pairs"] == len(selection.lines)


def test_pairs_of_the_report() -> None:
    some = group(
        sample("correct", 10), sample("correct", 14), sample("correct", 15), sample("wrong", 9), sample("wrong", 11)
    )
    lines = select(PAIRS, [some], RULES).lines
    assert [(line["chosen"], line["rejected"]) for line in lines] == [
        ("correct 10", "correct 15"),
        ("correct 10", "wrong 11"),
    ]


def test_a_prompt_stands_as_its_file_has_it() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    [line] = select(SHORTEST, [group(sample("correct"), messages=chat)], RULES).lines
    assert line == {"id": "a", "messages": chat, "response": "correct 1"}
    assert read_example(line)[1] == ("correct 1",)
    [line] = select(SHORTEST, [group(sample("correct"))], RULES).lines
    assert read_example(line) == ("1+1=", ("correct 1",), ())


def test_characters_count_where_tokens_are_not_known() -> None:
    some = group(sample("correct", 1, "longer"), sample("correct", None, "short"), sample("failed", None, ""))
    [line] = select(SHORTEST, [some], RULES).lines
    assert line["response"] == "short"
    assert describe_samples([some])["length_unit"] == "characters"
    known = group(sample("correct", 1, "longer"), sample("failed", None, ""))
    assert describe_samples([known])["length_unit"] == "tokens"


def test_a_failure_counts_neither_as_wrong_nor_as_a_length() -> None:
    found = describe_samples([group(sample("correct", 4), sample("failed", 90), sample("wrong", 6))])
    assert found["verdicts"] == {"correct": 1, "wrong": 1, "ungradable": 0, "failed": 1}
    assert found["accuracy"]["mean"] == 0.5
    assert found["length"]["all"]["mean"] == 5
    assert found["failures"] == {"lost": 1}
    assert describe_samples([group(sample("failed"))])["accuracy"] is None


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([sample("wrong")], "1 have no correct response"),
        ([sample("failed")], "1 have no response with a verdict, most often because lost"),
        ([sample("correct", truncated=True)], "1 have no correct response that is whole"),
    ],
)
@pytest.mark.parametrize("kind", [SHORTEST, PAIRS, ALL])
def test_nothing_to_select_is_an_error(samples: list[Any], words: str, kind: str) -> None:
    with pytest.raises(FailedPreconditionError, match=words):
        select(kind, [group(*samples)], RULES)


def test_nothing_to_reject_is_an_error() -> None:
    equal = [sample("correct", 1, "x"), sample("wrong", 2, "x "), sample("wrong", 1, "y")]
    with pytest.raises(FailedPreconditionError, match="no response is to be rejected"):
        select(PAIRS, [group(*equal)], RULES)


def test_samples_of_a_file_have_verdicts(tmp_path: Path) -> None:
    path, line = tmp_path / "samples.jsonl", group().line
    path.write_text(json.dumps({"id": "a", "response": "2", "verdict": "correct"}) + "\n")
    assert len(group_samples([line], read_samples(path, [line]))[0].samples) == 1
    for values, words in (
        ({"verdict": None}, "verdict: must be one of correct, wrong, ungradable, failed; got None"),
        ({"id": "b"}, "id: 'b' is the id of no prompt"),
        ({"id": ["a"]}, "id: ['a'] is the id of no prompt"),
        ({"tokens": -1}, "tokens: must be 0 or more, is -1"),
        ({"reason": 1}, "reason: must be a text, got a number"),
        ({"response": 1}, "response: must be a text, got a number"),
        ({"tokens": "4"}, "tokens: must be a number of tokens, got a string"),
        ({"truncated": 1}, "truncated: must be true or false, got a number"),
    ):
        path.write_text(json.dumps({"id": "a", "response": "2", "verdict": "correct"} | values))
        with pytest.raises(InvalidArgumentError) as raised:
            read_samples(path, [line])
        assert raised.value.message == f"{path}:1: {words}"
    path.write_text('{"id": "a", "response": "2"}')
    with pytest.raises(InvalidArgumentError, match="perigee reward score judges"):
        read_samples(path, [line])
    path.write_text("")
    with pytest.raises(InvalidArgumentError, match="holds no samples"):
        read_samples(path, [line])


def test_the_words_of_a_template_stand_around_the_question(tmp_path: Path) -> None:
    template = read_template("default")
    assert all(word in template for word in ("Planning", "Evaluation", "Reflection", "Exploration"))
    assert wrap("1+1={prompt}", template) == template.replace("{prompt}", "1+1={prompt}")
    chat = tuple(ChatMessage(role=role, content=role) for role in ("system", "user", "assistant", "user", "tool"))
    assert [each["content"] for each in wrap(chat, "<{prompt}>")] == ["system", "user", "assistant", "<user>", "tool"]
    (tmp_path / "cot.txt").write_text("Think.")
    with pytest.raises(InvalidArgumentError, match=r"--cot: .* has no \{prompt\}"):
        read_template(str(tmp_path / "cot.txt"))
    with pytest.raises(InvalidArgumentError, match=r"--cot: .* cannot be read"):
        read_template(str(tmp_path / "none.txt"))
    assert COT_PATH.is_file()


def test_options_that_do_not_fit() -> None:
    for source in (
        (None, None, None, None),
        ("http://x", "m", "folder", None),
        (None, "folder", "run", None),
        (None, None, "run", Path("s")),
    ):
        with pytest.raises(InvalidArgumentError, match="MODEL_OR_RUN: give one of"):
            check_source(*source)
    with pytest.raises(InvalidArgumentError, match="--endpoint: needs the model's name"):
        check_source("http://x", None, None, None)
    with pytest.raises(InvalidArgumentError, match="--select: longest is unknown; choose from shortest, pairs, all"):
        check_selections(["longest"], has_rules=True)
    with pytest.raises(InvalidArgumentError, match="leaves no response to reject"):
        check_selections(["pairs"], has_rules=False)
    assert check_selections(["all", "pairs", "all"], has_rules=True) == ["all", "pairs"]
