"""The cache of compiled programs."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.archive import Archive
from services.sandbox.agent.protocol import Limits, RunResult
from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import OutOfMemory, load_catalog
from services.sandbox.runtime.compile_cache import CompileCache
from services.sandbox.runtime.jobs import Program
from services.sandbox.runtime.programs import digest_of, opened, ran_out_of_memory

LIMITS = Limits(1000, 1000, 1 << 28, 64, 1 << 20, 1 << 16, 100)


def folder(size: int) -> Archive:
    return Archive({"paths": ["program"], "executable": [True]}, [b"x" * size])


async def test_the_least_recently_used_make_room() -> None:
    cache = CompileCache(entries=2, total_bytes=100)
    for key in (b"a", b"b"):
        cache.keep(key, pb.CompileResult(wall_ms=5), folder(30))
    found = await cache.find(b"a")
    assert found is not None
    assert (found.result.cached, found.result.wall_ms, len(found.folder.blobs[0])) == (True, 0, 30)
    cache.keep(b"c", pb.CompileResult(), folder(30))
    assert await cache.find(b"b") is None
    cache.keep(b"d", pb.CompileResult(), folder(80))
    assert await cache.find(b"a") is None
    assert await cache.find(b"d") is not None
    cache.keep(b"e", pb.CompileResult(), folder(101))
    assert await cache.find(b"e") is None
    assert await cache.find(b"d") is not None


async def test_who_comes_meanwhile_waits_for_the_compiler() -> None:
    cache = CompileCache(entries=2, total_bytes=100)
    with cache.compiling(b"a"):
        waiting = asyncio.create_task(cache.find(b"a"))
        await asyncio.sleep(0)
        assert not waiting.done()
        cache.keep(b"a", pb.CompileResult(), folder(1))
    assert await waiting is not None
    with cache.compiling(b"b"):
        waiting = asyncio.create_task(cache.find(b"b"))
        await asyncio.sleep(0)
    assert await waiting is None  # that one failed: compile it yourself


def test_the_key_is_all_that_a_compiler_sees() -> None:
    runtime = load_catalog(SandboxConfig()).find("c")
    assert runtime is not None
    program = Program(runtime, b"int main;", LIMITS, LIMITS, [pb.File(path="a.h", content=b"1")])
    others = [
        dataclasses.replace(program, source=b"int main; "),
        dataclasses.replace(program, files=[pb.File(path="b.h", content=b"1")]),
        dataclasses.replace(program, files=[pb.File(path="a.h", content=b"2")]),
        dataclasses.replace(program, files=[pb.File(path="a.h", content=b"1", executable=True)]),
        dataclasses.replace(program, compile_limits=dataclasses.replace(LIMITS, cpu_ms=2000)),
        dataclasses.replace(program, environment={"CPATH": "."}),
        dataclasses.replace(program, compile_arguments=("-DX",)),
        dataclasses.replace(program, runtime=dataclasses.replace(runtime, image="/srv/other")),
        dataclasses.replace(program, source=b"int main;1", files=[pb.File(path="a.h")]),
    ]
    assert len({digest_of(each) for each in (program, *others)}) == len(others) + 1
    assert digest_of(dataclasses.replace(program, limits=dataclasses.replace(LIMITS, wall_ms=5))) == digest_of(program)


def test_the_key_changes_with_the_files_of_an_image(tmp_path: Path) -> None:
    runtime = load_catalog(SandboxConfig()).find("c")
    assert runtime is not None
    image = tmp_path / "rootfs"
    (image / "usr/bin").mkdir(parents=True)
    compiler = image / "usr/bin/gcc"
    compiler.write_text("one")
    program = Program(dataclasses.replace(runtime, image=str(image)), b"int main;", LIMITS, LIMITS)
    keys = [digest_of(program), digest_of(program)]
    compiler.write_text("another")  # in its place
    keys.append(digest_of(program))
    (image / "var/lib/dpkg").mkdir(parents=True)
    (image / "var/lib/dpkg/status").write_text("Package: binutils\n")
    keys.append(digest_of(program))
    image.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", image)  # built again
    keys.append(digest_of(program))
    assert len(set(keys)) == 4
    assert keys[0] == keys[1]


JAVA_WORDS = b"Terminating due to java.lang.OutOfMemoryError: Java heap space"


@pytest.mark.parametrize(
    ("sign", "exit_code", "stderr", "full"),
    [
        (OutOfMemory(exit_code=3, message="Terminating"), 3, b"Warning\n" + JAVA_WORDS + b"\n", True),
        (OutOfMemory(exit_code=3, message="Terminating"), 1, JAVA_WORDS, False),
        (OutOfMemory(exit_code=3, message="Terminating"), 3, JAVA_WORDS + b"\nor so", False),
        (OutOfMemory(exit_code=3, message="Terminating"), 3, b"", False),
        (OutOfMemory(exit_code=3, message="Terminating"), None, JAVA_WORDS, False),
        (None, 3, JAVA_WORDS, False),
    ],
)
def test_a_heap_is_full_by_exit_code_and_words(
    sign: OutOfMemory | None, exit_code: int | None, stderr: bytes, full: bool
) -> None:
    with opened(stderr) as (file,):
        assert ran_out_of_memory(RunResult(exit_code=exit_code), file, sign) == full
