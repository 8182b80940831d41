"""Vision towers before the language model: a picture's patches in, embeddings of its tokens out.

Towers are Hugging Face's modules, whole on each tensor-parallel rank of the first pipeline stage. The gradient of the
language model's input is the same on all of those ranks, and so is the tower's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from perigee.errors import DataLossError
from services.trainer.architecture import IDEFICS3, QWEN2_5_VL, QWEN2_VL
from services.trainer.hf import TowerShape
from services.trainer.megatron.memory import SavedTensors
from services.trainer.packing import PackedImages, PackLayout

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


# Pixels of the picture that measures what a feature takes: long, so that few frames are cut from it.
_PROBE_SIZE = (448, 28)


class Tower(torch.nn.Module, ABC):
    """Base of the towers. A subclass builds the modules under the names that they have on disk, behind `prefix`."""

    prefix: ClassVar[str]
    """What the names of its tensors on disk begin with."""
    projector: ClassVar[str]
    """Name of the module that maps features to the language model's embeddings."""

    def __init__(self, folder: Path, recompute: bool) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        super().__init__()
        self._config = AutoConfig.from_pretrained(folder)
        # The backend without torchvision, as rollout workers have it, too: theirs would differ by 2/255 a pixel.
        self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._recompute = recompute

    @abstractmethod
    def forward(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Returns the features of RGB pictures, one after another, [F, D]."""

    def _build(self, kind: Any, config: Any) -> Any:
        """Builds Hugging Face's vision model, without dropout."""
        if hasattr(config, "attention_dropout"):
            config.attention_dropout = 0.0
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        if self._recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _prepare(self, pictures: Any) -> dict[str, torch.Tensor]:
        """Returns what the vision model takes of pictures, numbers in its type and on its device."""
        weight = next(self.parameters())
        # Told, because a picture 1 or 3 pixels high could be taken for one of 1 or 3 channels.
        found = self._processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        return {
            name: tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)
            for name, tensor in found.items()
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Converts the weights alone: rotary frequencies stay in float32, and only move."""
        exact = [(module, *item) for module in self.modules() for item in module.named_buffers(recurse=False)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in exact:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self


class Idefics3Tower(Tower):
    """SigLIP and a projector that joins neighbours (arXiv 2408.12637); a large picture is cut into frames."""

    prefix = "model."
    projector = "connector"

    def __init__(self, folder: Path, recompute: bool) -> None:
        from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer

        super().__init__(folder, recompute)
        self.vision_model = self._build(Idefics3VisionTransformer, self._config.vision_config)
        self.connector = Idefics3Connector(self._config)

    def forward(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Returns the features of RGB pictures, frame by frame, [F, D]."""
        found = self._prepare([list(pictures)])
        frames_N, mask = found["pixel_values"][0], None
        if "pixel_attention_mask" in found:
            patch = self._config.vision_config.patch_size
            seen_N = found["pixel_attention_mask"][0].unfold(1, patch, patch).unfold(2, patch, patch)
            mask = seen_N.sum((-1, -2)) > 0
        hidden_N = self.vision_model(pixel_values=frames_N, patch_attention_mask=mask).last_hidden_state
        features_FD: torch.Tensor = self.connector(hidden_N).flatten(0, 1)
        return features_FD


class QwenTower(Tower):
    """Tower of Qwen2-VL (arXiv 2409.12191) at a picture's own resolution; the merger at its end is the projector."""

    prefix = ""
    projector = "visual.merger"

    def __init__(self, folder: Path, recompute: bool) -> None:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        super().__init__(folder, recompute)
        self.visual = self._build(Qwen2VisionTransformerPretrainedModel, self._config.vision_config)

    def forward(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Returns the features of RGB pictures, row by row, [F, D]."""
        found = self._prepare(list(pictures))
        features_FD: torch.Tensor = self.visual(found["pixel_values"], grid_thw=found["image_grid_thw"]).pooler_output
        return features_FD


class Qwen25Tower(QwenTower):
    """Tower of Qwen2.5-VL (arXiv 2502.13923), most of whose layers attend within windows."""

    def __init__(self, folder: Path, recompute: bool) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        Tower.__init__(self, folder, recompute)
        self.visual = self._build(Qwen2_5_VisionTransformerPretrainedModel, self._config.vision_config)


TOWERS: dict[str, type[Tower]] = {IDEFICS3: Idefics3Tower, QWEN2_VL: QwenTower, QWEN2_5_VL: Qwen25Tower}


def build_tower(shape: TowerShape, trains: str, recompute: bool) -> Tower:
    """Builds the tower of a model; `trains` is the trainer's `vision`, and what it leaves out gets no gradient."""
    tower = TOWERS[shape.architecture](shape.folder, recompute)
    tower.requires_grad_(trains == "trained")
    tower.get_submodule(tower.projector).requires_grad_(trains != "frozen")
    for parameter in tower.parameters():
        # Kernels whose sums have no fixed order would set the tensor-parallel ranks' copies apart.
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
    return tower


def measure_tower(tower: Tower) -> float:
    """Returns the bytes that a forward pass keeps for its backward pass, for each feature; 0 if nothing is trained."""
    from PIL.Image import new

    parameters = list(tower.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        return 0.0
    saved = SavedTensors(parameters)
    with saved:
        features_FD = tower([new("RGB", _PROBE_SIZE)])
    return saved.peak / len(features_FD)


class VisionGPT(GPTModel):  # type: ignore[misc]  # megatron.core is untyped
    """GPTModel whose embeddings at the tokens of images are the features of these."""

    def __init__(self, *args: Any, tower: Tower | None, **options: Any) -> None:
        # Tensor-parallel ranks share the embeddings once those of images are in place.
        super().__init__(*args, scatter_embedding_sequence_parallel=False, **options)
        if tower is not None:
            self.tower = tower

    def forward(
        self, input_ids: torch.Tensor, position_ids: None, attention_mask: None, packed_seq_params: PackLayout
    ) -> torch.Tensor:
        """Runs this stage; on the first one each image of the pack passes the tower once."""
        embeddings_T1D = None
        if self.pre_process:
            embeddings_T1D = self._embed(input_ids, packed_seq_params.images)
        output: torch.Tensor = super().forward(
            input_ids, position_ids, attention_mask, decoder_input=embeddings_T1D, packed_seq_params=packed_seq_params
        )
        return output

    def _embed(self, input_ids: torch.Tensor, packed: PackedImages | None) -> torch.Tensor:
        """Returns the embeddings of this rank's tokens [T, 1, D], those of images from the tower."""
        from perigee.images import decode_image

        embeddings_T1D: torch.Tensor = self.embedding(input_ids=input_ids, position_ids=None)
        if packed is not None and packed.images:
            features_FD = self.tower([decode_image(image) for image in packed.images])
            if len(features_FD) != packed.features:
                raise DataLossError(
                    f"images whose tokens are {packed.features} have {len(features_FD)} features: config.json and "
                    "preprocessor_config.json do not fit together"
                )
            chosen_F1D = features_FD[packed.features_F, None].to(embeddings_T1D.dtype)
            embeddings_T1D = embeddings_T1D.index_copy(0, packed.tokens_F, chosen_F1D)
        if self.config.sequence_parallel:
            embeddings_T1D = scatter_to_sequence_parallel_region(embeddings_T1D)
        return embeddings_T1D
