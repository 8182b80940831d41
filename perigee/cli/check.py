"""`perigee check`: a recipe's model, prompts and verifiers, and an estimate of memory, before a service starts."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from perigee.cli.doctor import NVIDIA
from perigee.cli.recipe import Recipe, config_class
from perigee.cli.stack import HOST
from perigee.config import validate
from perigee.errors import InvalidArgumentError
from perigee.reward.items import find_parts, looks_at_images
from perigee.reward.v1 import reward_pb2
from services.kit.addresses import is_loopback
from services.kit.hf import count_experts
from services.kit.rope import RopeConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_BYTES = 1 << 30
# By model_type the keys of width, inner width (of Qwen2-VL by the width) and layers in vision_config, with the defaults
# of transformers, and how many of either width a layer keeps of a patch for its backward pass.
TOWERS: dict[str, Any] = {
    "idefics3": (("hidden_size", 1152), ("intermediate_size", 3072), ("num_hidden_layers", 12), (9, 2)),
    "qwen2_vl": (("embed_dim", 1280), ("mlp_ratio", 4), ("depth", 32), (9, 4)),
    "qwen2_5_vl": (("hidden_size", 3584), ("intermediate_size", 3420), ("depth", 32), (12, 5)),
}
# Logits that the trainer computes at once, and the same again for their exponentials.
LOGIT_BYTES = 2 * (384 << 20)
# Interpreter and libraries of the trainer, and of a rollout worker with its engine.
PROCESS_BYTES = 3 << 28
# What the trainer and an engine that sleeps or ends keep of their memory while the other has the devices.
KEPT = ("libraries", "image to push", "received image")
GIB = 1 << 30
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_inputs(recipe: Recipe, workers: int | None = None) -> list[str]:
    """Returns what a run of an expanded recipe is made of and the memory it will take, in lines for people; `workers`
    stand in place of the recipe's.

    Raises InvalidArgumentError, in one sentence that names the key, file or line, for a model folder that cannot be
    trained, a prompt that cannot be asked or judged or is too long, and a verifier or language that is not set up.
    """
    from services.coordinator.runs import read_inputs
    from services.rollout.model import require_experts

    configs: dict[str, Any] = {
        name: validate(config_class(name), recipe.values.get(name) or {}, recipe.path.name, name)
        for name in ("run", "rollout", "trainer", "buffer", "coordinator", "reward", "sandbox")
    }
    model, parameters = check_model(configs["trainer"].model, "trainer.model", configs["trainer"].rope)
    if configs["rollout"].router_replay:
        require_experts(model.path, count_experts(model.text_config))
    check_layout(model, configs["trainer"])
    inputs = read_inputs("", configs["run"], Path(), str(model.path), "", examples=None, keep_images=False)
    problems = [*inputs.prompts.values(), *inputs.heldout.values()]
    longest = max(problems, key=lambda prompt: prompt.tokens)
    check_lengths(model, longest, configs)
    check_images(problems, configs)
    check_verifiers([prompt.line.item for prompt in problems], configs["reward"], configs["sandbox"])
    count = workers or recipe.head.local.workers
    return [
        f"model: {parameters / 1e6:,.1f}M parameters, {model.config['architectures'][0]}, context of "
        f"{model.context_tokens} tokens",
        f"prompts: {len(inputs.prompts)} to train on, {len(inputs.heldout)} held out, the longest of "
        f"{longest.tokens} tokens{count_images(problems)}",
        *describe_memory(estimate_memory(model, parameters, longest.tokens, configs), count, configs["run"]),
        *find_long_sequences(model, longest.tokens, configs),
        *(f"warning: {text}" for text in find_hybrid_faults(configs, [f"rollout-{index}" for index in range(count)])),
    ]


def count_images(problems: Sequence[Any]) -> str:
    """Returns how many different images prompts have, for people; nothing where there are none."""
    sizes = {image.digest: image.size_bytes for prompt in problems for image in prompt.line.images}
    return f"; {len(sizes)} images of {sum(sizes.values()) / (1 << 20):,.1f} MiB" if sizes else ""


def check_model(path: str, field: str, rope: RopeConfig | None = None) -> tuple[Any, int]:
    """Returns the model folder, with another rotary embedding where one is given, and the number of its parameters.

    Raises InvalidArgumentError naming `field` and the file that is missing, broken, or not supported.
    """
    from services.kit.hf import fetch_model, open_model_folder
    from services.trainer.architecture import read_architecture, text_prefix

    model = open_model_folder(fetch_model(path, field, rope), field)
    read_architecture(model)
    model.open_tokenizer()
    if not Path(path).is_dir():  # the trainer alone fetches the weights of a URL
        return model, count_by_config(model.text_config) + count_tower(model.config)[0]
    shapes = dict(read_shapes(model))
    name = f"{text_prefix(model)}embed_tokens.weight"
    embedding = shapes.get(name)
    if embedding is None or embedding[0] != model.vocabulary_size:
        found = f"no {name}" if embedding is None else f"an embedding of {embedding[0]} rows"
        raise model.error("config.json", f"has a vocabulary of {model.vocabulary_size}, and the weights have {found}")
    return model, sum(math.prod(shape) for shape in shapes.values())


def check_layout(model: Any, trainer: Any) -> None:
    """Raises InvalidArgumentError naming the parallel size of the trainer that does not divide the model."""
    from services.trainer.architecture import check_divisible

    config, heads = model.text_config, model.positive_integer("num_attention_heads")
    experts = count_experts(config)
    check_divisible(
        heads=heads,
        query_groups=int(config.get("num_key_value_heads") or heads),
        feed_forward=0 if experts else model.positive_integer("intermediate_size"),
        vocabulary=model.vocabulary_size,
        experts=experts,
        layers=model.positive_integer("num_hidden_layers"),
        tensor=trainer.tensor_parallel,
        context=trainer.context_parallel,
        pipeline=trainer.pipeline_parallel,
        expert=trainer.expert_parallel,
    )


def read_shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of each tensor, from the headers of the weights' files."""
    from safetensors import SafetensorError, safe_open

    from services.kit.hf import SINGLE_FILE

    for path in sorted(set(model.tensor_files().values())) or [model.path / SINGLE_FILE]:
        if not path.is_file():
            raise model.error(path.name, "is missing: the trainer needs the weights as safetensors")
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (a file, not a mapping)
                    yield name, tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise model.error(path.name, f"cannot be read: {error}") from error


def count_by_config(config: Mapping[str, Any]) -> int:
    """Returns the number of parameters by the sizes of config.json, without biases and norms."""
    hidden, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    width = int(config.get("head_dim") or hidden // heads)
    groups = int(config.get("num_key_value_heads") or heads)
    experts = count_expert_parameters(config)
    layer = 2 * hidden * width * (heads + groups) + (0 if experts else 3 * hidden * int(config["intermediate_size"]))
    embeddings = int(config["vocab_size"]) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * layer + experts + embeddings


def count_expert_parameters(config: Mapping[str, Any]) -> int:
    """Returns the number of parameters of all experts of a mixture of experts, 0 for another model."""
    experts = count_experts(config)
    if not experts:
        return 0
    sizes = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "moe_intermediate_size"))
    return 3 * experts * math.prod(sizes)


def check_lengths(model: Any, longest: Any, configs: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError for a limit beyond the model's context, or below the longest prompt and response."""
    limits = {
        "rollout.max_model_len": configs["rollout"].max_model_len,
        "trainer.max_sequence_length": configs["trainer"].max_sequence_length,
    }
    response = configs["run"].rollout.max_response_tokens
    needed = longest.tokens + response
    for key, limit in limits.items():
        if limit is not None and limit > model.context_tokens:
            raise InvalidArgumentError.for_field(key, f"{limit} is more than the model's {model.context_tokens}")
        if limit is not None and needed > limit:
            raise InvalidArgumentError.for_field(
                key,
                f"{limit} is less than the {needed} tokens of prompt {longest.id} and a response of {response}: raise "
                "it, or lower run.rollout.max_response_tokens",
            )


def check_images(problems: Sequence[Any], configs: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError for a limit of buffer, workers or reward service that prompts of the run pass."""
    buffer, rollout, reward = configs["buffer"].images, configs["rollout"].images, configs["reward"]
    for prompt in problems:
        images = prompt.line.images
        found = {
            "max_per_prompt": len(images),
            "max_bytes": max((image.size_bytes for image in images), default=0),
            "max_pixels": max((image.width * image.height for image in images), default=0),
        }
        limits = {f"rollout.images.{key}": (getattr(rollout, key), value) for key, value in found.items()}
        limits["buffer.images.max_image_bytes"] = (buffer.max_image_bytes, found["max_bytes"])
        if looks_at_images(prompt.line.item):
            names = zip(("max_images", "max_image_bytes", "max_image_pixels"), found.values(), strict=True)
            limits |= {f"reward.{key}": (getattr(reward, key), value) for key, value in names}
        for key, (limit, value) in limits.items():
            if value > limit:
                raise InvalidArgumentError.for_field(
                    key, f"{limit} is less than the {value} of prompt {prompt.id}: raise it, or shrink its images"
                )


def check_verifiers(items: Sequence[Message], reward: Any, sandbox: Any) -> None:
    """Raises InvalidArgumentError for the first judge, value head or language that the items need and is not set up."""
    parts = [part for item in items for part in find_parts(item)]
    kinds = {type(part) for part in parts}
    if reward_pb2.JudgeVerifier in kinds and not reward.judge.judges:
        raise InvalidArgumentError.for_field("reward.judge.judges", "is empty, and prompts are judged by a judge")
    if reward_pb2.ValueHeadVerifier in kinds and not reward.value_head.path:
        raise InvalidArgumentError.for_field("reward.value_head.path", "is unset, and prompts are judged by value_head")
    languages = sorted({part.language for part in parts if "language" in part.DESCRIPTOR.fields_by_name} - {""})
    if languages:
        catalog = importlib.import_module("services.sandbox.languages.catalog").load_catalog(sandbox)
        for language in languages:
            if catalog.find(language) is None:
                raise InvalidArgumentError.for_field("run.prompts: language", catalog.explain(language))


def count_activations(config: Mapping[str, Any], recompute: bool, recompute_layers: int | None = None) -> int:
    """Returns the numbers that a token's backward pass needs, by what the trainer measures at its start.

    Within a tenth of that in float32 on twelve measurements of hidden 32 to 1,024, and up to a fifth below on four of a
    mixture of experts of hidden 128 and 256; in bfloat16 up to two fifths below, as some numbers stay in float32.
    """
    hidden, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_width = int(config.get("head_dim") or hidden // heads)
    width, shared = heads * head_width, int(config.get("num_key_value_heads") or heads) * head_width
    if count_expert_parameters(config):
        chosen = int(config["num_experts_per_tok"])
        feed_forward = chosen * (hidden + 5 * int(config["moe_intermediate_size"]))
    else:
        feed_forward = 5 * int(config["intermediate_size"])
    # The last two are of sequences that attention pads.
    layer = 12 * max(hidden, width) + feed_forward + 2 * width + 2 * shared
    again = min(recompute_layers or layers, layers) if recompute else 0
    return again * hidden + max(layers - again, min(again, 1)) * layer


def count_tower(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the parameters of a vision tower, its matrices alone, and the numbers that the backward pass needs for
    each token of an image; 0 of a model without a tower.

    The numbers are within a sixth of those that the trainer measures on seven shapes of hidden 96 to 384.
    """
    kind = config.get("model_type")
    if kind not in TOWERS:
        return 0, 0
    vision, (*keys, (kept_hidden, kept_inner)) = config.get("vision_config") or {}, TOWERS[kind]
    hidden, inner, layers = (int(vision.get(key, default)) for key, default in keys)
    inner *= hidden if kind == "qwen2_vl" else 1
    side = config.get("scale_factor", 2) if kind == "idefics3" else vision.get("spatial_merge_size", 2)
    joined, embedding = side**2 * hidden, int((config.get("text_config") or config)["hidden_size"])
    projector = joined * (embedding if kind == "idefics3" else joined + embedding)
    layer = hidden * (4 * hidden + (3 if kind == "qwen2_5_vl" else 2) * inner)
    return layers * layer + projector, side**2 * layers * (kept_hidden * hidden + kept_inner * inner)


def estimate_memory(
    model: Any, parameters: int, prompt_tokens: int, configs: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Returns estimated bytes by process and part; those of the trainer are of each of its ranks."""
    run, rollout, trainer = (configs[name] for name in ("run", "rollout", "trainer"))
    experts = count_expert_parameters(model.text_config)
    tower, tower_activations = count_tower(model.config)
    share = (parameters - experts - tower) // trainer.tensor_parallel + experts // trainer.expert_parallel
    # Whole on each process of the first stage, which is the largest then.
    share = share // trainer.pipeline_parallel + tower
    is_trained = trainer.vision == "trained"
    trained = share if is_trained else share - tower
    size = BYTES[trainer.dtype]
    # A sequence that is longer than a micro-batch has one of its own.
    lengths = [prompt_tokens + run.rollout.max_response_tokens, *(each.max_sequence_length or 0 for each in run.sft)]
    tokens = max(
        -(-max(lengths) // trainer.context_parallel),
        run.update.max_tokens_per_microbatch,
        *(stage.max_tokens_per_microbatch for stage in run.sft),
    )
    numbers = count_activations(model.text_config, trainer.recompute, trainer.recompute_layers)
    activations = tokens * numbers * size // trainer.tensor_parallel
    # As the trainer bounds them: as though every token were of an image.
    activations += tokens * tower_activations * size * is_trained
    engine_size = BYTES.get(model.dtype if rollout.dtype == "auto" else rollout.dtype, 4)
    return {
        "trainer": {
            "libraries": PROCESS_BYTES,
            "weights": share * size,
            "main weights": trained * 4 if size < 4 else 0,
            "gradients": trained * 4,
            "moments": trained * 8,
            "image to push": parameters * size,
            "activations": min(activations, trainer.max_microbatch_bytes or activations),
            "logits": min(LOGIT_BYTES, 2 * tokens * model.vocabulary_size * 4 // trainer.tensor_parallel),
        },
        "rollout": {
            "libraries": PROCESS_BYTES,
            "weights": parameters * engine_size // rollout.tensor_parallel_size,
            "received image": parameters * size,
            "KV cache": rollout.kv_cache_bytes or CPU_KV_BYTES,
        },
    }


def find_long_sequences(model: Any, prompt_tokens: int, configs: Mapping[str, Any]) -> Iterator[str]:
    """Yields a warning where the longest sequence takes more memory of the trainer than it may, by the estimate."""
    run, trainer = configs["run"], configs["trainer"]
    tokens = prompt_tokens + run.rollout.max_response_tokens
    numbers = count_activations(model.text_config, trainer.recompute, trainer.recompute_layers)
    shares = trainer.tensor_parallel * trainer.context_parallel
    needed = tokens * numbers * BYTES[trainer.dtype] // shares
    if trainer.max_microbatch_bytes is not None and needed > trainer.max_microbatch_bytes:
        yield (
            f"warning: a sequence of {tokens} tokens takes about {needed / (1 << 20):,.1f} MiB of activations on a "
            "process, and trainer.max_microbatch_bytes is less: the trainer will refuse it, unless trainer.recompute, "
            "trainer.context_parallel or run.rollout.max_response_tokens make it less"
        )


def count_peak(estimate: Mapping[str, Mapping[str, int]], workers: int, run: Any) -> int:
    """Returns the bytes of trainer and workers together, at most: in a hybrid run one side keeps only KEPT."""
    whole = {name: sum(parts.values()) for name, parts in estimate.items()}
    kept = {name: sum(parts.get(part, 0) for part in KEPT) for name, parts in estimate.items()}
    if run.deployment != "hybrid" or run.hybrid.trainer == "keep":
        kept["trainer"] = whole["trainer"]
    if run.deployment != "hybrid" or run.hybrid.engine == "keep":
        kept["rollout"] = whole["rollout"]
    return max(whole["trainer"] + workers * kept["rollout"], kept["trainer"] + workers * whole["rollout"])


def find_hybrid_faults(configs: Mapping[str, Any], workers: Sequence[str]) -> Iterator[str]:
    """Yields what keeps a hybrid run from sharing devices, in sentences; `workers` are those of the local stack."""
    run, rollout, trainer = (configs[name] for name in ("run", "rollout", "trainer"))
    if run.deployment != "hybrid":
        return
    named, server = run.hybrid.workers, rollout.server
    host = (rollout.advertise_address or "").rpartition(":")[0] or server.advertise_host or server.host
    if named and not {*named} & {*workers}:
        yield f"run.hybrid.workers names none of {', '.join(workers)}: no worker leaves the trainer's devices"
    if not named and not is_loopback(host):
        yield f"workers on {host} have another host than the trainer, {HOST}: name who leaves in run.hybrid.workers"
    if run.hybrid.engine == "sleep" and any(NVIDIA.glob("*")) and not rollout.enable_sleep_mode:
        yield "a GPU's engine cannot sleep: set rollout.enable_sleep_mode, or run.hybrid.engine to restart"
    if run.hybrid.engine == run.hybrid.trainer == "keep":
        yield "run.hybrid has engine and trainer keep their memory: both have to fit at once"
    if trainer.nodes > 1 and not named:
        yield "trainer.nodes is above 1, and only workers beside machine 0 leave: name all in run.hybrid.workers"
    if trainer.nodes > 1 and configs["coordinator"].weights.transfer == "push":
        yield "machine 0 of the trainer holds the whole model to push: set coordinator.weights.transfer to pull"


def describe_memory(estimate: Mapping[str, Mapping[str, int]], workers: int, run: Any) -> list[str]:
    """Returns a line for each process, and one more where they pass the memory of this machine or container."""
    lines = [
        f"memory of {name}, estimated: {sum(parts.values()) / GIB:.1f} GiB ("
        + ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size)
        + ")"
        for name, parts in estimate.items()
    ]
    needed = count_peak(estimate, workers, run)
    if run.deployment == "hybrid":
        lines.append(f"memory of the trainer and its workers in turn, estimated: {needed / GIB:.1f} GiB at most")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CONTAINER_LIMIT.read_text(encoding="utf-8").strip() if CONTAINER_LIMIT.is_file() else "max"
    if limit != "max":
        physical = min(physical, int(limit))
    if not any(NVIDIA.glob("*")) and needed > physical:
        lines.append(
            f"warning: about {needed / GIB:.1f} GiB are needed and this machine has {physical / GIB:.1f} GiB: lower "
            "run.update.max_tokens_per_microbatch or rollout.kv_cache_bytes, or set trainer.recompute"
            + ("" if run.deployment == "hybrid" else ", or deployment: hybrid where one side alone would fit")
        )
    return lines
