"""The visual recipe: its model folder loads, and its problems have the answers that they claim."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from visual_model import EOS_ID, IMAGE_ID, Shape, write_model

from tests.fixtures.vision import make_picture


def test_transformers_loads_the_model_and_its_processor(vision_model: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from PIL import Image

    model, report = transformers.AutoModelForImageTextToText.from_pretrained(vision_model, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.AutoProcessor.from_pretrained(vision_model)
    content = [{"type": "image"}, {"type": "text", "text": "count red"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<image>count red="
    images = [Image.open(io.BytesIO(make_picture(seed=0)))]
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist()[0].count(IMAGE_ID) == 4
    assert model(**inputs).logits.shape == (1, 4 + 3 + len("count red="), model.config.text_config.vocab_size)
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id == EOS_ID


def test_the_same_seed_draws_the_same_weights_and_the_recipe_has_a_million_of_them(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        write_model(tmp_path / name, seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert again == first != other
    weights = load_file(tmp_path / "first" / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == 1_039_968
    assert weights["model.vision_model.embeddings.position_embedding.weight"].shape[0] == Shape().image_tokens == 16
