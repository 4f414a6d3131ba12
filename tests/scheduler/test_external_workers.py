"""Workers for external engines beside our own: what goes where, whom the server trusts, and what a desertion costs."""

from typing import Any

import msgspec
import numpy as np
import pytest

from tests.support.simulation import INFO
from tests.support.stage import Stage
from tx_async.scheduler.core.instructions import DeleteFiles, Dismiss, Send
from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerReady
from tx_async.wire.operations import Sample
from tx_async.wire.worker import (
    BASE_SLOT,
    AdmitSequences,
    Capability,
    CommandFailed,
    CommandFinished,
    Done,
    FinishedSequence,
    Loaded,
    LoadSampler,
    Sampled,
    SampleQuantum,
    SamplingLimits,
    Trial,
    TrialSequence,
)

LIMITS = SamplingLimits(temperature_min=0.01, temperature_max=2.0, topk_logprobs_max=20, stop_strings_max=4)
EXTERNAL = msgspec.structs.replace(
    INFO, continuous=True, limits=LIMITS, num_training_slots=0, num_sequences_max=16, num_sampler_slots=2
)
OURS: frozenset[Capability] = frozenset({"train", "sample", "score"})
TRIAL = Trial(
    key="external-trials/1",
    sequences=(
        TrialSequence(tokens=(5, 6, 7, 8), logprobs=(-1.0, -2.0), with_adapter=False),
        TrialSequence(tokens=(5, 6, 9, 10), logprobs=(-3.0, -4.0), with_adapter=True),
    ),
    tolerance=1e-4,
)


class Workers(Stage):
    """Workers that do nothing by themselves: a test looks at what they were sent, and says what they answer."""

    def __init__(self):
        self.to: dict[str, list[Send]] = {}
        self.instructions: list[object] = []
        super().__init__(info=msgspec.structs.replace(INFO, num_sequences_max=16), with_worker=False)

    def _perform(self, instructions):
        self.instructions += instructions
        super()._perform(instructions)

    def _send(self, instruction):
        self.to.setdefault(instruction.worker_id, []).append(instruction)

    def attach(self, name, info=EXTERNAL, capabilities: frozenset[Capability] = frozenset({"sample"})):
        self.to[name] = []
        self.handle(WorkerReady(name, info, capabilities))

    def attach_ours(self, info=INFO):
        self.attach("ours", info, OURS)

    def answer(self, name, sent, result, tensors=()):
        outcome = (
            result
            if isinstance(result, CommandFailed)
            else CommandFinished(number=sent.number, result=result, elapsed_ms=1.0)
        )
        self.handle(CommandEnded(name, outcome, tensors))
        self.settle()

    def take(self, name, kind) -> Any:
        """The oldest command of a kind that a worker was sent; it is not looked at again."""
        found = next((sent for sent in self.to[name] if isinstance(sent.command, kind)), None)
        if found:
            self.to[name].remove(found)
        return found

    def admitted(self, name):
        """Sequences that a worker was sent since the last look; their admission is answered."""
        specs = []
        while sent := self.take(name, AdmitSequences):
            specs += sent.command.sequences
            self.answer(name, sent, Done())
        return specs

    def finish(self, name, *specs, failed=()):
        tokens, logprobs = np.array([7], np.int32), np.array([-0.5], np.float32)
        scores = np.array([np.nan, -1.0, -1.0, -2.0], np.float32)
        finished = tuple(
            FinishedSequence(
                sequence_id=spec.sequence_id, stop_reason="stop", tokens_index=0, logprobs_index=1,
                prompt_logprobs_index=2 if spec.prompt_scores else -1,
            )
            for spec in specs
        )  # fmt: skip
        result = Sampled(finished=finished, failed=tuple(failed))
        quantum = self.take(name, SampleQuantum)
        assert quantum is not None
        self.answer(name, quantum, result, [tokens, logprobs, scores])

    def load(self, name):
        sent = self.take(name, LoadSampler)
        assert sent is not None
        self.answer(name, sent, Loaded())
        return sent.command.key

    def ask_for(self, sampler, **fields):
        self.num_samples += 1
        values = {"prompt": np.array([5], np.int32).tobytes(), "max_tokens": 4, "use_eos": False}
        return self.submit_now(Sample(sampling_session_id=sampler, seq_id=self.num_samples, **values | fields))

    def version(self, name="v"):
        """A sampling session whose weights lie in storage."""
        sampler = self.sampler(self.new_session(f"session {name}"))
        record = msgspec.structs.replace(self.catalog.samplers[sampler], storage_key=name)
        self.catalog.samplers[sampler] = record
        return sampler


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def both(workers):
    workers.attach_ours()
    workers.attach("vllm")
    return workers


# ---- what goes where


def test_what_an_external_engine_can_take_goes_there(both):
    both.ask_for(both.sampler(), num_samples=3)
    assert len(both.admitted("vllm")) == 3 and not both.to["ours"]


def test_everything_is_sampled_here_while_no_external_engine_is_there(workers):
    workers.attach_ours()
    workers.ask_for(workers.sampler(), num_samples=2)
    assert len(workers.admitted("ours")) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": True},
        {"topk_prompt_logprobs": 2},
        {"prompt_alt_tokens_k": 2},
        {"temperature": 2.5},
        {"temperature": 0.005},
        {"topk_sample_logprobs": 21},
        {"stop_strings": ("a", "b", "c", "d", "e")},
        {"max_tokens": 12},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_it_cannot_take_is_sampled_here(workers, fields):
    workers.attach_ours()
    workers.attach("vllm", msgspec.structs.replace(EXTERNAL, max_context_length=8))
    workers.ask_for(workers.sampler(), **fields)
    workers.ask_for(workers.sampler(), temperature=0.0)
    assert len(workers.admitted("ours")) == len(workers.admitted("vllm")) == 1


def test_of_a_scored_prompt_only_the_sample_that_brings_the_scores_is_drawn_here(both):
    request = both.ask_for(both.sampler(), num_samples=4, prompt_logprobs=True)
    (scored,), rest = both.admitted("ours"), both.admitted("vllm")
    assert scored.prompt_scores and scored.sample_index == 0
    assert sorted(spec.sample_index for spec in rest) == [1, 2, 3] and not any(spec.prompt_scores for spec in rest)
    both.finish("ours", scored)
    both.finish("vllm", *rest)
    assert not both.error(request)


def test_a_newcomer_is_admitted_while_a_quantum_waits_for_news(both):
    both.ask_for(both.sampler())
    assert len(both.admitted("vllm")) == 1
    both.ask_for(both.sampler())
    assert len(both.admitted("vllm")) == 1
    assert sum(isinstance(sent.command, SampleQuantum) for sent in both.to["vllm"]) == 1


# ---- several


def test_a_version_goes_where_it_is_already(workers):
    workers.attach_ours()
    workers.attach("a")
    workers.attach("b")
    first, second = workers.version("one"), workers.version("two")
    workers.ask_for(first)
    assert workers.load("a") == "one" and len(workers.admitted("a")) == 1
    workers.ask_for(second)
    assert workers.load("b") == "two" and len(workers.admitted("b")) == 1
    workers.ask_for(first, num_samples=3)
    assert len(workers.admitted("a")) == 3 and not workers.take("b", LoadSampler)


def test_a_version_that_many_want_is_brought_to_another_engine_as_well(workers):
    workers.attach_ours()
    workers.attach("a")
    workers.attach("b")
    sampler = workers.version("one")
    workers.ask_for(sampler, num_samples=12)
    workers.load("a")
    assert workers.load("b") == "one"
    counts = [len(workers.admitted(name)) for name in "ab"]
    assert sum(counts) == 12 and min(counts) >= 4


def test_samples_of_the_base_model_are_spread(workers):
    workers.attach_ours()
    workers.attach("a")
    workers.attach("b")
    workers.ask_for(workers.sampler(), num_samples=8)
    assert [len(workers.admitted(name)) for name in "ab"] == [4, 4]


# ---- what goes wrong


def test_a_desertion_costs_a_request_nothing(both):
    request = both.ask_for(both.sampler(), num_samples=2)
    both.admitted("vllm")
    both.handle(WorkerLost("vllm", "it does not answer"))
    assert next(iter(both.state.sampling.jobs.values())).num_failures == 0
    both.finish("ours", *both.admitted("ours"))
    assert not both.error(request)


def test_a_request_that_saw_many_engines_go_is_sampled_here(workers):
    """It may be what they die of."""
    workers.attach("vllm")
    workers.ask_for(workers.sampler())
    for _ in range(3):
        assert len(workers.admitted("vllm")) == 1
        workers.handle(WorkerLost("vllm", "it does not answer"))
        workers.attach("vllm")
    assert not workers.admitted("vllm")
    workers.attach_ours()
    assert len(workers.admitted("ours")) == 1


def test_a_sequence_that_fails_alone_is_sampled_by_another_worker(both):
    request = both.ask_for(both.sampler(), num_samples=2)
    bad, good = both.admitted("vllm")
    both.finish("vllm", good, failed=[(bad.sequence_id, "server", "vLLM answered 400")])
    (again,) = both.admitted("ours")
    assert again.sample_index == bad.sample_index
    both.finish("ours", again)
    assert not both.error(request)


def test_a_sequence_that_fails_on_our_own_worker_is_tried_again_there(workers):
    workers.attach_ours()
    request = workers.ask_for(workers.sampler())
    for _ in range(workers.policy.attempts_max):
        assert workers.result(request) is None
        (spec,) = workers.admitted("ours")
        workers.finish("ours", failed=[(spec.sequence_id, "server", "its pages were lost")])
        workers.wait(1)
    workers.settle()
    assert "pages were lost" in workers.error(request)


def test_a_sequence_whose_request_is_at_fault_ends_it_and_no_other(both):
    request, other = both.ask_for(both.sampler(), num_samples=2), both.ask_for(both.sampler())
    first, second, third = both.admitted("vllm")
    both.finish("vllm", third, failed=[(first.sequence_id, "user", "no such token")])
    assert "no such token" in both.error(request) and not both.error(other)
    assert second.sequence_id not in both.state.workers["vllm"].sequences


def test_a_version_that_an_engine_refuses_is_sampled_here(both):
    both.ask_for(both.version("wide"))
    both.answer("vllm", both.take("vllm", LoadSampler), Loaded(refused="rank 64 is more than 16"))
    assert both.load("ours") == "wide"
    (spec,) = both.admitted("ours")
    both.finish("ours", spec)
    assert not both.take("vllm", LoadSampler) and not both.state.workers["vllm"].refused_versions


def test_a_request_that_no_worker_can_take_says_why(workers):
    workers.attach("trains", INFO, frozenset({"train"}))
    workers.attach("vllm")
    request = workers.ask_for(workers.sampler(), prompt_logprobs=True)
    why = workers.state.sampling.why_waiting(request)
    assert "worker vllm: it does not score prompts" in why
    plain = workers.ask_for(workers.sampler())
    workers.handle(WorkerLost("vllm", "vLLM at http://127.0.0.1:8001 does not answer"))
    assert "does not answer" in workers.state.sampling.why_waiting(plain)
    workers.attach("vllm")
    assert not workers.state.sampling.why_waiting(plain)


# ---- trust


def on_trial(workers):
    workers.attach("vllm", msgspec.structs.replace(EXTERNAL, trial=TRIAL))


def score(workers, difference=0.0):
    """Our own worker scores what waits, off by so much from what the trial says."""
    if workers.take("ours", LoadSampler) is not None:
        raise AssertionError("it was loaded before")
    for spec in workers.admitted("ours"):
        expected = TRIAL.sequences[0 if spec.sampler_slot == BASE_SLOT else 1].logprobs
        scores = np.array([np.nan, -9.0, *expected], np.float32) + np.float32(difference)
        quantum = workers.take("ours", SampleQuantum)
        finished = FinishedSequence(
            sequence_id=spec.sequence_id, stop_reason="stop", tokens_index=0, logprobs_index=1, prompt_logprobs_index=2
        )
        tensors = [np.array([7], np.int32), np.array([-0.5], np.float32), scores]
        workers.answer("ours", quantum, Sampled(finished=(finished,)), tensors)


def of_kind(workers, kind):
    return [instruction for instruction in workers.instructions if isinstance(instruction, kind)]


def test_an_engine_that_agrees_is_trusted_after_its_trial(workers):
    on_trial(workers)
    workers.attach_ours()
    request = workers.ask_for(workers.sampler(), temperature=0.5)
    assert workers.load("ours") == TRIAL.key
    assert not workers.admitted("vllm")
    for _ in range(3):
        score(workers)
    assert not workers.state.workers["vllm"].is_on_trial
    assert [deleted.storage_key for deleted in of_kind(workers, DeleteFiles)] == [TRIAL.key]
    assert not of_kind(workers, Dismiss)
    workers.ask_for(workers.sampler())
    assert len(workers.admitted("vllm")) >= 1 and request


def test_an_engine_that_differs_is_sent_away_with_the_reason(workers):
    workers.attach_ours()
    on_trial(workers)
    workers.load("ours")
    for _ in range(3):
        score(workers, difference=0.01)
    (dismissed,) = of_kind(workers, Dismiss)
    assert dismissed.worker_id == "vllm" and "differ from ours by 0.01 nats" in dismissed.reason
    assert [deleted.storage_key for deleted in of_kind(workers, DeleteFiles)] == [TRIAL.key]
    assert not workers.state.sampling.jobs


def test_rounding_of_bfloat16_is_no_difference(workers):
    workers.attach_ours(msgspec.structs.replace(INFO, dtype="bfloat16"))
    on_trial(workers)
    workers.load("ours")
    for _ in range(3):
        score(workers, difference=0.01)
    assert not of_kind(workers, Dismiss) and not workers.state.workers["vllm"].is_on_trial


def test_a_trial_ends_with_its_worker(workers):
    workers.attach_ours()
    on_trial(workers)
    workers.handle(WorkerLost("vllm", "it does not answer"))
    assert not workers.state.sampling.jobs and not workers.state.sampling.waiting
    assert [deleted.storage_key for deleted in of_kind(workers, DeleteFiles)] == [TRIAL.key]
    on_trial(workers)
    assert len(workers.state.sampling.jobs) == 2
