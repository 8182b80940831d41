"""Errors over HTTP: the status of each gRPC code, the body, and when to try again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from perigee.errors import InvalidArgumentError, PerigeeError, UnimplementedError

STATUS_BY_CODE: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

# Returns the status and the JSON body of an error, in the form of another tool's interface.
WriteError = Callable[[PerigeeError], tuple[int, Any]]


class MethodNotAllowedError(UnimplementedError):
    """The path is there, but for other methods."""

    def __init__(self, message: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = ", ".join(sorted(allowed))


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "Why a call failed; of a stream, its last line.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "field_violations"],
            "properties": {
                "code": {"type": "string", "enum": [code.name for code in STATUS_BY_CODE]},
                "message": {"type": "string"},
                "field_violations": {
                    "type": "array",
                    "description": "The fields of the request that are wrong, and how.",
                    "items": {
                        "type": "object",
                        "required": ["field", "description"],
                        "properties": {"field": {"type": "string"}, "description": {"type": "string"}},
                    },
                },
                "retry_after_s": {"type": "number", "description": "When the call may be tried again."},
            },
        }
    },
}


def write_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns the status and the body of an error in Perigee's form."""
    violations = error.violations if isinstance(error, InvalidArgumentError) else ()
    body: dict[str, Any] = {
        "code": error.code.name,
        "message": error.message,
        "field_violations": [{"field": each.field, "description": each.description} for each in violations],
    }
    if error.retry_after_s is not None:
        body["retry_after_s"] = error.retry_after_s
    status = 405 if isinstance(error, MethodNotAllowedError) else STATUS_BY_CODE[error.code]
    return status, {"error": body}


def error_headers(error: PerigeeError) -> dict[str, str]:
    """Returns the headers of an error: the retry hint in whole seconds, how to authenticate, the methods there are."""
    headers = {}
    if isinstance(error, MethodNotAllowedError):
        headers["allow"] = error.allowed
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return headers


def dump_error(body: Any) -> bytes:
    """Returns the body in ASCII, for a message may quote text that UTF-8 cannot hold."""
    return json.dumps(body, separators=(",", ":")).encode()
