"""What every engine must do, whatever runs inside: one list of behaviours over the protocol of `worker/engine_api.py`.

An engine joins by a factory in `ENGINES` that builds it with the given configuration, its checkpoints under a folder.
One that only samples has a trainer beside it, which writes the adapters that it reads.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tx_async.errors import NonFiniteGradients, TxError, UnknownCheckpoint
from tx_async.testing.fake_engine import FakeEngine
from tx_async.testing.fake_vllm import FakeVllm
from tx_async.wire.worker import (
    BASE_SLOT,
    LOSS_FNS,
    TRAIN_TENSORS,
    AdamParams,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    CreateAdapter,
    Done,
    EngineConfig,
    LoadAdapter,
    Loaded,
    LoadSampler,
    PromptScores,
    ReleaseAdapter,
    Sampled,
    SampleQuantum,
    SaveAdapter,
    Saved,
    SequenceSpec,
    StepOptimizer,
    Stepped,
    Trained,
    TrainMicroBatch,
    Welcome,
)
from tx_async.worker.engine_api import Engine
from tx_async.worker.external_settings import ExternalSettings
from tx_async.worker.vllm import create as create_vllm


def jax_engine(config: EngineConfig, folder: Path) -> Engine:
    """Rows of 32 and 128, four to a micro-batch, on a random model of two layers."""
    from tx_async.engine.engine import create
    from tx_async.testing.models import make_qwen3

    model = folder / "model"
    if not model.exists():
        make_qwen3(model, vocab_size=128, eos_token_id=127, tokenizer=False)
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]  # of all engines, the first one compiles
    engine = msgspec.structs.replace(
        config, train_micro_batch_size=4, train_row_lengths=(32,), compilation_cache_dir=cache
    )
    welcome = Welcome(
        base_model=str(model), engine=engine, checkpoints_base=str(folder), heartbeat_interval_ms=1000, lease_ms=1000
    )
    return create(welcome, lambda *_: None)


def fake_engine(config: EngineConfig, folder: Path) -> Engine:
    return FakeEngine(config, str(folder), vocab_size=128, context=128)


def vllm_engine(config: EngineConfig, folder: Path, cleanup: contextlib.ExitStack) -> Engine:
    """The worker that samples through vLLM, and a vLLM whose model is the fake engine's."""
    from tx_async.testing.models import make_qwen3

    model = folder / "model"
    if not model.exists():
        make_qwen3(model, vocab_size=128, eos_token_id=127, tokenizer=False)
    vllm = cleanup.enter_context(FakeVllm(str(model), vocab_size=128, max_model_len=128))
    welcome = Welcome(
        base_model=str(model), engine=config, checkpoints_base=str(folder), heartbeat_interval_ms=1000, lease_ms=1000
    )
    settings = ExternalSettings(url=vllm.url, lora_dir=str(folder / "loras"), worker_name=f"vllm-{vllm.port}")
    return create_vllm(welcome, lambda *_: None, settings)


ENGINES: dict[str, Callable[[EngineConfig, Path], Engine]] = {"fake": fake_engine, "jax": jax_engine}
SAMPLERS: dict[str, Callable[[EngineConfig, Path, contextlib.ExitStack], Engine]] = {"vllm": vllm_engine}
TRAINING = (
    CreateAdapter,
    LoadAdapter,
    ReleaseAdapter,
    TrainMicroBatch,
    StepOptimizer,
    SaveAdapter,
)
CONFIG = EngineConfig(
    max_lora_adapters=4, max_lora_rank=8, max_sampler_adapters=3, sample_max_num_sequences=4, max_context_length=128,
    decode_steps=4,
)  # fmt: skip
ADAPTER = AdapterConfig(rank=4, seed=1)
ADAM = AdamParams(learning_rate=0.01)
DATA = [np.arange(5, 25), np.arange(40, 52), np.array([7, 9, 7, 9, 7, 9])]


@dataclasses.dataclass
class Bench:
    """An engine and the batches that a scheduler would make for it."""

    engine: Engine
    #: another one, where the engine only samples
    trainer: Engine
    #: (sequence_id, start, tokens, log-probabilities) of every piece that came while sequences ran
    pieces: list[tuple[int, int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def run(self, command, *tensors):
        engine = self.trainer if isinstance(command, TRAINING) else self.engine
        return engine.execute(command, tensors)()

    def result(self, command, *tensors):
        return self.run(command, *tensors)[0]

    def train(self, sequences, slots, forward_only=False, **inputs):
        """One sequence a row, next-token targets, weight 1, cross entropy. Returns (logprobs, losses), cut to size."""
        info = self.trainer.info()
        longest = max(len(sequence) for sequence in sequences)
        num_rows, length = next(
            shape for shape in info.row_shapes if shape[1] >= longest and shape[0] >= len(sequences)
        )
        batch = empty_batch(num_rows, length) | {}
        for row, sequence in enumerate(sequences):
            size = len(sequence) - 1
            batch["tokens"][row, :size] = sequence[:-1]
            batch["positions"][row, :size] = np.arange(size)
            batch["segment_ids"][row, :size] = 1
            batch["target_tokens"][row, :size, 0] = sequence[1:]
            batch["weights"][row, :size, 0] = 1.0
        for name, value in inputs.items():
            batch[name][: len(sequences)] = value
        command = TrainMicroBatch(
            slots=(*slots, *[-1] * (num_rows - len(slots))), row_length=length, targets_per_token=1,
            forward_only=forward_only,
        )  # fmt: skip
        result, (logprobs, losses) = self.run(command, *(batch[name] for name in TRAIN_TENSORS))
        assert result == Trained()
        assert logprobs.shape == (num_rows, length, 1) and losses.shape == (num_rows, length)
        assert logprobs.dtype == losses.dtype == np.float32
        sizes = [len(sequence) - 1 for sequence in sequences]
        assert all((logprobs[row, size:] == 0).all() for row, size in enumerate(sizes))
        return [logprobs[row, :size, 0] for row, size in enumerate(sizes)], [
            losses[row, :size] for row, size in enumerate(sizes)
        ]

    def step(self, slot=0, adam=ADAM):
        return self.result(StepOptimizer(slot=slot, adam=adam))

    def create(self, slot=0, adapter=ADAPTER):
        assert self.result(CreateAdapter(slot=slot, config=adapter)) == Done()

    def trained(self, slot, steps=3):
        """An adapter that has left its beginning."""
        self.create(slot)
        for _ in range(steps):
            self.train(DATA, [slot] * 3)
            self.step(slot)

    def save(self, slot, key, kind):
        saved = self.result(SaveAdapter(slot=slot, config=ADAPTER, key=key, kind=kind))
        assert isinstance(saved, Saved) and saved.size_bytes > 0

    def load(self, slot, key, optimizer=True):
        loaded = self.result(LoadAdapter(slot=slot, config=ADAPTER, key=key, optimizer=optimizer))
        assert isinstance(loaded, Loaded)
        return loaded

    def logprobs(self, slot):
        return np.concatenate(self.train(DATA, [slot] * 3, forward_only=True)[0])

    def sample(self, *specs, prompts, targets=()):
        """Admit, then run quanta until all are finished. {sequence_id: (finished, tensors of its message, quantum)}"""
        assert self.result(AdmitSequences(sequences=specs), *prompts, *targets) == Done()
        info, finished = self.engine.info(), {}
        for quantum in range(1, 200):
            result, tensors = self.run(
                SampleQuantum(decode_steps=info.decode_steps, prefill_tokens=info.prefill_tokens)
            )
            assert isinstance(result, Sampled)
            for piece in result.pieces:
                assert piece.sequence_id not in finished
                said = tensors[piece.tokens_index], tensors[piece.logprobs_index]
                self.pieces.append((piece.sequence_id, piece.start, *said))
            for sequence in result.finished:
                assert sequence.sequence_id not in finished
                finished[sequence.sequence_id] = (sequence, tensors, quantum)
            if result.num_running == result.num_waiting == 0:
                return finished
        raise AssertionError("sampling does not end")


def empty_batch(rows, length):
    integers = ("tokens", "positions", "segment_ids", "loss_fn")
    batch: dict[str, np.ndarray] = {
        name: np.zeros((rows, length), np.int32 if name in integers else np.float32) for name in TRAIN_TENSORS
    }
    batch["target_tokens"] = np.zeros((rows, length, 1), np.int32)
    batch["weights"] = np.zeros((rows, length, 1), np.float32)
    return batch


def spec(sequence_id=1, **fields):
    values = {"sampler_slot": BASE_SLOT, "adapter_version": "", "prompt_index": 0, "max_tokens": 10, "temperature": 0.0}
    return SequenceSpec(sequence_id=sequence_id, **values | fields)


def prompt(*tokens):
    return np.array(tokens or (3, 1, 4, 1, 5), np.int32)


@pytest.fixture(params=ENGINES)
def make(request, tmp_path):
    """Engines that share one folder of checkpoints."""
    with contextlib.ExitStack() as cleanup:
        yield maker(request.param, tmp_path, cleanup)


@pytest.fixture(params=[*ENGINES, *SAMPLERS])
def make_sampler(request, tmp_path):
    """The same, and those that only sample."""
    with contextlib.ExitStack() as cleanup:
        yield maker(request.param, tmp_path, cleanup)


def maker(name, folder, cleanup):
    def make():
        if name in ENGINES:
            engine = trainer = ENGINES[name](CONFIG, folder)
        else:
            engine, trainer = SAMPLERS[name](CONFIG, folder, cleanup), fake_engine(CONFIG, folder)
        cleanup.callback(engine.close)
        return Bench(engine, trainer)

    return make


@pytest.fixture
def sampler(make_sampler):
    return make_sampler()


@pytest.fixture
def bench(make):
    return make()


# ---- what it says of itself


def test_its_shapes_are_ascending_and_hold_its_context(bench):
    info = bench.engine.info()
    lengths = [length for _, length in info.row_shapes]
    assert lengths == sorted(set(lengths)) and lengths[-1] >= info.max_context_length - 1
    assert info.row_length_preferred in lengths
    assert info.target_tokens_k[0] == 1 and list(info.target_tokens_k) == sorted(info.target_tokens_k)
    assert info.num_training_slots >= 1 and info.max_lora_rank == CONFIG.max_lora_rank


# ---- training


def test_the_loss_of_cross_entropy_is_the_negative_logprob(bench):
    bench.create()
    for logprobs, losses in zip(*bench.train(DATA, [0, 0, 0]), strict=True):
        assert (logprobs < 0).all()
        np.testing.assert_allclose(losses, -logprobs, rtol=1e-5)


def test_training_lowers_the_loss(bench):
    bench.create()
    before = bench.logprobs(0).sum()
    for number in range(1, 6):
        bench.train(DATA, [0, 0, 0])
        stepped = bench.step()
        assert isinstance(stepped, Stepped) and stepped.step == number
    assert bench.logprobs(0).sum() > before


def test_forward_leaves_no_trace(bench):
    bench.trained(0)
    before = bench.logprobs(0)
    bench.train(DATA, [0, 0, 0], forward_only=True)
    bench.step(adam=AdamParams(learning_rate=0.0))
    np.testing.assert_array_equal(bench.logprobs(0), before)


def test_micro_batches_add_up(bench):
    """Two micro-batches before a step are one batch of both."""
    for slot in (0, 1):
        bench.create(slot)
    bench.train(DATA, [0, 0, 0])
    for sequence in DATA:
        bench.train([sequence], [1])
    bench.step(0)
    bench.step(1)
    np.testing.assert_allclose(bench.logprobs(0), bench.logprobs(1), rtol=1e-5, atol=1e-6)


def test_a_row_trains_its_own_slot_only(bench):
    for slot in (0, 1, 2):
        bench.create(slot)
    untouched = bench.logprobs(2)
    bench.train(DATA[:2], [0, 1])
    bench.step(0)
    one_stepped = bench.logprobs(1)
    np.testing.assert_array_equal(bench.logprobs(2), untouched)
    np.testing.assert_array_equal(one_stepped, untouched)
    bench.step(1)
    assert (bench.logprobs(1) != one_stepped).any()


@pytest.mark.parametrize("neighbour", ["none", "another", "nan"])
def test_results_do_not_depend_on_the_other_rows(make, neighbour):
    """Bit for bit, even beside a neighbour whose numbers are not numbers."""
    alone, beside = make(), make()
    for bench in (alone, beside):
        bench.create(0)
        bench.create(1)
    for _ in range(3):
        results = alone.train([DATA[0]], [0])
        weights = np.ones((2, 1, 1), np.float32)
        weights[1] = np.nan if neighbour == "nan" else 1.0
        pair = [DATA[0], DATA[1]] if neighbour != "none" else [DATA[0]]
        others = beside.train(pair, [0, 1][: len(pair)], weights=weights[: len(pair)])
        np.testing.assert_array_equal(results[0][0], others[0][0])
        alone.step(0)
        beside.step(0)
    np.testing.assert_array_equal(alone.logprobs(0), beside.logprobs(0))


def test_gradients_that_are_not_finite_fail_the_step_and_are_cleared(make):
    bench, untouched = make(), make()
    for one in (bench, untouched):
        one.trained(0)
    bench.train(DATA, [0, 0, 0], weights=np.float32("inf"))
    with pytest.raises(NonFiniteGradients):
        bench.step()
    for one in (bench, untouched):
        one.train(DATA, [0, 0, 0])
        one.step()
    np.testing.assert_array_equal(bench.logprobs(0), untouched.logprobs(0))


def test_policy_losses_take_their_sign_from_the_advantage(bench):
    for slot, advantage in enumerate((1.0, -1.0)):
        bench.create(slot)
        before = bench.logprobs(slot).sum()
        sampled = bench.train(DATA, [slot] * 3, forward_only=True)[0]
        length = max(map(len, sampled))
        old = np.stack([np.pad(row, (0, length - len(row))) for row in sampled])
        num_columns = next(size for _, size in bench.engine.info().row_shapes if size > length)
        for _ in range(3):
            bench.train(
                DATA, [slot] * 3, loss_fn=LOSS_FNS.index("importance_sampling"), advantages=np.float32(advantage),
                logprobs=np.pad(old, ((0, 0), (0, num_columns - length))),
            )  # fmt: skip
            bench.step(slot)
        assert np.sign(bench.logprobs(slot).sum() - before) == advantage


# ---- slots and checkpoints


def test_a_slot_is_cleared_before_it_is_used_again(make):
    used, fresh = make(), make()
    used.trained(0)
    used.train(DATA, [0, 0, 0])  # gradients that nobody will apply
    assert used.result(ReleaseAdapter(slot=0)) == Done()
    for bench in (used, fresh):
        bench.trained(0)
    np.testing.assert_array_equal(used.logprobs(0), fresh.logprobs(0))


@pytest.mark.parametrize("kind", ["training", "snapshot"])
def test_a_restored_run_goes_on_as_if_nothing_had_happened(make, kind):
    first, second = make(), make()
    first.trained(0)
    first.save(0, "run/one", kind)
    assert second.load(2, "run/one").step == 3
    for bench, slot in ((first, 0), (second, 2)):
        for _ in range(2):
            bench.train(DATA, [slot] * 3)
            bench.step(slot)
    np.testing.assert_array_equal(first.logprobs(0), second.logprobs(2))


def test_a_snapshot_contains_half_accumulated_gradients(make):
    first, second = make(), make()
    first.trained(0)
    first.train(DATA, [0, 0, 0])
    first.save(0, "run/half", "snapshot")
    second.load(0, "run/half")
    for bench in (first, second):
        bench.step(0)
    np.testing.assert_array_equal(first.logprobs(0), second.logprobs(0))


def test_weights_without_optimizer_begin_with_fresh_moments(make):
    bench, other = make(), make()
    bench.trained(0)
    bench.save(0, "run/weights", "training")
    assert other.load(0, "run/weights", optimizer=False).step == 0
    np.testing.assert_array_equal(bench.logprobs(0), other.logprobs(0))
    for one in (bench, other):
        one.train(DATA, [0, 0, 0])
        one.step(0)
    assert (bench.logprobs(0) != other.logprobs(0)).any()


def test_a_version_that_does_not_exist_fails_alone(sampler):
    with pytest.raises(UnknownCheckpoint):
        sampler.result(LoadSampler(sampler_slot=0, key="run/nothing"))
    assert set(sampler.sample(spec(1), prompts=[prompt()])) == {1}


def test_a_checkpoint_that_does_not_exist_fails_alone(bench):
    bench.trained(0)
    with pytest.raises(UnknownCheckpoint):
        bench.load(1, "run/nothing")
    with pytest.raises(TxError):
        bench.result(LoadSampler(sampler_slot=0, key="run/nothing"))
    bench.train(DATA, [0, 0, 0])
    assert bench.step().step == 4


def test_a_slot_whose_load_failed_has_nothing_of_the_run_before_it(make):
    bench, fresh = make(), make()
    bench.trained(0)
    fresh.create(0)
    with pytest.raises(UnknownCheckpoint):
        bench.load(0, "run/nothing")
    try:
        shown = bench.logprobs(0)
    except TxError:
        return  # an empty slot
    np.testing.assert_array_equal(shown, fresh.logprobs(0))


# ---- sampling


def test_a_sample_takes_its_quanta_and_its_length(sampler):
    found = sampler.sample(spec(max_tokens=10), prompts=[prompt()])
    sequence, tensors, num_quanta = found[1]
    assert sequence.stop_reason == "length"
    tokens, logprobs = tensors[sequence.tokens_index], tensors[sequence.logprobs_index]
    assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
    assert len(tokens) == len(logprobs) == 10 and (logprobs <= 0).all()
    assert num_quanta >= -(-10 // sampler.engine.info().decode_steps)


def test_a_stop_token_ends_a_sample_and_belongs_to_it(sampler):
    sequence, tensors, _ = sampler.sample(spec(), prompts=[prompt()])[1]
    third = int(tensors[sequence.tokens_index][2])
    expected = tensors[sequence.tokens_index][: list(tensors[sequence.tokens_index]).index(third) + 1]
    stopped, tensors, _ = sampler.sample(spec(2, stop_token_ids=(third,)), prompts=[prompt()])[2]
    assert stopped.stop_reason == "stop"
    np.testing.assert_array_equal(tensors[stopped.tokens_index], expected)


def test_a_sample_is_a_function_of_its_seed_and_index_alone(make_sampler):
    def tokens(found, sequence_id):
        sequence, tensors, _ = found[sequence_id]
        return tensors[sequence.tokens_index].tolist()

    fields = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
    alone = make_sampler().sample(spec(1, **fields), prompts=[prompt()])
    crowd = make_sampler().sample(
        *[spec(10 + index, **fields, sample_index=index) for index in range(6)], prompts=[prompt()]
    )
    assert tokens(crowd, 10) == tokens(alone, 1)
    assert len({tuple(tokens(crowd, 10 + index)) for index in range(6)}) > 1


def test_more_sequences_than_fit_simply_wait(sampler):
    specs = [spec(number, max_tokens=3 + number % 3) for number in range(1, 12)]
    found = sampler.sample(*specs, prompts=[prompt()])
    assert set(found) == set(range(1, 12))
    for number, (sequence, tensors, _) in found.items():
        assert len(tensors[sequence.tokens_index]) == 3 + number % 3


def test_cancelled_sequences_are_forgotten(sampler):
    sampler.result(AdmitSequences(sequences=(spec(1, max_tokens=100), spec(2, max_tokens=4))), prompt())
    assert sampler.result(CancelSequences(sequence_ids=(1, 77))) == Done()
    assert set(sampler.sample(spec(3), prompts=[prompt()])) == {2, 3}


def test_a_sequence_that_cannot_run_fails_alone(sampler):
    """Its sampler slot was never filled; the one beside it, in the same quantum, is none the worse."""
    specs = (spec(1, sampler_slot=2, adapter_version="run/none"), spec(2))
    assert sampler.result(AdmitSequences(sequences=specs), prompt()) == Done()
    failed, finished = [], []
    for _ in range(50):
        result = sampler.result(SampleQuantum(decode_steps=4, prefill_tokens=64))
        failed += result.failed
        finished += [sequence.sequence_id for sequence in result.finished]
        if failed and finished:
            break
    assert [(sequence_id, category) for sequence_id, category, _ in failed] == [(1, "server")] and finished == [2]
    assert "slot 2" in failed[0][2]


def test_sampler_and_trainer_agree(sampler):
    """What was sampled with a saved version has the log-probabilities that `forward` computes for it."""
    sampler.trained(0)
    sampler.save(0, "run/version", "sampler")
    assert isinstance(sampler.result(LoadSampler(sampler_slot=1, key="run/version")), Loaded)
    sequence, tensors, _ = sampler.sample(spec(sampler_slot=1, adapter_version="run/version"), prompts=[prompt()])[1]
    text = np.concatenate([prompt(), tensors[sequence.tokens_index]])
    logprobs = sampler.train([text], [0], forward_only=True)[0][0]
    np.testing.assert_allclose(tensors[sequence.logprobs_index], logprobs[len(prompt()) - 1 :], atol=1e-3)


def test_a_saved_version_never_changes(sampler):
    sampler.trained(0)
    sampler.save(0, "run/fixed", "sampler")
    sampler.result(LoadSampler(sampler_slot=0, key="run/fixed"))
    fields = {"sampler_slot": 0, "adapter_version": "run/fixed"}
    before, tensors, _ = sampler.sample(spec(1, **fields), prompts=[prompt()])[1]
    expected = tensors[before.logprobs_index]
    sampler.train(DATA, [0, 0, 0])
    sampler.step()
    after, tensors, _ = sampler.sample(spec(2, **fields), prompts=[prompt()])[2]
    np.testing.assert_array_equal(tensors[after.logprobs_index], expected)


def test_a_prompt_is_scored_as_forward_scores_it(bench):
    text = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    targets = np.full((7, 2), -1, np.int32)
    targets[:, 0] = text[1:]
    scores = PromptScores(logprobs=True, topk=3, targets_index=1, alt_tokens_k=2)
    found = bench.sample(spec(max_tokens=1, prompt_scores=scores), prompts=[text], targets=[targets])
    sequence, tensors, _ = found[1]
    bench.create(0)  # B = 0: the base model
    expected = bench.train([text], [0], forward_only=True)[0][0]

    logprobs = tensors[sequence.prompt_logprobs_index]
    assert logprobs.shape == (8,) and np.isnan(logprobs[0])
    np.testing.assert_allclose(logprobs[1:], expected, atol=1e-3)
    np.testing.assert_allclose(tensors[sequence.target_logprobs_index][:, 0], expected, atol=1e-3)
    assert (tensors[sequence.target_logprobs_index][:, 1] == 0.0).all()
    top = tensors[sequence.prompt_topk_logprobs_index]
    assert top.shape == (8, 3) and (top[0] == -99999.0).all() and (np.diff(top[1:]) <= 0).all()
    assert (tensors[sequence.prompt_topk_token_ids_index][0] == 0).all()
    assert (top[1:, 0] >= logprobs[1:] - 1e-3).all()
    assert tensors[sequence.alt_logprobs_index].shape == tensors[sequence.alt_token_ids_index].shape == (7, 2)


def test_only_the_last_positions_are_scored_when_asked_so(bench):
    scores = PromptScores(logprobs=True, topk=2, last_n=2)
    sequence, tensors, _ = bench.sample(spec(max_tokens=1, prompt_scores=scores), prompts=[prompt()])[1]
    assert np.isnan(tensors[sequence.prompt_logprobs_index]).tolist() == [True, True, True, False, False]
    assert (tensors[sequence.prompt_topk_logprobs_index][:3] == -99999.0).all()


def test_a_watched_sequence_tells_piece_by_piece_what_it_says_in_the_end(bench):
    finished = bench.sample(
        spec(1, stream=True, temperature=1.0, seed=4), spec(2), spec(3, stream=True), prompts=[prompt()]
    )
    for sequence_id in (1, 3):
        sequence, tensors, _ = finished[sequence_id]
        pieces = [piece for piece in bench.pieces if piece[0] == sequence_id]
        assert len(pieces) == 2, "ten tokens in quanta of four, the last ones with the whole"
        told, logprobs = (np.concatenate([piece[place] for piece in pieces]) for place in (2, 3))
        assert [start for _, start, _, _ in pieces] == [0, len(pieces[0][2])]
        assert told.dtype == np.int32 and told.tolist() == tensors[sequence.tokens_index][: len(told)].tolist()
        assert logprobs.tobytes() == tensors[sequence.logprobs_index][: len(told)].tobytes()
    assert not [piece for piece in bench.pieces if piece[0] == 2]


def test_a_sequence_that_is_watched_says_what_it_would_say_unwatched(make_sampler):
    said = [
        tensors[sequence.tokens_index].tolist()
        for stream in (False, True)
        for sequence, tensors, _ in make_sampler()
        .sample(spec(stream=stream, temperature=1.0, seed=4), prompts=[prompt()])
        .values()
    ]
    assert said[0] == said[1]


def test_no_stop_token_ends_a_sample_before_its_least_length(sampler):
    every = tuple(range(100))
    stopped = sampler.sample(spec(stop_token_ids=every, min_tokens=6), prompts=[prompt()])[1]
    tokens = stopped[1][stopped[0].tokens_index]
    assert len(tokens) >= 6 and not set(every) & set(tokens[:6].tolist())


def test_a_bias_of_100_always_draws_a_token_and_of_minus_100_never(sampler):
    sequence, tensors, _ = sampler.sample(spec(1), prompts=[prompt()])[1]
    plain = tensors[sequence.tokens_index].tolist()
    found = sampler.sample(
        spec(2, temperature=1.0, logit_bias=((60, 100.0),)),
        spec(3, logit_bias=tuple((token, -100.0) for token in sorted(set(plain)))),
        prompts=[prompt()],
    )
    forced, banned = (found[i][1][found[i][0].tokens_index].tolist() for i in (2, 3))
    assert forced == [60] * 10 and not set(banned) & set(plain)


def test_top_logprobs_of_sampled_tokens_contain_the_greedy_one(sampler):
    sequence, tensors, _ = sampler.sample(spec(topk_logprobs=4, max_tokens=5), prompts=[prompt()])[1]
    top = tensors[sequence.topk_logprobs_index]
    assert top.shape == tensors[sequence.topk_token_ids_index].shape == (5, 4)
    assert (top[:, 0] >= tensors[sequence.logprobs_index] - 1e-6).all()


def test_commands_may_be_issued_before_earlier_ones_are_waited_for(bench):
    """The worker keeps commands in flight: outcomes are asked for later, in order."""
    commands = [CreateAdapter(slot=0, config=ADAPTER), *[StepOptimizer(slot=0, adam=ADAM)] * 3]
    pendings = [bench.engine.execute(command, []) for command in commands]
    results = [pending()[0] for pending in pendings]
    assert results[0] == Done() and [stepped.step for stepped in results[1:]] == [1, 2, 3]
