"""stable_reinforce as today's recipes use it: sample with recording, name the sequences by spans, train."""

import numpy as np
import pytest
import tinker

from tests.support import recorded

PROMPT = [65, 66, 67, 68]
PARAMS = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=3, stop=[])


@pytest.fixture
def trainer(service, tiny_qwen3):
    return service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()


def sampled(trainer, params=PARAMS, num_samples=2):
    sampler = trainer.save_weights_and_get_sampling_client(record_stability_info=True).result()
    response = sampler.sample(tinker.ModelInput.from_ints(PROMPT), num_samples, params).result()
    return response.sequences


def datum_of(sequence, advantage=1.0, sequence_id="", on_prompt=0.0, spans=True):
    datum = recorded.datum_of(PROMPT, sequence, advantage, on_prompt, sequence_id)
    return datum if spans else tinker.Datum(model_input=datum.model_input, loss_fn_inputs=datum.loss_fn_inputs)


def train(trainer, data, **config):
    return trainer.forward_backward(data, "stable_reinforce", config or None).result()


def test_on_policy_it_is_reinforce_and_says_how_near_the_sampler_is(trainer):
    sequences = sampled(trainer)
    data = [datum_of(s, advantage) for s, advantage in zip(sequences, (0.5, -1.0), strict=True)]
    output = train(trainer, data, kl_coeff=0.1)
    lp = [np.array(out["logprobs"].data)[len(PROMPT) - 1 :] for out in output.loss_fn_outputs]
    assert output.metrics["loss:sum"] == pytest.approx(-0.5 * lp[0].sum() + lp[1].sum(), abs=2e-4)
    assert output.metrics["kl_sample_train:mean"] == pytest.approx(0, abs=1e-4)
    assert output.metrics["kl_sample_train:max"] == pytest.approx(0, abs=1e-4)
    assert output.metrics["ratio:mean"] == pytest.approx(1, abs=1e-4)
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()


def test_a_filtered_sampler_is_compared_within_its_support(trainer):
    params = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=3, stop=[], top_k=5)
    (sequence,) = sampled(trainer, params, num_samples=1)
    output = train(trainer, [datum_of(sequence)], kl_coeff=1.0)
    # q is the policy within five tokens: log p(a) there, minus its mean, and no divergence.
    lp = np.array(output.loss_fn_outputs[0]["logprobs"].data)[len(PROMPT) - 1 :]
    assert output.metrics["loss:sum"] < -lp.sum()
    assert np.isfinite(output.metrics["loss:sum"])


def test_a_batch_can_be_trained_on_again_after_the_policy_has_moved(trainer):
    (sequence,) = sampled(trainer, num_samples=1)
    first = train(trainer, [datum_of(sequence)])
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    again = train(trainer, [datum_of(sequence)])
    assert again.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert again.metrics["kl_sample_train:mean"] != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sequence_id": "nobody:1:0"},
            r"data\[1\]: model_input_spans\[0\]: the sequence 'nobody:1:0' is not recorded",
        ),
        ({"spans": False}, r"data\[1\]: stable_reinforce needs provenance spans"),
        ({"on_prompt": 1.0}, r"data\[1\]: advantages are not 0 within loss_fn_input_spans\[0\]"),
    ],
    ids=["unknown", "no spans", "a prompt's advantages"],
)
def test_what_does_not_fit_is_refused_by_datum_and_span(trainer, change, message):
    sequences = sampled(trainer)
    with pytest.raises(tinker.TinkerError, match=message):
        train(trainer, [datum_of(sequences[0]), datum_of(sequences[1], **change)])
    train(trainer, [datum_of(sequences[0])])


def test_tokens_of_another_sequence_are_refused(trainer):
    one, other = sampled(trainer)
    with pytest.raises(tinker.TinkerError, match=r"data\[0\]: .*the datum's tokens are not the sampled tokens 0 to"):
        train(trainer, [datum_of(one, sequence_id=other.sequence_id)])


def test_another_sessions_samples_are_not_this_runs_to_train_on(trainer, server, tiny_qwen3):
    (sequence,) = sampled(trainer, num_samples=1)
    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
        other = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8).result()
        with pytest.raises(tinker.TinkerError, match="was sampled in another session"):
            train(other, [datum_of(sequence)])


@pytest.mark.parametrize("limits", [{"top_k": 200}, {"top_p": 0.999}], ids=str)
def test_a_large_support_is_recorded_whole(trainer, limits):
    """Of 320 tokens most can be drawn. On-policy, within what can be drawn, the policy is the sampler."""
    params = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=3, stop=[], **limits)
    (sequence,) = sampled(trainer, params, num_samples=1)
    divergence = train(trainer, [datum_of(sequence, advantage=0.0)], kl_coeff=1.0)
    assert divergence.metrics["loss:sum"] == pytest.approx(0, abs=1e-4)
    assert np.isfinite(train(trainer, [datum_of(sequence)]).metrics["loss:sum"])
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
