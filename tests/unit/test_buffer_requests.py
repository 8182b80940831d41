"""What the buffer refuses before it asks Redis, and how the refusal reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import InvalidArgumentError
from services.buffer import requests
from services.buffer.config import ImagesConfig, LimitsConfig
from services.buffer.model import commit_digest
from services.buffer.requests import describe_bad_id, describe_bad_run_id
from services.buffer.scripts import run_key

LIMITS = LimitsConfig(chunks=3, groups=3, trajectories=4, trajectory_tokens=10, images=2)


def fields_of(error: InvalidArgumentError) -> list[str]:
    return [violation.field for violation in error.violations]


def chunk(offset: int = 0, count: int = 1) -> pb.Chunk:
    return pb.Chunk(
        trajectory_id="t",
        epoch=1,
        offset=offset,
        token_ids=pack_token_ids([1] * count),
        logprobs=pack_logprobs([-1.0] * count),
        versions=[pb.VersionSpan(policy_version=1, tokens=count)],
    )


@given(st.text(max_size=300))
def test_ids_that_pass_make_one_hash_tag(run_id: str) -> None:
    if describe_bad_run_id(run_id) is None:
        key = run_key(run_id)
        # Redis hashes what stands between the first brace and the next closing one.
        start = key.index("{") + 1
        assert key[start : key.index("}", start)] == run_id


@pytest.mark.parametrize("bad", ["", "a\nb", "a\x00", "x" * 257, "ü" * 129])
def test_ids_that_cannot_be_used(bad: str) -> None:
    assert describe_bad_id(bad) is not None


def test_limits_are_named_with_what_to_do() -> None:
    with pytest.raises(InvalidArgumentError, match="chunks: holds 4 items, 3 at most: send several calls"):
        requests.check_chunks([chunk()] * 4, LIMITS)
    with pytest.raises(InvalidArgumentError, match=r"chunks\[0\]\.offset: passes the limit of 10 tokens"):
        requests.check_chunks([chunk(offset=9, count=2)], LIMITS)
    requests.check_chunks([chunk(offset=9)], LIMITS)
    with pytest.raises(InvalidArgumentError, match="trajectory_ids"):
        requests.check_ids("trajectory_ids", ["a", "b", "c", "d", "e"], LIMITS)


def test_every_wrong_field_is_named() -> None:
    wrong = chunk()
    wrong.epoch = 0
    wrong.trajectory_id = ""
    wrong.logprobs += pack_logprobs([-1])
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_chunks([chunk(), wrong], LIMITS)
    assert fields_of(caught.value) == ["chunks[1].trajectory_id", "chunks[1].epoch", "chunks[1].logprobs"]
    assert caught.value.message.startswith("chunks[1].trajectory_id: must not be empty; chunks[1].epoch: must be")


def test_tokens_that_are_cut_inside_of_one_are_refused() -> None:
    wrong = chunk()
    wrong.token_ids, wrong.logprobs = wrong.token_ids[:3], wrong.logprobs[:3]
    with pytest.raises(InvalidArgumentError, match="holds 3 bytes, not 4 for each token") as caught:
        requests.check_chunks([wrong], LIMITS)
    assert fields_of(caught.value)[0] == "chunks[0].token_ids"
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=b"123456", trajectory_ids=["t"])
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_groups([group], LIMITS)
    assert fields_of(caught.value) == ["groups[0].prompt_token_ids"]


DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("piece", "field"),
    [
        (pb.ImagePiece(digest=DIGEST.upper(), image_bytes=5), "digest"),
        (pb.ImagePiece(digest=DIGEST[:-1], image_bytes=5), "digest"),
        (pb.ImagePiece(digest=DIGEST), "image_bytes"),
        (pb.ImagePiece(digest=DIGEST, image_bytes=9), "image_bytes"),
        (pb.ImagePiece(digest=DIGEST, image_bytes=8, offset=5, content=b"1234"), "content"),
        (pb.ImagePiece(digest=DIGEST, image_bytes=8, offset=5), "content"),
    ],
)
def test_pieces_that_no_image_can_have(piece: pb.ImagePiece, field: str) -> None:
    images = ImagesConfig(max_image_bytes=8)
    good = pb.ImagePiece(digest=DIGEST, image_bytes=8, offset=5, content=b"123")
    requests.check_pieces([good, pb.ImagePiece(digest=DIGEST, image_bytes=8)], LIMITS, images)
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_pieces([good, piece], LIMITS, images)
    assert fields_of(caught.value) == [f"pieces[1].{field}"]
    with pytest.raises(InvalidArgumentError, match="pieces: holds 3 items, 2 at most"):
        requests.check_pieces([good] * 3, LIMITS, images)


def test_digests_that_name_no_image() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_digests([DIGEST, DIGEST, "picture.png"], LIMITS)
    assert fields_of(caught.value) == ["digests", "digests[2]"]
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=["t"])
    group.image_digests.extend([DIGEST, "x"])
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_groups([group], LIMITS)
    assert fields_of(caught.value) == ["groups[0].image_digests", "groups[0].image_digests[1]"]


def test_ids_that_are_there_twice_are_named() -> None:
    groups = [
        pb.NewGroup(group_id=name, prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=ids)
        for name, ids in (("a", ["t", "u"]), ("a", ["v", "t"]))
    ]
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_groups(groups, LIMITS)
    assert fields_of(caught.value) == ["groups[1].group_id", "groups[1].trajectory_ids[1]"]


@pytest.mark.parametrize(
    ("verdict", "reward", "field"),
    [
        (pb.VERDICT_FAILED, 0.0, "verdicts[0].reward"),
        (pb.VERDICT_CORRECT, None, "verdicts[0].reward"),
        (pb.VERDICT_WRONG, float("nan"), "verdicts[0].reward"),
        (pb.VERDICT_UNSPECIFIED, None, "verdicts[0].verdict"),
        (99, None, "verdicts[0].verdict"),
    ],
)
def test_verdicts_that_contradict_themselves(verdict: pb.Verdict.ValueType, reward: float | None, field: str) -> None:
    item = pb.TrajectoryVerdict(trajectory_id="t", verdict=verdict, reward=reward)
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_verdicts([item], LIMITS)
    assert fields_of(caught.value) == [field]


def test_a_commit_is_known_by_its_contents() -> None:
    request = pb.CommitIterationRequest(run_id="r", iteration=1, consumed_group_ids=["a"])
    digest = commit_digest(request)
    assert commit_digest(pb.CommitIterationRequest.FromString(request.SerializeToString())) == digest
    request.coordinator_state = b"x"
    assert commit_digest(request) != digest


def test_a_commit_cannot_count_more_right_answers_than_answers() -> None:
    increment = pb.PromptStatistics(prompt_id="p", trajectories=1, correct=2)
    with pytest.raises(InvalidArgumentError) as caught:
        requests.check_commit(pb.CommitIterationRequest(iteration=1, prompt_increments=[increment]), LIMITS)
    assert fields_of(caught.value) == ["prompt_increments[0].correct"]
