"""Datums find the sampler's heads by their spans; what does not fit is refused by the names of datum and span."""

from typing import Any

import msgspec
import numpy as np
import pytest

from tx_async.errors import InvalidRequest
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.recorded import RecordedSequences
from tx_async.scheduler.sampling import recordings
from tx_async.scheduler.sampling.recordings import ALL, CUT, WHOLE, Recording
from tx_async.wire.operations import Datum, ForwardBackward, Provenance, ProvenanceSpan, Sample
from tx_async.wire.records import ModelRecord, RecordedSequence
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import AdapterConfig, FinishedSequence

MODEL = ModelRecord(
    model_id="m", session_id="s", owner="o", base_model="b", lora=AdapterConfig(rank=4, seed=0), created_at=0.0
)
PROMPT, SAMPLED = [5, 6, 7], [10, 11]


def record(**changes) -> RecordedSequence:
    fields = {"sequence_id": "q", "session_id": "s", "owner": "o", "base_model": "b", "num_bytes": 10, "used_at": 0.0}
    return RecordedSequence(**fields | changes)


def recording(is_whole=(ALL, ALL), tokens=SAMPLED, k=3) -> Recording:
    ids = np.arange(len(tokens) * k, dtype=np.int32)
    probabilities = np.full(len(tokens) * k, 0.25, np.float32)
    return Recording(
        np.array(PROMPT, np.int32).tobytes(),
        np.array(tokens, np.int32).tobytes(),
        ids.tobytes(),
        probabilities.tobytes(),
        np.array(is_whole, np.uint8).tobytes(),
        k,
    )


def batch(tokens=(*PROMPT, *SAMPLED), sequence_id="q") -> ForwardBackward:
    """As the cookbook makes it: the targets are the tokens from the second one on."""
    tokens = np.array(tokens)
    provenance = Provenance(
        (ProvenanceSpan(False, sequence_id, 0, 3), ProvenanceSpan(True, sequence_id, 0, 1)),
        (ProvenanceSpan(False, sequence_id, 1, 2), ProvenanceSpan(True, sequence_id, 0, 2)),
    )
    inputs = {"target_tokens": Tensor.of(tokens[1:]), "advantages": Tensor.of(np.array([0, 0, 1, 1], np.float32))}
    datum = Datum(tokens[:-1].astype(np.int32).tobytes(), inputs, provenance)
    return ForwardBackward(model_id="m", seq_id=1, data=(datum,), loss_fn="stable_reinforce")


def test_sampled_positions_get_their_heads():
    (datum,) = recordings.with_heads(batch(), {"q": recording(is_whole=(ALL, WHOLE))}).data
    assert datum.heads is not None
    assert np.frombuffer(datum.heads.positions, np.int32).tolist() == [2, 3]
    assert np.frombuffer(datum.heads.token_ids, np.int32).tolist() == [0, 1, 2, 3, 4, 5]
    assert list(datum.heads.is_whole) == [ALL, WHOLE]


def test_a_recording_is_the_same_after_its_journey_to_disk():
    assert recordings.decode(recordings.encode(recording())) == recording()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "not recorded here"),
        (record(owner="somebody else"), "not recorded here"),
        (record(session_id="another"), "another session"),
        (record(base_model="another"), "sampled from another, and this run trains b"),
    ],
    ids=["unknown", "tenant", "session", "base"],
)
def test_a_sequence_that_this_run_cannot_train_on_is_named_with_its_span(found, message):
    known = {"q": found} if found else {}
    with pytest.raises(InvalidRequest, match=rf"data\[0\]: model_input_spans\[0\]: the sequence 'q' .*{message}"):
        recordings.needed(batch(), MODEL, known.get)


def test_a_sequence_is_looked_up_once():
    assert recordings.needed(batch(), MODEL, {"q": record()}.get) == {"q": record()}


@pytest.mark.parametrize(
    ("tokens", "where"),
    [
        ((5, 6, 8, 10, 11), r"model_input_spans\[0\]: the datum's tokens are not the prompt"),
        ((5, 6, 7, 10, 12), r"loss_fn_input_spans\[1\]: the datum's tokens are not the sampled tokens 0 to 2"),
    ],
)
def test_tokens_that_were_not_recorded_are_refused(tokens, where):
    with pytest.raises(InvalidRequest, match=rf"data\[0\]: {where}"):
        recordings.with_heads(batch(tokens), {"q": recording()})


def test_targets_that_are_not_trained_on_may_be_anything():
    """tinker-cookbook's rl_loop has zeros where the prompt's tokens stand."""
    operation = batch()
    targets = operation.data[0].loss_fn_inputs["target_tokens"].numpy().copy()
    provenance = operation.data[0].provenance
    assert provenance is not None
    span = provenance.loss_fn_inputs[0]
    assert not span.is_sampled and span.length
    targets[: span.length] = 0
    inputs = operation.data[0].loss_fn_inputs | {"target_tokens": Tensor.of(targets)}
    zeroed = msgspec.structs.replace(operation.data[0], loss_fn_inputs=inputs)
    found = recordings.with_heads(msgspec.structs.replace(operation, data=(zeroed,)), {"q": recording()})
    assert found.data[0].heads == recordings.with_heads(operation, {"q": recording()}).data[0].heads


def test_a_limit_that_left_more_than_was_recorded_is_refused():
    with pytest.raises(InvalidRequest, match=r"loss_fn_input_spans\[1\]: top_k or top_p left more than 3"):
        recordings.with_heads(batch(), {"q": recording(is_whole=(CUT, ALL))})


def test_heads_of_different_sizes_join_in_one_datum():
    """Two turns of a conversation, the second sampled with a larger head."""
    tokens = np.array([*PROMPT, 10, 11])
    provenance = Provenance(
        (ProvenanceSpan(False, "q", 0, 3), ProvenanceSpan(True, "q", 0, 1)),
        (ProvenanceSpan(False, "q", 1, 2), ProvenanceSpan(True, "q", 0, 1), ProvenanceSpan(True, "r", 0, 1)),
    )
    inputs = {"target_tokens": Tensor.of(tokens[1:]), "advantages": Tensor.of(np.ones(4, np.float32))}
    operation = ForwardBackward(
        model_id="m",
        seq_id=1,
        data=(Datum(tokens[:-1].astype(np.int32).tobytes(), inputs, provenance),),
        loss_fn="stable_reinforce",
    )
    (datum,) = recordings.with_heads(operation, {"q": recording(), "r": recording((ALL,), [11], k=5)}).data
    assert datum.heads is not None and datum.heads.k == 5
    assert np.frombuffer(datum.heads.probabilities, np.float32).tolist() == [0.25] * 3 + [0.0] * 2 + [0.25] * 5


def filled() -> RecordedSequences:
    known = RecordedSequences()
    for i in range(5):
        known.put(record(sequence_id=str(i), used_at=float(i)))
    known.put(record(sequence_id="x", owner="p", used_at=-99.0, num_bytes=1000))
    return known


def names(records: list[RecordedSequence]) -> list[str]:
    return [entry.sequence_id for entry in records]


def test_the_longest_unused_go_first_and_nobody_elses():
    known = filled()
    known.put(record(sequence_id="0", used_at=9.0))
    assert names(known.beyond("o", 25)) == ["1", "2", "3"]
    assert known.beyond("o", 50) == [] and known.num_bytes_of("p") == 1000


def test_what_nobody_has_used_for_long_is_found_after_a_restart_too():
    known = RecordedSequences()
    for i in (3, 1, 2):
        known.put(record(sequence_id=str(i), used_at=float(i)))
    known.sort()
    assert names(known.unused_since(2.5)) == ["1", "2"]


def test_a_sequence_that_is_gone_takes_no_room():
    known = filled()
    for i in range(5):
        known.pop(str(i))
    known.pop("unknown")
    assert known.num_bytes_of("o") == 0 and len(known) == 1


def sample(fields: dict[str, Any]) -> Sample:
    plain = {"sampling_session_id": "s:sample:0", "seq_id": 1, "prompt": np.array(PROMPT, np.int32).tobytes()}
    return Sample(**{"num_samples": 1, "temperature": 1.0, "record_stability_info": True} | plain | fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"record_stability_info": False, "top_k": 200}, 0),
        ({}, 64),
        ({"temperature": 0.5}, 64),
        ({"top_k": 1_000}, 64),
        ({"top_k": 5}, 127),
        ({"top_k": 127, "top_p": 0.5}, 127),
        ({"top_k": 128}, 4_096),
        ({"top_p": 0.5}, 4_096),
        ({"top_p": 0.5, "temperature": 0.0}, 64),
    ],
    ids=str,
)
def test_where_a_limit_filters_all_that_it_leaves_is_recorded(fields, expected):
    """In a vocabulary of 1,000 a top_k of as many is none."""
    assert recordings.head_tokens(sample(fields), Policy(), 1_000) == expected


def test_more_than_may_be_recorded_ends_the_sample_with_the_setting_s_name():
    finished = FinishedSequence(sequence_id=1, stop_reason="stop", tokens_index=0, logprobs_index=1)
    recordings.check_whole(finished, [], Policy())
    finished = msgspec.structs.replace(finished, head_is_whole_index=0)
    recordings.check_whole(finished, [np.array([ALL, WHOLE])], Policy())
    with pytest.raises(InvalidRequest, match=r"at token 1 .*`stability_support_max` is 100"):
        recordings.check_whole(finished, [np.array([WHOLE, CUT])], Policy(stability_support_max=100))
