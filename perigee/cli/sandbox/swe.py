"""`perigee sandbox swe`: a patch, judged by the tests of a repository."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict
from pydantic import Field, field_validator, model_validator
from rich.markup import escape
from rich.table import Table

from perigee.cli.sandbox.connection import check_size, open_console, open_sandbox, read_bytes
from perigee.cli.sandbox.problem import LimitsSection
from perigee.config import Model, read_yaml, validate
from perigee.rpc import ChannelOptions
from perigee.sandbox.v1 import sandbox_pb2 as pb

# The call's deadline beyond the tests' own limits: the wait in the queue, and the patch.
QUEUE_S = 600.0
_VERDICT_CODES = {pb.TEST_VERDICT_ACCEPTED: 0, pb.TEST_VERDICT_INFRA_ERROR: 3, pb.TEST_VERDICT_UNJUDGEABLE: 3}


class TestsSection(Model):
    """Run of a repository's tests."""

    framework: Literal["pytest", "go_test", "jest", "junit"] = "pytest"
    """Report that is read, and the command unless one is given."""
    targets: list[str] = []
    """Paths, ids or packages; those of the tests that must pass unless set."""
    command: list[str] = []
    """Instead of the framework's own."""
    report: str = ""
    """Path of the report that the command leaves; its standard output unless set."""


class TaskSection(Model):
    """Contents of a task's file."""

    language: str = "python-test"
    """Runtime of setup and tests."""
    repository: str
    """Folder, tar, tar.gz or zip beside the file."""
    strip_folders: int = Field(0, ge=0)
    """Leading folders that are taken off the names in an archive."""
    tests: TestsSection = TestsSection()
    """Run of the tests."""
    fail_to_pass: list[str] = []
    """Ids of tests that only the right patch makes pass."""
    pass_to_pass: list[str] = []
    """Ids of tests that pass without it, too."""
    test_patch: str = ""
    """Diff of the tests, applied before the patch."""
    patch: str = ""
    """The right patch, judged when no other is given."""
    setup: list[str] = []
    """Command between patch and tests."""
    protected_paths: list[str] = []
    """Patterns of files that the patch does not change."""
    limits: LimitsSection = LimitsSection()
    """Limits of setup and tests; unset ones are the runtime's."""
    files: int | None = Field(None, ge=16)
    """Files in the working folder."""
    env: dict[str, str] = {}
    """Environment variables."""
    loopback: bool = False
    """Whether tests may use sockets on loopback."""

    @model_validator(mode="before")
    @classmethod
    def _read_upper_case(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name.lower() if name in ("FAIL_TO_PASS", "PASS_TO_PASS") else name: each for name, each in value.items()
        }

    @field_validator("fail_to_pass", "pass_to_pass", mode="before")
    @classmethod
    def _read_lists_in_text(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def read_archive(path: Path) -> bytes:
    """Reads an archive, or packs a folder, its history left out."""
    if not path.is_dir():
        return read_bytes(path)
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as tar:
        tar.add(path, ".", filter=lambda member: None if member.name == "./.git" else member)
    return output.getvalue()


def make_request(task: Path, patch: Path | None) -> pb.JudgePatchRequest:
    """Returns the request for a task and a patch; raises InvalidArgumentError naming what is wrong with its file."""
    section = validate(TaskSection, read_yaml(task), str(task), "")
    limits = section.limits.to_proto()
    if section.files is not None:
        limits.files = section.files
    tests = section.tests
    request = pb.JudgePatchRequest(
        language=section.language,
        archives=[
            pb.Archive(content=read_archive(task.parent / section.repository), strip_folders=section.strip_folders)
        ],
        patch=section.patch.encode() if patch is None else read_bytes(patch),
        test_patch=section.test_patch.encode(),
        protected_paths=section.protected_paths,
        setup=section.setup,
        tests=pb.TestRun(
            framework=f"TEST_FRAMEWORK_{tests.framework.upper()}",  # type: ignore[arg-type]
            targets=tests.targets,
            command=tests.command,
            report=tests.report,
        ),
        fail_to_pass=section.fail_to_pass,
        pass_to_pass=section.pass_to_pass,
        limits=limits,
        env=section.env,
        loopback=section.loopback,
    )
    check_size(request, str(task))
    return request


async def judge_patch(address: str, channel: ChannelOptions, request: pb.JudgePatchRequest, as_json: bool) -> int:
    """Judges the patch, prints the tests that must pass, and returns the exit code to end with."""
    async with open_sandbox(address, channel) as sandbox:
        response = await sandbox.client.judge_patch(request, timeout_s=QUEUE_S + 4 * request.limits.wall_ms / 1000)
    if as_json:
        print(json.dumps(MessageToDict(response, preserving_proto_field_name=True), indent=2))
    else:
        print_tests(request, response)
    return _VERDICT_CODES.get(response.verdict, 1)


def print_tests(request: pb.JudgePatchRequest, response: pb.JudgePatchResponse) -> None:
    """Prints the tests that must pass, and the verdict."""
    console = open_console()
    table = Table("test", "", "time")
    for test in response.tests[: len(request.fail_to_pass) + len(request.pass_to_pass)]:
        outcome = pb.TestOutcome.Name(test.outcome).removeprefix("TEST_OUTCOME_").lower()
        table.add_row(escape(test.id), outcome, f"{test.duration_ms} ms")
    console.print(table)
    verdict = pb.TestVerdict.Name(response.verdict).removeprefix("TEST_VERDICT_").lower().replace("_", " ")
    console.print(f"{verdict}: {response.reason}" if response.reason else verdict, markup=False)
