"""Training runs: created, described, unloaded."""

from __future__ import annotations

import hashlib

from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.api.ownership import owned
from tx_async.errors import UnknownModel
from tx_async.wire import ids, operations, tinker
from tx_async.wire.records import RequestRecord
from tx_async.wire.worker import AdapterConfig


async def create_model(call: Call, request: tinker.CreateModelRequest) -> tinker.UntypedAPIFuture:
    base_model = validation.base_model(request.base_model, call.scheduler.base_model)
    validation.optimizer_type((request.optimizer_config or tinker.OptimizerConfig()).type)
    model_id = ids.model_id(request.session_id, request.model_seq_id)
    lora = _adapter_config(model_id, request.lora_config or tinker.LoraConfig())
    operation = operations.CreateModel(
        model_id=model_id,
        session_id=request.session_id,
        model_seq_id=request.model_seq_id,
        base_model=base_model,
        lora=validation.adapter(lora, call.scheduler.base_model),
        user_metadata=validation.metadata(request.user_metadata, call.api.config.user_metadata_bytes_max),
    )
    return future(await call.scheduler.submit(call.owner, operation), model_id)


async def get_info(call: Call, request: tinker.ModelIdRequest) -> tinker.GetInfoResponse:
    model = owned(call.scheduler.models, request.model_id, call.owner, UnknownModel)
    base = call.scheduler.base_model
    return tinker.GetInfoResponse(
        type="get_info",
        model_id=model.model_id,
        model_data=tinker.ModelData(
            arch=base.architecture, model_name=model.base_model, tokenizer_id=call.api.tokenizer_id
        ),
        optimizer_config=tinker.OptimizerInfo(type="adamw"),
        is_lora=True,
        lora_rank=model.lora.rank,
        model_name=model.base_model,
    )


async def unload_model(call: Call, request: tinker.ModelIdRequest) -> tinker.UntypedAPIFuture:
    operation = operations.UnloadModel(model_id=request.model_id)
    return future(await call.scheduler.submit(call.owner, operation), request.model_id)


def future(record: RequestRecord, model_id: str | None = None) -> tinker.UntypedAPIFuture:
    return tinker.UntypedAPIFuture(
        request_id=record.request_id,
        model_id=model_id,
        sample_sequence_ids=list(record.sample_sequence_ids) or None,
    )


def _adapter_config(model_id: str, config: tinker.LoraConfig) -> AdapterConfig:
    """A missing seed is derived from the model's id, which is random: a repeated request is the same request."""
    seed = config.seed
    if seed is None:
        seed = int.from_bytes(hashlib.blake2b(model_id.encode(), digest_size=8).digest(), "little")
    return AdapterConfig(
        rank=config.rank,
        seed=validation.seed(seed) or 0,
        train_attn=config.train_attn,
        train_mlp=config.train_mlp,
        train_unembed=config.train_unembed,
    )
