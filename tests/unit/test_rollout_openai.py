"""Text of a response as its tokens come."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import InvalidArgumentError
from perigee.rollout.v1 import rollout_pb2 as pb
from services.rollout.model import open_policy
from services.rollout.openai_api import ChatCall, Choice, Endpoint, Part
from services.rollout.worker import Worker
from tests.fixtures.rollout import rollout_config
from tests.fixtures.rollout_engine import FragileEngine
from tests.fixtures.vision import make_picture

# A token for each byte, as byte-level tokenizers have at the least.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = Tokenizer(models.BPE({byte: number for number, byte in enumerate(BYTES)}, []))
TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZER.decoder = decoders.ByteLevel()
# Characters and single bytes, as SentencePiece models have them.
PIECES = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -1.0) for byte in range(256)), ("a", -2.0)]
FALLBACK = Tokenizer(models.Unigram(PIECES, 0, True))
FALLBACK.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
TEXT = st.text(st.sampled_from("ab\u00e4\u20ac\U0001f600 "), max_size=12)


def stream(
    token_ids: list[int], stops: list[str], sizes: list[int], end_reason: int, tokenizer: Tokenizer = TOKENIZER
) -> tuple[Choice, list[Part]]:
    """A choice that gets tokens in chunks of these sizes, in turn, and the parts that are taken after each."""
    choice = Choice(0, [1], pb.GenerateRequest(), stops, tokenizer)
    parts, begin = [], 0
    for chunk in range(len(token_ids) + 1):
        end = min(len(token_ids), begin + sizes[chunk % len(sizes)])
        is_last = end == len(token_ids)
        choice.add(
            pb.GenerateResponse(
                token_ids=pack_token_ids(token_ids[begin:end]),
                logprobs=pack_logprobs([-1.0] * (end - begin)),
                versions=[buffer_pb2.VersionSpan(policy_version=chunk, tokens=end - begin)],
                end_reason=end_reason if is_last else 0,  # type: ignore[arg-type]
            )
        )
        parts += filter(None, [choice.take()])
        if choice.finish:
            break
        begin = end
    assert choice.take() is None
    return choice, parts


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, of those the one that begins first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(ends)[0] if ends else 0
    return text[: min(begin for end, begin in ends if end == first)] if ends else text


@given(TEXT, st.lists(TEXT.filter(bool), max_size=2), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_parts_join_to_the_text_before_the_first_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    token_ids = TOKENIZER.encode(text).ids
    choice, parts = stream([*token_ids, 5], stops, sizes, buffer_pb2.END_REASON_STOP)
    assert "".join(part.text for part in parts) == choice.text == cut(text, stops)
    assert choice.finish == "stop"
    assert [part.finish for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert [token for part in parts for token in part.tokens] == choice.tokens
    assert [token.id for token in choice.tokens] == [*token_ids, 5][: len(choice.tokens)]
    assert sum(span.tokens for part in parts for span in part.versions) == len(choice.tokens)
    for token in choice.tokens:
        assert text[token.offset :].startswith(token.text)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_tokens_that_are_no_characters_become_what_the_tokenizer_makes_of_them(
    token_ids: list[int], sizes: list[int]
) -> None:
    choice, parts = stream(token_ids, [], sizes, buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS)
    assert "".join(part.text for part in parts) == choice.text
    assert choice.text == TOKENIZER.decode(token_ids, skip_special_tokens=False)
    assert choice.finish == "length"


def test_bytes_after_which_the_library_fails_end_no_response() -> None:
    # A character, then bytes that make it none; then text again.
    token_ids = [*(1 + byte for byte in "\u0364".encode()), 1 + 0xCD, 1 + 0x20, 257, 257]
    with pytest.raises(Exception, match="Invalid prefix"):
        [step for decoder in [DecodeStream()] for step in (decoder.step(FALLBACK, each) for each in token_ids)]
    choice, parts = stream(token_ids, [], [2], buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS, FALLBACK)
    assert "".join(part.text for part in parts) == choice.text
    assert choice.text.endswith("aa")
    assert [token.id for token in choice.tokens] == token_ids


def test_more_images_than_a_prompt_may_have_are_not_decoded(vision_model: Path) -> None:
    config = rollout_config(vision_model, "", images={"max_per_prompt": 2})
    endpoint = Endpoint(Worker(config, open_policy(str(vision_model), None), FragileEngine(), "w"))
    url = f"data:image/png;base64,{base64.b64encode(make_picture(1)).decode()}"
    damaged = f"data:image/png;base64,{base64.b64encode(make_picture(1)[:-20]).decode()}"

    def ask(*urls: str) -> ChatCall:
        parts = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
        return ChatCall(model="policy", messages=[{"role": "user", "content": parts}])

    [prompt] = endpoint._read_prompts(ask(url, url))
    assert len(prompt.images) == 2
    with pytest.raises(InvalidArgumentError, match=r"content\[2\]: 3 images are more than rollout\.images") as caught:
        endpoint._read_prompts(ask(url, url, damaged))
    assert len(caught.value.violations) == 1
