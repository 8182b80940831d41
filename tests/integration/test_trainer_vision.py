"""Images in the trainer: log-probabilities and gradients against Hugging Face, on every layout, and what is frozen."""

from __future__ import annotations

import io
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perigee.images import ImageLimits, decode_image, read_image
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.hf import open_model_folder
from services.kit.vision import VisionModel, open_vision
from tests.fixtures.trainer import train_request
from tests.fixtures.trainer_ranks import RunRanks, Sizes, check_slices
from tests.fixtures.vision import make_picture

if TYPE_CHECKING:
    from perigee.images import Image
    from services.trainer.data import Trajectory
    from services.trainer.engine import Engine
    from services.trainer.megatron.model import Evaluated, Policy
    from services.trainer.packing import TokenSequence

LAYOUTS = [Sizes(tensor=2), Sizes(pipeline=2), Sizes(data=2)]
# Images by their seeds, the numbers of text tokens between them, and response tokens: some have several, one has none.
PROMPTS: list[tuple[list[int | str], int]] = [
    (["1", 3, "2"], 21),
    ([2, "3", "1", 4], 8),
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


def expect(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and gradients of Hugging Face's model, sequence by sequence."""
    from transformers import AutoImageProcessor, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    total, found = torch.zeros(()), []
    for each in map(to_sequence, make_trajectories(vision_of(folder))):
        ids = torch.from_numpy(each.tokens[:-1])[None]
        embeddings = model.get_input_embeddings()(ids)
        if each.images:
            pictures = [decode_image(image.image) for image in each.images]
            pixels = processor(images=[pictures], return_tensors="pt", input_data_format="channels_last")
            places = np.concatenate([image.tokens_F for image in each.images])
            features = model.model.get_image_features(**pixels).pooler_output.flatten(0, 1)
            embeddings = embeddings.index_copy(1, torch.from_numpy(places), features[None])
        hidden = model.model.text_model(inputs_embeds=embeddings).last_hidden_state
        targets_T = torch.from_numpy(each.tokens[1:])
        logprobs_T = model.lm_head(hidden)[0].log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
        total = total + (logprobs_T * torch.cos(targets_T + 3.0 * torch.arange(len(targets_T)))).sum()
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
        engine.policy, engine.job_context(), request, 0, lambda _, ids: {name: trajectories[name] for name in ids}
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


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
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
        assert (weights[name] - value).abs().max() < 2e-5, name
        assert not torch.equal(value, before[name]), name


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
