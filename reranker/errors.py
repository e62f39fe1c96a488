"""Every error that the project raises on purpose.

    RerankError                     status  error_type
    ├── InvalidRequestError          422    invalid_request        the request cannot be ranked as it is
    ├── MalformedBodyError           400    malformed_body         not JSON, not UTF-8, nested too deep
    ├── MalformedRequestError        400    malformed_request      not HTTP/1.1, or to be read in two ways
    ├── UnauthorizedError            401    unauthorized           token missing or wrong
    ├── HeadTimeoutError             408    head_timeout           the head did not arrive in time
    ├── BodyTimeoutError             408    body_timeout           the body did not arrive in time
    ├── BodyTooLargeError            413    body_too_large         more bytes than allowed
    ├── UnsupportedMediaTypeError    415    unsupported_media_type not application/json
    ├── QueueFullError               429    queue_full             come back after `retry_after` seconds
    ├── HeadersTooLargeError         431    headers_too_large
    ├── ScoringError                 500    scoring_failed         the model gave no usable score
    │   └── OutOfMemoryError         500    out_of_memory          one document alone does not fit on the device
    ├── NotReadyError                503    not_ready              loading, draining or unhealthy
    │   └── DeviceLostError          503    device_lost            the device needs a new process
    └── DeadlineError                504    deadline_exceeded      not answered within the request's deadline
    ModelLoadError                   start-up only: the model cannot be served; the message says how to mend it

A RerankError carries its status, so the service has one handler from error to answer.
"""

from __future__ import annotations

from typing import ClassVar


class RerankError(Exception):
    """Base of all errors that become an answer; `str(error)` is the text a client reads."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which another try makes sense; becomes the Retry-After header."""


class InvalidRequestError(RerankError):
    """The request is well-formed JSON but cannot be ranked."""

    status = 422
    error_type = "invalid_request"


class MalformedBodyError(RerankError):
    """The body is not JSON."""

    status = 400
    error_type = "malformed_body"


class MalformedRequestError(RerankError):
    """The request is not HTTP/1.1, or another parser could read it in another way."""

    status = 400
    error_type = "malformed_request"


class UnauthorizedError(RerankError):
    """The token is missing, wrong or given twice."""

    status = 401
    error_type = "unauthorized"


class HeadTimeoutError(RerankError):
    """The head of the request did not arrive in time."""

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
    """The body is declared as something else than JSON."""

    status = 415
    error_type = "unsupported_media_type"


class QueueFullError(RerankError):
    """More work waits than the service may hold."""

    status = 429
    error_type = "queue_full"


class HeadersTooLargeError(RerankError):
    """The request's headers have more bytes than allowed."""

    status = 431
    error_type = "headers_too_large"


class ScoringError(RerankError):
    """The model failed on this request, or gave a score that is not a number."""

    status = 500
    error_type = "scoring_failed"


class OutOfMemoryError(ScoringError):
    """One document alone does not fit into the device's memory."""

    error_type = "out_of_memory"


class NotReadyError(RerankError):
    """The service is loading, draining or unhealthy."""

    status = 503
    error_type = "not_ready"


class DeviceLostError(NotReadyError):
    """The device reported an error that only a new process can clear."""

    error_type = "device_lost"


class DeadlineError(RerankError):
    """The deadline of the request passed before it was answered."""

    status = 504
    error_type = "deadline_exceeded"


class ModelLoadError(Exception):
    """The model cannot be served; the message is one line that says why and how to mend it."""


class CommandError(Exception):
    """A command or a batch cannot go on: one line on standard error and an exit code, never a traceback."""

    code: ClassVar[int] = 1


class InputError(CommandError):
    """Arguments, the environment, a file or a line of it cannot be used."""

    code = 2


class FailedError(CommandError):
    """The input is valid, but the work could not be done: no model, no service, no disk space."""
