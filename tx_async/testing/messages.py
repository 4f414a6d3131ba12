"""One example of every message between server and worker: `schemas/worker/examples.json` shows them on the wire."""

from __future__ import annotations

from msgspec import Struct

from tx_async.wire.tensors import TensorSpec
from tx_async.wire.worker import (
    BASE_SLOT,
    PROTOCOL_VERSION,
    AdamParams,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    Command,
    CommandFailed,
    CommandFinished,
    CreateAdapter,
    Done,
    EngineConfig,
    EngineInfo,
    FinishedSequence,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    LoadAdapter,
    Loaded,
    LoadSampler,
    NumberedCommand,
    Progress,
    PromptScores,
    Ready,
    Refused,
    ReleaseAdapter,
    Result,
    Sampled,
    SampleQuantum,
    SaveAdapter,
    Saved,
    SequencePiece,
    SequenceSpec,
    Shutdown,
    StepOptimizer,
    Stepped,
    ToWorker,
    Trained,
    TrainMicroBatch,
    Welcome,
    command_digest,
)


class CommandExample(Struct, frozen=True):
    """A command and what answers it, each with its tensors."""

    command: Command
    result: Result
    tensors: tuple[TensorSpec, ...] = ()
    result_tensors: tuple[TensorSpec, ...] = ()


CONFIG = AdapterConfig(rank=8, seed=7)
KEY = "checkpoints/s-1/0/weights/step-16"


def _spec(dtype, *shape: int) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


COMMANDS = (
    CommandExample(CreateAdapter(slot=0, config=CONFIG), Done()),
    CommandExample(LoadAdapter(slot=1, config=CONFIG, key=KEY, optimizer=True), Loaded(step=16)),
    CommandExample(
        TrainMicroBatch(slots=(0, -1), row_length=64, targets_per_token=1, forward_only=False),
        Trained(),
        (
            *[_spec("int32", 2, 64)] * 4,
            _spec("int32", 2, 64, 1),
            _spec("float32", 2, 64, 1),
            *[_spec("float32", 2, 64)] * 6,
        ),
        (_spec("float32", 2, 64, 1), _spec("float32", 2, 64)),
    ),
    CommandExample(
        StepOptimizer(slot=0, adam=AdamParams(learning_rate=0.0001)), Stepped(metrics={"grad_norm": 0.5}, step=1)
    ),
    CommandExample(SaveAdapter(slot=0, config=CONFIG, key=KEY, kind="training"), Saved(size_bytes=1_048_576)),
    CommandExample(LoadSampler(sampler_slot=0, key=KEY), Loaded()),
    CommandExample(
        AdmitSequences(
            sequences=(
                SequenceSpec(
                    sequence_id=1,
                    sampler_slot=0,
                    adapter_version="s-1:train:0/1",
                    prompt_index=0,
                    max_tokens=20,
                    temperature=0.0,
                    stop_token_ids=(256,),
                    stop_strings=("\n",),
                    prompt_scores=PromptScores(logprobs=True),
                ),
                SequenceSpec(
                    sequence_id=2,
                    sampler_slot=BASE_SLOT,
                    adapter_version="",
                    prompt_index=0,
                    max_tokens=20,
                    seed=1,
                    min_p=0.05,
                    presence_penalty=0.5,
                    min_tokens=2,
                    logit_bias=((7, -100.0),),
                    grammar='{"grammars": [{"name": "main", "json_schema": {"type": "object"}}]}',
                    stream=True,
                ),
            )
        ),
        Done(),
        (_spec("int32", 30),),
    ),
    CommandExample(
        SampleQuantum(decode_steps=8, prefill_tokens=512),
        Sampled(
            finished=(
                FinishedSequence(
                    sequence_id=1, stop_reason="stop", tokens_index=0, logprobs_index=1, prompt_logprobs_index=2
                ),
            ),
            failed=((3, "server", "Sampler slot 7 is empty."),),
            progress=((1, 8), (2, 8)),
            num_running=1,
            num_prefilled_tokens=30,
            pieces=(SequencePiece(sequence_id=2, start=8, tokens_index=3, logprobs_index=4),),
        ),
        (),
        (_spec("int32", 5), _spec("float32", 5), _spec("float32", 30), _spec("int32", 8), _spec("float32", 8)),
    ),
    CommandExample(CancelSequences(sequence_ids=(2,)), Done()),
    CommandExample(ReleaseAdapter(slot=1), Done()),
)

INFO = EngineInfo(
    vocab_size=320,
    max_context_length=2048,
    row_shapes=((8, 64), (4, 128)),
    row_length_preferred=128,
    target_tokens_k=(1, 16),
    num_training_slots=8,
    num_sampler_slots=8,
    max_lora_rank=32,
    num_sequences_max=64,
    decode_steps=8,
    prefill_tokens=512,
)


def to_worker() -> list[ToWorker]:
    welcome = Welcome(
        base_model="/models/qwen3-tiny",
        engine=EngineConfig(max_lora_rank=16),
        checkpoints_base="/var/lib/tx_async/checkpoints",
        heartbeat_interval_ms=1_000,
        lease_ms=60_000,
        inbox="tx_async-1-in",
        outbox="tx_async-1-out",
    )
    return [welcome, Refused("another protocol version"), *_numbered(), Heartbeat(), Shutdown()]


def from_worker() -> list[FromWorker]:
    hello = Hello(
        protocol_version=PROTOCOL_VERSION, name="w0", host="trainer-1", pid=4242, capabilities=frozenset({"train"})
    )
    finished = [
        CommandFinished(number=number, result=example.result, elapsed_ms=1.5, tensors=example.result_tensors)
        for number, example in enumerate(COMMANDS, 1)
    ]
    failed = CommandFailed(number=len(COMMANDS) + 1, category="user", message="The gradients are NaN or infinite.")
    heartbeat = Heartbeat(num_compilations=6)
    return [
        hello,
        Progress(stage="loading weights", done=1, total=4),
        Ready(info=INFO),
        heartbeat,
        *finished,
        failed,
        Goodbye("stopped"),
    ]


def _numbered() -> list[NumberedCommand]:
    return [
        NumberedCommand(
            number=number,
            digest=command_digest(number, example.command, example.tensors),
            command=example.command,
            tensors=example.tensors,
        )
        for number, example in enumerate(COMMANDS, 1)
    ]
