"""The chat template and special tokens, applied in one place: what prompts and supervised examples become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from perigee.chat import Asked, ChatMessage, read_messages
from perigee.cli.prompts.sampling import SamplingSettings, guessing_stage
from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_prompt_line
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from services.kit.chat import PromptEncoder, encode_examples, open_encoder
from services.kit.hf import ModelFolder, open_model_folder
from tests.fixtures.chat import BOS, END, EOS, TEMPLATE, write_chat_model

ASKED: Asked = (ChatMessage(role="user", content="1+1=?"),)


def make_encoder(folder: Path, template: str | None = TEMPLATE, **settings: str) -> PromptEncoder:
    return open_encoder(
        open_model_folder(write_chat_model(folder, template=template), "model"), ChatSettings(**settings)
    )


def read(encoder: PromptEncoder, asked: Asked) -> str:
    [ids] = encoder.encode([asked], ["p:1"])
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_chat_has_the_tokens_that_transformers_gives_it(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path)
    messages = [
        ChatMessage(role="system", content="Add."),
        ChatMessage(role="user", content="1+1=?"),
        ChatMessage(role="assistant", content="2"),
        ChatMessage(role="user", content="2+2=?\nQuick!"),
    ]
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<bos>", chat_template=TEMPLATE
    )
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert encoder.render(tuple(messages)) == expected
    [ids] = encoder.encode([tuple(messages)], ["p:1"])
    assert ids == reference(expected, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


def make_bare_encoder(template: str | None) -> PromptEncoder:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PromptEncoder(cast(ModelFolder, None), tokenizer, None)


@pytest.mark.parametrize(
    ("template", "text", "ids"),
    [
        (None, "a b", [3, 4]),
        (None, "<s>a", [1, 3]),
        ("<s> $A", "a b", [1, 3, 4]),
        ("<s> $A", "<s>a b", [1, 3, 4]),
        ("<s> $A </s>", "a", [1, 3]),
        ("$A </s>", "a", [3]),
        ("<s> $A", "", [1]),
    ],
)
def test_a_text_begins_once(template: str | None, text: str, ids: list[int]) -> None:
    assert make_bare_encoder(template).encode([text], ["p:1"]) == [ids]


def test_prompts_are_encoded_together() -> None:
    assert make_bare_encoder("<s> $A").encode(["a", "<s>b"], ["p:1", "p:2"]) == [[1, 3], [1, 4]]


def test_special_tokens_are_there_once(tmp_path: Path) -> None:
    """Tokenizer and template both write BOS; a template without it has none, and plain text has the tokenizer's."""
    encoder = make_encoder(tmp_path)
    for asked in (ASKED, "1+1=?", "<bos>1+1=?"):
        [ids] = encoder.encode([asked], ["p:1"])
        assert (ids[0], ids.count(BOS)) == (BOS, 1)
    bare = make_encoder(tmp_path / "bare", TEMPLATE.removeprefix("{{ bos_token }}"))
    assert BOS not in bare.encode([ASKED], ["p:1"])[0]


@pytest.mark.parametrize(
    ("settings", "asked", "text"),
    [
        ({}, "1+1=?", "<bos>1+1=?"),
        ({}, ASKED, "<bos><turn>user: 1+1=?<end><turn>assistant: "),
        ({"mode": "always"}, "1+1=?", "<bos><turn>user: 1+1=?<end><turn>assistant: "),
        ({"system_prompt": "Add."}, "1=?", "<bos><turn>system: Add.<end><turn>user: 1=?<end><turn>assistant: "),
        ({"instruction": "Box it."}, "1+1=?", "<bos>1+1=?\nBox it."),
        ({"instruction": "Box it."}, ASKED, "<bos><turn>user: 1+1=?\nBox it.<end><turn>assistant: "),
        ({"mode": "never"}, "<bos><turn>x", "<bos><turn>x"),
    ],
)
def test_what_the_model_is_asked(tmp_path: Path, settings: dict[str, str], asked: Asked, text: str) -> None:
    assert read(make_encoder(tmp_path, **settings), asked) == text


def test_a_system_message_of_the_line_stands(tmp_path: Path) -> None:
    asked = (ChatMessage(role="system", content="Mine."), ChatMessage(role="user", content="1"))
    assert "Theirs" not in read(make_encoder(tmp_path, system_prompt="Theirs."), asked)


@pytest.mark.parametrize(
    ("template", "settings", "asked", "said"),
    [
        (
            TEMPLATE,
            {},
            (*ASKED, ChatMessage(role="tool", content="2")),
            "messages: the model's chat template fails: tools",
        ),
        ("{{ 1 / 0 }}", {}, ASKED, "p:1: messages: the model's chat template fails: division by zero"),
        ("{% if %}", {}, ASKED, "p:1: messages: the model's chat template fails: "),
        ("{{ ''.__class__.mro() }}", {}, ASKED, "is unsafe"),
        (None, {}, ASKED, "has no chat template"),
        (None, {"mode": "always"}, "1", "p:1: prompt: cannot be asked as a chat: "),
        (TEMPLATE, {"mode": "never"}, ASKED, "run.chat is never"),
        (TEMPLATE, {"mode": "always"}, "<turn>user: 1", "p:1: prompt: begins with a special token"),
    ],
)
def test_what_cannot_be_asked_is_named(
    tmp_path: Path, template: str | None, settings: dict[str, str], asked: Asked, said: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make_encoder(tmp_path, template, **settings).encode([asked], ["p:1"])
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: must be a list of messages"),
        ([{"content": "1"}], r"messages\[0\].role: is required"),
        ([{"role": "user", "value": "1"}], r"messages\[0\].value: unknown key"),
        ([{"role": "user"}], r"messages\[0\].content: must be a text or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\].content\[1\]: is an image",
        ),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]: must be \{"),
    ],
)
def test_malformed_messages_are_named(messages: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        read_messages(messages)


def write_examples(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_stop_token_ends_a_response(tmp_path: Path) -> None:
    """The template's own behind a chat, the model's first behind text, and none twice."""
    encoder = make_encoder(tmp_path / "model")
    assert encoder.model.stop_token_ids == (EOS, END)
    user, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    path = write_examples(
        tmp_path / "sft.jsonl",
        {"prompt": "1", "response": "2"},
        {"messages": [user], "response": "2"},
        {"messages": [user, answer]},
        {"prompt": "1", "response": "2<end>"},
        {"messages": [user], "response": "2<eos>\n"},
    )
    pairs = encode_examples(path, "dataset", encoder, 128)
    two = encoder.tokenizer.token_to_id("2")
    assert [response for _, [response], _ in pairs] == [
        [two, EOS],
        [two, END],
        [two, END],
        [two, END],
        [two, EOS],
    ]
    assert pairs[1] == pairs[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "1", "response": ""}, ":2: response: is empty"),
        ({"prompt": "", "response": "1"}, ":2: prompt: must be a text"),
        ({"messages": [{"role": "assistant", "content": "1"}]}, ":2: messages: must hold what the response answers"),
        ({"messages": [{"content": "1"}], "response": "1"}, ":2: messages[0].role: is required"),
        ({"prompt": "1", "response": "1" * 200}, ":2: 203 tokens are more than the context of 128"),
        ([], ":2: must be a JSON object"),
    ],
)
def test_a_bad_example_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write_examples(tmp_path / "sft.jsonl", {"prompt": "1", "response": "2"}, line)
    with pytest.raises(InvalidArgumentError) as caught:
        encode_examples(path, "dataset", make_encoder(tmp_path / "model"), 128)
    assert f"{path}{said}" in caught.value.message


PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}


def test_a_pair_has_two_responses_to_one_prompt(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "model")
    messages = {"messages": [{"role": "user", "content": "1"}], "chosen": "2", "rejected": "33"}
    path = write_examples(tmp_path / "pairs.jsonl", PAIR, messages)
    two, three = (encoder.tokenizer.token_to_id(digit) for digit in "23")
    text, chat = encode_examples(path, "dataset", encoder, 128, algorithm="dpo")
    assert text[:2] == (encoder.encode(["1"], [""])[0], [[two, EOS], [three, EOS]])
    asked = read_messages(messages["messages"])
    assert chat[:2] == (encoder.encode([asked], [""])[0], [[two, END], [three, three, END]])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "1", "response": "2"}, ":2: chosen: is empty: a line of a pair has prompt or messages, chosen"),
        (PAIR | {"chosen": ""}, ":2: chosen: is empty"),
        ({"prompt": "1", "chosen": "2"}, ":2: rejected: is empty"),
        (PAIR | {"rejected": ["3"]}, ":2: rejected: must be a text, got an array"),
        (PAIR | {"rejected": "2"}, ":2: rejected: has the same tokens as chosen: there is nothing to prefer"),
        (PAIR | {"rejected": "2<eos>3"}, ":2: rejected: has the same tokens as chosen"),
        (PAIR | {"rejected": "3" * 200}, ":2: rejected: 203 tokens are more than the context of 128"),
        (PAIR | {"prompt": ""}, ":2: prompt: must be a text"),
        ({"messages": [{"role": "assistant", "content": "1"}]}, ":2: messages: must hold what the response answers"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write_examples(tmp_path / "pairs.jsonl", PAIR, line)
    with pytest.raises(InvalidArgumentError) as caught:
        encode_examples(path, "dataset", make_encoder(tmp_path / "model"), 128, algorithm="dpo")
    assert f"{path}{said}" in caught.value.message


def test_a_guess_is_asked_for_in_the_chat_and_begun_behind_it(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "1+1=?"}]}
    stage = guessing_stage(SamplingSettings())
    encoder = make_encoder(tmp_path)
    said = "1+1=?\nGive the final answer at once, without any reasoning."
    for asked, text in (
        ({"prompt": "1+1=?"}, f"<bos>{said}\n#"),
        (chat, f"<bos><turn>user: {said}<end><turn>assistant: #"),
    ):
        line = read_prompt_line({"id": "a", "verifier": "math", "answer": 2, "answer_marker": "#", **asked}, "p:1")
        [ids] = encoder.encode([stage.ask(line)], [line.place], stage.given(line.item))
        assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text
