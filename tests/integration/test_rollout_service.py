"""A rollout worker on the real engine, with a real buffer and weights pushed over Mooncake."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2
from services.rollout.model import open_policy
from services.rollout.worker import score_prompt
from services.weights.config import WeightsConfig
from services.weights.manifest import WeightImage
from services.weights.pieces import place_pieces
from services.weights.receive import WeightReceiver
from tests.fixtures.rollout import (
    CHARACTERS,
    CONTEXT,
    EOS,
    VOCABULARY,
    NewTrajectories,
    Pusher,
    Response,
    extend_request,
    find_mapped,
    make_policy,
    policy_logprobs,
    policy_tensors,
    rollout_config,
    wait_for_state,
)
from tests.fixtures.weights import local_source

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

POLICIES = [make_policy(seed) for seed in (11, 12)]
# Logprobs of the engine against an fp32 forward pass of transformers on the same tokens.
TOLERANCE = 1e-3
PROMPT = [2 + (7 * i) % len(CHARACTERS) for i in range(12)]
MANY_PROMPTS = [[2 + (seed + 7 * i * i) % len(CHARACTERS) for i in range(8)] for seed in range(12)]
HALVED = tuple(f"{name}_proj.weight" for name in ("q", "o", "gate", "up", "down"))
LONG_PROMPT = [2 + (5 * i * i) % len(CHARACTERS) for i in range(100)]
_runs = itertools.count()


@pytest_asyncio.fixture(loop_scope="session")
async def worker(rollout_address: str, pusher: Pusher, rollout_client: RolloutClient) -> str:
    """The worker with policy 0 as version 10, whatever the test before has left; no test pushes others as 10."""
    state = await rollout_client.get_state(pb.GetStateRequest())
    if (state.status, state.policy_version) != (pb.WORKER_STATUS_READY, 10):
        assert await pusher.push(policy_tensors(POLICIES[0]), 10, rollout_address) == ""
    return rollout_address


@pytest_asyncio.fixture(loop_scope="session")
async def trajectories(
    rollout_address: str, pusher: Pusher, buffer_client: BufferClient, rollout_client: RolloutClient
) -> NewTrajectories:
    """Trajectories of a run of its own, whose weights the worker holds: policy 0 as version 0."""
    run_id = f"rollout-{next(_runs)}"
    assert await pusher.push(policy_tensors(POLICIES[0]), 0, rollout_address, run_id) == ""
    return NewTrajectories(buffer_client, rollout_client, run_id)


async def generate(client: RolloutClient, prompts: Sequence[Sequence[int]], **fields: Any) -> list[Response]:
    """The whole answer to each prompt, in order; 48 tokens at temperature 1 unless told otherwise."""
    max_tokens = fields.pop("max_tokens", 48)
    items = [
        pb.GenerateItem(id=str(i), prompt_token_ids=pack_token_ids(prompt), max_tokens=max_tokens)
        for i, prompt in enumerate(prompts)
    ]
    request = pb.GenerateRequest(items=items, **({"sampling": pb.Sampling(temperature=1)} | fields))
    whole = {item.id: Response() for item in items}
    async for response in client.generate(request, timeout_s=60):
        answer = whole[response.id]
        assert response.end_reason == 0 or answer.end_reason == 0
        if not request.text_only:
            assert response.offset == len(answer.token_ids)
        answer.token_ids += unpack_token_ids(response.token_ids)
        answer.logprobs += unpack_logprobs(response.logprobs)
        answer.versions += response.versions
        answer.end_reason, answer.text, answer.tokens = response.end_reason, response.text, response.tokens
    return list(whole.values())


def largest_difference(policy: int, prompt: Sequence[int], answer: Any, temperature: float = 1.0) -> float:
    """Between the answer's logprobs and the policy's own, nats."""
    expected = policy_logprobs(POLICIES[policy], prompt, answer.token_ids, temperature)
    return max(abs(a - b) for a, b in zip(expected, answer.logprobs, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_the_sampled_distribution(
    worker: str, rollout_client: RolloutClient, temperature: float
) -> None:
    answers = await generate(rollout_client, [PROMPT] * 8, sampling=pb.Sampling(temperature=temperature))
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    for answer in answers:
        assert largest_difference(0, PROMPT, answer, temperature) < TOLERANCE


async def test_a_push_reaches_the_tied_head_and_forgets_cached_prefixes(
    trajectories: NewTrajectories, rollout_address: str, pusher: Pusher
) -> None:
    [warm] = await trajectories.create([LONG_PROMPT])
    await trajectories.extend([warm], token_budget=4)
    [again] = await trajectories.create([LONG_PROMPT])
    ended, _ = await trajectories.extend([again], token_budget=4)
    assert ended[again].cached_tokens >= 64
    assert ended[again].cached_tokens + ended[again].prefilled_tokens == len(LONG_PROMPT)

    assert await pusher.push(policy_tensors(POLICIES[1]), 1, rollout_address, trajectories.run_id) == ""
    [fresh] = await trajectories.create([LONG_PROMPT])
    ended, _ = await trajectories.extend([fresh], policy_version=1)
    assert ended[fresh].cached_tokens == 0
    held = await trajectories.read(fresh)
    assert largest_difference(1, LONG_PROMPT, held) < TOLERANCE
    # The two policies are far apart, even in a short answer, so this would notice any part of the old one.
    assert largest_difference(0, LONG_PROMPT, held) > 20 * TOLERANCE
    assert [(span.policy_version, span.tokens) for span in held.versions] == [(1, len(held.token_ids))]


async def test_pulled_slices_are_the_engine_s_weights(worker: str, rollout_client: RolloutClient) -> None:
    """Rows of the embedding from two ranks are one view of the image, columns are put together by the engine."""
    tensors = policy_tensors(POLICIES[1])
    config = WeightsConfig(block_bytes=1 << 12)
    async with local_source(config, ranks=2) as source, WeightReceiverClient.connect(worker) as receiver:
        manifest = source.publish("image", tensors, 3, columns="down_proj.weight")
        logprobs = policy_logprobs(POLICIES[1], PROMPT[:1], PROMPT[1:])
        manifest.fingerprint.CopyFrom(weights_pb2.Fingerprint(token_ids=PROMPT, logprobs=logprobs))
        request = weights_pb2.PullRequest(image_id="image", sources=[source.address])
        assert (await receiver.pull(request, timeout_s=60)).policy_version == 3
        [answer] = await generate(rollout_client, [PROMPT])
        assert largest_difference(1, PROMPT, answer) < TOLERANCE
        assert {span.policy_version for span in answer.versions} == {3}
        assert REGISTRY.get_sample_value("perigee_rollout_fingerprint_difference") < TOLERANCE


def test_slices_that_loaders_of_two_workers_copy_are_rectangles() -> None:
    """What is used of vLLM's fake tensors, which are no public interface."""
    import torch
    from vllm.distributed.weight_transfer.sharded_rdt_fake import FakeRDTTensor

    from services.rollout.vllm_slices import SliceRecorder

    target, layer = torch.empty(4, 6, device="meta"), torch.nn.Module()
    layers = {target.untyped_storage()._cdata: layer}
    recorder = SliceRecorder({"a": (8, 6), "b": (6,)}, layers)

    def fake(name: str, *shape: int) -> Any:
        return FakeRDTTensor(name, torch.Size(shape), torch.float32, torch.device("cpu"), sink=recorder)  # type: ignore[arg-type]

    target.copy_(fake("a", 8, 6).narrow(0, 4, 4))
    target[:, :3].copy_(fake("a", 8, 6).narrow(1, 3, 3)[:4])
    torch.empty(6, device="meta").copy_(fake("b", 6))
    assert recorder.rectangles["a"] == {((4, 0), (8, 6)), ((0, 3), (4, 6))}
    torch.empty(6, 8, device="meta").copy_(fake("a", 8, 6).t())
    assert ((0, 0), (8, 6)) in recorder.rectangles["a"]
    assert recorder.rectangles["b"] == {((0,), (6,))}
    assert recorder.layers["a"] == {layer, None}
    with pytest.raises(NotImplementedError, match="unsupported op"):
        target.copy_(fake("a", 8, 6)[:4] * 2)


def test_a_process_whose_loader_computes_takes_whole_tensors_and_says_why() -> None:
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from services.rollout.vllm_extension import WorkerExtension

    class Doubling(torch.nn.Module):
        """Model whose loader does not copy what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)

        def load_weights(self, weights: Any) -> None:
            for _, tensor in weights:
                self.weight.copy_(tensor * 2)

    model = Doubling()
    record_metadata_for_reloading(model)

    class Process(WorkerExtension):
        """What the extension uses of vLLM's worker."""

        weight_transfer_engine = SimpleNamespace(model=model, taken={})
        vllm_config = VllmConfig()

    manifest = weights_pb2.Manifest(tensors=[weights_pb2.TensorSpec(name="weight", dtype="F32", shape=[2])])
    assert "unsupported op" in Process().find_slices(manifest.SerializeToString())
    assert Process.weight_transfer_engine.taken is None
    assert model.weight.tolist() == [1, 1]


@pytest.mark.timeout(300)  # starts an engine of two processes
async def test_two_processes_take_their_slices_and_load_what_has_changed(policy_folder: Path) -> None:
    """An engine of tensor parallelism 2: its host pulls each piece once, and each process takes its share of them."""
    from services.rollout.vllm_engine import VllmEngine, join_slices

    engine = VllmEngine(
        rollout_config(policy_folder, "", tensor_parallel_size=2), open_policy(str(policy_folder), None)
    )
    intact: set[str] = set(policy_tensors(POLICIES[0]))
    changed_model = deepcopy(POLICIES[0])
    changed_model.model.layers[1].mlp.gate_proj.weight.data *= 1.5

    async def commit(image: WeightImage) -> None:
        """Loads an image of which other tensors than those intact must not be read."""
        with image.buffer.view() as view:
            for piece in image.manifest.pieces:
                if image.manifest.tensors[piece.tensor].name not in intact:
                    view[piece.offset : piece.offset + 4] = b"\xff" * 4
        assert await engine.update_weights(image) > 0

    async def difference(policy: Qwen2ForCausalLM) -> float:
        found = await score_prompt(engine, LONG_PROMPT)
        expected = policy_logprobs(policy, LONG_PROMPT[:1], LONG_PROMPT[1:])
        return max(abs(a - b) for a, b in zip(expected, found, strict=True))

    config = WeightsConfig(block_bytes=1 << 12)
    receiver = WeightReceiver(config, commit, find_slices=engine.find_slices)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        await engine.start()
        # What the processes share has no name that would outlive them.
        shared = find_mapped("cpushm")
        assert shared
        assert all(line.endswith("(deleted)") for line in shared)
        await receiver.start()
        stack.push_async_callback(receiver.close)
        source = await stack.enter_async_context(local_source(config, ranks=2))

        async def pull(image_id: str, policy: Qwen2ForCausalLM) -> tuple[weights_pb2.Manifest, int]:
            columns = ("down_proj.weight", "o_proj.weight")
            manifest = source.publish(image_id, policy_tensors(policy), 1, columns)
            request = weights_pb2.PullRequest(image_id=image_id, sources=[source.address])
            response = await receiver.Pull(request, None)
            await source.source.withdraw(image_id)
            return manifest, response.bytes

        manifest, pulled = await pull("first", POLICIES[0])
        assert await difference(POLICIES[0]) < TOLERANCE
        assert pulled == place_pieces(manifest).total_bytes
        assert engine._llm is not None
        tensors = weights_pb2.Manifest(tensors=manifest.tensors).SerializeToString()
        shares = [join_slices([each]) for each in await engine._llm.collective_rpc("find_slices", args=(tensors,))]
        for share, rows in zip(shares, (40, 24), strict=True):
            # Of the vocabulary, filled up to 64 rows, the first has 32, in whole pieces of 16 and 8. Both have the only
            # head of keys and values, and norms.
            halved = [each for each in manifest.tensors if each.name.endswith(HALVED)]
            left_out = sum(4 * math.prod(each.shape) // 2 for each in halved) + 4 * (VOCABULARY - rows) * 64
            assert place_pieces(manifest, share).total_bytes == pulled - left_out
        assert receiver.current is not None
        for _ in range(2):
            held = engine.count_memory()
            await engine.sleep()
            freed = held - engine.count_memory()
            await engine.wake_up(receiver.current)
        # Of two caches, whose pages are untouched the first time.
        assert freed > 60 << 20
        assert await difference(POLICIES[0]) < TOLERANCE
        intact = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")}
        await pull("second", changed_model)
        assert await difference(changed_model) < TOLERANCE
        assert await difference(POLICIES[0]) > 20 * TOLERANCE


async def test_a_continuation_is_the_uninterrupted_response(worker: str, rollout_client: RolloutClient) -> None:
    greedy = pb.Sampling(temperature=0)
    wholes = await generate(rollout_client, MANY_PROMPTS, sampling=greedy)
    firsts = [list(whole.token_ids[: whole.tokens // 2]) for whole in wholes]
    assert max(len(first) for first in firsts) == 24
    for prompt, first, whole in zip(MANY_PROMPTS, firsts, wholes, strict=True):
        [rest] = await generate(rollout_client, [prompt + first], sampling=greedy, max_tokens=48 - len(first))
        assert first + list(rest.token_ids) == list(whole.token_ids)


async def test_a_resumed_trajectory_stays_within_its_cap(trajectories: NewTrajectories) -> None:
    ids = await trajectories.create([PROMPT], k=32)
    ended, failed = await trajectories.extend(ids, token_budget=32, max_response_tokens=40)
    assert failed == {}
    partial = [
        trajectory_id for trajectory_id in ids if ended[trajectory_id].end_reason == buffer_pb2.END_REASON_BUDGET
    ]
    assert partial
    assert all((ended[i].tokens, ended[i].new_tokens, ended[i].text) == (32, 32, "") for i in partial)

    ended, failed = await trajectories.extend(partial, token_budget=32, max_response_tokens=40)
    assert failed == {}
    for trajectory_id, end in ended.items():
        held = await trajectories.read(trajectory_id)
        assert end.tokens == len(held.token_ids) == len(held.logprobs) <= 40
        assert end.new_tokens == end.tokens - 32
        assert held.end_reason == end.end_reason
        assert largest_difference(0, PROMPT, held) < TOLERANCE
        if end.end_reason == buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS:
            assert end.tokens == 40
        else:
            assert (end.end_reason, held.token_ids[-1]) == (buffer_pb2.END_REASON_STOP, EOS)
    assert any(end.end_reason == buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS for end in ended.values())


async def test_a_call_repeated_under_one_lease_has_one_budget(trajectories: NewTrajectories) -> None:
    [trajectory_id] = await trajectories.create([PROMPT])
    leases = await trajectories.lease([trajectory_id])
    ended, _ = await trajectories.extend([], leases, token_budget=8)
    tokens = ended[trajectory_id].tokens
    again, failed = await trajectories.extend([], leases, token_budget=8)
    if ended[trajectory_id].end_reason == buffer_pb2.END_REASON_BUDGET:
        assert (again[trajectory_id].tokens, again[trajectory_id].new_tokens) == (tokens, 0)
    else:
        assert "has ended" in failed[trajectory_id]


async def test_every_token_knows_its_version_when_weights_change_under_way(
    trajectories: NewTrajectories, rollout_address: str, rollout_client: RolloutClient, pusher: Pusher
) -> None:
    extended: list[str] = []
    before = (await rollout_client.get_state(pb.GetStateRequest())).generated_tokens

    async def extend_until_refused() -> None:
        # The first call after the commit asks for weights that are gone.
        with suppress(FailedPreconditionError):
            while True:
                # With six calls more than the engine decodes at once: it is busy until the last one ends.
                ids = await trajectories.create([PROMPT], k=48)
                _, failed = await trajectories.extend(ids, token_budget=200, max_response_tokens=200)
                assert failed == {}
                extended.extend(ids)

    async with asyncio.TaskGroup() as group:
        # Several calls at once, so that sequences are in flight at whatever moment the commit comes.
        for _ in range(6):
            group.create_task(extend_until_refused())
        await wait_for_state(rollout_client, lambda state: state.running > 0 and state.generated_tokens > before)
        assert await pusher.push(policy_tensors(POLICIES[1]), 1, rollout_address, trajectories.run_id) == ""
    mixed = 0
    for trajectory_id in extended:
        held = await trajectories.read(trajectory_id)
        versions = [span.policy_version for span in held.versions for _ in range(span.tokens)]
        assert len(versions) == len(held.token_ids)
        assert versions == sorted(versions)
        by_version = [policy_logprobs(policy, PROMPT, held.token_ids) for policy in POLICIES]
        for place, version in enumerate(versions):
            assert abs(by_version[version][place] - held.logprobs[place]) < TOLERANCE
        mixed += len(set(versions)) == 2
    assert mixed > 0


async def test_text_is_the_whole_response_without_its_stop_token(trajectories: NewTrajectories) -> None:
    ids = await trajectories.create([PROMPT], k=32)
    ended, _ = await trajectories.extend(ids, token_budget=100, max_response_tokens=100)
    stopped = [i for i in ids if ended[i].end_reason == buffer_pb2.END_REASON_STOP]
    assert stopped
    for trajectory_id in stopped:
        held = await trajectories.read(trajectory_id)
        assert held.token_ids[-1] == EOS
        assert EOS not in held.token_ids[:-1]
        assert ended[trajectory_id].text == "".join(
            "<pad>" if token == 0 else CHARACTERS[token - 2] for token in held.token_ids[:-1]
        )


async def test_a_greedy_loop_is_cut_as_repetition(worker: str, rollout_client: RolloutClient) -> None:
    stop = pb.RepetitionStop(max_period=16, min_repeats=3)
    fields: dict[str, Any] = {"sampling": pb.Sampling(temperature=0), "max_tokens": 240}
    wholes = await generate(rollout_client, MANY_PROMPTS, **fields)
    cuts = await generate(rollout_client, MANY_PROMPTS, **fields, repetition_stop=stop)
    repeated = 0
    for whole, cut in zip(wholes, cuts, strict=True):
        tokens = list(cut.token_ids)
        assert tokens == list(whole.token_ids[: cut.tokens])
        if cut.end_reason == buffer_pb2.END_REASON_REPETITION:
            assert any(tokens[-3 * p :] == tokens[-p:] * 3 for p in range(1, 17))
            assert cut.tokens <= whole.tokens
            repeated += 1
    assert repeated > 0


async def test_a_newer_lease_fences_the_older_call(trajectories: NewTrajectories) -> None:
    [trajectory_id] = await trajectories.create([PROMPT])
    old = await trajectories.lease([trajectory_id])
    await trajectories.lease([trajectory_id])
    ended, failed = await trajectories.extend([], old)
    assert ended == {}
    assert "leased again" in failed[trajectory_id]


async def test_a_caller_that_goes_away_frees_the_engine(
    trajectories: NewTrajectories, rollout_client: RolloutClient
) -> None:
    ids = await trajectories.create([PROMPT], k=32)
    request = extend_request(
        trajectories.run_id, await trajectories.lease(ids), token_budget=240, max_response_tokens=240
    )
    before = (await rollout_client.get_state(pb.GetStateRequest())).generated_tokens
    reading = asyncio.ensure_future(anext(rollout_client.extend_trajectories(request)))
    await wait_for_state(rollout_client, lambda state: state.generated_tokens > before)
    reading.cancel()
    await wait_for_state(rollout_client, lambda state: state.running == 0)
    leases: list[pb.LeasedTrajectory] = []
    for trajectory_id in ids:
        # Short responses may have ended before.
        with suppress(FailedPreconditionError):
            leases += await trajectories.lease([trajectory_id])
    assert leases
    # What was cut goes on elsewhere.
    ended, failed = await trajectories.extend([], leases, token_budget=240, max_response_tokens=240)
    assert (len(ended), failed) == (len(leases), {})


async def test_one_seed_gives_one_answer(worker: str, rollout_client: RolloutClient) -> None:
    sampling = pb.Sampling(temperature=1, seed=5)
    first, second = [await generate(rollout_client, [PROMPT] * 4, sampling=sampling) for _ in range(2)]
    assert [list(answer.token_ids) for answer in first] == [list(answer.token_ids) for answer in second]
    assert len({tuple(answer.token_ids) for answer in first}) == 4


async def test_seeded_prompts_that_fill_several_steps_give_the_same_answers(
    worker: str, pusher: Pusher, rollout_client: RolloutClient
) -> None:
    # A commit forgets the cached prefixes, so the prompts exceed what one step prefills.
    assert await pusher.push(policy_tensors(POLICIES[0]), 10, worker) == ""
    restarts = (await rollout_client.get_state(pb.GetStateRequest())).engine_restarts
    prompts = [[2 + (i * 7 + j) % len(CHARACTERS) for j in range(100)] for i in range(64)]
    sampling = pb.Sampling(temperature=1, seed=5)
    together = await generate(rollout_client, prompts, sampling=sampling, max_tokens=8)
    for count in (1, 16):
        few = await generate(rollout_client, prompts[:count], sampling=sampling, max_tokens=8)
        assert [answer.token_ids for answer in few] == [answer.token_ids for answer in together[:count]]
    assert (await rollout_client.get_state(pb.GetStateRequest())).engine_restarts == restarts


async def test_text_only_carries_no_tokens(worker: str, rollout_client: RolloutClient) -> None:
    greedy = pb.Sampling(temperature=0)
    answers = await generate(rollout_client, MANY_PROMPTS, sampling=greedy)
    texts = await generate(rollout_client, MANY_PROMPTS, sampling=greedy, text_only=True)
    assert [(text.text, text.tokens) for text in texts] == [(each.text, each.tokens) for each in answers]
    assert all(text.tokens for text in texts)
    assert any(text.text for text in texts)
    assert not any(text.token_ids or text.logprobs or text.versions for text in texts)


async def test_a_checkpoint_of_another_model_is_refused_and_the_old_one_serves_on(
    rollout_address: str, pusher: Pusher, trajectories: NewTrajectories, rollout_client: RolloutClient
) -> None:
    tensors = policy_tensors(POLICIES[1])
    missing = {name: tensor for name, tensor in tensors.items() if "q_proj.weight" not in name}
    assert "q_proj.weight is missing" in await pusher.push(missing, 1, rollout_address, trajectories.run_id)
    larger = tensors | {"model.norm.weight": tensors["model.norm.weight"].repeat(2)}
    assert "model.norm.weight has shape" in await pusher.push(larger, 1, rollout_address, trajectories.run_id)
    assert (await rollout_client.get_state(pb.GetStateRequest())).policy_version == 0
    [answer] = await generate(rollout_client, [PROMPT])
    assert largest_difference(0, PROMPT, answer) < TOLERANCE


async def test_other_weights_than_asked_for_are_a_failed_precondition(
    trajectories: NewTrajectories, rollout_client: RolloutClient
) -> None:
    ids = await trajectories.create([PROMPT])
    with pytest.raises(FailedPreconditionError, match="holds policy version 0, not 3"):
        await trajectories.extend(ids, policy_version=3)
    with pytest.raises(FailedPreconditionError, match="weights of run"):
        await generate(rollout_client, [PROMPT], run_id="another")
    with pytest.raises(FailedPreconditionError, match="not 7"):
        await generate(rollout_client, [PROMPT], policy_version=7)


async def test_settings_that_cannot_be_corrected_are_refused(
    trajectories: NewTrajectories, rollout_client: RolloutClient
) -> None:
    ids = await trajectories.create([PROMPT])
    with pytest.raises(InvalidArgumentError) as caught:
        await trajectories.extend(ids, sampling=pb.Sampling(temperature=0, top_p=0.9))
    assert [violation.field for violation in caught.value.violations] == ["sampling.top_p", "sampling.temperature"]
    with pytest.raises(InvalidArgumentError) as caught:
        await generate(rollout_client, [PROMPT], sampling=pb.Sampling(temperature=1, repetition_penalty=1.2))
    assert [violation.field for violation in caught.value.violations] == ["sampling.repetition_penalty"]
    with pytest.raises(InvalidArgumentError) as caught:
        await trajectories.extend(ids, token_budget=0, max_response_tokens=0)
    assert [violation.field for violation in caught.value.violations] == ["token_budget", "max_response_tokens"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [([], "empty"), ([5] * CONTEXT, f"context of {CONTEXT}"), ([VOCABULARY], f"vocabulary of {VOCABULARY}")],
)
async def test_prompts_that_cannot_be_generated_are_named(
    worker: str, rollout_client: RolloutClient, prompt: list[int], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        await generate(rollout_client, [PROMPT, prompt])
    assert [violation.field for violation in caught.value.violations] == ["items[1].prompt_token_ids"]


async def test_a_prompt_that_fills_the_context_fails_its_trajectory_alone(trajectories: NewTrajectories) -> None:
    short, long = await trajectories.create([PROMPT, [5] * CONTEXT])
    ended, failed = await trajectories.extend([short, long])
    assert set(ended) == {short}
    assert "leaves no room in the context" in failed[long]


async def test_the_context_bounds_a_response(trajectories: NewTrajectories) -> None:
    prompt = [5] * (CONTEXT - 6)
    ids = await trajectories.create([prompt], k=32)
    ended, failed = await trajectories.extend(ids, max_response_tokens=64)
    assert failed == {}
    assert {end.tokens for end in ended.values() if end.end_reason == buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS} == {6}


async def test_too_many_sequences_are_refused(worker: str, rollout_client: RolloutClient) -> None:
    items = [pb.GenerateItem(id=str(i), prompt_token_ids=pack_token_ids([5]), max_tokens=1) for i in range(16385)]
    request = pb.GenerateRequest(items=items, sampling=pb.Sampling(temperature=1))
    with pytest.raises(ResourceExhaustedError, match="16384 sequences"):
        async for _ in rollout_client.generate(request):
            pass


async def test_state_and_readiness(worker: str, rollout_client: RolloutClient) -> None:
    before = (await rollout_client.get_state(pb.GetStateRequest())).generated_tokens
    [response] = await generate(rollout_client, [PROMPT])
    state = await rollout_client.get_state(pb.GetStateRequest())
    assert (state.status, state.running, state.capacity) == (pb.WORKER_STATUS_READY, 0, 64)
    assert state.max_model_len == CONTEXT
    assert state.generated_tokens == before + len(response.token_ids)
    async with grpc.aio.insecure_channel(worker) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(service="perigee.rollout.v1.RolloutService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", pb.Residence.keys()[1:])
async def test_an_engine_that_comes_back_answers_as_before(
    worker: str, rollout_client: RolloutClient, name: str
) -> None:
    async def answer() -> list[Response]:
        return await generate(rollout_client, MANY_PROMPTS[:4], sampling=pb.Sampling(temperature=0), max_tokens=24)

    before, freed = await answer(), []
    version = (await rollout_client.get_state(pb.GetStateRequest())).policy_version
    for iteration in range(2 if name == "RESIDENCE_RESTART" else 10):
        moment: dict[str, Any] = {"run_id": name, "iteration": iteration}
        left = await rollout_client.leave(pb.LeaveRequest(**moment, residence=name))
        freed.append(left.freed_bytes)
        state = await rollout_client.get_state(pb.GetStateRequest())
        assert (state.status, state.policy_version) == (pb.WORKER_STATUS_AWAY, version)
        with pytest.raises(FailedPreconditionError, match="is away"):
            await answer()
        back = await rollout_client.come_back(pb.ComeBackRequest(**moment))
        assert back.policy_version == version
        assert await answer() == before
    if name != "RESIDENCE_KEEP":
        # The first cache has untouched pages, which take no memory.
        assert freed[-1] > 30 << 20
    with pytest.raises(FailedPreconditionError, match="is in iteration"):
        await rollout_client.leave(pb.LeaveRequest(run_id=name, residence=name))


class SilentLlm:
    """vLLM's client of a process that answers nothing."""

    errored = False

    def __init__(self) -> None:
        self.engine_core = self
        self.output_processor = SimpleNamespace(external_req_ids={"a": ["a-1"]})
        self.aborted: list[str] = []

    async def pause_scheduler_async(self, **options: Any) -> None:
        await asyncio.Event().wait()

    async def collective_rpc(self, method: str, args: Sequence[str] = ()) -> None:
        await asyncio.Event().wait()

    async def call_utility_async(self, *arguments: Any) -> None:
        await asyncio.Event().wait()

    async def abort(self, request_ids: Sequence[str], internal: bool) -> None:
        self.aborted += request_ids


class RecordingLlm(SilentLlm):
    """vLLM's client of a process on a GPU; writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    async def pause_scheduler_async(self, **options: Any) -> None:
        self.calls.append(("pause", options))

    async def resume_generation(self) -> None:
        self.calls.append(("resume", None))

    async def sleep(self, **options: Any) -> None:
        self.calls.append(("sleep", options))

    async def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))


async def test_on_a_gpu_vllm_sleeps_and_wakes_weights_before_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.rollout import fork_server, vllm_engine
    from services.rollout.config import RolloutConfig

    monkeypatch.setattr(vllm_engine, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    nothing: Any = None
    model: Any = SimpleNamespace(path="m", dtype="bfloat16", context_tokens=64, vision=None)
    config = RolloutConfig(enable_sleep_mode=True, gpu_memory_utilization=0.3, visible_devices="2,3")
    arguments = vllm_engine.engine_arguments(config, model)
    assert (arguments.enable_sleep_mode, arguments.gpu_memory_utilization) == (True, 0.3)
    # What the share of the GPU leaves is the cache's.
    assert arguments.kv_cache_memory_bytes is None
    assert fork_server.engine_environment(config)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in fork_server.engine_environment(RolloutConfig())
    assert not vllm_engine.VllmEngine(RolloutConfig(), nothing).can_sleep
    engine, llm = vllm_engine.VllmEngine(config, nothing), RecordingLlm()
    assert engine.can_sleep

    async def load(*_: Any) -> None:
        llm.calls.append(("load", None))

    monkeypatch.setattr(engine, "_llm", llm)
    monkeypatch.setattr(engine, "_load", load)
    await engine.sleep()
    await engine.wake_up(nothing)
    assert llm.calls == [
        ("pause", {"mode": "keep", "clear_cache": True}),
        ("sleep", {"level": 2, "mode": "keep"}),
        ("wake_up", ["weights"]),
        ("load", None),
        ("wake_up", ["kv_cache"]),
        ("resume", None),
    ]


async def test_what_a_silent_engine_is_asked_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.rollout import vllm_engine
    from services.rollout.engine import EngineDiedError

    nothing: Any = None
    engine, llm = vllm_engine.VllmEngine(nothing, nothing), SilentLlm()
    monkeypatch.setattr(engine, "_llm", llm)
    monkeypatch.setattr(vllm_engine, "INTERRUPT_SECONDS", 0.01)
    await engine.interrupt(["a", "unknown"])
    assert llm.aborted == ["a-1"]
    for change in (engine.update_weights, engine.wake_up):
        llm.errored = False
        changing = asyncio.ensure_future(change(nothing))
        await asyncio.wait([changing], timeout=0.01)
        llm.errored = True
        with pytest.raises(EngineDiedError, match="died meanwhile"):
            await changing


async def test_requests_in_flight_sleep_and_go_on(worker: str, rollout_client: RolloutClient, pusher: Pusher) -> None:
    async def answer() -> list[Response]:
        return await generate(rollout_client, MANY_PROMPTS, sampling=pb.Sampling(temperature=0), max_tokens=200)

    undisturbed = await answer()
    state = await rollout_client.get_state(pb.GetStateRequest())
    version, generated = state.policy_version, state.generated_tokens
    running = asyncio.create_task(answer())
    # Short answers have ended, long ones have not.
    await wait_for_state(rollout_client, lambda state: state.generated_tokens > generated)
    await rollout_client.leave(pb.LeaveRequest(residence=pb.RESIDENCE_SLEEP))
    assert (await rollout_client.get_state(pb.GetStateRequest())).running
    # A push brings it back as well.
    assert await pusher.push(policy_tensors(POLICIES[0]), version + 1, worker) == ""
    disturbed = await running
    assert [each.token_ids for each in disturbed] == [each.token_ids for each in undisturbed]
    assert {span.policy_version for each in disturbed for span in each.versions} == {version, version + 1}
