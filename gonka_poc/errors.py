"""The errors of this package, and the HTTP status that each is answered with.

PoCError
├── RequestError             400  a value breaks a limit of this server
├── UnauthorizedError        401  the request does not show the server's token
├── ForeignPageError         403  a browser sent the request for a web page of another site
├── ConflictError            409  the request does not fit what the server is or does
├── NotFoundError            404  no such request
├── BodyTooLargeError        413  the body is over POC_MAX_BODY_BYTES
├── FieldError               422  a field of a chat has a value that it cannot have
├── QueueFullError           429  the queue is full
├── ComputeError             500  a worker failed on this computation
├── OtherRankError           500  another worker failed; its own error is the one to answer with
├── WorkerMemoryError        500  a worker ran out of memory even for one nonce
├── SettingsError            500  a POC_* variable cannot be used; the server does not start
├── ServerStartError         500  a server that a command started did not come up; never over HTTP
├── ArtifactFileError        500  a file of artifacts cannot be read or written; never over HTTP
├── ServerAnswerError        500  a server that a command asked refused or is not there; never over HTTP
├── ToolError                500  a test tool cannot do what it was asked; never over HTTP
├── OutboxError              500  the file of POC_OUTBOX_PATH cannot be used
├── UnsupportedServerError   501  this model or server configuration cannot give a correct vector
├── UnsupportedSchemeError   501  the request asks for the decode scheme
├── EngineUnavailableError   503  the engine or the way to its workers is missing
├── EngineAsleepError        503  the engine sleeps (POST /sleep), so nothing can be computed
├── OutboxFullError          507  the outbox has no room, or cannot be written now
└── OutboxDamagedError       507  the file of POC_OUTBOX_PATH is damaged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PoCError(Exception):
    """Base of every error that this package raises on purpose. The text says what, which value, what to do."""

    http_status = 500

    def __init_subclass__(cls, http_status: int | None = None) -> None:
        cls.http_status = http_status or cls.http_status


class RequestError(PoCError, http_status=400):
    """A value of the request breaks a limit of this server."""


class UnauthorizedError(PoCError, http_status=401):
    """The request does not show POC_API_TOKEN."""


class ForeignPageError(PoCError, http_status=403):
    """A browser sent a request that changes something for a web page of another site."""


class ConflictError(PoCError, http_status=409):
    """The request does not fit the model that is served, or the round that runs."""


class NotFoundError(PoCError, http_status=404):
    """There is no such request, or its result has expired."""


class BodyTooLargeError(PoCError, http_status=413):
    """The request body is over the limit."""


class FieldError(PoCError, http_status=422):
    """A field of a chat or completion has a value that it cannot have."""


class QueueFullError(PoCError, http_status=429):
    """Accepting the request would take the queue over its limit of nonces, or of requests."""


class ComputeError(PoCError):
    """A worker failed while it computed a batch."""


class OtherRankError(PoCError):
    """Another worker failed, and its own error tells more."""


class WorkerMemoryError(PoCError):
    """A worker ran out of memory. A batch of several nonces is halved first, so a request fails only at one nonce."""


class SettingsError(PoCError):
    """A POC_* variable has a value that cannot be used; the text names it."""


class ServerStartError(PoCError):
    """A server ended, or did not answer, while it was starting; the text has the end of its log."""


class ArtifactFileError(PoCError):
    """A file of artifacts cannot be read or written, or is not one."""


class ServerAnswerError(PoCError):
    """The server that a command asked refused, or cannot be reached; the text has its answer.

    `status`: the HTTP status of a refusal; `reason`: what the server says of it.
    """

    def __init__(self, message: str, status: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class ToolError(PoCError):
    """A test tool cannot do what it was asked: a value that makes no sense there, or a package that is missing."""


class OutboxError(PoCError):
    """The file that POC_OUTBOX_PATH names is no outbox of this release, or cannot be opened."""


class UnsupportedServerError(PoCError, http_status=501):
    """This model, vLLM release or server configuration cannot give a correct vector, so none is given."""


class UnsupportedSchemeError(PoCError, http_status=501):
    """The request asks for another scheme than the one that is computed here (prefill)."""


class EngineUnavailableError(PoCError, http_status=503):
    """The engine, or the way to call its workers, is missing."""


class EngineAsleepError(PoCError, http_status=503):
    """The engine sleeps: its weights and caches may be unmapped. What was accepted waits until it is woken."""

    def __init__(self, message: str = "the engine sleeps; POST /wake_up, without tags, wakes it") -> None:
        super().__init__(message)


class OutboxFullError(PoCError, http_status=507):
    """The outbox is at its cap, the disk is full, or the file cannot be written now; what it has is safe."""


class OutboxDamagedError(OutboxError, http_status=507):
    """The outbox is damaged, and could not be set aside and replaced; chat is served all the same."""


def error_by_name(name: str, message: str) -> PoCError:
    """The error that a worker named in its answer; a ComputeError for a name that is not ours."""
    classes = {cls.__name__: cls for cls in (*PoCError.__subclasses__(), *OutboxError.__subclasses__())}
    return classes[name](message) if name in classes else ComputeError(f"{name}: {message}")


def raise_worker_error(answers: Sequence[Any]) -> None:
    """Raise the error in one of the workers' `answers`; OtherRankError only where there is no other."""
    errors = [answer["error"] for answer in answers if answer is not None and "error" in answer]
    if errors:
        error = next((e for e in errors if e["type"] != OtherRankError.__name__), errors[0])
        raise error_by_name(error["type"], error["message"])


def for_terminal(text: str) -> str:
    """`text` with everything escaped that is no visible character or space: nothing in it can steer a terminal, turn
    the direction of writing, or look like another line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable(text: str) -> str:
    """`text` in printable ASCII: everything else escaped, so that it cannot look like another line of a log."""
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 artifact, 2 artifacts. `plural`: where it is not `noun` with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
