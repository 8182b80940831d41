"""Common parts of the interfaces of other sandboxes: texts, limits, names of languages."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.notebook import is_binary

# Names of one language in different sandboxes.
SYNONYMS = (
    {"bash", "sh"},
    {"c++", "cpp", "g++"},
    {"csharp", "c#", "cs"},
    {"go", "golang"},
    {"haskell", "hs"},
    {"julia", "jl"},
    {"kotlin", "kt"},
    {"nodejs", "node", "javascript", "js", "node-js", "node-javascript"},
    {"perl", "pl"},
    {"python", "python3", "py", "py3"},
    {"r", "rscript"},
    {"ruby", "rb"},
    {"rust", "rs"},
    {"typescript", "ts"},
)


class Servicer(Protocol):
    """Methods of the sandbox's servicer that these interfaces call."""

    async def Execute(self, request: pb.ExecuteRequest, context: Any, /) -> pb.ExecuteResponse: ...

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Any, /) -> pb.CreateSessionResponse: ...

    async def RunCell(self, request: pb.RunCellRequest, context: Any, /) -> pb.RunCellResponse: ...

    async def RestartSession(self, request: pb.RestartSessionRequest, context: Any, /) -> pb.RestartSessionResponse: ...

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any, /) -> pb.CloseSessionResponse: ...

    async def ListRuntimes(self, request: pb.ListRuntimesRequest, context: Any, /) -> pb.ListRuntimesResponse: ...


def _refuse_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which no UTF-8 text can hold") from None
    return text


# A string that UTF-8 can encode.
Text = Annotated[str, AfterValidator(_refuse_surrogates)]


def names_of(name: str) -> set[str]:
    """Returns the name and its synonyms, in lower case."""
    name = name.lower()
    return next((names for names in SYNONYMS if name in names), {name})


def find_runtime(runtimes: Iterable[pb.Runtime], name: str) -> pb.Runtime | None:
    """Finds the runtime that has this name or alias, else the first that has a synonym of it."""
    for wanted in ({name.lower()}, names_of(name)):
        for runtime in runtimes:
            if wanted & {own.lower() for own in (runtime.language, *runtime.aliases)}:
                return runtime
    return None


def to_bundle(display: pb.Display) -> dict[str, Any]:
    """Returns what a cell displayed by MIME type, as Jupyter writes it: JSON as values, images as base64."""
    return {content.mime_type: _to_value(content) for content in display.contents}


def _to_value(content: pb.DisplayContent) -> Any:
    if is_binary(content.mime_type):
        return base64.b64encode(content.content).decode()
    text = content.content.decode(errors="replace")
    if not content.mime_type.endswith("json"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the cell has forged it
        return text


def whole(value: float, maximum: int = 2**32 - 1) -> int:
    """Rounds a limit up to an integer of at least 1; a larger one than a field can hold is cut, and refused later."""
    return max(1, min(math.ceil(value), maximum))


def rename_fields(error: InvalidArgumentError, names: Mapping[str, str]) -> InvalidArgumentError:
    """Returns the error with the caller's names of the fields."""
    renamed = dict.fromkeys(
        FieldViolation(names.get(each.field, each.field), each.description) for each in error.violations
    )
    if not renamed:
        return error
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in [*renamed][:5])
    return InvalidArgumentError(message, violations=[*renamed])
