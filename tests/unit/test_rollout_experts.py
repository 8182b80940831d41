"""Expert choices from the arrays of vLLM to those of the trainer."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import DataLossError
from perigee.rollout.v1.rollout_pb2 import RepetitionStop, Sampling
from services.rollout.engine import EngineOutput, EngineRequest
from services.rollout.segment import Segment, SegmentSettings, generate_segment
from services.rollout.vllm_experts import Rows, pack_rows, take_rows
from services.trainer.data import Trajectory, unpack_experts
from services.trainer.hf import ModelShape
from services.trainer.packing import TokenSequence, make_micro_batches
from tests.fixtures.rollout_engine import FragileEngine

VERSIONS = [buffer_pb2.VersionSpan(policy_version=1, tokens=1)]


class RecordingEngine(FragileEngine):
    """Draws tokens whose rows vLLM has when it hands out an output, and `ahead` more."""

    def __init__(self, rows_TLK: Rows, outputs: Sequence[int], ahead: int) -> None:
        super().__init__()
        self.rows_TLK, self.outputs, self.ahead = rows_TLK, outputs, ahead

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        tokens, offset, known, kept = len(self.rows_TLK), 0, 0, list[Rows]()
        for wanted in [*self.outputs, tokens]:
            count = min(wanted, tokens - offset)
            last = offset + count == tokens
            seen = min(offset + count + self.ahead, tokens)
            # One array for each step of the engine.
            kept += [self.rows_TLK[at : at + 1] for at in range(known, seen)]
            known = seen
            rows_TLK = np.concatenate(kept) if last else take_rows(kept, count)
            assert rows_TLK is not None
            yield EngineOutput(
                token_ids=[5] * count,
                logprobs=[-1.0] * count,
                versions=VERSIONS * count,
                cached_tokens=0,
                finish="length" if last else None,
                experts=pack_rows(rows_TLK, count),
            )
            offset += count
            if last:
                return


async def collect(engine: RecordingEngine, tokens: int, chunk_tokens: int) -> bytes:
    segment = Segment("s", "t", pack_token_ids([7, 8]), b"", tokens, buffer_pb2.END_REASON_BUDGET)
    settings = SegmentSettings(Sampling(temperature=1), RepetitionStop(), (99,), chunk_tokens)
    return b"".join([chunk.experts async for chunk in generate_segment(engine, segment, settings)])


def model_shape(layers: int, experts: int, per_token: int) -> ModelShape:
    return cast(ModelShape, SimpleNamespace(layers=layers, experts=experts, experts_per_token=per_token))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4)),
    experts=st.sampled_from([4, 256, 257, 1000]),
    outputs=st.lists(st.integers(1, 9), max_size=8),
    ahead=st.integers(0, 3),
    chunk_tokens=st.integers(1, 20),
)
def test_the_trainer_gets_the_choices_of_each_trained_token(
    seed: int, sizes: tuple[int, int, int], experts: int, outputs: list[int], ahead: int, chunk_tokens: int
) -> None:
    generator = np.random.default_rng(seed)
    rows_TLK = generator.integers(0, experts, sizes).astype(np.uint8 if experts <= 256 else np.uint16)
    packed = asyncio.run(collect(RecordingEngine(rows_TLK, outputs, ahead), sizes[0], chunk_tokens))
    tokens_T = np.full(sizes[0], 5)
    trajectory = Trajectory(np.array([7, 8]), tokens_T, -np.ones(sizes[0], np.float32), np.ones_like(tokens_T), packed)
    shape = model_shape(sizes[1], experts, sizes[2])
    assert np.array_equal(unpack_experts(trajectory, shape), rows_TLK)
    trained_T = np.concatenate([[False], generator.random(sizes[0]) < 0.5])
    sequences = [
        TokenSequence(np.concatenate([[7, 8], tokens_T]), trained_T, experts_TLK)
        for experts_TLK in (unpack_experts(trajectory, shape), None)
    ]
    [batch] = make_micro_batches([sequences], torch.device("cpu"))
    assert batch.experts_TLK is not None
    replayed_TLK = batch.experts_TLK.numpy()
    assert np.array_equal(replayed_TLK[1 : len(trained_T)][trained_T[1:]], rows_TLK[trained_T[1:]])
    assert (replayed_TLK[: len(trained_T)][~trained_T] == -1).all()
    assert (replayed_TLK[len(trained_T) :] == -1).all()


@pytest.mark.parametrize(("packed", "experts"), [(bytes(3), 300), (bytes(3), 4), (b"\x00\x04", 4)])
def test_choices_of_another_model_are_refused(packed: bytes, experts: int) -> None:
    """Also such as are no whole number of choices."""
    trajectory = Trajectory(np.array([7]), np.array([5]), -np.ones(1, np.float32), np.ones(1, np.int64), packed)
    with pytest.raises(DataLossError, match=f"not of 1 layers with {experts} experts, of which a token passes 2"):
        unpack_experts(trajectory, model_shape(1, experts, 2))


def test_a_token_without_choices_leaves_its_chunk_without() -> None:
    rows_TLK = np.zeros((3, 2, 2), np.uint8)
    assert pack_rows(rows_TLK, 4) == []
    assert take_rows([], 4) is None
    assert pack_rows(rows_TLK[:2], 2) == [bytes(4)] * 2
