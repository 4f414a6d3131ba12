"""Losses, forward and custom losses through the SDK, each against its formula on the log-probabilities that came back.

All losses are plain sums over positions and datums. lp = log-probabilities of the targets now, q = the sampler's,
A = advantages, r = exp(lp - q).
"""

import numpy as np
import pytest
import tinker

LENGTHS = (5, 9, 17)
VOCABULARY = 256
RNG = np.random.default_rng(7)
TOKENS = [RNG.integers(0, VOCABULARY, length + 1) for length in LENGTHS]
WEIGHTS = [RNG.uniform(0, 2, length) for length in LENGTHS]
ADVANTAGES = [RNG.normal(size=length) for length in LENGTHS]
NOISE = [RNG.normal(0, 0.3, length) for length in LENGTHS]
MASK = [np.arange(length) % 2 for length in LENGTHS]


def importance_sampling(lp, q, a):
    return -np.sum(np.exp(lp - q) * a)


def ppo(lp, q, a, low=0.8, high=1.2):
    r = np.exp(lp - q)
    return -np.sum(np.minimum(r * a, np.clip(r, low, high) * a))


def cispo(lp, q, a, low=0.0, high=4.0):
    return -np.sum(np.clip(np.exp(lp - q), low, high) * lp * a)


def dro(lp, q, a, beta=0.05):
    return -np.sum(lp * a - 0.5 * beta * (lp - q) ** 2)


def gspo(lp, q, a, mask=None, low=0.8, high=1.2):
    where = np.ones_like(lp) if mask is None else mask
    s = np.exp(np.sum((lp - q) * where) / where.sum())
    return -np.sum(np.minimum(s * a, np.clip(s, low, high) * a))


LOSSES = [
    ("importance_sampling", importance_sampling, {}),
    ("ppo", ppo, {}),
    ("ppo", lambda lp, q, a: ppo(lp, q, a, 0.95, 1.05), {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}),
    ("cispo", cispo, {}),
    ("cispo", lambda lp, q, a: cispo(lp, q, a, 0.9, 1.1), {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("dro", dro, {"beta": 0.05}),
    ("gspo", gspo, {}),
]


@pytest.fixture
def trainer(service, tiny_qwen3):
    return service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()


def data_of(**inputs):
    return [_datum(number, inputs) for number in range(len(LENGTHS))]


def _datum(number, inputs):
    columns = {"target_tokens": tinker.TensorData(data=TOKENS[number][1:].tolist(), dtype="int64")}
    columns |= {
        name: tinker.TensorData(data=[float(x) for x in of[number]], dtype="float32") for name, of in inputs.items()
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(TOKENS[number][:-1].tolist()), loss_fn_inputs=columns)


def logprobs_of(result):
    return [np.array(outputs["logprobs"].tolist()) for outputs in result.loss_fn_outputs]


def sampled_with(trainer):
    """Sampling log-probabilities near to the policy's own: as if it had moved a little since."""
    lp = logprobs_of(trainer.forward(data_of(weights=WEIGHTS), "cross_entropy").result())
    return [one + noise for one, noise in zip(lp, NOISE, strict=True)]


def test_cross_entropy_is_the_weighted_sum_and_forward_returns_the_same(trainer):
    data = data_of(weights=WEIGHTS)
    forward = trainer.forward(data, "cross_entropy").result()
    result = trainer.forward_backward(data, "cross_entropy").result()
    lp = logprobs_of(result)
    assert [one.shape for one in lp] == [(length,) for length in LENGTHS]
    assert result.metrics["loss:sum"] == pytest.approx(-sum(map(np.dot, WEIGHTS, lp)), rel=1e-4)
    # Two programs: XLA may fuse them differently.
    np.testing.assert_allclose(np.concatenate(lp), np.concatenate(logprobs_of(forward)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "formula", "config"), LOSSES, ids=lambda value: value if isinstance(value, str) else None
)
def test_policy_gradient_losses_follow_their_formulas(trainer, name, formula, config):
    q = sampled_with(trainer)
    result = trainer.forward_backward(data_of(logprobs=q, advantages=ADVANTAGES), name, config or None).result()
    expected = sum(formula(*rows) for rows in zip(logprobs_of(result), q, ADVANTAGES, strict=True))
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_gspo_takes_the_ratio_of_masked_positions_only(trainer):
    q = sampled_with(trainer)
    data = data_of(logprobs=q, advantages=ADVANTAGES, sequence_ratio_mask=MASK)
    result = trainer.forward_backward(data, "gspo").result()
    expected = sum(gspo(*rows) for rows in zip(logprobs_of(result), q, ADVANTAGES, MASK, strict=True))
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_a_step_moves_the_policy_toward_what_was_rewarded(trainer, name):
    """All advantages positive: whatever the loss, the targets become likelier."""
    q = logprobs_of(trainer.forward(data_of(weights=WEIGHTS), "cross_entropy").result())
    data = data_of(logprobs=q, advantages=[np.ones(length) for length in LENGTHS])
    config = {"beta": 0.05} if name == "dro" else None
    trainer.forward_backward(data, name, config)
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    after = logprobs_of(trainer.forward(data_of(weights=WEIGHTS), "cross_entropy").result())
    assert sum(map(np.sum, after)) > sum(map(np.sum, q))


def test_gradients_accumulate_until_the_optimizer_steps(service, tiny_qwen3):
    """Two half batches and one step end where one whole batch and one step end."""
    after = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()
        data = data_of(weights=WEIGHTS)
        for part in parts:
            trainer.forward_backward(data[part], "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        after.append(np.concatenate(logprobs_of(trainer.forward(data, "cross_entropy").result())))
    np.testing.assert_allclose(*after, atol=1e-4)


def test_forward_leaves_no_gradient(trainer):
    data = data_of(weights=WEIGHTS)
    before = logprobs_of(trainer.forward(data, "cross_entropy").result())
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-1)).result()
    after = logprobs_of(trainer.forward(data, "cross_entropy").result())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.torch
def test_a_custom_loss_trains_as_its_built_in_twin_does(service, tiny_qwen3):
    """forward_backward_custom computes the loss in the client, from log-probabilities, and sends the gradients back."""
    import torch

    def loss_fn(data, logprobs):
        weights = [torch.tensor(datum.loss_fn_inputs["weights"].tolist()) for datum in data]
        loss = -sum((w * lp).sum() for w, lp in zip(weights, logprobs, strict=True))
        return loss, {"my_loss": loss.item()}

    after = []
    for is_custom in (True, False):
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()
        data = data_of(weights=WEIGHTS)
        if is_custom:
            metrics = trainer.forward_backward_custom(data, loss_fn).result().metrics
            assert metrics["my_loss"] > 0
        else:
            trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        after.append(np.concatenate(logprobs_of(trainer.forward(data, "cross_entropy").result())))
    np.testing.assert_allclose(*after, atol=1e-4)


# ---- what is refused, and harms nobody


@pytest.mark.parametrize(
    ("make_data", "loss", "config", "named"),
    [
        (lambda: data_of(weights=WEIGHTS), "hinge", None, "hinge"),
        (lambda: data_of(weights=WEIGHTS[::-1]), "cross_entropy", None, "weights"),
        (lambda: data_of(weights=[w * np.nan for w in WEIGHTS]), "cross_entropy", None, "weights"),
        (lambda: data_of(logprobs=NOISE, advantages=[a * np.inf for a in ADVANTAGES]), "ppo", None, "advantages"),
        (lambda: data_of(logprobs=NOISE), "importance_sampling", None, "advantages"),
        (lambda: data_of(logprobs=NOISE, advantages=ADVANTAGES), "ppo", {"clip_lo": 0.8}, "clip_lo"),
        (lambda: data_of(logprobs=NOISE, advantages=ADVANTAGES), "dro", None, "beta"),
    ],
    ids=["loss", "lengths", "nan", "infinite", "missing input", "config key", "missing config"],
)
def test_a_bad_batch_is_refused_by_name_and_the_run_goes_on(trainer, make_data, loss, config, named):
    good = data_of(weights=WEIGHTS)
    before = logprobs_of(trainer.forward(good, "cross_entropy").result())
    with pytest.raises(tinker.TinkerError, match=named):
        trainer.forward_backward(make_data(), loss, config).result()
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-1)).result()
    after = logprobs_of(trainer.forward(good, "cross_entropy").result())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "the refused batch left a gradient"


@pytest.mark.parametrize("lora", [{"rank": 0}, {"rank": 33}])
def test_a_rank_that_does_not_fit_is_refused(service, tiny_qwen3, lora):
    with pytest.raises(tinker.TinkerError, match="rank"):
        service.create_lora_training_client(base_model=str(tiny_qwen3), **lora).result()


def test_an_unknown_base_model_is_refused_by_name(service):
    with pytest.raises(tinker.TinkerError, match="no-such-model"):
        service.create_lora_training_client(base_model="no-such-model").result()
