"""Images in lines of prompt files, data sets and supervised sets: how they are named, kept, asked and counted."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perigee.chat import change_text, find_images, read_example, read_messages, text_of
from perigee.errors import DataLossError, InvalidArgumentError
from perigee.image_sources import ImageReader, ImageStore, embed_images, split_images
from perigee.images import ImageInfo, ImageLimits
from perigee.reward.items import read_item, read_prompt_line
from perigee.reward.sources import Columns, image_base, read_source
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from services.coordinator.prompts import read_prompts
from services.coordinator.run_config import ImagesConfig, PromptSource
from services.kit.chat import PromptEncoder, encode_examples, open_chat_template, open_encoder
from services.kit.hf import open_model_folder
from tests.fixtures.chat import write_chat_model
from tests.fixtures.vision import make_picture

PNG, OTHER = make_picture(1), make_picture(2)
DIGEST, OTHER_DIGEST = (hashlib.sha256(data).hexdigest() for data in (PNG, OTHER))
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
IMAGE = "<image>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(PNG)
    # A name that lies: the bytes count.
    (tmp_path / "pictures/b.jpg").write_bytes(OTHER)
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return tmp_path


@pytest.fixture
def encoder(vision_model: Path) -> PromptEncoder:
    return open_encoder(open_model_folder(vision_model, "model"))


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def ask(*parts: Any, **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "answer": "1", **others}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "pictures/a.png"},
        {"type": "image", "image": DATA_URL},
        {"type": "image", "image": {"bytes": BASE64}},
        {"type": "image", "image": {"bytes": PNG, "path": "gone.png"}},
        {"type": "image", "image": {"bytes": None, "path": "pictures/a.png"}},
        {"type": "image", "image": PNG, "text": None},
        {"type": "image", "path": "pictures/a.png"},
        {"type": "image", "url": DATA_URL},
        {"type": "image", "base64": f"{BASE64[:60]}\n{BASE64[60:]}\n"},
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
        {"type": "image_url", "image_url": "pictures/a.png"},
    ],
)
def test_an_image_is_named_in_many_ways(folder: Path, part: dict[str, Any]) -> None:
    store = ImageStore(folder / "store")
    values = ask(text("What "), part, text("is it?")) | {"id": "a", "verifier": "math"}
    line = read_prompt_line(values, "p:1", ImageReader(str(folder), store=store))
    [image] = line.images
    assert (image.digest, image.width, image.height) == (DIGEST, 28, 28)
    assert line.item.prompt == "What is it?"
    assert not line.item.images
    assert store.read(image).data == PNG
    assert line.question == ("What is it?", DIGEST)


@pytest.mark.parametrize(("verifier", "digests"), [("exact", []), ("judge", [DIGEST])])
def test_verifiers_that_look_at_no_image_are_sent_none(folder: Path, verifier: str, digests: list[str]) -> None:
    values = ask(text("What?"), {"type": "image", "image": "pictures/a.png"}, id="a", verifier=verifier)
    line = read_prompt_line(values, "p:1", ImageReader(str(folder)))
    assert [image.digest for image in line.images] == [DIGEST]
    assert [image.digest for image in line.judged_images] == digests


def test_images_are_sent_in_parts_that_fit_into_memory() -> None:
    sizes = [20, 12, 1, 40, 31, 1]
    images = [ImageInfo(str(size), "image/png", 1, 1, size << 20) for size in sizes]
    assert [[int(each.digest) for each in part] for part in split_images(images)] == [[20, 12], [1], [40], [31, 1]]
    assert split_images([]) == []


def test_a_path_may_be_absolute_and_a_name_is_looked_up_beside_the_file(folder: Path) -> None:
    read = ImageReader("/nowhere")
    assert read(str(folder / "pictures/a.png"), "image").digest == DIGEST
    assert image_base(str(folder / "p.jsonl")) == image_base(str(folder)) == str(folder)
    assert image_base("s3://bucket/folder/p.jsonl") == image_base("s3://bucket/folder") == "s3://bucket/folder"


def test_parts_without_a_name_take_the_images_beside_the_messages(folder: Path) -> None:
    line = ask({"type": "image"}, text("or"), {"type": "image", "text": None}, images=["pictures/b.jpg", PNG])
    read = read_prompt_line(line | {"id": "a", "verifier": "math"}, "p:1", ImageReader(str(folder)))
    assert [image.digest for image in read.images] == [OTHER_DIGEST, DIGEST]


def test_rows_of_parquet_hold_the_feature_image_of_datasets(folder: Path) -> None:
    rows = [
        {"problem": f"{IMAGE}{n}?", "images": [{"bytes": data, "path": None}], "answer": str(n)}
        for n, data in enumerate([PNG, OTHER] * 100)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet", row_group_size=200)
    lines = read_source(folder / "p.parquet", Columns({"problem": "prompt"}), "run.prompts")
    assert [line.images[0].digest for line in lines] == [DIGEST, OTHER_DIGEST] * 100
    assert [line.item.prompt for line in lines[:2]] == [f"{IMAGE}0?", f"{IMAGE}1?"]
    single = [{"prompt": "1?", "image": {"bytes": PNG, "path": None}, "answer": "1"}]
    pq.write_table(pa.Table.from_pylist(single), folder / "single.parquet")
    [line] = read_source(folder / "single.parquet", Columns({"image": "images"}), "run.prompts")
    assert [image.digest for image in line.images] == [DIGEST]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (ask({"type": "image", "image": "gone.png"}), "messages[0].content[0]: gone.png does not exist"),
        (ask({"type": "image", "image": "pictures"}), "messages[0].content[0]: pictures is no file"),
        (ask({"type": "image", "image": "drawing.svg"}), "messages[0].content[0]: drawing.svg is SVG"),
        (ask({"type": "image", "image": "p.jsonl"}), "messages[0].content[0]: p.jsonl is no image"),
        (ask({"type": "image", "image": "a\0b"}), "messages[0].content[0]: a\0b does not exist"),
        (ask({"type": "image", "image": {"bytes": "%"}}), "messages[0].content[0]: is not base64"),
        (ask({"type": "image", "image": f"{DATA_URL[:-9]}"}), "messages[0].content[0]: is "),
        (ask({"type": "image", "image": 3}), "messages[0].content[0]: must be a path, a data URL or bytes, got"),
        (ask({"type": "image"}), "messages[0].content[0]: names no image"),
        (ask({"type": "image", "image": "http://a/b.png"}), "http://a/b.png is an address of the web: set run.images"),
        (ask({"type": "image", "image": "s3://a/b.png"}), "s3://a/b.png is a URL, and only files are read here"),
        (ask({"type": "audio"}), 'messages[0].content[0]: must be {"type": "text"'),
        (ask(text("?"), images=["pictures/a.png"]), "images: has 1 more than messages have parts"),
        ({"prompt": "?", "answer": "1", "images": ["pictures/a.png", "gone.png"]}, "images[1]: gone.png does not"),
        ({"prompt": "?", "answer": "1", "image": "pictures/a.png"}, "image: unknown key; did you mean images?"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder: Path, line: dict[str, Any], said: str) -> None:
    path = write_lines(folder / "p.jsonl", {"prompt": "?", "answer": "1"}, line)
    with pytest.raises(InvalidArgumentError) as caught:
        read_source(path, Columns(), "run.prompts")
    [violation] = caught.value.violations
    assert said in f"{violation.field.removeprefix(f'{path}:2: ')}: {violation.description}"
    assert violation.field.startswith(f"{path}:2: ")


def test_what_is_too_large_is_refused_before_it_is_read(folder: Path) -> None:
    read = ImageReader(str(folder), ImageLimits(max_bytes=50))
    for value in ("pictures/a.png", {"bytes": BASE64}, DATA_URL, PNG):
        with pytest.raises(InvalidArgumentError, match=r"has .*bytes"):
            read(value, "image")


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_of_the_web_is_read_where_that_is_allowed(web: str) -> None:
    assert ImageReader(allow_urls=True)(f"{web}/pictures/a.png", "image").digest == DIGEST
    with pytest.raises(InvalidArgumentError, match=r"gone.png cannot be had: HTTP Error 404"):
        ImageReader(allow_urls=True)(f"{web}/gone.png", "image")
    with pytest.raises(InvalidArgumentError, match="bytes, more than 50"):
        ImageReader(allow_urls=True, limits=ImageLimits(max_bytes=50))(f"{web}/pictures/a.png", "image")


def test_a_kept_image_that_changed_is_not_used(folder: Path) -> None:
    store = ImageStore(folder / "store")
    info = ImageReader(store=store)(PNG, "image")
    store.path(info.digest).write_bytes(OTHER)
    with pytest.raises(DataLossError, match="is not what it was"):
        store.read(info)
    store.path(info.digest).unlink()
    with pytest.raises(DataLossError, match="cannot be read"):
        store.read(info)
    ImageReader(store=store)(PNG, "image")
    assert store.read(info).data == PNG


def test_text_is_changed_beside_images() -> None:
    [message] = read_messages(
        ask({"type": "image", "image": PNG}, text("a"), {"type": "image", "image": OTHER})["messages"], ImageReader()
    )
    changed = change_text(message, str.upper)
    assert text_of(changed) == "A"
    assert [image.digest for image in find_images([changed])] == [DIGEST, OTHER_DIGEST]
    [alone] = read_messages(ask({"type": "image", "image": PNG})["messages"], ImageReader())
    assert text_of(change_text(alone, lambda old: f"{old}Look!")) == "Look!"


def test_items_to_score_have_the_bytes(folder: Path) -> None:
    values = ask({"type": "image", "image": "pictures/a.png"}, text("?"), response="1", verifier="math")
    item = read_item(values, "line-1", images=ImageReader(str(folder)))
    assert ([image.data for image in item.images], item.prompt) == ([PNG], "?")
    with pytest.raises(InvalidArgumentError, match=r"messages\[0\]\.content\[0\]: is an image"):
        read_item(values, "line-1")


def encode(encoder: PromptEncoder, line: dict[str, Any], folder: Path) -> tuple[str, int]:
    """The prompt as text, and the tokens that the model reads."""
    prompt = read_prompt_line(line | {"id": "a", "verifier": "math"}, "p:1", ImageReader(str(folder)))
    [ids] = encoder.encode([prompt.asked], ["p:1"], images=[prompt.images])
    return encoder.tokenizer.decode(ids, skip_special_tokens=False), len(encoder.expand(ids, prompt.images, "p:1"))


def test_an_image_is_one_token_of_a_prompt(encoder: PromptEncoder, folder: Path) -> None:
    chat = ask(text("how many "), {"type": "image", "image": "pictures/a.png"}, text("?"))
    # One placeholder becomes four tokens and three around them.
    assert encode(encoder, chat, folder) == (f"how many {IMAGE}?=", 12 + 6)
    plain = {"prompt": f"{IMAGE}{IMAGE}how?", "answer": 1, "images": ["pictures/a.png", "pictures/b.jpg"]}
    assert encode(encoder, plain, folder) == (f"{IMAGE}{IMAGE}how?", 6 + 12)


def test_a_text_with_images_becomes_a_chat_that_begins_with_them(vision_model: Path, folder: Path) -> None:
    settings = ChatSettings(mode="always", instruction="quick!")
    encoder = open_encoder(open_model_folder(vision_model, "model"), settings)
    line = {"prompt": "how?", "answer": 1, "images": ["pictures/a.png"]}
    assert encode(encoder, line, folder)[0] == f"{IMAGE}how?<unk>quick!="
    assert encode(encoder, line | {"prompt": f"how{IMAGE}"}, folder)[0] == f"how{IMAGE}<unk>quick!="


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "how?", "images": [PNG]}, "p:1: images: are 1, and the prompt has 0 of <image>"),
        ({"prompt": f"{IMAGE}?"}, "p:1: images: are 0, and the prompt has 1 of <image>"),
        (ask(text(IMAGE), {"type": "image", "image": PNG}), "p:1: images: are 1, and the prompt has 2 of <image>"),
    ],
)
def test_placeholders_are_as_many_as_images(
    encoder: PromptEncoder, folder: Path, line: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        encode(encoder, line | {"answer": "1"}, folder)
    assert said in caught.value.message


def test_a_model_of_text_takes_no_images(tmp_path: Path, folder: Path) -> None:
    encoder = open_encoder(open_model_folder(write_chat_model(tmp_path / "model"), "model"))
    with pytest.raises(InvalidArgumentError, match=r"p:1: images: the model of .* takes no images"):
        encode(encoder, ask(text("?"), {"type": "image", "image": PNG}), folder)


def test_a_template_that_wants_parts_gets_them(tmp_path: Path) -> None:
    """As Idefics3's own does, which would leave a text out."""
    source = (
        "{% for message in messages %}{{ message['role'] }}:"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    )
    # As transformers 4 wrote it.
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    template = open_chat_template(tmp_path, "model")
    assert template is not None
    messages = read_messages(
        [{"role": "system", "content": "Look."}, *ask({"type": "image", "image": PNG}, text("?"))["messages"]],
        ImageReader(),
    )
    assert template.render(messages) == f"system:Look.user:{IMAGE}?"


def test_examples_to_learn_have_images(encoder: PromptEncoder, folder: Path) -> None:
    chat = ask({"type": "image", "image": "pictures/a.png"}, text("how?"))["messages"]
    path = write_lines(
        folder / "sft.jsonl",
        {"messages": chat, "response": "1"},
        {"messages": [*chat, {"role": "assistant", "content": "1"}]},
        {"prompt": f"{IMAGE}how?", "images": [DATA_URL], "response": "1"},
        {"prompt": "1+1", "response": "2"},
    )
    first, second, third, text_only = encode_examples(path, "d", encoder, 14, read_image=ImageReader(str(folder)))
    assert first == second
    assert (first.images, third.images[0].digest, text_only.images) == (second.images, DIGEST, ())
    assert first.prompt.count(5) == third.prompt.count(5) == 1
    # Of 6 tokens and 2 to learn one is an image of 7.
    with pytest.raises(InvalidArgumentError, match=r"sft.jsonl:1: 14 tokens are more than the context of 13"):
        encode_examples(path, "d", encoder, 13, read_image=ImageReader(str(folder)))
    with pytest.raises(InvalidArgumentError, match="is an image, and text alone is read here"):
        encode_examples(path, "d", encoder, 99)
    assert read_example(json.loads(path.read_text().splitlines()[3])).images == ()


def test_a_file_that_is_sent_holds_its_images(folder: Path) -> None:
    path = write_lines(
        folder / "p.jsonl",
        ask({"type": "image", "image": "pictures/a.png"}, text("?")),
        ask({"type": "image"}, {"type": "image", "image": DATA_URL}, text("?"), images="pictures/b.jpg"),
        ask({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, figure={"bytes": BASE64}),
        {"prompt": "1+1", "answer": "2"},
    )
    read = ImageReader(str(folder))
    sent = embed_images(path, read, "run", folder / "sent", {"images": "figure"})
    first, second, third, plain = (json.loads(line) for line in sent.read_text().splitlines())
    assert first["messages"][0]["content"] == [{"type": "image", "image": DATA_URL}, text("?")]
    # Under another name than the source has for images it is no image.
    assert second["images"] == "pictures/b.jpg"
    assert third["messages"][0]["content"][0] == {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
    assert (third["figure"], plain) == ([{"bytes": BASE64}], {"prompt": "1+1", "answer": "2"})
    [named] = read_source(
        embed_images(write_lines(path, second | {"id": "a"}), read, "run", folder / "s"), Columns(), "f"
    )[:1]
    assert [image.digest for image in named.images] == [OTHER_DIGEST, DIGEST]
    # Lines that are wrong stay, for their reader to name.
    wrong = [["image"], {"messages": 3}, {"messages": [{"role": "image"}]}, {"messages": [{"content": ["image"]}]}]
    path = write_lines(folder / "wrong.jsonl", {"messages": []}, *wrong)
    path.write_text(f'{path.read_text()}{{"image')
    assert [*embed_images(path, read, "run", folder / "sent").open()][1:-1] == [
        f"{json.dumps(each)}\n" for each in wrong
    ]
    text_alone = write_lines(folder / "text.jsonl", {"prompt": "1+1", "answer": "2"})
    assert embed_images(text_alone, read, "run", folder / "none") == text_alone
    assert not (folder / "none").exists()
    with pytest.raises(InvalidArgumentError, match=r"run: .*wrong.jsonl:1: messages: gone.png does not exist"):
        embed_images(write_lines(path, ask({"type": "image", "image": "gone.png"})), read, "run", folder / "sent")


def test_images_of_a_file_in_object_storage_are_beside_it(
    folder: Path, vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERIGEE_CACHE", str(folder / "cache"))
    lines = write_lines(folder / "p.jsonl", ask({"type": "image", "image": "pictures/a.png"}, text("?")) | {"id": "a"})
    storage = fsspec.filesystem("memory")
    storage.pipe({"/images-test/p.jsonl": lines.read_bytes(), "/images-test/pictures/a.png": PNG})
    encoder = open_encoder(open_model_folder(vision_model, "model"))
    source = PromptSource(path="memory://images-test/p.jsonl")
    [prompt] = read_prompts([source], "run.prompts", encoder, 16).values()
    assert ([image.digest for image in prompt.line.images], prompt.tokens) == ([DIGEST], 9)
    with pytest.raises(InvalidArgumentError, match=r"pictures/a.png has \d+ bytes, more than 50"):
        read_prompts([source], "run.prompts", encoder, 16, ImagesConfig(max_bytes=50))
    storage.rm("/images-test/pictures/a.png")
    with pytest.raises(InvalidArgumentError, match=r"pictures/a.png does not exist"):
        read_prompts([source], "run.prompts", encoder, 16)
