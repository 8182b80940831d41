"""The whole system on a small run that is killed in part, ended and resumed."""

from __future__ import annotations

import pytest
import torch
import yaml
from PIL import Image

from perigee.config import validate
from services.coordinator.prompts import read_problems
from services.coordinator.run_config import RunConfig
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder
from tests.fixtures.training import TrainedRun, processes_below

pytestmark = pytest.mark.timeout(600)


def test_services_that_are_killed_do_not_end_the_run_and_ctrl_c_does(trained_run: TrainedRun) -> None:
    for name in ("trainer", "coordinator", "buffer", "rollout-0"):
        assert f"{name} was ended by SIGKILL" in trained_run.output_until_ctrl_c
    assert f"go on with: perigee train --resume {trained_run.path.name}" in trained_run.output_until_ctrl_c


def test_a_run_that_ctrl_c_ended_goes_on_to_its_end(trained_run: TrainedRun) -> None:
    assert f"going on with {trained_run.path.name}" in trained_run.output
    assert sum(line["rollout/tokens"] for line in trained_run.iterations) == trained_run.summary["tokens_generated"]


def test_every_iteration_trains_and_makes_the_next_version(trained_run: TrainedRun) -> None:
    lines = trained_run.iterations
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    trained = [line for line in lines if line["train/trajectories"]]
    assert len(trained) >= 3
    versions = [line["policy_version"] for line in lines]
    assert versions == sorted(versions)
    assert versions[-1] == 1 + len(trained)


def test_chats_are_asked_by_the_template_and_text_as_it_stands(trained_run: TrainedRun) -> None:
    values = yaml.safe_load((trained_run.path / "recipe.yaml").read_text())
    run = validate(RunConfig, values["run"], "recipe.yaml", "run")
    encoder = open_encoder(open_model_folder(str(run.model), "run.model"), run.chat_message())
    chat, text, *_ = read_problems(run, encoder)[0].values()
    asked = [encoder.tokenizer.decode(list(each.token_ids)) for each in (chat, text)]
    assert asked == [f"user:{chat.line.item.prompt};assistant:", text.line.item.prompt]


def test_rollout_and_trainer_agree_on_every_token(trained_run: TrainedRun) -> None:
    assert 0 < trained_run.summary["train_infer_logprob_diff_max"] < 1e-3


def test_trajectories_span_policy_versions(trained_run: TrainedRun) -> None:
    summary = trained_run.summary
    assert summary["trajectories_multi_version"] > 0
    assert summary["trajectories_trained"] > summary["trajectories_multi_version"]
    assert summary["tokens_generated"] == sum(line["rollout/tokens"] for line in trained_run.iterations)


def test_the_summary_has_intervals_for_every_domain(trained_run: TrainedRun) -> None:
    for kind in ("accuracy_baseline", "accuracy_final"):
        accuracy = trained_run.summary[kind]
        assert set(accuracy) == {"overall", "math", "code"}
        for way in ("greedy", "sampled"):
            for domain in accuracy.values():
                assert 0 <= domain[way]["low"] <= domain[way]["mean"] <= domain[way]["high"] <= 1


def test_the_report_and_the_files_are_there(trained_run: TrainedRun) -> None:
    report = (trained_run.path / "report.html").read_text()
    assert trained_run.path.name in report
    assert "plotly" in report.lower()
    assert list((trained_run.path / "tensorboard").glob("events.out.tfevents*"))
    assert "<figure id='timeline'>" in report
    assert f"report: {trained_run.path / 'report.html'}" in trained_run.output
    assert (trained_run.path / "recipe.yaml").is_file()


def test_the_final_model_loads_in_transformers_and_its_tower_has_learned(trained_run: TrainedRun) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folders = [trained_run.path / "model", trained_run.path / "data/model"]
    final, first = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    processor = AutoProcessor.from_pretrained(folders[0])
    image = Image.open(trained_run.path / "data/heldout-0.png")
    inputs = processor(images=[image], text="user:<image>3+4=;assistant:", return_tensors="pt")
    assert not torch.equal(final(**inputs).logits, first(**inputs).logits)
    answer = final.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    changed = {name for name, value in final.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    assert any(name.startswith("model.vision_model.") for name in changed)


def test_nothing_is_left_running(trained_run: TrainedRun) -> None:
    assert processes_below(trained_run.path.parent) == []
    assert not (trained_run.path / "stack.json").exists()
