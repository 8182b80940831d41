"""The sandbox that a command talks to, and the runtimes that it has."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePath

from perigee.errors import InvalidArgumentError, UnavailableError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

# What a suffix stands for, unless --language says otherwise.
LANGUAGES = {
    ".py": "python",
    ".c": "c",
    ".cpp": "cpp",
    ".cc": "cpp",
    ".cxx": "cpp",
    ".java": "java",
    ".js": "javascript",
    ".mjs": "javascript",
    ".ts": "typescript",
    ".sh": "bash",
    ".go": "go",
    ".rs": "rust",
    ".rb": "ruby",
    ".pl": "perl",
    ".lua": "lua",
    ".php": "php",
    ".kt": "kotlin",
    ".cs": "csharp",
    ".hs": "haskell",
}


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that answered."""

    client: SandboxClient
    runtimes: pb.ListRuntimesResponse

    def find_runtime(self, language: str, source: str) -> pb.Runtime:
        """The runtime of this name or alias, whatever its case, as the sandbox takes it; `source` says what needs it.

        Raises InvalidArgumentError.
        """
        for runtime in self.runtimes.runtimes:
            if {language, language.lower()} & {runtime.language, *runtime.aliases}:
                return runtime
        for missing in self.runtimes.missing:
            if missing.language == language:
                raise InvalidArgumentError.of(source, f"this sandbox cannot run {language}: {missing.reason}")
        known = ", ".join(runtime.language for runtime in self.runtimes.runtimes)
        raise InvalidArgumentError.of(source, f"this sandbox has no runtime {language}; it has {known}")


@asynccontextmanager
async def open_sandbox(address: str) -> AsyncIterator[Sandbox]:
    """The sandbox at `address`. Raises UnavailableError that says how to start one when nobody answers."""
    async with SandboxClient.connect(address, token=os.environ.get("PERIGEE_TOKEN")) as client:
        try:
            runtimes = await client.list_runtimes(pb.ListRuntimesRequest())
        except UnavailableError as error:
            raise UnavailableError(f"{error.message}; start one: perigee sandbox serve") from error
        yield Sandbox(client, runtimes)


def language_of(path: PurePath) -> str:
    """The language that the file's suffix stands for. Raises InvalidArgumentError when it stands for none."""
    language = LANGUAGES.get(path.suffix)
    if language is None:
        what = f"the suffix {path.suffix} stands for" if path.suffix else "without a suffix it is of"
        raise InvalidArgumentError.of(str(path), f"{what} no known language; known are {' '.join(LANGUAGES)}")
    return language


def wall_seconds(runtime: pb.Runtime, limits: pb.Limits) -> float:
    """The wall-clock limit that a program with these limits has in this runtime."""
    wall_ms = limits.wall_ms if limits.HasField("wall_ms") else runtime.default_limits.wall_ms
    return wall_ms / 1000
