"""Files of a run's folder: whole after a crash, no iteration twice, none missing."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import DataLossError
from perigee.files import append_lines, read_lines
from perigee.image_sources import ImageStore
from services.coordinator.groups import LiveGroups
from services.coordinator.iteration import CoordinatorState, Totals, decode_state
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import RunConfig, UpdateConfig, config_digest, parse_run_config
from services.coordinator.run_log import RunLog, number_or_none, numbers
from services.coordinator.sampling import SamplerState
from tests.fixtures.coordinator import write_run_section


def test_an_unknown_number_is_null() -> None:
    assert number_or_none(float("nan")) is None
    assert number_or_none(0.12345678) == 0.123457


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 8), max_size=12), st.integers(0, 8))
def test_restored_iterations_are_the_committed_ones_once_each(written: list[int], committed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_log = RunLog(Path(folder))
        for iteration in written:
            append_lines(Path(folder) / "metrics.jsonl", [{"iteration": iteration}])
        last = {"iteration": committed, "restored": True} if committed else None
        run_log.restore_iterations(committed, last)
        found = [line["iteration"] for line in read_lines(Path(folder) / "metrics.jsonl")]
        kept = {iteration for iteration in written if iteration <= committed}
        assert found == sorted(kept | ({committed} if committed else set()))


def test_evaluations_are_found_by_kind_and_iteration(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path)
    run_log.add_evaluation({"kind": "baseline", "iteration": 0, "accuracy": {"overall": {"greedy": {"mean": 0.5}}}})
    run_log.close()
    assert run_log.evaluation("baseline", 0) is not None
    assert run_log.evaluation("final", 0) is None


def test_only_numbers_are_metrics() -> None:
    line = {"a": 1, "b": {"c": 0.5, "d": None, "e": "text"}, "f": True, "g": {"h": {"i": 2}}}
    assert numbers(line) == {"a": 1.0, "b/c": 0.5, "g/h/i": 2.0}


def test_the_state_survives_its_encoding() -> None:
    state = CoordinatorState(
        SamplerState(3, "abc"), 17, 12.5, 4.5, Totals(10, 4, 1, 1e-4, {"rollout": 1.5}), {"iteration": 2, "x": None}
    )
    assert decode_state(state.encode()) == state
    for wrong in (b"{}", b"not json", json.dumps({"sampler": {"colour": 1}, "totals": {}}).encode()):
        with pytest.raises(DataLossError, match="cannot be read"):
            decode_state(wrong)


async def test_trajectories_of_a_state_without_starts_begin_as_they_are(tmp_path: Path) -> None:
    class Buffer:
        """Has a group with a partial trajectory and one without tokens."""

        async def list_groups(self, *_: object, timeout_s: float) -> AsyncIterator[pb.ListGroupsResponse]:
            trajectories = [pb.TrajectorySummary(trajectory_id=f"g0-{tokens}", tokens=tokens) for tokens in (7, 0)]
            group = pb.GroupSummary(group_id="g0", prompt_id="p", trajectories=trajectories)
            yield pb.ListGroupsResponse(groups=[group])

    stored = json.loads(CoordinatorState(SamplerState(3, "abc")).encode())
    del stored["starts"]
    groups = LiveGroups("run", cast(BufferClient, Buffer()), 1.0, ImageStore(tmp_path))
    prompts = {"p": cast(Prompt, object())}
    for starts, added in (
        (decode_state(json.dumps(stored).encode()).starts, [0, 0]),
        ({}, [7, 0]),
        ({"g0": [5, 0]}, [2, 0]),
    ):
        await groups.load(prompts, starts)
        assert [trajectory.added for trajectory in groups.trajectories()] == added


def test_old_names_of_keys_give_the_same_run(tmp_path: Path) -> None:
    values = yaml.safe_load(write_run_section(tmp_path)) | {
        "sft": [{"dataset": "d", "steps": 1, "optimizer": {"max_grad_norm": 2.0, "min_lr_ratio": 0.5}}],
        "evaluation": {"max_response_tokens": 12},
        "algorithm": {"tau": 0.2},
        "update": {"tis_cap": 2.0, "minibatches": 3},
        "optimizer": {"learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.9},
        "final_lr_ratio": 0.3,
    }
    old = copy.deepcopy(values)
    old["warmup"] = old.pop("sft")
    old["warmup"][0]["optimizer"] = {"clip_grad": 2.0, "final_share": 0.5}
    old["groups"] = {"live": old.pop("max_live_groups"), "size": old.pop("group_size")}
    for part in (old["rollout"], old["evaluation"]):
        part["response_cap"] = part.pop("max_response_tokens")
    for key in ("update", "optimizer", "final_lr_ratio"):
        del old[key]
    old["algorithm"] |= {
        "importance_cap": 2.0,
        "minibatches": 3,
        "optimizer": {"learning_rate": 1e-3, "betas": [0.8, 0.9]},
        "final_learning_rate_share": 0.3,
    }
    with pytest.warns(FutureWarning) as caught:
        parsed = parse_run_config(yaml.safe_dump(old))
    assert parsed == parse_run_config(yaml.safe_dump(values))
    assert len({str(warning.message) for warning in caught}) == 11


def test_the_digest_holds_what_must_not_change(tmp_path: Path) -> None:
    section = write_run_section(tmp_path)
    digest = config_digest(parse_run_config(section))
    longer = section.replace("iterations: 3", "iterations: 30") + "time_limit_s: 60\nevaluation: {every: 4}\n"
    assert config_digest(parse_run_config(longer)) == digest
    assert config_digest(parse_run_config(section + "seed: 4\n")) != digest


def test_a_key_that_a_later_version_adds_leaves_the_digest(tmp_path: Path) -> None:
    class LaterUpdate(UpdateConfig):
        min_trained_tokens: int = 1

    class LaterRun(RunConfig):
        update: LaterUpdate = LaterUpdate()

    values = yaml.safe_load(write_run_section(tmp_path))
    digest = config_digest(RunConfig(**values))
    assert config_digest(LaterRun(**values)) == digest
    assert config_digest(LaterRun(**values, update=LaterUpdate(min_trained_tokens=4))) != digest


def test_a_key_whose_default_changed_counts_from_its_first_default() -> None:
    values = {"model": "m", "prompts": "p", "heldout": "h", "iterations": 3, "group_size": 4}
    first = {"max_live_groups": 160, "rollout": {"max_response_tokens": 200}, "optimizer": {"learning_rate": 2e-4}}
    first |= {"update": {"tis_cap": 0}}
    # As version 0.2.0 had it, whether or not the recipe named these.
    digest = "4069843c7a72abfdd40d08ac7661ff0d"
    assert config_digest(RunConfig(**values, **first)) == digest
    for key in first:
        others = {name: value for name, value in first.items() if name != key}
        assert config_digest(RunConfig(**values, **others)) != digest
