"""Every error of the server: whose problem it is, and what to change.

The docstring of a class is its default message. `category` uses Tinker's terms and reaches the client either as the
body of an HTTP error (`status`) or as the failed future's `category`. Only `api/` turns errors into HTTP; only
`worker/` turns exceptions into `CommandFailed`.
"""

from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class TxError(Exception):
    """Something went wrong."""

    category: ClassVar[Category] = "unknown"
    status: ClassVar[int] = 500

    def __init__(self, message: str | None = None):
        super().__init__(message or self.default_message())

    @classmethod
    def default_message(cls) -> str:
        """The docstring without the source's line breaks and indentation."""
        return " ".join((cls.__doc__ or "").split())

    @property
    def message(self) -> str:
        return str(self.args[0])


class UserError(TxError):
    """The request cannot be served as it is: change it and send it again."""

    category = "user"
    status = 400


class ServerError(TxError):
    """The server failed; the request was fine. Try again."""

    category = "server"
    status = 500


# ---- the request itself


class InvalidRequest(UserError):
    """The request is malformed."""


class BodyTooLarge(UserError):
    """The request body is larger than this server accepts (`request_body_bytes_max`)."""

    status = 413


class BodyTimeout(UserError):
    """The request body made no progress for too long (`body_timeout_ms`). Send it again."""

    status = 408


class Unauthorized(UserError):
    """This API key is not valid here: ask the server's operator for one."""

    status = 401


class Forbidden(UserError):
    """This key is not allowed to do that."""

    status = 403


class NotFound(UserError):
    """Nothing with that name exists here, or it belongs to somebody else."""

    status = 404


class UnknownModel(NotFound):
    """This model_id does not exist here: it was never created, or its run was deleted. Create it, or load a
    checkpoint."""


class UnknownTrainingRun(NotFound):
    """This training run does not exist here: it was never created, or it was deleted."""


class UnknownSession(NotFound):
    """This session_id does not exist here. Create a session first."""


class UnknownSampler(NotFound):
    """This sampling_session_id does not exist here. Create a sampling session first."""


class UnknownCheckpoint(NotFound):
    """No checkpoint with that path exists here: it was never saved, was deleted, or has expired."""


class SessionGone(UserError):
    """This session has ended: it was finished, or sent no heartbeat for too long. Create a new session."""

    status = 410


class ResultGone(UserError):
    """This request does not exist, or its result is no longer kept. Submit the request again."""

    status = 410


class Conflict(UserError):
    """The same key was used before with another body. Use the next seq_id for a new request."""

    status = 409


class CheckpointExists(UserError):
    """A checkpoint with that name already exists: choose another name, or save with overwrite=True."""


class CorruptedCheckpoint(UserError):
    """The checkpoint's files do not match their recorded hashes. It cannot be loaded; use an earlier one."""


class CorruptedModel(UserError):
    """This training run cannot continue: none of its snapshots can be read. Load one of its checkpoints instead."""


class OtherBase(UserError):
    """This belongs to a different base model than the one served here. It is kept, and works again when a server has
    that base."""


class NonFiniteGradients(UserError):
    """The gradients are NaN or infinite. The step was not taken, the weights are unchanged, and the gradients were
    cleared."""


class NonFiniteLoss(UserError):
    """The loss is NaN or infinite. The request left no gradients behind; those of other requests are unchanged."""


class Cancelled(UserError):
    """The request was cancelled, or its session ended, before it finished."""


# ---- capacity: try again later


class Overloaded(ServerError):
    """The server's queue is full. Try again in a moment."""

    status = 429


class NotReady(ServerError):
    """The server is starting and cannot do this yet. Try again in a moment."""

    status = 503


# ---- the operator's problems: reported at start, then the process exits


class ConfigError(TxError):
    """The configuration is invalid."""


class BaseModelError(ConfigError):
    """The base model cannot be loaded."""


class WrongIdentity(ConfigError):
    """The journal belongs to another base model or another storage. Start with that one, or say `--adopt`."""


class LeaseHeld(ConfigError):
    """Another server uses this journal. Stop it first, or point this one to another database."""


class JournalReplaced(LeaseHeld):
    """The journal under this server is not the one that it wrote: it was deleted, replaced or set back. The server's
    memory is out of date, so it stops."""


class WorkerRefused(ConfigError):
    """The server refused this worker."""


class EngineGone(ServerError):
    """The external engine that this worker speaks for is gone."""


class EngineError(ServerError):
    """The engine failed while it ran this request."""


class StorageError(ServerError):
    """The journal or the checkpoint storage could not be read or written: its disk is full, read-only or unreachable.
    Try again in a moment."""

    status = 503


class JournalUnusable(ConfigError, StorageError):
    """The journal cannot be opened: its database is not there, refuses this user, is damaged or cannot be written."""


class ContentLost(StorageError):
    """Stored content is gone or damaged: trying again will not help."""

    status = 500
