"""Connection of a command to a sandbox, the sandbox's runtimes, and the files of requests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from rich.console import Console

from perigee.errors import InvalidArgumentError, UnavailableError
from perigee.rpc import MAX_MESSAGE_BYTES, ChannelOptions
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

MIB = 1 << 20
# Room for the envelope of a request.
ENVELOPE_BYTES = 1024


def read_bytes(path: Path) -> bytes:
    """Reads a file. Raises InvalidArgumentError naming it when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError.for_field(str(path), f"cannot be read: {error.strerror}") from error


def read_input_file(option: str, name: str, folder: Path = Path()) -> pb.File:
    """Reads a file below `folder` as one of the working folder, with the same relative path.

    Raises InvalidArgumentError when the path leaves the folder or cannot be read.
    """
    path = folder / name
    return pb.File(path=check_relative(option, name), content=read_bytes(path), executable=os.access(path, os.X_OK))


def check_relative(option: str, name: str) -> str:
    """Returns a relative path in its shortest form; raises InvalidArgumentError when it leaves its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InvalidArgumentError.for_field(option, f"{name!r} must be a relative path that does not leave its folder")
    return path.as_posix()


def check_size(
    request: pb.ExecuteRequest | pb.JudgeRequest | pb.JudgePatchRequest, what: str, most_bytes: int = MAX_MESSAGE_BYTES
) -> None:
    """Raises InvalidArgumentError when the request is larger than a message may be."""
    size = request.ByteSize()
    if size > most_bytes - ENVELOPE_BYTES:
        raise InvalidArgumentError.for_field(
            what, f"makes a request of {size:,} bytes; at most {most_bytes:,} can be sent"
        )


def megabytes(count: int) -> str:
    """Formats bytes as MiB."""
    return f"{count / MIB:.1f} MiB"


# Lines in files and pipes are not folded at the 80 columns of a terminal that is not there.
WIDE = 160
# Language by the suffix of a file, unless --language is set.
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
    ".kts": "kotlin-script",
    ".cs": "csharp",
    ".hs": "haskell",
    ".ada": "ada",
    ".adb": "ada",
    ".clj": "clojure",
    ".d": "d",
    ".exs": "elixir",
    ".jl": "julia",
    ".lean": "lean4",
    ".lisp": "common-lisp",
    ".ml": "ocaml",
    ".pas": "pascal",
    ".R": "r",
    ".r": "r",
    ".rkt": "racket",
    ".scala": "scala",
    ".scm": "scheme",
    ".sv": "verilog",
    ".swift": "swift",
}


@dataclass(frozen=True)
class Sandbox:
    """Sandbox that has answered, with its runtimes."""

    client: SandboxClient
    runtimes: pb.ListRuntimesResponse

    def find_runtime(self, language: str, source: str) -> pb.Runtime:
        """Finds the runtime of a name or alias, in upper or lower case; `source` names what needs it in errors.

        Raises InvalidArgumentError.
        """
        for runtime in self.runtimes.runtimes:
            if {language, language.lower()} & {runtime.language, *runtime.aliases}:
                return runtime
        for missing in self.runtimes.missing:
            if missing.language == language:
                raise InvalidArgumentError.for_field(source, f"this sandbox cannot run {language}: {missing.reason}")
        known = ", ".join(runtime.language for runtime in self.runtimes.runtimes)
        raise InvalidArgumentError.for_field(source, f"this sandbox has no runtime {language}; it has {known}")


@asynccontextmanager
async def open_sandbox(address: str, channel: ChannelOptions) -> AsyncIterator[Sandbox]:
    """Connects to the sandbox at `address`; raises UnavailableError that says how to start one when none answers."""
    async with SandboxClient(address, channel) as client:
        try:
            runtimes = await client.list_runtimes(pb.ListRuntimesRequest())
        except UnavailableError as error:
            hint = "; start one: perigee sandbox serve" if "refused" in error.message else ""
            raise UnavailableError(error.message + hint) from error
        yield Sandbox(client, runtimes)


def open_console() -> Console:
    """Opens standard output as a console."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def language_of(path: PurePath) -> str:
    """Returns the language of a file by its suffix; raises InvalidArgumentError when there is none."""
    language = LANGUAGES.get(path.suffix)
    if language is None:
        what = f"the suffix {path.suffix} stands for" if path.suffix else "without a suffix it is of"
        raise InvalidArgumentError.for_field(str(path), f"{what} no known language; known are {' '.join(LANGUAGES)}")
    return language


def wall_seconds(runtime: pb.Runtime, limits: pb.Limits) -> float:
    """Returns the wall-clock limit of a program with these limits in this runtime."""
    wall_ms = limits.wall_ms if limits.HasField("wall_ms") else runtime.default_limits.wall_ms
    return wall_ms / 1000
