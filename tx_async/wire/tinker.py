"""Client ⇄ server: every JSON request and response of the Tinker API, under Tinker's own names.

Requests ignore unknown fields. A field that the SDK declares optional accepts null; the others refuse it, because the
SDK turns NaN into null, and a default instead would train with a number that nobody chose. Defaults fill what
older SDKs leave out. Responses omit what equals its default: every SDK fills the same ones in.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
SeqId = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Id = Annotated[str, Meta(min_length=1, max_length=512)]
AccessScope = Literal["owned", "accessible"]
FinishReason = Literal["success", "errored", "interrupted"]


class Request(Struct):
    """The base of structs that clients send."""


class Response(Struct, omit_defaults=True):
    """The base of structs that clients get."""


class Accepted(Response):
    """An answer that only says yes."""


class ErrorBody(Response):
    """The body of every answer that is not 2xx."""

    detail: str
    category: Literal["user", "server", "unknown"]


# ---- service


class ClientConfigResponse(Response):
    """Flags that the SDK asks for once; the others keep the SDK's defaults."""

    pjwt_auth_enabled: bool
    proto_compress_fwdbwd: bool
    parallel_fwdbwd_chunks: bool
    sample_use_retrieve_futures: bool
    custom_loss_server_side: bool
    sample_join_sampling_session: bool
    create_model_via_load_weights: bool


class ClientDynamicConfigResponse(Response):
    refresh_interval_sec: int
    sample_cancel_enabled: bool
    sample_cancel_max_batch_size: int


class CreateSessionRequest(Request):
    tags: list[str] | None = None
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class CreateSessionResponse(Response):
    type: str
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class SessionHeartbeatRequest(Request):
    session_id: Id


class SessionHeartbeatResponse(Response):
    type: str


class FinishReasonObject(Request):
    type: FinishReason


class FinishSessionRequest(Request):
    reason: FinishReasonObject
    detail: str | None = None


class HealthCheck(Response):
    state: str
    text: str


class HealthResponse(Response):
    status: str
    waiting_for: list[str] = []
    checks: dict[str, HealthCheck] | None = None


class SupportedModel(Response):
    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class ServerCapabilitiesResponse(Response):
    supported_models: list[SupportedModel]


class TelemetryResponse(Response):
    status: str


# ---- models


class LoraConfig(Request):
    rank: Int64 = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Request):
    type: str = "adamw"


class CreateModelRequest(Request):
    session_id: Id
    model_seq_id: Counter
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None


class ModelIdRequest(Request):
    model_id: Id


class UntypedAPIFuture(Response):
    """The promise that every submit answers with."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class ModelData(Response):
    arch: str
    model_name: str
    tokenizer_id: str | None = None


class OptimizerInfo(Response):
    type: str


class GetInfoResponse(Response):
    type: str
    model_id: str
    model_data: ModelData
    optimizer_config: OptimizerInfo
    is_lora: bool
    lora_rank: int
    model_name: str


class WeightsInfoRequest(Request):
    tinker_path: str


class WeightsInfoResponse(Response):
    base_model: str
    optimizer_config: OptimizerInfo
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


# ---- training


class TrainingIds(Request):
    """The fields with which every request in a model's sequence begins: enough to refuse it in its place."""

    model_id: Id
    seq_id: SeqId


class Chunk(Request):
    """One piece of a prompt. 0.6.x sends no type for encoded text."""

    type: str = "encoded_text"
    tokens: list[Int32] | None = None


class ModelInput(Request):
    chunks: list[Chunk]


class TensorData(Request):
    data: list[float]
    dtype: Literal["int64", "float32"]
    shape: list[Int64] | None = None
    sparse_crow_indices: list[Int64] | None = None
    sparse_col_indices: list[Int64] | None = None


class DatumJson(Request):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


class ForwardBackwardInput(Request):
    data: list[DatumJson]
    loss_fn: str
    loss_fn_config: dict[str, float] | None = None


class UndecodedInput(Request):
    """`ForwardBackwardInput` whose datums are decoded later, one by one."""

    data: list[Raw]
    loss_fn: str
    loss_fn_config: dict[str, float] | None = None


class ForwardBackwardRequest(TrainingIds):
    forward_backward_input: UndecodedInput


class ForwardRequest(TrainingIds):
    forward_input: ForwardBackwardInput


class UndecodedForwardRequest(TrainingIds):
    forward_input: UndecodedInput


class AdamParams(Request):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OtherOptimizerParams(Request):
    """`optimizer_params` belongs to other optimizer families; an object without a type is AdamW's."""

    type: str = "adamw"


class OptimStepRequest(TrainingIds):
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None
    optim_params: dict[str, Any] | None = None


# ---- weights


class SaveWeightsRequest(TrainingIds):
    path: str | None = None
    ttl_seconds: Int64 | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSamplerRequest(TrainingIds):
    path: str | None = None
    sampling_session_seq_id: Counter | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Int64 | None = None
    user_metadata: dict[str, Any] | None = None


class SaveWeightsExternalRequest(TrainingIds):
    path: str
    ttl_seconds: Int64 | None = None
    age_encryption_recipients: list[str] | None = None
    exclude_unembed: bool = False
    """Not part of the SDK: leaves out lm_head's adapter, for tools that merge into a model with tied embeddings."""


class ImportAdapterResponse(Response):
    """Not part of the SDK: where `tx-async import` put an adapter."""

    path: str


class LoadStateRequest(TrainingIds):
    """load_weights into a live model."""

    path: str
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None


class LoadWeightsRequest(Request):
    """load_weights into a new model, whose LoRA configuration is the checkpoint's."""

    session_id: Id
    model_seq_id: Counter
    path: str
    optimizer: bool
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


class CopyWeightsRequest(Request):
    source_path: str
    session_id: Id | None = None
    model_seq_id: Counter | None = None
    destination_project_id: str | None = None
    ttl_seconds: Int64 | None = None


class CopyWeightsResponse(Response):
    tinker_path: str


# ---- sampling


class SamplingParams(Request):
    max_tokens: Int64 | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: Int64 = -1
    top_p: float = 1.0


class SampleRequest(Request):
    prompt: ModelInput
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    num_samples: Int64 = 1
    sampling_session_id: Id | None = None
    seq_id: Counter | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Int64 = 0
    topk_sample_logprobs: Int64 = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: Int64 = 0
    prompt_logprobs_last_n: Int64 | None = None
    record_stability_info: bool | None = None


class CreateSamplingSessionRequest(Request):
    session_id: Id
    sampling_session_seq_id: Counter
    base_model: str | None = None
    model_path: str | None = None


class CreateSamplingSessionResponse(Response):
    type: str
    sampling_session_id: str


class JoinSamplingSessionRequest(Request):
    sampling_session_id: Id


class JoinSamplingSessionResponse(Response):
    type: str
    client_counter: int


class SamplerResponse(Response):
    sampler_id: str
    base_model: str
    model_path: str | None = None


# ---- futures


class RetrieveFutureRequest(Request):
    request_id: Id
    allow_metadata_only: bool | None = None


class ResultMetadata(Response):
    """Sent instead of a large result: its size, so that the client can make room before it asks again."""

    status: str
    response_payload_size: int


class PendingResponse(Response):
    """The body of the 408 that ends a long poll."""

    request_id: str
    queue_state: str
    detail: str
    category: str
    queue_state_reason: str | None = None


class CancelFutureRequest(Request):
    request_id: Id


# ---- results in JSON, for SDKs that do not ask for protobuf


class TensorJson(Response):
    data: list[float | None]
    dtype: str
    shape: list[int]


class ForwardBackwardOutputJson(Response):
    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorJson]]
    metrics: dict[str, float]


class SampledSequenceJson(Response):
    stop_reason: str
    tokens: list[int]
    logprobs: list[float | None]
    topk_logprobs: list[list[tuple[int, float]] | None] | None = None


class SampleResponseJson(Response):
    type: str
    sequences: list[SampledSequenceJson]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0


# ---- rest


class Cursor(Response):
    offset: int
    limit: int
    total_count: int


class Checkpoint(Response):
    checkpoint_id: str
    """`<kind>/<name>`"""
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class CheckpointsResponse(Response):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Response):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int
    last_request_time: datetime
    corrupted: bool = False
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunsResponse(Response):
    training_runs: list[TrainingRun]
    cursor: Cursor


class CheckpointTtlRequest(Request):
    ttl_seconds: Int64 | None = None


class ExternalWeightsUrlsResponse(Response):
    urls: dict[str, str]
    """Links by path relative to the checkpoint."""
    expires: datetime


class SessionResponse(Response):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class SessionsResponse(Response):
    sessions: list[str]


class TraceExportResponse(Response):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class AssignProjectRequest(Request):
    project_id: str


class SearchOwner(Request):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = []


class SessionStatusQuery(Request):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[FinishReason] | None = None


class SessionSearchCursor(Struct):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: str


class SessionSearchRequest(Request):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None
    owner: SearchOwner = field(default_factory=SearchOwner)
    statuses: list[SessionStatusQuery] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: SessionSearchCursor | None = None


class SessionFinishedReason(Response):
    type: str


class SessionStatus(Response):
    type: str
    reason: SessionFinishedReason | None = None
    detail: str | None = None


class SessionSummary(Response):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    checkpoints_count: int
    status: SessionStatus | None = None
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchResponse(Response):
    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None


class AuditLogEntry(Response):
    timestamp: datetime
    event: str
    event_details: dict[str, Any]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLogResponse(Response):
    entries: list[AuditLogEntry]


class BillingUsageResponse(Response):
    data: list[dict[str, Any]]
    sessions: dict[str, Any]


class CheckpointStorageUsage(Response):
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: str | None = None
    user_name: str | None = None


class CheckpointStorageUsageResponse(Response):
    data: list[CheckpointStorageUsage]


class ApiKeyOrganisation(Response):
    name: str


class ApiKeyUser(Response):
    email: str


class ApiKeyDetails(Response):
    org_details: ApiKeyOrganisation
    user_details: ApiKeyUser


class ApiKeyResponse(Response):
    key_id: int
    name: str
    note: str
    details: ApiKeyDetails
