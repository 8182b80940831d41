"""Prompts as data sets hold them: columns, answers, splits, held-out parts and mixtures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from perigee.cli.train import send_files
from perigee.config import validate
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import InvalidArgumentError
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import PromptSource, RunConfig, config_digest
from services.coordinator.runs import read_inputs
from services.coordinator.sampling import Sampler, make_sampler
from services.kit.chat import encode_examples, open_encoder
from services.kit.hf import open_model_folder
from services.kit.storage import CACHE_VARIABLE
from tests.fixtures.chat import write_chat_model

GSM = [{"question": f"{n}+1=?", "answer": f"one more\n#### {n + 1}", "level": n} for n in range(20)]
GSM_SOURCE = {"columns": {"prompt": "question"}, "answer_after": "####"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(**values: Any) -> RunConfig:
    rest = {"iterations": 1, "heldout": {"count": 2}, "rollout": {"max_response_tokens": 16}}
    return validate(RunConfig, rest | values, "recipe", "run")


def read(folder: Path, context: int = 256, **values: Any) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
    config = make_config(**values)
    inputs = read_inputs("r", config, folder, str(write_chat_model(folder / "model", context)), "")
    return dict(inputs.prompts), dict(inputs.heldout)


def test_columns_become_fields_and_parquet_holds_the_same(tmp_path: Path) -> None:
    lines = GSM_SOURCE | {"path": write(tmp_path / "gsm.jsonl", GSM), "defaults": {"domain": "sums"}}
    # A file that was sent has no suffix.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM), tmp_path / "0f3a")
    table = lines | {"path": str(tmp_path / "0f3a"), "name": "gsm"}
    found = [read(tmp_path, prompts=source)[0] for source in (lines, table)]
    assert [[(p.id, p.domain, p.line.item, p.token_ids) for p in one.values()] for one in found[:1]] == [
        [(p.id, p.domain, p.line.item, p.token_ids) for p in one.values()] for one in found[1:]
    ]
    prompt = found[0]["gsm-000003"]
    assert (prompt.domain, prompt.line.item.prompt, prompt.line.item.math.reference) == ("sums", "2+1=?", "3")


def test_the_question_stays_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{n}=?"}], "info": {"truth": n}} for n in range(4)]
    columns = {"messages": "prompt", "answer": "info.truth"}
    source = {"path": write(tmp_path / "p.jsonl", rows), "columns": columns, "verifier": {"math": {}}}
    prompts, heldout = read(tmp_path, prompts=source, instruction="Box it.", system_prompt="Add.")
    prompt = (prompts | heldout)["p-000002"]
    assert (prompt.line.item.prompt, prompt.line.item.math.reference) == ("1=?", "1")
    tokenizer = open_model_folder(tmp_path / "model", "model").open_tokenizer()
    assert tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False) == (
        "<bos><turn>system: Add.<end><turn>user: 1=?\nBox it.<end><turn>assistant: "
    )


@pytest.mark.parametrize(("answer", "reference"), [(7, "7"), (0.5, "0.5"), (-3.0, "-3"), ("x", "x")])
def test_a_number_is_an_answer(tmp_path: Path, answer: object, reference: str) -> None:
    rows = [{"prompt": f"{n}=?", "answer": answer} for n in range(3)]
    prompts, _ = read(tmp_path, prompts=write(tmp_path / "p.jsonl", rows))
    assert {prompt.line.item.math.reference for prompt in prompts.values()} == {reference}


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (GSM, {"columns": {"prompt": "problem"}}, "p.jsonl:1: problem: is no column, and prompt is to be read from it"),
        (GSM, {"answer_after": "@"}, "p.jsonl:1: answer: has no '@'"),
        (
            [{"question": "1", "answer": [1]}],
            {"answer_after": ""},
            "p.jsonl:1: reference: must be a string, got an array",
        ),
        ([{"question": None, "answer": "#### 1"}], {}, "p.jsonl:1: prompt: is required"),
    ],
)
def test_a_bad_source_is_named(tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], said: str) -> None:
    source = GSM_SOURCE | {"path": write(tmp_path / "p.jsonl", rows)} | changes
    with pytest.raises(InvalidArgumentError) as caught:
        read(tmp_path, prompts=source)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"content": "1"}], ":1: messages[0].role: is required"),
        ([{"role": "user", "content": [{"type": "image"}]}], ":1: messages[0].content[0]: names no image"),
        ([{"role": "assistant", "content": "1"}], ":1: messages: must end with what is to be answered"),
        ([{"role": "system", "content": "1"}], ":1: messages: holds no message of the role user"),
        (
            [{"role": "user", "content": "1"}, {"role": "tool", "content": "1"}],
            "chat template fails: tools are not known",
        ),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: Any, said: str) -> None:
    path = write(tmp_path / "p.jsonl", [{"messages": messages, "answer": 1}])
    with pytest.raises(InvalidArgumentError) as caught:
        read(tmp_path, prompts=path)
    assert said in caught.value.message
    assert f"{path}:1: " in caught.value.message
    assert "\n" not in caught.value.message


def test_a_run_starts_after_a_look_at_the_first_examples_to_learn(tmp_path: Path) -> None:
    encoder = open_encoder(open_model_folder(write_chat_model(tmp_path / "model"), "model"))
    rows = [{"prompt": "1+1=", "response": "2"}, {"prompt": "1+1=", "response": ""}]
    path = Path(write(tmp_path / "sft.jsonl", rows))
    assert len(encode_examples(path, "run.sft.0.dataset", encoder, 256, 1)) == 1
    with pytest.raises(InvalidArgumentError, match=r"sft\.jsonl:2: response"):
        encode_examples(path, "run.sft.0.dataset", encoder, 256)


def test_an_empty_response_to_learn_is_named(tmp_path: Path) -> None:
    prompts, examples = write(tmp_path / "p.jsonl", GSM), write(tmp_path / "sft.jsonl", [{"prompt": "1"}])
    with pytest.raises(InvalidArgumentError, match=r"^run\.sft\.0\.dataset: .*sft\.jsonl:1: response: is empty: "):
        read(tmp_path, prompts=GSM_SOURCE | {"path": prompts}, sft=[{"dataset": examples, "steps": 1}])


def test_a_broken_template_is_named_at_the_first_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": str(n), "answer": 1} for n in range(100)])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InvalidArgumentError, match=r"p\.jsonl:1: prompt: the model's chat template fails: ") as caught:
        read(tmp_path, prompts=path, chat="always")
    assert len(caught.value.violations) == 1


def test_a_context_shorter_than_prompt_and_cap_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "1" * 50, "answer": 1}])
    with pytest.raises(InvalidArgumentError, match=r"p.jsonl:1: prompt p-000001: has 51 tokens, .* context of 60"):
        read(tmp_path, context=60, prompts=path)


def test_a_url_is_a_file_or_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    storage, table = fsspec.filesystem("memory"), pyarrow.Table.from_pylist(GSM)
    lines = "".join(json.dumps(row) + "\n" for row in GSM).encode()
    storage.pipe({"/urls/a.json": lines, "/urls/b.txt": lines, "/urls/c.json/train.jsonl": lines})
    storage.pipe("/urls/saved/dataset_dict.json", b'{"splits": ["train", "test"]}')
    storage.pipe("/urls/saved/train/state.json", b'{"_data_files": [{"filename": "data.arrow"}]}')
    with storage.open("/urls/saved/train/data.arrow", "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as sink:
        sink.write_table(table)
    for path, split in (("a.json", None), ("b.txt", None), ("c.json", None), ("saved", "train"), ("saved/train", None)):
        source = GSM_SOURCE | {"path": f"memory://urls/{path}", "split": split}
        found = [sum(map(len, read(tmp_path, prompts=source)))]
        assert found == [len(GSM)], path
    with pytest.raises(InvalidArgumentError, match="split: must be one of train, test, got None"):
        read(tmp_path, prompts=GSM_SOURCE | {"path": "memory://urls/saved"})


def test_a_bare_hub_name_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"openai/gsm8k is no folder here; .* hf://datasets/openai/gsm8k/"):
        read(tmp_path, prompts="openai/gsm8k")
    with pytest.raises(InvalidArgumentError, match=r"or hf://owner/Model-1\.7B where the Hugging Face Hub has it"):
        open_model_folder("owner/Model-1.7B", "model")


def test_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidArgumentError, match=r"run\.prompts: .*p\.parquet cannot be read"):
        read(tmp_path, prompts=GSM_SOURCE | {"path": str(tmp_path / "p.parquet")})


def test_parquet_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM), tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InvalidArgumentError, match=r"run\.prompts: .*p\.parquet needs the package pyarrow"):
        read(tmp_path, prompts=GSM_SOURCE | {"path": str(tmp_path / "p.parquet")})


def test_a_part_is_held_out_by_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n % 10}=?", "answer": n % 10} for n in range(20)]
    path = write(tmp_path / "p.jsonl", rows)
    prompts, heldout = read(tmp_path, prompts=path, heldout={"fraction": 0.3, "seed": 1})
    assert (len(prompts), len(heldout)) == (14, 6)
    assert not {p.line.item.prompt for p in prompts.values()} & {p.line.item.prompt for p in heldout.values()}
    assert read(tmp_path, prompts=path, heldout={"count": 3, "seed": 1})[1].keys() == heldout.keys()
    assert read(tmp_path, prompts=path, heldout={"count": 3, "seed": 2})[1].keys() != heldout.keys()
    with pytest.raises(InvalidArgumentError, match=r"run\.heldout: takes 10 of 10 different prompts"):
        read(tmp_path, prompts=path, heldout={"count": 10})


@pytest.mark.parametrize("heldout", [{"count": 1, "fraction": 0.1}, {"seed": 1}, []])
def test_a_held_out_part_has_one_size(heldout: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"run\.heldout: wants one of a path, fraction and count"):
        make_config(prompts="p", heldout=heldout)


def test_one_plain_path_keeps_its_digest() -> None:
    config = make_config(prompts="p", heldout="h")
    assert (config.model_dump()["prompts"], config.model_dump()["heldout"]) == ("p", "h")
    assert config_digest(config) == config_digest(make_config(prompts=[{"path": "p"}], heldout={"path": "h"}))
    assert config_digest(config) != config_digest(make_config(prompts="p", heldout={"count": 1}))
    with pytest.raises(InvalidArgumentError, match="system_prompt needs a chat template"):
        make_config(prompts="p", heldout="h", chat="never", system_prompt="Add.")


@pytest.mark.parametrize("prioritized", [False, True])
def test_sources_are_mixed_by_weight_and_the_mixture_goes_on(tmp_path: Path, prioritized: bool) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{n}", "answer": n} for n in range(size)])
             for name, size in (("a", 8), ("b", 400))]  # fmt: skip
    sources = [{"path": paths[0], "weight": 3}, paths[1]]
    config = make_config(prompts=sources, heldout=paths[0], prioritized={"enabled": prioritized})
    assert config.prompts[1] == PromptSource(path=paths[1])
    prompts = list(read(tmp_path, prompts=sources, heldout=paths[0])[0].values())

    def draw(sampler: Sampler, times: int) -> list[str]:
        return [prompt.id for _ in range(times) for prompt in sampler.sample(4, 1, set())]

    sampler = make_sampler(prompts, config, {})
    first = draw(sampler, 10)
    assert Counter(prompt_id[0] for prompt_id in first) == {"a": 30, "b": 10}
    restored = make_sampler(prompts, config, {})
    restored.restore(sampler.state())
    assert draw(restored, 10) == draw(sampler, 10)


class Receiver:
    async def put_file(self, path: Path, run_id: str, run_path: str) -> str:
        return f"{run_path}/{path.name}"


async def test_files_of_sources_are_sent_to_a_coordinator_elsewhere(tmp_path: Path) -> None:
    client = cast(CoordinatorClient, Receiver())
    request = coordinator_pb2.StartRunRequest(run_path="there")
    path, url = write(tmp_path / "p.jsonl", GSM), "s3://b/p.jsonl"
    there = "there/p.jsonl"
    for section, sent in [
        ({"prompts": path, "heldout": {"count": 2}}, {"prompts": there, "heldout": {"count": 2}}),
        ({"prompts": {"path": path, "name": path}}, {"prompts": {"path": there, "name": path}}),
        ({"prompts": [path, {"path": url}], "model": path}, {"prompts": [there, {"path": url}], "model": path}),
        ({"heldout": {"sources": [{"path": path}, url]}}, {"heldout": {"sources": [{"path": there}, url]}}),
        ({"heldout": url, "sft": [{"dataset": path}]}, {"heldout": url, "sft": [{"dataset": there}]}),
    ]:
        assert await send_files(client, request, section) == sent
    with pytest.raises(InvalidArgumentError, match="is a folder, and a coordinator elsewhere is sent files"):
        await send_files(client, request, {"prompts": str(tmp_path), "heldout": path})
