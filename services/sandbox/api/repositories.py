"""Checks requests about repositories and turns them into jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import Limits
from services.sandbox.api.requests import Reader, check_test_run
from services.sandbox.config import LimitsConfig, SandboxConfig
from services.sandbox.judge.repositories import Assessment, PatchJob
from services.sandbox.languages.catalog import Catalog, Runtime

_MOST_IDS = 20_000


def read_patch_job(request: pb.JudgePatchRequest, config: SandboxConfig, catalog: Catalog) -> PatchJob:
    """Reads a JudgePatch request; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    runtime, limits = _read_common(reader, request)
    reader.check_size("test_patch", request.test_patch)
    reader.read_files("test_files", request.test_files, None)
    reader.check_arguments("setup", request.setup)
    reader.check_arguments("protected_paths", request.protected_paths)
    check_test_run(reader, "tests", request.tests)
    if not request.fail_to_pass and not request.pass_to_pass:
        reader.refuse("fail_to_pass", "must name a test, or pass_to_pass must")
    _check_ids(reader, "fail_to_pass", [*request.fail_to_pass, *request.pass_to_pass])
    reader.finish()
    assert runtime is not None
    return PatchJob(runtime, limits, request)


def _read_common(reader: Reader, request: pb.JudgePatchRequest | pb.AssessRequest) -> tuple[Runtime | None, Limits]:
    runtime = reader.read_runtime("language", request.language)
    reader.check_archives("archives", request.archives)
    reader.check_size("patch", request.patch)
    reader.check_environment("env", request.env)
    reader.check_key(request.idempotency_key)
    return runtime, reader.read_limits("limits", request.limits, _defaults(reader, runtime))


def _defaults(reader: Reader, runtime: Runtime | None) -> LimitsConfig:
    return runtime.limits if runtime else reader.config.default_limits


def _check_ids(reader: Reader, field: str, ids: Sequence[str]) -> None:
    if len(ids) > _MOST_IDS:
        reader.refuse(field, f"has {len(ids)} ids, at most {_MOST_IDS} are taken")
    for index, each in enumerate(ids):
        if not each or each.startswith("-") or "\0" in each:
            reader.refuse(f"{field}[{index}]", f"{each[:80]!r} is no id of a test")


def read_assessment(request: pb.AssessRequest, config: SandboxConfig, catalog: Catalog) -> Assessment:
    """Reads an Assess request; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    runtime, limits = _read_common(reader, request)
    reader.read_files("files", request.files, None)
    if not 1 <= len(request.stages) <= config.max_tests:
        reader.refuse("stages", f"has {len(request.stages)} stages, must have from 1 to {config.max_tests}")
    before: set[str] = set()
    stage_limits = []
    for index, stage in enumerate(request.stages):
        _check_stage(reader, f"stages[{index}]", stage, before)
        before.add(stage.name)
        own = pb.Limits()
        own.CopyFrom(request.limits)
        own.MergeFrom(stage.limits)
        stage_limits.append(reader.read_limits(f"stages[{index}].limits", own, _defaults(reader, runtime)))
    weights = [stage.weight if stage.HasField("weight") else 1.0 for stage in request.stages]
    if not (all(0 <= weight < math.inf for weight in weights) and 0 < sum(weights) < math.inf):
        reader.refuse("stages", "must have weights of at least 0, and one above it")
    reader.finish()
    assert runtime is not None
    return Assessment(runtime, limits, stage_limits, request)


def _check_stage(reader: Reader, field: str, stage: pb.Stage, before: set[str]) -> None:
    if not stage.name or stage.name in before:
        reader.refuse(f"{field}.name", "must be a name that no stage before it has")
    if bool(stage.command) == stage.HasField("tests"):
        reader.refuse(field, "must have either command or tests")
    if stage.HasField("tests"):
        check_test_run(reader, f"{field}.tests", stage.tests)
    if stage.expected and not stage.HasField("tests"):
        reader.refuse(f"{field}.expected", "is for stages with tests")
    if stage.keep and (stage.files or stage.HasField("tests")):
        reader.refuse(f"{field}.keep", "is for stages with a command and without files")
    reader.check_arguments(f"{field}.command", stage.command)
    reader.read_files(f"{field}.files", stage.files, None)
    _check_ids(reader, f"{field}.expected", stage.expected)
    for name in stage.needs:
        if name not in before:
            reader.refuse(f"{field}.needs", f"names {name!r}, which is no stage before it")
