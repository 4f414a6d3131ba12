"""Ids of things, as they travel. Model ids are part of Tinker's contract; the others are free-form and URL-safe."""

import secrets

SessionId = str
ModelId = str
SamplerId = str


def new_id(prefix: str) -> str:
    """An unguessable id of 128 random bits: `s-…` for sessions, `r-…` for requests."""
    return f"{prefix}-{secrets.token_hex(16)}"


def model_id(session_id: SessionId, model_seq_id: int) -> ModelId:
    """The SDK computes this id itself for create-via-load, so its form is fixed."""
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: SessionId, sampling_session_seq_id: int) -> SamplerId:
    return f"{session_id}:sample:{sampling_session_seq_id}"
