"""The errors of Perigee: raised by the services, and again by the clients that called them.

Each class stands for one canonical gRPC code. `to_status` and `from_rpc_error` translate to and from
`google.rpc.Status`, whose details carry field violations and retry hints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"
_SHOWN_VIOLATIONS = 5
# What travels of them: gRPC breaks a call off whose trailing metadata have more than 8 KiB.
_MAX_VIOLATIONS_BYTES = 4096


@dataclass(frozen=True)
class FieldViolation:
    """A request or configuration field and what is wrong with it."""

    field: str
    description: str


class PerigeeError(Exception):
    """Base of all errors; `retry_after_s` is a hint when the call may be tried again."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidArgumentError(PerigeeError):
    """The request is wrong whatever the state of the service; `violations` name the fields."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, violations: Sequence[FieldViolation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)

    @classmethod
    def for_field(cls, field: str, description: str) -> InvalidArgumentError:
        """Returns the error of one violation, with the message made from it."""
        return cls.for_fields([FieldViolation(field, description)])

    @classmethod
    def for_fields(cls, violations: Sequence[FieldViolation]) -> InvalidArgumentError:
        """Returns the error of several violations; its message has the first few."""
        shown = "; ".join(f"{each.field}: {each.description}" for each in violations[:_SHOWN_VIOLATIONS])
        return cls(shown, violations=violations)


class UnauthenticatedError(PerigeeError):
    """The call carries no valid token."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(PerigeeError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFoundError(PerigeeError):
    """NOT_FOUND: the request names what does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(PerigeeError):
    """ALREADY_EXISTS: the request creates what exists with other contents."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(PerigeeError):
    """The service is not in the state that the request needs."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class AbortedError(PerigeeError):
    """A concurrent change won; start again from fresh state."""

    code = grpc.StatusCode.ABORTED


class ResourceExhaustedError(PerigeeError):
    """A bounded queue or a quota is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(PerigeeError):
    """The service, or one that it needs, cannot be reached."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(PerigeeError):
    """The call did not finish before its deadline."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLossError(PerigeeError):
    """Data arrived or was read damaged."""

    code = grpc.StatusCode.DATA_LOSS


class UnimplementedError(PerigeeError):
    """The service does not offer this call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class CancelledError(PerigeeError):
    """The caller went away."""

    code = grpc.StatusCode.CANCELLED


class InternalError(PerigeeError):
    """A fault of the service itself."""

    code = grpc.StatusCode.INTERNAL


# The service did not take the call, which says nothing of the request: wait, and send it again.
UNAVAILABLE = (UnavailableError, ResourceExhaustedError)
# The service took the call and failed at it, for which the request may be the reason: bound the attempts.
CALL_FAILED = (DeadlineExceededError, InternalError, AbortedError)
# All that an idempotent call may be sent again for.
TRANSIENT = (*UNAVAILABLE, *CALL_FAILED)

_CLASS_BY_CODE: dict[grpc.StatusCode, type[PerigeeError]] = {cls.code: cls for cls in PerigeeError.__subclasses__()}


def first_error(group: BaseException) -> BaseException:
    """Returns the first error inside nested exception groups, which made a task group cancel the others."""
    error = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def to_status(error: PerigeeError) -> status_pb2.Status:
    """Returns the error as google.rpc.Status: BadRequest for the first violations, RetryInfo for a retry hint."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=error.message)
    if isinstance(error, InvalidArgumentError) and error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
            if bad_request.ByteSize() > _MAX_VIOLATIONS_BYTES:
                break
        status.details.add().Pack(bad_request)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError | grpc.Call, target: str) -> PerigeeError:
    """Returns the error that a failed call stands for; `target` names the peer when it could not be reached."""
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        message = f"{target} cannot be reached: {message}"
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    is_from_service = False
    for key, value in error.trailing_metadata() or ():
        if key != STATUS_DETAILS_KEY:
            continue
        assert isinstance(value, bytes)
        is_from_service = True
        for detail in status_pb2.Status.FromString(value).details:
            bad_request, retry_info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request):
                violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
            elif detail.Unpack(retry_info):
                retry_after_s = retry_info.retry_delay.ToMilliseconds() / 1000
    if error.code() is grpc.StatusCode.CANCELLED and not is_from_service:
        # A server that stops cancels what is in flight.
        return UnavailableError(f"{target} ended the call: it is stopping")
    error_class = _CLASS_BY_CODE.get(error.code(), PerigeeError)
    if error_class is InvalidArgumentError:
        return InvalidArgumentError(message, violations=violations)
    return error_class(message, retry_after_s=retry_after_s)
