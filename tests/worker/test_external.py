"""The worker for an external engine, against a vLLM whose answers were recorded: what it asks, and how it leaves."""

import json
import logging
import queue
import re
import time

import numpy as np
import pytest

from tx_async.errors import BaseModelError, ConfigError, EngineGone
from tx_async.storage.checkpoint_files import write_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.testing.fake_engine import FakeEngine
from tx_async.testing.models import make_qwen3_moe
from tx_async.wire.worker import (
    BASE_SLOT,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    CreateAdapter,
    EngineConfig,
    LoadSampler,
    SampleQuantum,
    SaveAdapter,
    SequenceSpec,
    Welcome,
)
from tx_async.worker.external import ExternalEngine
from tx_async.worker.external_health import HealthSettings
from tx_async.worker.external_settings import ExternalSettings
from tx_async.worker.vllm_http import VllmHttp, completion_request, seed_of

QUANTUM = SampleQuantum(decode_steps=8, prefill_tokens=64)
HASTY = HealthSettings(interval_s=0.05, silence_s=0.4, stall_s=0.6)


@pytest.fixture
def attach(vllm, model, tmp_path):
    """Makes workers' engines; they are closed when the test ends."""
    engines = []

    def attach(base_model=model, progress=lambda *_: None, health=HASTY, **settings):
        welcome = Welcome(
            base_model=str(base_model), engine=EngineConfig(max_sampler_adapters=4), checkpoints_base=str(tmp_path),
            heartbeat_interval_ms=1000, lease_ms=1000,
        )  # fmt: skip
        given = ExternalSettings(url=vllm.url, lora_dir=str(tmp_path / "loras"), **settings)
        engine = ExternalEngine(lambda: VllmHttp(given.url, given.api_key), welcome, given, health)
        engines.append(engine)
        engine.attach(progress)
        return engine

    yield attach
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(attach):
    return attach()


def save(folder, *keys):
    """Adapters in storage."""
    trainer = FakeEngine(checkpoints_base=str(folder))
    config = AdapterConfig(rank=4)
    trainer.execute(CreateAdapter(slot=0, config=config), [])()
    for key in keys:
        trainer.execute(SaveAdapter(slot=0, config=config, key=key, kind="sampler"), [])()


def load(engine, slot, key):
    return engine.execute(LoadSampler(sampler_slot=slot, key=key), [])()[0]


def spec(sequence_id=1, **fields):
    values = {"sampler_slot": BASE_SLOT, "adapter_version": "", "prompt_index": 0, "max_tokens": 4, "seed": 1}
    return SequenceSpec(sequence_id=sequence_id, **values | fields)


def admit(engine, *specs, prompt=(3, 1, 4)):
    engine.execute(AdmitSequences(sequences=specs), [np.array(prompt, np.int32)])()


def outcomes(engine, number):
    """(finished, failed) of so many sequences."""
    finished, failed = [], []
    while len(finished) + len(failed) < number:
        result, _ = engine.execute(QUANTUM, [])()
        finished += result.finished
        failed += result.failed
    return finished, failed


def watched(engine):
    """One sequence to its end: (piece, tensors) of each quantum that told some, what finished, and its tensors."""
    pieces = []
    while True:
        result, tensors = engine.execute(QUANTUM, [])()
        assert not result.failed
        pieces += [(piece, tensors) for piece in result.pieces]
        if result.finished:
            return pieces, result.finished, tensors


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


# ---- attaching


def test_what_it_allows_is_found_out_by_trying(vllm, attach):
    vllm.max_logprobs, vllm.max_model_len = 37, 512
    info = attach().info()
    assert info.limits.topk_logprobs_max == 37 and info.max_context_length == 512 and info.continuous
    assert {sequence.with_adapter for sequence in info.trial.sequences} == {True, False}
    assert not vllm.adapters, "the trial's adapter is gone again"


def test_a_version_that_was_not_tested_is_warned_of(vllm, attach, caplog):
    vllm.version = "0.99.1"
    with caplog.at_level(logging.WARNING):
        attach()
    assert "0.99.1 was not tested" in caplog.text


def test_another_model_is_refused_by_name(vllm, attach):
    vllm.model = "/models/Other-8B"
    with pytest.raises(ConfigError, match="serves /models/Other-8B, this server"):
        attach()


def test_one_that_may_not_load_adapters_is_refused_with_what_to_change(vllm, attach):
    vllm.allows_loading = False
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        attach()


def test_a_small_largest_rank_is_no_reason_to_refuse_it(vllm, attach, tmp_path):
    vllm.max_lora_rank = 1
    engine = attach()
    wide = {"peft_type": "LORA", "r": 64, "base_model_name_or_path": None}
    files = {"adapter_config.json": json.dumps(wide).encode(), "adapter_model.safetensors": b""}
    write_checkpoint_sync(Store(tmp_path), "run/wide", files, {})
    assert "rank 64 is greater than max_lora_rank 1" in load(engine, 0, "run/wide").refused
    admit(engine, spec())
    assert outcomes(engine, 1)[0]


def test_a_mixture_of_experts_wants_to_be_asked_for(vllm, attach, tmp_path):
    moe = make_qwen3_moe(tmp_path / "moe", tokenizer=False)
    vllm.model = str(moe)
    with pytest.raises(BaseModelError, match="allow-unproven"):
        attach(base_model=moe)
    assert attach(base_model=moe, allow_unproven=True).info().trial


def test_it_waits_for_an_engine_that_is_not_there_yet(vllm, attach):
    vllm.die()
    said = queue.SimpleQueue()

    def progress(stage, _done, _total):
        said.put(stage)
        if not vllm.is_listening:
            vllm.start()

    attach(progress=progress)
    assert said.get() == f"waiting for vLLM at {vllm.url}"


def test_its_key_is_sent(vllm, attach):
    vllm.api_key = "sesame"
    with pytest.raises(ConfigError, match="401"):
        attach()
    assert attach(api_key="sesame").info()


# ---- adapters


def test_an_adapter_has_a_name_of_its_own_and_leaves_with_its_slot(vllm, engine, tmp_path):
    save(tmp_path, "run/a", "run/b")
    vllm.log.clear()
    assert not load(engine, 0, "run/a").refused and not load(engine, 0, "run/b").refused
    (_, first), (_, gone), (_, second) = vllm.log
    assert [action for action, _ in vllm.log] == ["load", "unload", "load"]
    assert first == gone != second and set(vllm.adapters) == {second}
    assert [entry.name for entry in (tmp_path / "loras").iterdir()] == [second]


def test_an_exported_adapter_names_the_base_model_as_vllm_does(vllm, engine, tmp_path):
    """Without it, its resolver does not find the adapter."""
    save(tmp_path, "run/a")
    load(engine, 0, "run/a")
    (folder,) = vllm.adapters.values()
    with open(f"{folder}/adapter_config.json") as file:
        assert json.load(file)["base_model_name_or_path"] == vllm.model


def test_what_an_earlier_life_left_is_removed(vllm, attach, tmp_path):
    save(tmp_path, "run/a")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "somebody-else").mkdir()
    load(attach(), 0, "run/a")
    assert len(vllm.adapters) == 1
    again = attach()
    assert not vllm.adapters
    assert [entry.name for entry in (tmp_path / "loras").iterdir()] == ["somebody-else"]
    assert not load(again, 0, "run/a").refused


# ---- sequences


def test_cancelled_sequences_end_in_vllm_too(vllm, engine):
    vllm.token_s = 10.0
    admit(engine, *(spec(number) for number in range(8)))
    wait_until(lambda: vllm.num_running == 8)
    engine.execute(CancelSequences(sequence_ids=tuple(range(7))), [])()
    wait_until(lambda: vllm.num_running == 1)


def test_a_watched_sequence_is_told_as_it_grows(vllm, engine):
    asked = {"max_tokens": 6, "topk_logprobs": 3}
    admit(engine, spec(1, **asked))
    (whole,), tensors = watched(engine)[1:]
    vllm.token_s = 0.02
    admit(engine, spec(1, stream=True, **asked))
    pieces, (finished,), streamed = watched(engine)
    assert len(pieces) > 1 and [piece.start for piece, _ in pieces] == sorted({piece.start for piece, _ in pieces})
    for name in ("tokens_index", "logprobs_index", "topk_token_ids_index", "topk_logprobs_index"):
        all_of_it = tensors[getattr(whole, name)]
        np.testing.assert_array_equal(streamed[getattr(finished, name)], all_of_it)
        told = np.concatenate([arrays[getattr(piece, name)] for piece, arrays in pieces])
        np.testing.assert_array_equal(told, all_of_it[: len(told)])
    assert finished.stop_reason == whole.stop_reason


def test_a_watched_sequence_that_is_cancelled_ends_in_vllm_too(vllm, engine):
    vllm.token_s = 0.5
    admit(engine, spec(1, stream=True, max_tokens=100))
    wait_until(lambda: vllm.num_running == 1)
    engine.execute(CancelSequences(sequence_ids=(1,)), [])()
    wait_until(lambda: vllm.num_running == 0)


@pytest.mark.parametrize(("tells", "num_tokens"), [(False, 4), (True, 4), (True, 1)])
def test_vllm_says_how_long_it_generated_where_it_was_asked_to(vllm, engine, tells, num_tokens):
    vllm.tells_times, vllm.token_s = tells, 0.01
    engine.execute(AdmitSequences(sequences=(spec(max_tokens=num_tokens),)), [np.array([1], np.int32)])()
    sampled, _ = engine.execute(QUANTUM, [])()
    times = sampled.finished[0].times
    if not tells:
        assert times is None
    else:
        step = 10 * (num_tokens > 1)
        assert times.last_token - times.first_token == pytest.approx(10 * (num_tokens - 1))
        assert times.first_token - times.decode_began == pytest.approx(step)
        assert times.last_token >= 10 * num_tokens


def test_a_request_that_vllm_refuses_fails_alone(vllm, engine):
    admit(engine, spec(1), prompt=(vllm.vocab_size,))
    admit(engine, spec(2))
    finished, failed = outcomes(engine, 2)
    assert [sequence.sequence_id for sequence in finished] == [2]
    ((sequence_id, category, message),) = failed
    assert (sequence_id, category) == (1, "server") and "out of vocabulary" in message


def test_what_a_request_leaves_out_is_not_left_to_the_models_generation_config():
    body = completion_request("base", spec(temperature=0.7, top_k=-1, stop_token_ids=(7,)))
    assert body["top_k"] == 0 and body["min_p"] == 0.0 and body["repetition_penalty"] == 1.0
    assert body["ignore_eos"] and body["stop_token_ids"] == [7] and not body["skip_special_tokens"]


def test_every_sample_of_a_request_has_a_seed_of_its_own():
    seeds = {seed_of(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(5, 3) == seed_of(5, 3)


# ---- leaving


def other_model(vllm):
    vllm.die()
    vllm.start(model="/models/Other-8B")


FAILURES = {
    "dies": (lambda vllm: vllm.die(), "does not answer"),
    "hangs": (lambda vllm: setattr(vllm, "is_hanging", True), "has not answered"),
    "answers_500": (lambda vllm: setattr(vllm, "failing", ("/v1/completions",)), "answers 500"),
    "is_dead_inside": (lambda vllm: setattr(vllm, "failing", ("",)), "answers 500"),
    "forgets_an_adapter": (lambda vllm: vllm.forget(), "adapter|does not know"),
    "is_another_model": (other_model, "serves /models/Other-8B now|does not|Other"),
    "stands_still": (lambda vllm: setattr(vllm, "token_s", 100.0), "has computed no token"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_it_leaves_in_one_line_when_vllm(failure, vllm, engine, tmp_path):
    """With sequences running, begun before and after; nobody waits for ever, and nothing is answered."""
    save(tmp_path, "run/a")
    load(engine, 0, "run/a")
    gone = queue.SimpleQueue()
    engine.watch(gone.put)
    vllm.token_s = 0.05
    admit(engine, *(spec(number, sampler_slot=0, max_tokens=40) for number in range(8)))
    wait_until(lambda: vllm.num_running == 8)
    break_it, reason = FAILURES[failure]
    break_it(vllm)
    admit(engine, *(spec(number, max_tokens=40) for number in range(8, 12)))
    error = gone.get(timeout=20)
    assert isinstance(error, EngineGone) and "\n" not in error.message
    assert re.search(reason, error.message), error.message
    with pytest.raises(EngineGone):
        while True:
            engine.execute(QUANTUM, [])()
    assert gone.empty()


NO_ANSWERS = ((500, {"error": {"message": "EngineCore"}}), (200, {"choices": [], "usage": {}}), (200, "<html>"))


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=["failure", "empty", "of_something_else"])
def test_one_bad_answer_of_a_healthy_engine_is_no_reason_to_leave(answer, vllm, engine):
    """A request that always breaks it fails alone, and goes to another worker."""
    vllm.poison, vllm.poisoned = 99, answer
    gone = queue.SimpleQueue()
    engine.watch(gone.put)
    admit(engine, spec(1), prompt=(5, 99))
    admit(engine, spec(2))
    finished, failed = outcomes(engine, 2)
    assert len(finished) == len(failed) == 1 and re.search("50[02]", failed[0][2]) and gone.empty()


def test_a_stream_that_breaks_off_fails_alone(vllm, engine):
    vllm.broken_stream = True
    gone = queue.SimpleQueue()
    engine.watch(gone.put)
    admit(engine, spec(1, stream=True))
    admit(engine, spec(2))
    finished, failed = outcomes(engine, 2)
    assert [sequence.sequence_id for sequence in finished] == [2] and failed[0][0] == 1 and gone.empty()
