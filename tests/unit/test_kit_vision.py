"""Image tokens of prompts against the processors of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from perigee.errors import InvalidArgumentError
from services.kit.hf import open_model_folder
from services.kit.vision import VisionModel, open_vision

IMAGE = 2
SPECIAL = ("<unk>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>")
SIDES = st.integers(1, 6000)
IDEFICS3 = {"model_type": "idefics3", "image_token_id": IMAGE, "vision_config": {"patch_size": 14}, "scale_factor": 2}
QWEN = {"model_type": "qwen2_5_vl", "image_token_id": IMAGE, "vision_config": {}}


def write_folder(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """A model folder with a tokenizer in which two line ends are one token, and the words of tiles are many."""
    vocabulary = {text: n for n, text in enumerate((*SPECIAL, "\n\n", "\n", *"<>_0123456789rowcltab"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split("[^\n]", "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def open_folder(folder: Path) -> VisionModel:
    """How the model takes images; it does."""
    model = open_vision(open_model_folder(folder, "run.model"))
    assert model is not None
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def idefics3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionModel, Any]:
    """Idefics3 as its processor of transformers reads the same folder, with splitting and without."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    settings = {
        "do_image_splitting": request.param,
        "size": {"longest_edge": 224},
        "max_image_size": {"longest_edge": 56},
    }
    folder = write_folder(
        tmp_path_factory.mktemp("idefics3"),
        IDEFICS3,
        preprocessor_config=settings,
        processor_config={"image_seq_len": 4},
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = Idefics3ImageProcessorPil.from_pretrained(folder)
    return open_folder(folder), Idefics3Processor(images, tokenizer, image_seq_len=4)


@given(width=SIDES, height=SIDES)
def test_an_image_has_the_tokens_of_idefics3s_processor(
    idefics3: tuple[VisionModel, Any], width: int, height: int
) -> None:
    model, processor = idefics3
    _, rows, columns = processor.image_processor.get_number_of_image_patches(height, width)
    text = processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
    assert list(model.image_tokens((width, height))) == processor.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", [(56, 56), (1, 1), (57, 300), (640, 480), (3, 224), (225, 223)])
def test_a_prompt_is_expanded_as_idefics3s_processor_does(
    idefics3: tuple[VisionModel, Any], size: tuple[int, int]
) -> None:
    """On pixels: rows and columns are those that the processor cuts, not those that it foretells."""
    from PIL import Image

    model, processor = idefics3
    images = [Image.new("RGB", size), Image.new("RGB", (100, 50))]
    text = "ab<image>a<image>"
    found = processor(text=[text], images=[images], input_data_format="channels_last")
    prompt = processor.tokenizer.encode(text, add_special_tokens=False)
    expanded = model.expand(prompt, [size, (100, 50)])
    assert expanded == found["input_ids"][0]
    # A tile that is there has pixels; those of padding, where one image has fewer, have none.
    tiles = np.asarray(found["pixel_attention_mask"]).any((-2, -1)).sum()
    assert len(model.image_positions(expanded)) == tiles * 4 == model.count_tokens(size) + model.count_tokens((100, 50))


@pytest.fixture(scope="module", params=["size", "min_pixels", "defaults"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionModel, Any]:
    """Qwen2.5-VL with the settings of published and of tiny folders."""
    from transformers import Qwen2VLImageProcessorPil

    settings = {
        "size": {"patch_size": 7, "size": {"shortest_edge": 196, "longest_edge": 50176}},
        "min_pixels": {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056},
        "defaults": {},
    }[request.param]
    folder = write_folder(tmp_path_factory.mktemp("qwen"), QWEN, preprocessor_config=settings)
    return open_folder(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)


@given(width=SIDES, height=SIDES)
def test_an_image_has_the_tokens_of_qwens_processor(qwen: tuple[VisionModel, Any], width: int, height: int) -> None:
    model, processor = qwen
    try:
        patches = processor.get_number_of_image_patches(height, width)
    except ValueError:
        with pytest.raises(InvalidArgumentError, match="is longer than 200 times"):
            model.image_tokens((width, height))
    else:
        assert list(model.image_tokens((width, height))) == [IMAGE] * (patches // processor.merge_size**2)


@pytest.mark.parametrize("size", [(56, 56), (3, 60), (97, 41), (320, 240)])
def test_an_image_has_as_many_tokens_as_qwens_features(qwen: tuple[VisionModel, Any], size: tuple[int, int]) -> None:
    from PIL import Image

    model, processor = qwen
    found = processor(images=[Image.new("RGB", size)], input_data_format="channels_last")
    _, *patches = found["image_grid_thw"][0]
    assert model.grid(size) == tuple(each // processor.merge_size for each in patches)
    assert model.count_tokens(size) * processor.merge_size**2 == len(found["pixel_values"])


def test_images_and_placeholders_are_as_many(tmp_path: Path) -> None:
    model = open_folder(write_folder(tmp_path, QWEN))
    assert model.expand([7, 8], []) == [7, 8]
    assert model.expand([7, IMAGE, 8, IMAGE], [(56, 56), (84, 56)]) == [7, *[IMAGE] * 4, 8, *[IMAGE] * 6]
    for prompt, sizes in ([7, IMAGE], []), ([7, 8], [(56, 56)]), ([IMAGE] * 4, [(56, 56)]):
        with pytest.raises(InvalidArgumentError, match=r"^image_digests: the prompt has \d image tokens \(2\) for"):
            model.expand(prompt, sizes)


def test_a_model_of_text_takes_none(tmp_path: Path) -> None:
    assert open_vision(open_model_folder(write_folder(tmp_path, {"model_type": "qwen2"}), "run.model")) is None


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (QWEN | {"model_type": "llava"}, {}, "has model_type llava; images are known of idefics3, qwen2_vl"),
        ({key: QWEN[key] for key in ("model_type", "vision_config")}, {}, "has no image_token_id"),
        (QWEN, {"preprocessor_config": {"do_resize": False}}, "preprocessor_config.json has do_resize false"),
        (
            IDEFICS3,
            {"processor_config": {"image_seq_len": 64}},
            "has image_seq_len 64, and a tile of 364 pixels has 169",
        ),
        (IDEFICS3 | {"image_token_id": 3}, {}, "has image_token_id 3, and <image> of the tokenizer is 2"),
        (
            IDEFICS3,
            {"processor_config": {"image_seq_len": 169, "image_processor": {"size": {"longest_edge": 400}}}},
            "has size.longest_edge 400, which is no multiple of max_image_size.longest_edge 364",
        ),
    ],
)
def test_a_folder_whose_images_are_not_known_is_refused(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        open_vision(open_model_folder(write_folder(tmp_path, config, **files), "run.model"))
