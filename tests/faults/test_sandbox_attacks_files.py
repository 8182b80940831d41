"""Output files that are no files: an `error` or the program's own bytes come back, never the host's, and at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import OK, assert_serves, run_program

AT_ONCE_S = 30.0
# Where a link leads to the host's file, and to one that is there in the box as well.
TARGETS = ["host_secret", "/etc/passwd"]


async def collect(
    sandbox: SandboxClient, program: str, paths: list[str], args: Sequence[str] = (), **limits: int
) -> list[pb.OutputFile]:
    """The output files of a run that ended well, in the order asked for."""
    async with asyncio.timeout(AT_ONCE_S):
        response = await run_program(sandbox, program, limits, output_files=paths, args=args)
    assert response.status == OK, response
    assert [file.path for file in response.files] == paths
    for file in response.files:
        assert b"root:" not in file.content
        assert not (file.error and file.content)
    await assert_serves(sandbox)
    return list(response.files)


async def run_or_violations(
    sandbox: SandboxClient, source: bytes, **fields: Any
) -> tuple[pb.ExecuteResponse | None, list[str]]:
    """The response to a request, or the names of its fields that are refused."""
    try:
        return await run_program(sandbox, "files/link.py", source=source, **fields), []
    except InvalidArgumentError as error:
        return None, [violation.field for violation in error.violations]


def is_own(content: bytes) -> bool:
    """Whether nothing but the program's own text is in a file."""
    return re.fullmatch(b"(own)*(o|ow)?", content) is not None


async def test_a_plain_file_comes_back(sandbox: SandboxClient) -> None:
    """The same question has an answer where there is a file, so that the refusals mean something."""
    source = b"import os\nos.makedirs('a/b')\nopen('a/b/out', 'wb').write(bytes(range(256)))"
    response = await run_program(sandbox, "files/link.py", source=source, output_files=["a/b/out"])
    [file] = response.files
    assert (file.content, file.error, file.truncated) == (bytes(range(256)), "", False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("program", "paths", "more"),
    [
        ("files/link.py", ["out"], ["out"]),
        ("files/link.py", ["out.txt"], ["out.txt"]),
        ("files/link_chain.py", ["out", "first", "loop"], []),
        ("files/linked_parent.py", ["folder/{name}", "deep/deeper/folder/{name}", "folder"], []),
    ],
)
async def test_links_are_not_followed(
    sandbox: SandboxClient, host_secret: str, program: str, paths: list[str], more: list[str], target: str
) -> None:
    path = host_secret if target == "host_secret" else target
    asked = [name.format(name=path.rpartition("/")[2]) for name in paths]
    for file in await collect(sandbox, program, asked, [path, *more]):
        assert file.error
        assert file.content == b""


async def test_links_to_the_reader_are_not_followed(sandbox: SandboxClient) -> None:
    paths = ["memory", "environment", "root", "input", "descriptor", "first", "folder/etc/shadow", "folder/etc/passwd"]
    for file in await collect(sandbox, "files/kernel_links.py", paths):
        assert file.error
        assert file.content == b""


@pytest.mark.parametrize(
    ("program", "paths"),
    [
        ("files/fifo.py", ["out", "locked"]),
        ("files/socket.py", ["out"]),
        ("files/folder.py", ["out", "out/inside"]),
        ("files/device.py", ["out", "disk"]),
        ("files/hard_link.py", ["out", "missing", "missing/out"]),
    ],
)
async def test_what_is_no_file_has_an_error(sandbox: SandboxClient, program: str, paths: list[str]) -> None:
    for file in await collect(sandbox, program, paths):
        assert file.error
        assert file.content == b""


@pytest.mark.parametrize(
    ("program", "paths"),
    [("files/unreadable.py", ["out", "folder/out"]), ("files/unlinked.py", ["out", "main.py"])],
)
async def test_what_was_taken_away_is_own_or_an_error(sandbox: SandboxClient, program: str, paths: list[str]) -> None:
    for file in await collect(sandbox, program, paths):
        assert file.error or is_own(file.content)


async def test_a_huge_file_is_cut(sandbox: SandboxClient) -> None:
    [file] = await collect(sandbox, "files/huge.py", ["out"], file_bytes=64 << 20, memory_bytes=256 << 20)
    assert file.truncated or file.error
    assert file.content == b"x" * len(file.content)


async def test_many_files_fit_in_the_answer(sandbox: SandboxClient) -> None:
    paths = [f"out{index}" for index in range(40)]
    files = await collect(sandbox, "files/many.py", paths, file_bytes=64 << 20, memory_bytes=256 << 20)
    for index, file in enumerate(files):
        assert file.content == bytes([65 + index]) * len(file.content)
        assert file.truncated or file.error or len(file.content) == 1 << 20
    assert sum(len(file.content) for file in files) < 40 << 20


async def test_a_sparse_file_is_cut(sandbox: SandboxClient) -> None:
    [file] = await collect(sandbox, "files/sparse.py", ["out"], file_bytes=200 << 20)
    assert file.truncated or file.error
    assert file.content == bytes(len(file.content))


@pytest.mark.parametrize("target", TARGETS)
async def test_a_file_that_is_exchanged_with_a_link_is_own_or_an_error(
    sandbox: SandboxClient, host_secret: str, target: str
) -> None:
    path = host_secret if target == "host_secret" else target
    paths = ["out", f"folder/{path.rpartition('/')[2]}"] * 16
    for _ in range(5):
        for file in await collect(sandbox, "files/race.py", paths, [path]):
            assert file.error or is_own(file.content)


async def test_a_file_that_still_changes_is_own(sandbox: SandboxClient) -> None:
    for _ in range(5):
        [file] = await collect(sandbox, "files/growing.py", ["out"])
        assert file.error or is_own(file.content)


OUTSIDE = ["", "/etc/passwd", "../etc/passwd", "a/../../etc/passwd", "..", "/", "a\0b"]
NO_FILES = [".", "a/", "x" * 300, "a/" * 2000 + "x"]


@pytest.mark.parametrize("path", [*OUTSIDE, *NO_FILES])
async def test_paths_that_name_no_file_are_refused(sandbox: SandboxClient, path: str) -> None:
    response, violations = await run_or_violations(sandbox, b"import os\nos.makedirs('a')", output_files=[path])
    if response is None:
        assert violations == ["output_files[0]"]
    else:
        [file] = response.files
        assert file.error
        assert file.content == b""
    await assert_serves(sandbox)


@pytest.mark.parametrize("sandbox", ["zygote"], indirect=True)  # none reaches a box
@pytest.mark.parametrize("path", ["", "/tmp/evil", "../evil", "a/../../evil", "..", "/", "a\0b", "a/./../../evil"])
async def test_input_files_out_of_the_folder_are_refused(sandbox: SandboxClient, path: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        await run_program(sandbox, "leftovers/look_around.py", files=[pb.File(path=path, content=b"evil")])
    assert [violation.field for violation in error.value.violations] == ["files[0].path"]
    await assert_serves(sandbox)


async def test_input_files_do_not_replace_the_program(sandbox: SandboxClient) -> None:
    """A file by the name of the source, or twice the same one, is refused or leaves the source what it is."""
    for names in (["main.py"], ["./main.py"], ["same", "same"], ["folder", "folder/file"]):
        files = [pb.File(path=name, content=b"print('other')") for name in names]
        response, violations = await run_or_violations(sandbox, b"print('own')", files=files)
        if response is None:
            assert violations
            assert all(field.startswith("files[") for field in violations)
        else:
            assert (response.status, response.stdout) == (OK, b"own\n")
    await assert_serves(sandbox)
