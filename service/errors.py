"""The error tree. An error carries what happened as data; only `service.api` knows HTTP statuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One place in a request that is wrong: a JSON pointer (`#/backbone/depth`) and what is wrong there."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """Everything the service refuses or fails at on purpose.

    `detail` is written for the client: what, which and the limit; never a path, a traceback or the payload.
    """

    title = "The request failed"

    def __init__(
        self, detail: str, *, faults: Sequence[Fault] = (), retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.faults = tuple(faults)
        self.retry_after_s = retry_after_s


# --- the request cannot be read -----------------------------------------------------------------


class MalformedBody(ServiceError):
    """The body is not what its content type says."""

    title = "The body cannot be read"


class MalformedRequest(ServiceError):
    """What came is no HTTP request."""

    title = "The request cannot be read"


class SlowRequest(ServiceError):
    """The client takes too long to send its request."""

    title = "The request came too slowly"


class InvalidHeader(ServiceError):
    """A header of the request is malformed."""

    title = "A header cannot be read"


class UndecodableImage(ServiceError):
    """An image is empty, truncated or corrupt."""

    title = "An image cannot be decoded"


class UnsupportedMedia(ServiceError):
    """A body or image format that is not served."""

    title = "The format is not served"


class NotAcceptable(ServiceError):
    """No reply format of the `Accept` header is served."""

    title = "No reply format fits"


# --- something named does not exist -------------------------------------------------------------


class NotFound(ServiceError):
    """A name that is not known; `nearest` are the closest names that are."""

    title = "Not found"

    def __init__(self, what: str, name: str, nearest: Sequence[str] = (), *, pointer: str = "") -> None:
        self.nearest = tuple(nearest)
        hint = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        detail = f"no {what} named {name!r}{hint}"
        super().__init__(detail, faults=[Fault(pointer, detail)] if pointer else ())


class UnknownBackbone(NotFound):
    """No type of this name in the registry."""

    title = "No such backbone type"


class UnknownConfig(NotFound):
    """No file of this name in the config directory."""

    title = "No such named config"


class UnknownModel(NotFound):
    """No model of this id in memory."""

    title = "No such model"


# --- the request asks for something that is not valid -------------------------------------------


class InvalidConfig(ServiceError):
    """A well-formed config that cannot be built; `faults` name the offending keys."""

    title = "The config is not valid"

    def __init__(self, pointer: str, detail: str, *more: Fault) -> None:
        faults = (Fault(pointer, detail), *more)
        text = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults[:5])
        if len(faults) > 5:
            text += f"; and {len(faults) - 5} more"
        super().__init__(text, faults=faults)


class CheckpointUnavailable(InvalidConfig):
    """A checkpoint name that resolves to nothing that may be read."""

    title = "The checkpoint is not available"


class CheckpointUnreadable(InvalidConfig):
    """A checkpoint file that is not a file of tensors."""

    title = "The checkpoint cannot be read"


class CheckpointMismatch(InvalidConfig):
    """A checkpoint that does not fit the backbone; every key is accounted for."""

    title = "The checkpoint does not fit"

    def __init__(
        self,
        pointer: str,
        detail: str,
        *,
        missing: Sequence[str] = (),
        wrong_shape: Sequence[str] = (),
        unexpected: Sequence[str] = (),
    ) -> None:
        self.missing, self.wrong_shape, self.unexpected = (
            tuple(missing),
            tuple(wrong_shape),
            tuple(unexpected),
        )
        super().__init__(pointer, detail)


class NonFiniteLevel(ServiceError):
    """A level holds NaN or infinity."""

    title = "A level is not finite"


# --- the request is over a limit ----------------------------------------------------------------


class TooLarge(ServiceError):
    """Body, image, reply or count over its limit; the detail has the number."""

    title = "Over a limit"


class TargetTooLong(TooLarge):
    """The path and query of a request over their limit."""

    title = "The address is too long"


class HeadersTooLarge(TooLarge):
    """The headers of a request over their limit."""

    title = "The headers are too large"


# --- who asks -----------------------------------------------------------------------------------


class Unauthenticated(ServiceError):
    """No key was sent where one is needed."""

    title = "A key is needed"


class Forbidden(ServiceError):
    """The key is not one that may do this."""

    title = "The key is not accepted"


class QuotaExceeded(ServiceError):
    """This client has used up its quota."""

    title = "Over the quota"


# --- somebody else failed -----------------------------------------------------------------------


class RemoteFailed(ServiceError):
    """A remote checkpoint or image could not be fetched or is not what it should be."""

    title = "A remote source failed"


class RemoteTimeout(ServiceError):
    """A remote source was too slow."""

    title = "A remote source was too slow"


class DeadlineExceeded(ServiceError):
    """The request took longer than its deadline."""

    title = "The deadline passed"


# --- not now ------------------------------------------------------------------------------------


class Unavailable(ServiceError):
    """The service cannot do this now; `retry_after_s` says when to ask again."""

    title = "Not now"

    def __init__(self, detail: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)


class QueueFull(Unavailable):
    """The queue of the device is full."""

    title = "The queue is full"


class ServiceBusy(Unavailable):
    """Connections or bodies take all that the service has for them."""

    title = "The service is busy"


class ModelLoading(Unavailable):
    """The model was still loading when the deadline passed; loading goes on."""

    title = "The model is still loading"


class Draining(Unavailable):
    """The service is shutting down."""

    title = "The service is draining"


class OutOfMemory(Unavailable):
    """The model or its activations do not fit the memory budget."""

    title = "Not enough memory"


class Starting(Unavailable):
    """The service was still starting when the deadline passed; that goes on."""

    title = "The service is still starting"


# --- no request: what keeps the service from starting -------------------------------------------


class CannotStart(ValueError):
    """What an operator has to change before the service can start; the text is one line for them."""
