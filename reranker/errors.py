"""The error tree: every exception that the project raises for a known cause.

    RerankError                     status  error_type
    ├── InvalidRequestError          422    invalid_request        valid JSON, but not a request that can be ranked
    ├── MalformedBodyError           400    malformed_body         not JSON, not UTF-8, nested too deep
    ├── MalformedRequestError        400    malformed_request      not HTTP/1.1, or ambiguous
    ├── UnauthorizedError            401    unauthorized           token missing or wrong
    ├── HeadTimeoutError             408    head_timeout           the head did not arrive in time
    ├── BodyTimeoutError             408    body_timeout           the body did not arrive in time
    ├── BodyTooLargeError            413    body_too_large         more bytes than allowed
    ├── UnsupportedMediaTypeError    415    unsupported_media_type not application/json
    ├── QueueFullError               429    queue_full             retry after `retry_after` seconds
    ├── HeadersTooLargeError         431    headers_too_large
    ├── ScoringError                 500    scoring_failed         the model gave no usable score
    │   └── OutOfMemoryError         500    out_of_memory          one document alone does not fit on the device
    ├── NotReadyError                503    not_ready              loading, draining or unhealthy
    │   └── DeviceLostError          503    device_lost            the device needs a new process
    └── DeadlineError                504    deadline_exceeded      no response within the request's deadline
    ModelLoadError                   at load only: the model cannot be served; the message says how to fix it

    CommandError                     a command or a batch failed; exit code 1
    ├── InputError                   arguments, the environment or an input file are unusable; exit code 2
    └── FailedError                  no model, no service, no disk space

A RerankError carries its status, so one handler turns every error into a response.
"""

from __future__ import annotations

from typing import ClassVar


class RerankError(Exception):
    """Base of all errors that become a response; `str(error)` is the text in its body."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, retry_after: int | None = None, logged: str | None = None) -> None:
        super().__init__(message)
        self.logged = message if logged is None else logged
        """The text for the log, if the message has a word of the client in it."""
        self.retry_after = retry_after
        """Seconds to wait before a retry; the Retry-After header."""


class InvalidRequestError(RerankError):
    """The body is valid JSON, but not a request that can be ranked."""

    status = 422
    error_type = "invalid_request"


class MalformedBodyError(RerankError):
    """The body is not JSON, not UTF-8, or nested too deep."""

    status = 400
    error_type = "malformed_body"


class MalformedRequestError(RerankError):
    """The request is not HTTP/1.1, or parsers could disagree about where it ends."""

    status = 400
    error_type = "malformed_request"


class UnauthorizedError(RerankError):
    """The token is missing, wrong or sent twice."""

    status = 401
    error_type = "unauthorized"


class HeadTimeoutError(RerankError):
    """The request line and headers did not arrive in time."""

    status = 408
    error_type = "head_timeout"


class BodyTimeoutError(RerankError):
    """The body did not arrive in time."""

    status = 408
    error_type = "body_timeout"


class BodyTooLargeError(RerankError):
    """The body has more bytes than allowed."""

    status = 413
    error_type = "body_too_large"


class UnsupportedMediaTypeError(RerankError):
    """The Content-Type is not JSON."""

    status = 415
    error_type = "unsupported_media_type"


class QueueFullError(RerankError):
    """The queue has no room for this request."""

    status = 429
    error_type = "queue_full"


class HeadersTooLargeError(RerankError):
    """The request's headers have more bytes than allowed."""

    status = 431
    error_type = "headers_too_large"


class ScoringError(RerankError):
    """The model failed on this request, or its score is not a finite number."""

    status = 500
    error_type = "scoring_failed"


class OutOfMemoryError(ScoringError):
    """A single document does not fit into the device's memory."""

    error_type = "out_of_memory"


class NotReadyError(RerankError):
    """The service is loading, draining or unhealthy."""

    status = 503
    error_type = "not_ready"


class DeviceLostError(NotReadyError):
    """The device reported an error that only a new process clears."""

    error_type = "device_lost"


class DeadlineError(RerankError):
    """The request's deadline passed before its response."""

    status = 504
    error_type = "deadline_exceeded"


class ModelLoadError(Exception):
    """The model cannot be served; the message is one line with the cause and the fix."""


class CommandError(Exception):
    """A command or a batch failed; each argument is a line on standard error. It exits with `code`, no traceback."""

    code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the lines."""
        return "\n".join(map(str, self.args))


class InputError(CommandError):
    """Arguments, the environment, an input file or one of its lines are unusable."""

    code = 2


class FailedError(CommandError):
    """The input is valid, but there is no model, no service or no disk space."""
