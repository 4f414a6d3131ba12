"""Checkpoints as part of a model's sequence (save, load), and copies of them."""

from __future__ import annotations

import hashlib

import msgspec

from tx_async import age
from tx_async.api import body, measure, training, validation
from tx_async.api.context import Call
from tx_async.api.models import future
from tx_async.api.ownership import owned, readable_checkpoint
from tx_async.errors import InvalidRequest, UnknownSession
from tx_async.wire import ids, operations, tinker
from tx_async.wire.records import SessionRecord


async def save_weights(call: Call) -> tinker.UntypedAPIFuture:
    return await training.submit(call, "SaveWeights", tinker.SaveWeightsRequest, _save_weights)


async def save_weights_for_sampler(call: Call) -> tinker.UntypedAPIFuture:
    return await training.submit(call, "SaveWeights", tinker.SaveWeightsForSamplerRequest, _save_weights_for_sampler)


async def save_weights_external(call: Call) -> tinker.UntypedAPIFuture:
    return await training.submit(call, "SaveWeights", tinker.SaveWeightsExternalRequest, _save_weights_external)


async def load_weights(call: Call) -> tinker.UntypedAPIFuture:
    """With (model_id, seq_id) it loads into a live model, with (session_id, model_seq_id) into a new one."""
    content = await body.read(call.request, body.CONTROL_BYTES_MAX, call.hold)
    measure.check_nesting(content, call.api.config.json_depth_max)
    if training.ids_of(content) is not None:
        return await training.submit_body(call, content, "LoadWeights", tinker.LoadStateRequest, _load_weights)
    operation = _create_from_checkpoint(
        call, body.decode_json(content, tinker.LoadWeightsRequest, call.api.config.json_depth_max)
    )
    return future(await call.scheduler.submit(call.owner, operation), operation.model_id)


async def weights_info(call: Call, request: tinker.WeightsInfoRequest) -> tinker.WeightsInfoResponse:
    checkpoint = readable_checkpoint(call, request.tinker_path)
    return tinker.WeightsInfoResponse(
        base_model=checkpoint.base_model,
        optimizer_config=tinker.OptimizerInfo(type="adamw"),
        is_lora=True,
        lora_rank=checkpoint.lora.rank,
        train_unembed=checkpoint.lora.train_unembed,
        train_mlp=checkpoint.lora.train_mlp,
        train_attn=checkpoint.lora.train_attn,
    )


async def copy_weights(call: Call, request: tinker.CopyWeightsRequest) -> tinker.CopyWeightsResponse:
    """Copy into a slot of the caller's own session, or into a new session of a project."""
    source = readable_checkpoint(call, request.source_path)
    ttl_seconds = validation.ttl_seconds(request.ttl_seconds)
    session_id, model_seq_id = await _destination(call, request)
    copy = await call.scheduler.copy_checkpoint(call.owner, source.path, session_id, model_seq_id)
    expires_at = None if ttl_seconds is None else call.api.clock.now() + ttl_seconds
    if copy.expires_at is None and expires_at is not None:
        await call.scheduler.update_checkpoint(call.owner, msgspec.structs.replace(copy, expires_at=expires_at))
    return tinker.CopyWeightsResponse(tinker_path=copy.path)


async def _destination(call: Call, request: tinker.CopyWeightsRequest) -> tuple[str, int]:
    if request.session_id is not None and request.model_seq_id is not None:
        return owned(
            call.scheduler.sessions, request.session_id, call.owner, UnknownSession
        ).session_id, request.model_seq_id
    if request.destination_project_id is None:
        raise InvalidRequest("copy_weights needs session_id and model_seq_id, or destination_project_id.")
    project_id = validation.text(
        "destination_project_id", request.destination_project_id, call.api.config.text_bytes_max
    )
    session = SessionRecord(
        session_id=_session_of_copy(call),
        owner=call.owner,
        created_at=call.api.clock.now(),
        project_id=project_id,
    )
    if session.session_id not in call.scheduler.sessions:
        await call.scheduler.create_session(session)
    return session.session_id, 0


def _session_of_copy(call: Call) -> str:
    """A retry carries the same X-Idempotency-Key, and must find the copy that the first attempt made."""
    key = call.header("x-idempotency-key")
    if not key:
        return ids.new_id("s")
    return "s-" + hashlib.blake2b(f"{call.owner}/{key}".encode(), digest_size=16).hexdigest()


# ---- conversions


def _save_weights(call: Call, request: tinker.SaveWeightsRequest) -> operations.SaveWeights:
    if request.path is None:
        raise InvalidRequest("save_weights needs a name in path.")
    return operations.SaveWeights(
        model_id=request.model_id,
        seq_id=request.seq_id,
        kind="weights",
        name=validation.checkpoint_name(request.path),
        ttl_seconds=validation.ttl_seconds(request.ttl_seconds),
        overwrite=request.overwrite,
        user_metadata=validation.metadata(request.user_metadata, call.api.config.user_metadata_bytes_max),
    )


def _save_weights_for_sampler(call: Call, request: tinker.SaveWeightsForSamplerRequest) -> operations.SaveWeights:
    if (request.path is None) == (request.sampling_session_seq_id is None):
        raise InvalidRequest("save_weights_for_sampler needs either a name in path, or a sampling_session_seq_id.")
    return operations.SaveWeights(
        model_id=request.model_id,
        seq_id=request.seq_id,
        kind="sampler_weights",
        name=None if request.path is None else validation.checkpoint_name(request.path),
        sampling_session_seq_id=request.sampling_session_seq_id,
        inflight=request.kind == "inflight",
        ttl_seconds=validation.ttl_seconds(request.ttl_seconds),
        user_metadata=validation.metadata(request.user_metadata, call.api.config.user_metadata_bytes_max),
    )


def _save_weights_external(call: Call, request: tinker.SaveWeightsExternalRequest) -> operations.SaveWeights:
    return operations.SaveWeights(
        model_id=request.model_id,
        seq_id=request.seq_id,
        kind="external_weights",
        name=validation.checkpoint_name(request.path),
        ttl_seconds=validation.ttl_seconds(request.ttl_seconds),
        age_recipients=age.check_recipients(request.age_encryption_recipients or ()),
        exclude_unembed=request.exclude_unembed,
    )


def _load_weights(call: Call, request: tinker.LoadStateRequest) -> operations.LoadWeights:
    validation.optimizer_type((request.optimizer_config or tinker.OptimizerConfig()).type)
    return operations.LoadWeights(
        model_id=request.model_id,
        seq_id=request.seq_id,
        path=validation.tinker_path(request.path),
        optimizer=request.optimizer,
    )


def _create_from_checkpoint(call: Call, request: tinker.LoadWeightsRequest) -> operations.CreateModelFromCheckpoint:
    validation.optimizer_type((request.optimizer_config or tinker.OptimizerConfig()).type)
    if request.base_model is not None:
        validation.base_model(request.base_model, call.scheduler.base_model)
    return operations.CreateModelFromCheckpoint(
        model_id=ids.model_id(request.session_id, request.model_seq_id),
        session_id=request.session_id,
        model_seq_id=request.model_seq_id,
        path=validation.tinker_path(request.path),
        optimizer=request.optimizer,
        user_metadata=validation.metadata(request.user_metadata, call.api.config.user_metadata_bytes_max),
    )
