"""Server ⇄ worker: a closed world of messages.

Arrays never travel inside these structs: a message that has any lists them as `tensors`, and they follow in that
order, in shared memory or as frames. A field `NAME_index` says where among them an array lies; in bytes it is called
`NAME`, as protocol version 1 has it. Commands of one worker group are numbered without gaps from 1 after each
`Welcome`; every host of a mesh receives the same ones and runs them in that order. All index spaces (slots, sequence
ids) belong to the scheduler: a worker obeys them and invents none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from typing import Literal

import msgspec
from msgspec import Struct

from tx_async.errors import Category
from tx_async.wire.tensors import TensorSpec

PROTOCOL_VERSION = 1

Capability = Literal["train", "sample", "score"]
"""What a worker can be asked to do. train: everything about training slots. sample: `LoadSampler` and sequences. score:
sequences with `PromptScores`, too; a worker that trains also scores."""

BASE_SLOT = -1
"""`sampler_slot` of a sequence that samples the base model without an adapter."""

LORA_ALPHA = 32.0
"""Constant, as the Tinker cookbook states it: the scale of an adapter is 32 / rank."""


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The backend configuration: what the engine needs besides the base model. Unknown keys are refused by name."""

    max_lora_adapters: int = 8
    """Training adapters that are on the device at once; more models than this live in host memory and storage. Fewer
    where a GPU's memory does not hold that many; the plan in the log says how many."""
    max_lora_rank: int = 128
    """The highest rank of an adapter. Slots hold rank 32 until somebody asks for more; then the worker starts again
    with wider ones (64, 128, …), once for each."""
    max_sampler_adapters: int = 8
    """Sampler adapter versions that are on the device at once; likewise."""
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    fully_sharded_data_parallel_size: int = 1
    """So many devices divide the rows of a micro-batch, and the base model and the training adapters among them."""
    coordinator_address: str = ""
    num_processes: int = 1
    train_micro_batch_tokens: int = 0
    """Tokens of one training micro-batch, on each of the `fully_sharded_data_parallel_size` devices that share its
    rows; 0 lets the engine choose for its platform."""
    train_micro_batch_size: int = 0
    """Rows of one training micro-batch, whatever their length, rounded up to a multiple of
    `fully_sharded_data_parallel_size`; 0 derives it from `train_micro_batch_tokens`."""
    train_row_lengths: tuple[int, ...] = ()
    """Lengths of packed rows, ascending; () lets the engine choose: doubling steps up to the context."""
    gradient_checkpointing: bool = False
    """Training keeps only what enters each layer, and computes the rest again."""
    activation_memory_gib: float = 0.0
    """GiB on each accelerator that a training micro-batch may take; what would be more is computed again. 0 = a ninth
    of the memory. With more of it, training is faster where it computes again, and the KV cache smaller."""
    max_context_length: int = 0
    """Tokens of prompt and completion together; 0 takes the model's own limit."""
    sample_max_num_sequences: int = 64
    """Sequences that decode at once; more simply queue."""
    kv_cache_tokens: int = 0
    """Tokens that the paged KV cache holds, counted as if every layer saw all of them: layers with a window keep less,
    so more fit. 0 lets the engine choose from the device's memory."""
    kv_page_size: int = 16
    prefix_cache: bool = True
    decode_steps: int = 0
    """Decode steps of one quantum; 0 lets the engine choose for its platform."""
    prefill_chunk_tokens: int = 0
    """Prompt tokens that one prefill dispatch handles; 0 lets the engine choose."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """dtype of the base weights; "" is bfloat16 on accelerators and float32 on CPU."""
    compile_ahead: bool = False
    """Compile every program at start instead of at its first use."""
    compilation_cache_dir: str = ""
    """The folder for compiled programs, on each host; "" takes the server's `compilation_cache_dir`."""


# ---- handshake


class Hello(Struct, tag=True, frozen=True, kw_only=True):
    """The first message of a worker, sent again after each lost connection."""

    protocol_version: int
    name: str
    token: str = ""
    host: str
    pid: int
    process_id: int = 0
    capabilities: frozenset[Capability] = frozenset({"train", "sample", "score"})
    num_processes: int = 0
    """The number of processes of its mesh, where its launcher says it; 0: the server's `backend_config` says it."""
    coordinator_address: str = ""
    """Likewise."""
    shared_memory: bool = False
    """True when this worker runs on the server's own host and can map its segments."""


class StorageProbe(Struct, frozen=True):
    """A file that the server wrote to `checkpoints_base`, for workers on other hosts to find there."""

    key: str
    word: str


class Welcome(Struct, tag=True, frozen=True, kw_only=True):
    """The worker is attached. It builds its engine from this, reports `Progress`, then `Ready`."""

    base_model: str
    """The folder or hub name of the base model."""
    engine: EngineConfig
    checkpoints_base: str
    process_id: int = 0
    """This worker's place in its mesh, 0 … `engine.num_processes` - 1."""
    heartbeat_interval_ms: int
    lease_ms: int
    inbox: str = ""
    """The shared-memory arena that the server writes and this worker reads ("" = frames)."""
    outbox: str = ""
    """The shared-memory arena that this worker writes and the server reads ("" = frames)."""
    storage_probe: StorageProbe | None = None
    """None where all workers run on the server's host."""
    storage_id: str = ""
    """A file that is not found counts as gone only while the storage carries this identity. "" = not known yet."""
    lora_rank: int = 0
    """The highest rank that somebody has asked for: slots must hold it (`wire/ranks.py`); 0 = nobody has."""


class Refused(Struct, tag=True, frozen=True):
    """The worker may not attach, or may not stay; it logs the reason and exits."""

    reason: str
    is_final: bool = False
    """Whether attaching again at once would change nothing, although it was attached."""
    is_meant: bool = False
    """Whether nothing went wrong: it is to start again with other settings."""


class Progress(Struct, tag=True, frozen=True, kw_only=True):
    stage: str
    """What is being waited for: "loading weights", "compiling", …"""
    done: float
    total: float


class SamplingLimits(Struct, frozen=True, kw_only=True):
    """What a sequence may ask of a worker that cannot do everything; a sequence that asks for more goes to another
    worker."""

    temperature_min: float
    """The temperatures of sequences that are not greedy."""
    temperature_max: float
    topk_logprobs_max: int
    stop_strings_max: int


class TrialSequence(Struct, frozen=True, kw_only=True):
    """A sequence that an external engine sampled before it was trusted."""

    tokens: tuple[int, ...]
    """Prompt and completion."""
    logprobs: tuple[float, ...]
    """Log-probabilities of the completion's tokens, as the external engine reports them."""
    with_adapter: bool
    """Whether it was sampled with the trial's adapter, not with the base model."""


class Trial(Struct, frozen=True, kw_only=True):
    """An external engine's samples, which a scoring worker checks: if they differ from its own scores, the engine is
    refused."""

    key: str
    """The storage key of a strong adapter of all projections, made for this trial; the server deletes it afterwards."""
    sequences: tuple[TrialSequence, ...]
    tolerance: float
    """The largest allowed difference of a log-probability, in nats, where the scoring worker computes in float32."""


class MemoryPart(Struct, frozen=True):
    """A part of a device's memory, and its use."""

    name: str
    num_bytes: int
    note: str = ""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What the scheduler must know about an engine to form its batches."""

    vocab_size: int
    max_context_length: int
    row_shapes: tuple[tuple[int, int], ...]
    """(rows, row_length) of every training micro-batch, ascending by length: no other shape is ever sent."""
    row_length_preferred: int
    """Sequences that fit are packed into rows of this length; longer ones get the next length that holds them."""
    target_tokens_k: tuple[int, ...]
    """Sizes of the last axis of `target_tokens` that micro-batches may have, ascending; the first is 1."""
    num_training_slots: int
    num_sampler_slots: int
    max_lora_rank: int
    """The highest rank that its slots hold."""
    num_sequences_max: int
    decode_steps: int
    prefill_tokens: int
    num_devices: int = 1
    platform: str = "cpu"
    micro_batch_overhead: int = 25
    """The fixed cost of a training micro-batch, counted in positions."""
    memory: tuple[MemoryPart, ...] = ()
    """The parts of each device's memory; () where the device does not say how much it has."""
    kernels: tuple[tuple[str, str], ...] = ()
    """(task, kernel that runs it for this model in at least one layer, or "plain"), as chosen at start."""
    overlaps: bool = False
    """Whether training and sampling run side by side: then a quantum of one waits for no quantum of the other."""
    adapter_bytes: int = 0
    """Device bytes of one training slot: A, B, m, v and one gradient."""
    base_model_digest: str = ""
    """The digest of what the engine loaded: the processes of a mesh must agree on it. "" = not known."""
    dtype: str = "float32"
    """The dtype of the base weights."""
    continuous: bool = False
    """Whether admitted sequences run by themselves: then they may be admitted at any time, and a quantum only waits for
    news of them."""
    limits: SamplingLimits | None = None
    """None: it takes every sequence that its capabilities allow."""
    trial: Trial | None = None
    """None: the engine is trusted as it is."""
    kv_cache_tokens: int = 0
    """Tokens that its KV cache holds; 0 = not known."""
    lora_rank_limit: int = 0
    """The highest rank that it could hold if it started again with wider slots; 0 = it has no others."""
    kernels_plain: tuple[tuple[str, str], ...] = ()
    """(task, which layers run in the plain version, and why)."""
    lora_rank_classes: tuple[int, ...] = ()
    """Ascending: only adapters of one class share a micro-batch, so that no neighbour changes how their sums are
    formed. () = all may."""


class Ready(Struct, tag=True, frozen=True, kw_only=True):
    info: EngineInfo


class Heartbeat(Struct, tag=True, frozen=True, kw_only=True):
    """Sent by each worker every `heartbeat_interval_ms`, busy or not; answered by the server with the same."""

    num_compilations: int = 0
    compile_s: float = 0.0
    """Seconds that they took."""
    device_bytes: int = 0
    """Bytes in use on this process's first device; on a CPU, the process's own memory."""
    device_bytes_max: int = 0
    """Bytes that it can use there; 0 = not known."""


class Shutdown(Struct, tag=True, frozen=True):
    """Finish what is running and exit."""


class Goodbye(Struct, tag=True, frozen=True):
    """The worker leaves."""

    reason: str = ""


# ---- commands


class AdapterConfig(Struct, frozen=True, kw_only=True):
    """A LoRA adapter as its creator asked for it. A ~ U(±1/√in) from `seed`, B = 0, scale LORA_ALPHA / rank."""

    rank: int
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class AdamParams(Struct, frozen=True, kw_only=True):
    """torch.optim.AdamW: decoupled weight decay, eps outside the root. grad_clip_norm 0 = no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class CreateAdapter(Struct, tag=True, frozen=True, kw_only=True):
    """Clear training slot `slot` and initialise a new adapter in it. Result: `Done`."""

    slot: int
    config: AdapterConfig


class LoadAdapter(Struct, tag=True, frozen=True, kw_only=True):
    """Clear training slot `slot` and load a training checkpoint or snapshot into it. Result: `Loaded`.

    Without `optimizer`: moments, step and gradients are zero afterwards. With it: all that the files hold is restored.
    When it fails, the slot holds a new adapter of `config`, and nothing of the adapter that was there before.
    """

    slot: int
    config: AdapterConfig
    key: str
    optimizer: bool


class ReleaseAdapter(Struct, tag=True, frozen=True, kw_only=True):
    """The content of training slot `slot` is no longer needed. Result: `Done`."""

    slot: int


class TrainMicroBatch(Struct, tag=True, frozen=True, kw_only=True):
    """One packed micro-batch; its gradients join the accumulators of its rows' slots, in row order. Result: `Trained`.

    Tensors, for a shape (R, L) of `EngineInfo.row_shapes` and K of `EngineInfo.target_tokens_k`, in this order
    (`TRAIN_TENSORS`): tokens, positions, segment_ids (0 = padding; 1, 2, … per row), loss_fn (index in `LOSS_FNS`) as
    int32 [R, L]; target_tokens int32 [R, L, K]; weights float32 [R, L, K]; logprobs, advantages, clip_low_threshold,
    clip_high_threshold, sequence_ratio_mask, beta as float32 [R, L].

    stable_reinforce puts the sampled token into target 0 and the sampler's likeliest tokens into the others; their
    weights are the sampler's probabilities (0: an unused cell), weight 0 says whether they are all that it could draw,
    and beta is `kl_coeff`.
    """

    slots: tuple[int, ...]
    """Training slot of each row; -1 for an unused row."""
    row_length: int
    targets_per_token: int
    forward_only: bool


TRAIN_TENSORS = (
    "tokens",
    "positions",
    "segment_ids",
    "loss_fn",
    "target_tokens",
    "weights",
    "logprobs",
    "advantages",
    "clip_low_threshold",
    "clip_high_threshold",
    "sequence_ratio_mask",
    "beta",
)
LOSS_FNS = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")


CLIP_THRESHOLDS = {"ppo": (0.8, 1.2), "gspo": (0.8, 1.2), "cispo": (0.0, 4.0)}
"""The default clip bounds, for requests without any: `schemas/tinker.md`, "Losses". (clip_low_threshold,
clip_high_threshold), as bounds of the ratio itself."""


# Its tag is the protocol's name for it, which workers of earlier versions know.
class StepOptimizer(Struct, tag="OptimStep", frozen=True, kw_only=True):
    """Apply the gradients accumulated in a slot since its last optim_step, then clear them. Result: `Stepped`.

    Without gradients since the last step the update is that of a zero gradient (moments decay, weight decay applies).
    Non-finite gradients fail the command with `NonFiniteGradients` and are cleared; weights and moments stay.
    """

    slot: int
    adam: AdamParams


class SaveAdapter(Struct, tag=True, frozen=True, kw_only=True):
    """Write a slot under `key`, atomically. Result: `Saved`, sent when the files are durable.

    kind "training": A, B, m, v, step. "snapshot": the same and the accumulated gradients. "sampler" and "external": a
    PEFT adapter (adapter_config.json + adapter_model.safetensors).
    """

    slot: int
    config: AdapterConfig
    key: str
    kind: Literal["training", "snapshot", "sampler", "external"]
    metadata: dict[str, str] = {}
    age_recipients: tuple[str, ...] = ()
    """Files become `NAME.age`, encrypted to these; nobody here can load them again."""
    again: bool = False
    """Storage did not take it the first time: write the adapter that was kept in memory under `key` then. `slot` holds
    something else by now and is not read. An adapter that is no longer kept is an error of category "user"."""


class LoadSampler(Struct, tag=True, frozen=True, kw_only=True):
    """Put the adapter saved under `key` (any kind) into sampler slot `sampler_slot`. Result: `Loaded`, whose `refused`
    says so when this engine can never take that adapter while another one may."""

    sampler_slot: int
    key: str


class PromptScores(Struct, frozen=True, kw_only=True, rename={"targets_index": "targets"}):
    """What a request wants to know about its prompt besides samples."""

    logprobs: bool = False
    topk: int = 0
    last_n: int = 0
    """Score only the last n positions (0 = all)."""
    targets_index: int = -1
    """int32 [P-1, K]: candidate tokens (-1 = none; cells of -1 give 0.0)."""
    alt_tokens_k: int = 0


GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy."""
INT32_MAX = 2**31 - 1
"""The largest value that an engine's arrays hold; such a top_k is no limit in any vocabulary."""


LOGIT_BIAS_MAX = 1024
"""How many tokens one `logit_bias` may have."""


class SequenceSpec(Struct, frozen=True, kw_only=True, rename={"prompt_index": "prompt"}):
    """One sample of one prompt."""

    sequence_id: int
    """Unique while the server runs."""
    sampler_slot: int
    adapter_version: str
    """Prefix-cache namespace: equal ones have one tenant and equal weights."""
    prompt_index: int
    """int32 [P]. Samples of one prompt share the index."""
    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    sample_index: int = 0
    """The random stream of a sample is fold_in(seed, sample_index), then its position: it depends on nothing else."""
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    topk_logprobs: int = 0
    head_tokens: int = 0
    """How many of the likeliest tokens to record with each draw, with the probabilities that it drew from."""
    prompt_scores: PromptScores | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias that is added to its logit), each token once, at most LOGIT_BIAS_MAX. `operations.Sample` describes
    all of these."""
    grammar: str = ""
    """The grammar that the answer obeys (`grammar.py` says in which form); "" = any text. It ends with a stop token."""
    stream: bool = False
    """Whether somebody watches: then each quantum reports what it sampled (`Sampled.pieces`), and its turn comes before
    that of others where not all can have one."""


class AdmitSequences(Struct, tag=True, frozen=True, kw_only=True):
    """Queue sequences for the following quanta. Result: `Done`."""

    sequences: tuple[SequenceSpec, ...]


class CancelSequences(Struct, tag=True, frozen=True, kw_only=True):
    """Forget sequences, wherever they are. Unknown ids are ignored. Result: `Done`."""

    sequence_ids: tuple[int, ...]


class SampleQuantum(Struct, tag=True, frozen=True, kw_only=True):
    """Prefill at most `prefill_tokens` prompt tokens, then decode at most `decode_steps` tokens of every active
    sequence. Result: `Sampled`."""

    decode_steps: int
    prefill_tokens: int
    only_first_tokens: bool = False
    """Decode only the watched sequences that have no token yet, if there are any."""


Command = (
    CreateAdapter
    | LoadAdapter
    | ReleaseAdapter
    | TrainMicroBatch
    | StepOptimizer
    | SaveAdapter
    | LoadSampler
    | AdmitSequences
    | CancelSequences
    | SampleQuantum
)


class NumberedCommand(Struct, tag=True, frozen=True, kw_only=True):
    number: int
    digest: str
    """`command_digest` of the command, so that hosts that would run different programs stop instead of hanging."""
    command: Command
    tensors: tuple[TensorSpec, ...] = ()


# ---- results


class Done(Struct, tag=True, frozen=True):
    pass


class Loaded(Struct, tag=True, frozen=True, kw_only=True):
    step: int = 0
    """How many optimizer steps the loaded state has taken."""
    refused: str = ""
    """Why this engine cannot sample this adapter (its rank, its modules); the slot is empty then."""
    needs_rank: int = 0
    """The adapter's rank, where it needs wider slots than there are; the slot is empty then."""


class Trained(Struct, tag=True, frozen=True):
    """Tensors: logprobs float32 [R, L, K] (0 at padding) and losses float32 [R, L], each position's term of the sum."""


class Stepped(Struct, tag=True, frozen=True, kw_only=True):
    metrics: dict[str, float]
    step: int


class Saved(Struct, tag=True, frozen=True, kw_only=True):
    size_bytes: int


class SequenceTimes(Struct, frozen=True, kw_only=True):
    """Times in milliseconds since the worker received the sequence."""

    decode_began: float
    """When the quantum that brought its first tokens began; that of `first_token` where it is unknown how long one
    token took."""
    first_token: float
    """When its first tokens had come."""
    last_token: float
    """When all of them had come."""


class FinishedSequence(Struct, frozen=True, kw_only=True, rename=lambda name: name.removesuffix("_index")):
    """A sequence that ended. Its arrays are named by their index in the message's tensors; -1 = not asked for."""

    sequence_id: int
    stop_reason: Literal["stop", "length"]
    tokens_index: int
    """int32 [T], the stop token or the token that completed a stop string included."""
    logprobs_index: int
    """float32 [T], log-probabilities of the untempered model."""
    topk_token_ids_index: int = -1
    topk_logprobs_index: int = -1
    """int32 / float32 [T, topk]."""
    head_token_ids_index: int = -1
    head_probabilities_index: int = -1
    """int32 / float32 [T, head_tokens]: likeliest first, after temperature, top-k and top-p."""
    head_is_whole_index: int = -1
    """int32 [T]: 1 where nothing else could be drawn, because top-k, top-p or a temperature of 0 says so; 2
    where they left more than the head holds."""
    prompt_logprobs_index: int = -1
    """float32 [P], NaN at position 0 and where nothing was scored."""
    prompt_topk_token_ids_index: int = -1
    prompt_topk_logprobs_index: int = -1
    """int32 / float32 [P, topk], sentinels (0, -99999.0) where nothing was scored."""
    target_logprobs_index: int = -1
    """float32 [P-1, K]."""
    alt_token_ids_index: int = -1
    alt_logprobs_index: int = -1
    """int32 / float32 [P-1, alt_tokens_k]."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    times: SequenceTimes | None = None
    """None: not known, as with external engines."""


class SequencePiece(Struct, frozen=True, kw_only=True, rename=lambda name: name.removesuffix("_index")):
    """The part that a quantum added to a watched sequence that goes on. Its arrays are named by their index in the
    message's tensors; -1 = not asked for."""

    sequence_id: int
    start: int
    """How many tokens of the completion come before these."""
    tokens_index: int
    """int32 [T]"""
    logprobs_index: int
    """float32 [T]"""
    topk_token_ids_index: int = -1
    topk_logprobs_index: int = -1
    """int32 / float32 [T, topk]."""


class Sampled(Struct, tag=True, frozen=True, kw_only=True):
    finished: tuple[FinishedSequence, ...]
    failed: tuple[tuple[int, Category, str], ...] = ()
    """(sequence_id, category, message) of sequences that ended without a result; all others go on. "user": no worker
    can do what is asked. Otherwise the sequence runs again, on another worker where possible."""
    progress: tuple[tuple[int, int], ...] = ()
    """(sequence_id, tokens prefilled or decoded for it in this quantum)."""
    num_running: int = 0
    num_waiting: int = 0
    """Admitted but not decoding: their prompts wait for pages or for prefill."""
    num_prefilled_tokens: int = 0
    num_preempted: int = 0
    pieces: tuple[SequencePiece, ...] = ()
    """Pieces of sequences with `stream` that have not ended. An engine may send none: `finished` has everything."""
    num_kv_tokens: int = 0
    """Tokens of the KV cache that sequences hold; cached prefixes that no sequence uses do not count."""


Result = Done | Loaded | Trained | Stepped | Saved | Sampled


class CommandFinished(Struct, tag=True, frozen=True, kw_only=True):
    number: int
    result: Result
    elapsed_ms: float
    """Time since it arrived or since the previous answer: its cost on a device that works in order."""
    tensors: tuple[TensorSpec, ...] = ()


class CommandFailed(Struct, tag=True, frozen=True, kw_only=True):
    """One command failed; its slot's state is as the command's docstring says, everything else is unharmed."""

    number: int
    category: Category
    message: str
    fatal: bool = False
    """True when the engine can no longer vouch for its state: the worker exits and is recovered."""
    error: str = ""
    """The name of the error's class (`errors.py`), where it has one."""


ToWorker = Welcome | Refused | NumberedCommand | Heartbeat | Shutdown
FromWorker = Hello | Progress | Ready | Heartbeat | CommandFinished | CommandFailed | Goodbye


def command_digest(number: int, command: Command, tensors: SequenceOf[TensorSpec]) -> str:
    """Sixteen hex digits over the number, the command and the shapes of its tensors: equal on every host, or the mesh
    stops."""
    state = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8)
    state.update(msgspec.msgpack.encode(command))
    state.update(msgspec.msgpack.encode(list(tensors)))
    return state.hexdigest()
