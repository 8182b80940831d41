"""What calls have in common, over gRPC and over HTTP: the token, and errors."""

from __future__ import annotations

import hmac

from perigee.errors import InternalError, PerigeeError, UnauthenticatedError, UnimplementedError
from services.kit.telemetry import get_logger

log = get_logger(__name__)


def check_token(token: str | None, header: str | bytes | None) -> None:
    """Raises UnauthenticatedError unless the authorization header carries the service's token, where it has one."""
    if token is None:
        return
    if not isinstance(header, str) or not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise UnauthenticatedError("The call carries no valid bearer token: set PERIGEE_TOKEN to the service's.")


def as_perigee_error(error: Exception, call: str) -> PerigeeError:
    """The error that the caller sees: what is no PerigeeError is a fault of the service, and is logged."""
    if isinstance(error, PerigeeError):
        return error
    if isinstance(error, NotImplementedError):
        # Generated servicers raise it for methods that the service does not define.
        return UnimplementedError(f"The service does not offer {call}.")
    log.error("call failed", method=call, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
