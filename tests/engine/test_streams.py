"""Training and sampling side by side on a CPU: neither waits for the other, and neither changes a bit of the other."""

import threading

import numpy as np

from tx_async.engine.streams import OwnStream
from tx_async.testing.engine_bench import assert_same_bits, micro_batch, segment
from tx_async.wire.worker import AdmitSequences, SampleQuantum, SequenceSpec

NUM_BATCHES = 60


def train_all(bench):
    """Issue a stream of micro-batches; -> what waits for them."""
    command, tensors = micro_batch([(0, [segment(128, 1)])], 128)
    return [bench.engine.execute(command, tensors) for _ in range(NUM_BATCHES)]


def sample_all(bench):
    """One sequence to its end; -> (tokens, log-probabilities)."""
    spec = SequenceSpec(
        sequence_id=1, sampler_slot=-1, adapter_version="", prompt_index=0, max_tokens=12, temperature=1.0
    )
    bench.run(AdmitSequences(sequences=(spec,)), [np.arange(5, 25, dtype=np.int32)])
    while True:
        sampled, tensors = bench.run(SampleQuantum(decode_steps=4, prefill_tokens=64))
        if sampled.finished:
            return [tensors[sampled.finished[0].tokens_index], tensors[sampled.finished[0].logprobs_index]]


def side_by_side(bench):
    """-> (results of training, of sampling, whether sampling ended while training was still under way)."""
    pending = train_all(bench)
    results, is_trained = [], threading.Event()

    def wait():
        results.extend(wait_for_one() for wait_for_one in pending)
        is_trained.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    sampled = sample_all(bench)
    was_first = not is_trained.is_set()
    waiter.join()
    return [tensors for _, tensors in results], sampled, was_first


def test_sampling_does_not_wait_for_micro_batches_that_were_issued_before(bench):
    assert bench.engine.info().overlaps
    bench.create(0)
    side_by_side(bench)  # compiles
    assert any(side_by_side(bench)[2] for _ in range(5)), "never, though a busy machine may hide it now and then"


def test_side_by_side_gives_the_same_bits_as_one_after_the_other(make_bench):
    alone, together = make_bench(), make_bench()
    for one in (alone, together):
        one.create(0)
    trained = [wait()[1] for wait in train_all(alone)]
    sampled = sample_all(alone)
    both = side_by_side(together)
    assert_same_bits(trained, both[0])
    assert_same_bits(sampled, both[1])
    assert_same_bits(alone.state(0), together.state(0))


def test_an_error_on_a_stream_reaches_the_caller():
    stream = OwnStream("test")
    try:
        assert stream.run(lambda x: x + 1, 1) == 2
        try:
            stream.run(lambda: 1 / 0)
        except ZeroDivisionError as error:
            assert "division" in str(error)
        else:
            raise AssertionError("the error was lost")
    finally:
        stream.close()
