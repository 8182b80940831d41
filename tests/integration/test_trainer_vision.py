"""Images in the trainer: log-probabilities and gradients against Hugging Face, on every layout, and what is frozen."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perigee.buffer.client import BufferClient
from perigee.images import ImageLimits, decode_image, read_image
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import open_model_folder
from services.kit.vision import VisionModel, open_vision
from services.weights.config import WeightsConfig
from tests.fixtures.trainer import MadeTrajectory, TrainerAt, store_groups, train_request
from tests.fixtures.trainer_ranks import RunRanks, Sizes, check_slices
from tests.fixtures.vision import make_picture
from tests.fixtures.weights import equal, local_receiver

if TYPE_CHECKING:
    from perigee.images import Image
    from services.trainer.data import Trajectory
    from services.trainer.engine import Engine
    from services.trainer.megatron.model import Evaluated, Policy
    from services.trainer.packing import TokenSequence

LAYOUTS = [Sizes(tensor=2), Sizes(pipeline=2), Sizes(data=2)]
LONG = pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")
# Images by their seeds, the numbers of text tokens between them, and response tokens: some have several, one has none.
PROMPTS: list[tuple[list[int | str], int]] = [
    (["1", 3, "2"], 21),
    ([2, "3", 1, "1", 4], 8),
    ([5], 11),
    (["1", 3, "2"], 6),
    ([1, "4"], 4),
]
SIZES = {"1": (28, 28), "2": (84, 61), "3": (20, 90), "4": (1, 3)}


@pytest.fixture(scope="module")
def trainer_model(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a vocabulary that two ranks can share, and no weight at its initial 0 or 1."""
    folder = tmp_path_factory.mktemp("vision") / "model"
    shutil.copytree(vision_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += config["text_config"]["vocab_size"] % 2
    (folder / "config.json").write_text(json.dumps(config))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    embedding_VD = tensors["model.text_model.embed_tokens.weight"]
    missing = config["text_config"]["vocab_size"] - len(embedding_VD)
    tensors["model.text_model.embed_tokens.weight"] = torch.cat([embedding_VD, embedding_VD[:missing]])
    noisy = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def vision_of(folder: Path) -> VisionModel:
    vision = open_vision(open_model_folder(folder, "model"))
    assert vision is not None
    return vision


def read_picture(name: str) -> Image:
    return read_image(make_picture(int(name), *SIZES[name]), ImageLimits(), "image")


def make_trajectories(vision: VisionModel) -> list[Trajectory]:
    """Prompts with images; each response has an image token that was sampled, and that is text."""
    from services.trainer.data import Trajectory, place_images

    generator, found = np.random.default_rng(0), []
    for parts, tokens in PROMPTS:
        prompt: list[int] = []
        for part in parts:
            prompt += [vision.image_token_id] if isinstance(part, str) else generator.integers(7, 50, part).tolist()
        placed_tokens, placed = place_images(prompt, [read_picture(p) for p in parts if isinstance(p, str)], vision)
        response = generator.integers(7, 50, tokens)
        response[-2] = vision.image_token_id
        logprobs = -generator.random(tokens).astype(np.float32)
        found.append(Trajectory(placed_tokens, response, logprobs, np.zeros(tokens, np.int64), images=placed))
    return found


def to_sequence(each: Trajectory) -> TokenSequence:
    """All of a trajectory's tokens, trained."""
    from services.trainer.packing import TokenSequence

    tokens = np.concatenate([each.prompt_tokens, each.tokens_T])
    return TokenSequence(tokens, np.ones(len(tokens) - 1, np.bool_), images=each.images)


def weigh(found: Evaluated) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that weighs every token otherwise, and the log-probabilities."""
    logprobs_T = found.logprobs_T
    if found.batch.is_filler:
        return logprobs_T.sum() * 0.0, logprobs_T[:0]
    weights_T = torch.cos(found.batch.targets_T + 3.0 * found.batch.packed.positions_T)
    return (logprobs_T * weights_T).sum(), logprobs_T.detach().clone()


def step_on(policy: Policy, sequences: list[TokenSequence]) -> torch.Tensor:
    """The log-probabilities under a step that moves nothing, whose gradient stays; one pack and one more of text."""
    from services.trainer.packing import make_micro_batches

    policy.begin_job(pb.Optimizer(beta1=0.9, beta2=0.95))
    _, reports = policy.step(make_micro_batches([sequences], policy.dims.device, count=2), 1.0, weigh, 0.0)
    return torch.cat(reports) if reports else torch.zeros(0)


def compare(engine: Engine, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities, the gradient and the weights by Hugging Face's names."""
    policy = engine.policy
    logprobs_T = step_on(policy, [to_sequence(each) for each in make_trajectories(vision_of(folder))])
    [logprobs_T] = [each for each in engine.everyone.gather(logprobs_T) if len(each)][:1]
    check_slices(engine, policy)
    weights = {name: tensor.clone() for name, tensor in policy.collect()}
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    return logprobs_T, dict(policy.collect()), weights


def hugging_face(folder: Path) -> tuple[Any, Callable[[TokenSequence], torch.Tensor]]:
    """Hugging Face's model, and what gives the log-probabilities of a sequence by it."""
    from transformers import AutoImageProcessor, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def evaluate(sequence: TokenSequence) -> torch.Tensor:
        embeddings = model.get_input_embeddings()(torch.from_numpy(sequence.tokens[:-1])[None])
        if sequence.images:
            pictures = [decode_image(image.image) for image in sequence.images]
            pixels = processor(images=[pictures], return_tensors="pt", input_data_format="channels_last")
            places = np.concatenate([image.tokens_F for image in sequence.images])
            features = model.model.get_image_features(**pixels).pooler_output.flatten(0, 1)
            embeddings = embeddings.index_copy(1, torch.from_numpy(places), features[None])
        hidden = model.model.text_model(inputs_embeds=embeddings).last_hidden_state
        targets_T1 = torch.from_numpy(sequence.tokens[1:])[:, None]
        logprobs_T: torch.Tensor = model.lm_head(hidden)[0].log_softmax(-1).gather(1, targets_T1)[:, 0]
        return logprobs_T

    return model, evaluate


def expect(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and gradients of Hugging Face's model, sequence by sequence."""
    (model, evaluate), total, found = hugging_face(folder), torch.zeros(()), []
    for each in map(to_sequence, make_trajectories(vision_of(folder))):
        logprobs_T = evaluate(each)
        weights_T = torch.cos(torch.from_numpy(each.tokens[1:]) + 3.0 * torch.arange(len(logprobs_T)))
        total = total + (logprobs_T * weights_T).sum()
        found.append(logprobs_T.detach())
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return torch.cat(found), gradients


@pytest.fixture(scope="module")
def expected(trainer_model: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What Hugging Face's model has."""
    return expect(trainer_model)


@pytest.mark.parametrize("sizes", [Sizes(), *LAYOUTS[:2]], ids=str)
def test_logprobs_and_gradients_are_those_of_hugging_face(
    run_ranks: RunRanks, trainer_model: Path, expected: tuple[torch.Tensor, dict[str, torch.Tensor]], sizes: Sizes
) -> None:
    logprobs_T, gradient, weights = run_ranks(sizes, partial(compare, folder=trainer_model))
    original = load_file(trainer_model / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    assert (logprobs_T - expected[0]).abs().max() < 1e-5
    assert gradient.keys() == expected[1].keys()
    largest = max(float(value.abs().max()) for value in expected[1].values())
    for name, value in expected[1].items():
        difference = (gradient[name] - value).norm()
        # The gradient of a key's bias is zero but for rounding.
        assert difference < 1e-5 * value.norm() or value.abs().max() < 1e-6 * largest, name


def write_qwen(folder: Path, name: str) -> Path:
    """A tiny Qwen2-VL or Qwen2.5-VL, whose image token is 5 and whose images have 14 pixels a token."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
    tower = {"depth": 2, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "Qwen2VL":
        tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 28}
        tower |= {"fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 256, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=tower,
        tie_word_embeddings=True,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 14**2, "longest_edge": 70**2}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 7, "merge_size": 2, "size": pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def compare_qwen(engine: Engine, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[torch.dtype]]:
    """As `compare`, and the types of the tower's rotary frequencies in a policy of bfloat16."""
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy

    policy = Policy(read_model_shape(folder), engine.dims, torch.float32, 256)
    policy.load(folder)
    logprobs_T = step_on(policy, [to_sequence(each) for each in make_trajectories(vision_of(folder))])
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    half = Policy(read_model_shape(folder), engine.dims, torch.bfloat16, 256).core.tower
    return logprobs_T, dict(policy.collect()), {buffer.dtype for buffer in half.buffers()}


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_qwen_s_positions_on_axes_are_those_of_hugging_face(run_ranks: RunRanks, tmp_path: Path, name: str) -> None:
    import transformers

    folder = write_qwen(tmp_path, name)
    logprobs_T, gradient, types = run_ranks(Sizes(), partial(compare_qwen, folder=folder))
    model = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    total, found = torch.zeros(()), []
    for each in map(to_sequence, make_trajectories(vision_of(folder))):
        ids_1T, options = torch.from_numpy(each.tokens[:-1])[None], {}
        kinds_1T, embeddings = torch.zeros_like(ids_1T), model.get_input_embeddings()(ids_1T)
        if each.images:
            pictures = [decode_image(image.image) for image in each.images]
            pixels = processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
            places = torch.from_numpy(np.concatenate([image.tokens_F for image in each.images]))
            kinds_1T[0, places] = 1
            features = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
            embeddings = embeddings.index_copy(1, places, features[None])
            options["image_grid_thw"] = pixels["image_grid_thw"]
        ones = torch.ones_like(ids_1T)
        positions, _ = model.model.get_rope_index(ids_1T, mm_token_type_ids=kinds_1T, attention_mask=ones, **options)
        hidden = model.model.language_model(inputs_embeds=embeddings, position_ids=positions).last_hidden_state
        targets_T = torch.from_numpy(each.tokens[1:])
        picked_T = model.lm_head(hidden)[0].log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
        total = total + (picked_T * torch.cos(targets_T + 3.0 * torch.arange(len(targets_T)))).sum()
        found.append(picked_T.detach())
    assert (logprobs_T - torch.cat(found)).abs().max() < 1e-5
    total.backward()  # type: ignore[no-untyped-call]
    for ours, theirs in (("model.embed_tokens", "model.language_model.embed_tokens"), ("visual", "model.visual")):
        part = {name: tensor for name, tensor in gradient.items() if name.startswith(ours)}
        assert part
        for each_name, value in part.items():
            wanted = model.get_parameter(each_name.replace(ours, theirs)).grad
            assert (value - wanted).norm() < 1e-5 * wanted.norm(), each_name
    assert types == {torch.float32}


METRICS = ("loss", "grad_norm", "entropy", "kl_k3", "train_infer_logprob_diff_mean")


def learn(engine: Engine, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """DPO, then supervised and reinforcement learning on prompts with images: metrics, and the weights after them."""
    from services.trainer.fine_tuning import count_tokens, fine_tune
    from services.trainer.training import make_sequence, train_iteration

    trajectories = {f"t{i}": each for i, each in enumerate(make_trajectories(vision_of(folder)))}
    sequences = [make_sequence(each, 0, 0) for each in trajectories.values()]
    optimizer = pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95, min_lr_ratio=1.0)
    metrics = []
    # The first and the fourth have one prompt, so that they are a pair.
    for algorithm, examples in (("dpo", [(sequences[0], sequences[3])]), ("sft", [(each,) for each in sequences])):
        request = pb.FineTuneRequest(steps=2, batch_size=4, max_tokens_per_microbatch=60, optimizer=optimizer)
        request.algorithm.name = algorithm
        context = engine.job_context()
        context.interval_s = math.inf
        own = examples if engine.dims.rank == 0 else None
        done = fine_tune(engine.policy, context, request, count_tokens(examples), own)
        metrics += [done.loss, done.grad_norm]
    request = describe(trajectories)
    result = train_iteration(
        engine.policy,
        engine.job_context(),
        request,
        0,
        lambda _, ids, tokens: {name: trajectories[name] for name in ids},
    )
    metrics += [result.metrics[f"train/{name}"] for name in METRICS]
    return metrics, {name: tensor.clone() for name, tensor in engine.policy.collect()}


def describe(trajectories: dict[str, Trajectory]) -> pb.TrainRequest:
    """A request for one iteration on all of the trajectories as one group, and on the first two as another."""
    request = train_request("r", {}, [], minibatches=2, max_tokens_per_microbatch=60)
    names = list(trajectories)
    for group, members in enumerate((names[:2], names[2:])):
        request.groups.add(
            group_id=f"g{group}",
            trajectories=[
                pb.TrainingTrajectory(
                    trajectory_id=name,
                    reward=index % 2,
                    prompt_tokens=len(trajectories[name].prompt_tokens),
                    tokens_by_version={0: len(trajectories[name].tokens_T)},
                )
                for index, name in enumerate(members)
            ],
        )
    return request


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, trainer_model: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What one rank learns."""
    return run_ranks(Sizes(), partial(learn, folder=trainer_model))


@pytest.mark.parametrize("sizes", [*LAYOUTS, pytest.param(Sizes(context=2), marks=LONG)], ids=str)
def test_every_layout_learns_as_one_rank(
    run_ranks: RunRanks, trainer_model: Path, alone: tuple[list[float], dict[str, torch.Tensor]], sizes: Sizes
) -> None:
    """With two replicas one has steps without an image."""
    metrics, weights = run_ranks(sizes, partial(learn, folder=trainer_model))
    assert metrics == pytest.approx(alone[0], rel=1e-4, abs=1e-6)
    before = load_file(trainer_model / "model.safetensors")
    for name, value in alone[1].items():
        if "vision_model" in name and name.endswith("k_proj.bias"):
            # Softmax leaves it no gradient: Adam makes steps of rounding.
            continue
        # Where a gradient is next to nothing, rounding is a part of Adam's steps.
        assert (weights[name] - value).norm() < 1e-3 * (value - before[name]).norm(), name


def learn_parts(engine: Engine, folder: Path) -> dict[str, tuple[set[str], dict[str, int], int, float]]:
    """By what is trained of the tower: tensors that a step moves, bytes, a snapshot's tensors, a token's bytes."""
    from services.trainer.megatron.model import Policy
    from services.trainer.packing import make_micro_batches

    sequences = [to_sequence(each) for each in make_trajectories(vision_of(folder))]
    original, found = load_file(folder / "model.safetensors"), {}
    for vision in ("trained", "projector", "frozen"):
        policy = Policy(engine.shape, engine.dims, torch.float32, 256, vision=vision)
        policy.load(folder)
        policy.begin_job(pb.Optimizer(beta1=0.9, beta2=0.95))
        policy.step(make_micro_batches([sequences], engine.dims.device), 1.0, weigh, 1e-3)
        moved = {name for name, tensor in policy.collect() if not torch.equal(tensor, original[name])}
        assert {name for name, _ in policy.collect()} == original.keys()
        snapshot = policy.take_snapshot()
        found[vision] = moved, policy.count_copies(), len(snapshot), policy.measure_activations()
        policy.restore_snapshot(snapshot)
    return found


def test_what_is_frozen_stays_bit_for_bit_and_takes_no_memory(run_ranks: RunRanks, trainer_model: Path) -> None:
    names = load_file(trainer_model / "model.safetensors")
    tower = {name for name in names if name.startswith(("model.vision_model.", "model.connector."))}
    projector = {name for name in tower if name.startswith("model.connector.")}
    found = run_ranks(Sizes(), partial(learn_parts, folder=trainer_model))
    wanted = {"trained": {*names}, "projector": {*names} - tower | projector, "frozen": {*names} - tower}
    for vision, moved in wanted.items():
        assert found[vision][0] == moved
        trained = sum(names[name].nbytes for name in moved)
        assert found[vision][1] == {
            "weights": sum(tensor.nbytes for tensor in names.values()),
            "gradients": trained,
            "moments": 2 * trained,
            "main_weights": 0,
        }
    assert found["trained"][2] - found["frozen"][2] == len(tower)
    assert found["trained"][3] > found["projector"][3] > found["frozen"][3]


def change_pixels(engine: Engine, folder: Path) -> list[torch.Tensor]:
    """Log-probabilities of a prompt's tokens with a picture, with another block of pixels in it, and as before."""
    from services.trainer.data import place_images
    from services.trainer.packing import TokenSequence

    vision, found = vision_of(folder), []
    for block in (False, True, False):
        picture = decode_image(read_picture("1"))
        if block:
            picture.paste((0, 255, 0), (14, 14, 21, 21))
        file = io.BytesIO()
        picture.save(file, "PNG")
        image = read_image(file.getvalue(), ImageLimits(), "image")
        tokens, placed = place_images([9, vision.image_token_id, 10, 11, 12], [image], vision)
        sequence = TokenSequence(tokens, np.ones(len(tokens) - 1, np.bool_), images=placed)
        found.append(step_on(engine.policy, [sequence]))
    return found


def test_one_block_of_pixels_moves_what_comes_behind_it(run_ranks: RunRanks, trainer_model: Path) -> None:
    before_T, changed_T, again_T = run_ranks(Sizes(), partial(change_pixels, folder=trainer_model))
    assert torch.equal(before_T, again_T)
    moved_T = (before_T - changed_T).abs()
    # The tokens before the image, and those of its frame whose features come first, do not see it.
    assert moved_T[0] == 0
    assert moved_T[-3:].min() > 1e-4


RUN = "pictures"


def make_groups(folder: Path) -> dict[str, list[MadeTrajectory]]:
    """Two groups of two; their prompts have one and two images, and the log-probabilities are Hugging Face's."""
    from services.trainer.data import Trajectory, place_images

    vision, (_, evaluate), generator = vision_of(folder), hugging_face(folder), np.random.default_rng(3)
    groups: dict[str, list[MadeTrajectory]] = {}
    for group, names in enumerate((["3"], ["1", "2"])):
        images = [read_picture(name) for name in names]
        prompt = [9, *[vision.image_token_id, 12] * len(names)]
        tokens, placed = place_images(prompt, images, vision)
        groups[f"g{group}"] = []
        for j in range(2):
            response = generator.integers(7, 50, 6)
            unknown = np.zeros(6, np.float32), np.zeros(6, np.int64)
            logprobs_T = evaluate(to_sequence(Trajectory(tokens, response, *unknown, images=placed)))
            groups[f"g{group}"].append(
                MadeTrajectory(
                    f"g{group}-t{j}",
                    prompt,
                    response.tolist(),
                    logprobs_T[len(tokens) - 1 :].tolist(),
                    [(0, 6)],
                    {image.digest: image.data for image in images},
                    len(tokens) - len(prompt),
                )
            )
    return groups


def write_pictures(path: Path, examples: int = 4) -> Path:
    """A supervised set whose pictures are data URLs."""
    lines = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "sum"},
                        {"type": "image", "image": f"data:image/png;base64,{b64encode(make_picture(n)).decode()}"},
                    ],
                }
            ],
            "response": str(n),
        }
        for n in range(examples)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def test_a_run_with_images_is_trained_saved_exported_and_pushed(
    trainer: TrainerAt, trainer_model: Path, buffer_client: BufferClient, tmp_path: Path
) -> None:
    async def export(name: str) -> dict[str, torch.Tensor]:
        await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(tmp_path / name)))
        return load_file(tmp_path / name / "model.safetensors")

    groups = make_groups(trainer_model)
    await store_groups(buffer_client, RUN, groups)
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))
    request = train_request(RUN, groups, [1.0, 0.0])
    [*_, last] = [each async for each in trainer.client.train(request, timeout_s=120)]
    assert last.result.metrics["train/train_infer_logprob_diff_max"] < 1e-5
    saved = await trainer.client.save_checkpoint(pb.SaveCheckpointRequest(run_id=RUN, policy_version=1))
    first = load_file(Path(saved.path) / "model.safetensors")
    await trainer.client.offload(pb.OffloadRequest(run_id=RUN, iteration=1))
    tuning = pb.FineTuneRequest(
        run_id=RUN,
        dataset_path=str(write_pictures(tmp_path / "set.jsonl")),
        steps=3,
        batch_size=4,
        max_tokens_per_microbatch=64,
        new_version=2,
        optimizer=request.optimizer,
    )
    [*_, done] = [each async for each in trainer.client.fine_tune(tuning, timeout_s=120)]
    second = await export("second")
    assert {name for name in first if torch.equal(first[name], second[name])} == set()
    async with local_receiver(WeightsConfig()) as receiver:
        targets = [pb.PushTarget(worker_id="there", address=receiver.address)]
        pushing = pb.PushWeightsRequest(run_id=RUN, policy_version=2, targets=targets)
        assert (await trainer.client.push_weights(pushing, timeout_s=60)).outcomes[0].committed
        assert equal(receiver.loaded, second)
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=1))
    assert equal(await export("first"), first)
    # The exported folder is a whole one: Hugging Face's model and image processor open it.
    model, _ = hugging_face(tmp_path / "second")
    assert equal({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, second)
    # "sum" and "=", seven tokens of an image around them, a figure and the end.
    assert done.tokens == 3 * 4 * (4 + 7 + 2)
