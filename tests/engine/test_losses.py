"""Every loss against its formula in float64 NumPy, its derivative against finite differences of that."""

import jax
import numpy as np
import pytest

from tx_async.engine import head
from tx_async.engine.batch import RowBatch
from tx_async.engine.losses import LossInputs, log_sequence_ratios, loss_terms
from tx_async.wire.worker import LOSS_FNS

LENGTH, RANK, HIDDEN, VOCAB = 50, 3, 8, 40


def reference(name: str, lp: np.ndarray, x: dict[str, np.ndarray], frozen_lp: np.ndarray) -> np.ndarray:
    """`schemas/tinker.md`, "Losses", position by position. frozen_lp: the values that stop-gradients see."""
    q, advantages, low, high = (x[n] for n in ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold"))
    if name == "cross_entropy":
        return -(x["weights"] * lp).sum(-1)
    if name == "stable_reinforce":
        positions = np.ndindex(lp.shape[:-1])
        terms = [
            stable_reinforce(lp[at], frozen_lp[at], x["weights"][at], advantages[at], x["beta"][at]) for at in positions
        ]
        return np.reshape(terms, lp.shape[:-1])
    lp, frozen_lp = lp[..., 0], frozen_lp[..., 0]
    ratio = np.exp(lp - q)
    match name:
        case "importance_sampling":
            return -ratio * advantages
        case "ppo":
            return -np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages)
        case "cispo":
            return -np.clip(np.exp(frozen_lp - q), low, high) * lp * advantages
        case "dro":
            return -(lp * advantages - 0.5 * x["beta"] * (lp - q) ** 2)
    ratio = sequence_ratio(frozen_lp, x) * np.exp(lp - frozen_lp)
    return -np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages)


def stable_reinforce(lp, frozen_lp, weights, advantage, kl_coeff) -> float:
    """arXiv:2609.20807, top-k estimator, one position. lp, frozen_lp, weights [K]: the sampled token, then the head."""
    head = [i for i in range(1, len(lp)) if weights[i] > 0]
    if len(lp) == 1:
        return -advantage * lp[0]
    is_whole = weights[0] > 0 and len(head) > 0
    support, frozen_support = (np.log(np.exp(v[head]).sum()) if is_whole else 0.0 for v in (lp, frozen_lp))
    q, log_p, frozen_log_p = weights[head], lp[head] - support, frozen_lp[head] - frozen_support
    tail = 0.0 if is_whole else max(1 - q.sum(), 0.0)

    def rho(log_p):
        return tail / max(1 - np.exp(log_p).sum(), 1e-6)

    centred = lp[0] - support - ((q - rho(frozen_log_p) * np.exp(frozen_log_p)) * log_p).sum()
    divergence = (q * (np.log(q) - log_p)).sum() + (tail * np.log(rho(log_p)) if tail > 0 else 0.0)
    return -advantage * centred + kl_coeff * divergence


def sequence_ratio(lp: np.ndarray, x: dict[str, np.ndarray]) -> np.ndarray:
    ratios = np.ones_like(lp)
    for row in range(len(lp)):
        for number in set(x["segment_ids"][row]):
            mine = x["segment_ids"][row] == number
            marked = mine & (x["sequence_ratio_mask"][row] != 0)
            ratios[row, mine] = np.exp(np.mean(lp[row, marked] - x["logprobs"][row, marked])) if marked.any() else 1.0
    return ratios


def random_inputs(seed: int, k: int, rows: int = 2) -> dict[str, np.ndarray]:
    """Weights and advantages of any sign and size; three segments and padding in each row."""
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    return {
        "weights": rng.standard_normal((*shape, k)) * 10.0 ** rng.integers(-2, 3, (*shape, k)),
        "logprobs": -3 + 0.4 * rng.standard_normal(shape),
        "advantages": rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, shape),
        "clip_low_threshold": rng.uniform(0.5, 0.9, shape),
        "clip_high_threshold": rng.uniform(1.1, 1.5, shape),
        "sequence_ratio_mask": rng.integers(0, 2, shape).astype(float),
        "beta": rng.uniform(0.01, 1, shape),
        "segment_ids": np.repeat([[1, 2, 3, 0]], rows, 0).repeat([20, 10, 15, 5], axis=1),
    }


def loss_inputs(name: str, x: dict[str, np.ndarray], lp: np.ndarray) -> LossInputs:
    f32 = {key: np.float32(value) for key, value in x.items()}
    ratios = jax.jit(log_sequence_ratios)(
        np.float32(lp[..., 0]), f32["logprobs"], f32["sequence_ratio_mask"], x["segment_ids"]
    )
    shared = {key: f32[key] for key in LossInputs._fields if key in f32}
    loss_fn = np.full(x["logprobs"].shape, LOSS_FNS.index(name))
    return LossInputs(loss_fn=loss_fn, valid=x["segment_ids"] > 0, log_sequence_ratio=ratios, **shared)


def terms_and_slopes(lp: np.ndarray, inputs: LossInputs) -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(jax.jit(loss_terms)(np.float32(lp), inputs))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LOSS_FNS)
def test_each_loss_and_its_derivative_match_the_formula(name, k):
    x = random_inputs(seed=LOSS_FNS.index(name), k=k)
    lp = -3 + 0.4 * np.random.default_rng(7).standard_normal((2, LENGTH, k))
    terms, slopes = terms_and_slopes(lp, loss_inputs(name, x, lp))
    valid = x["segment_ids"] > 0
    np.testing.assert_allclose(terms, np.where(valid, reference(name, lp, x, lp), 0), rtol=2e-5, atol=1e-5)
    step = 1e-6
    for target in range(k):
        up, down = (lp + sign * step * np.eye(k)[target] for sign in (1, -1))
        slope = (reference(name, up, x, lp) - reference(name, down, x, lp)) / (2 * step)
        np.testing.assert_allclose(slopes[..., target], np.where(valid, slope, 0), rtol=1e-4, atol=1e-4)


def test_a_ratio_on_its_bound_passes_its_gradient():
    """As torch's clamp and minimum do: with the ratio exactly 1 and bounds that are 1, nothing is cut off."""
    x = {key: np.ones((1, 1)) for key in random_inputs(0, 1)} | {"weights": np.ones((1, 1, 1))}
    x["segment_ids"] = np.ones((1, 1), int)
    terms, slopes = terms_and_slopes(np.ones((1, 1, 1)), loss_inputs("ppo", x, np.ones((1, 1, 1))))
    assert terms[0, 0] == -1 and slopes[0, 0, 0] == -1


def test_what_stands_in_padding_does_not_count():
    x = random_inputs(3, 1)
    padding = x["segment_ids"] == 0
    for value in (np.nan, np.inf):
        dirty = {key: np.where(padding, value, v) if v.ndim == 2 and v.dtype == float else v for key, v in x.items()}
        for name in LOSS_FNS:
            lp = np.full((2, LENGTH, 1), -3.0)
            terms, slopes = terms_and_slopes(lp, loss_inputs(name, dirty, lp))
            assert (terms[padding] == 0).all() and (slopes[padding] == 0).all()
            assert np.isfinite(terms).all() and np.isfinite(slopes).all()


def test_a_mix_of_losses_in_one_row_is_each_loss_alone():
    x = random_inputs(5, 2)
    lp = -3 + np.random.default_rng(8).standard_normal((2, LENGTH, 2))
    mixed = loss_inputs("ppo", x, lp)
    loss_fn = np.random.default_rng(9).integers(0, len(LOSS_FNS), (2, LENGTH))
    terms, slopes = terms_and_slopes(lp, mixed._replace(loss_fn=loss_fn))
    for index, name in enumerate(LOSS_FNS):
        mine = loss_fn == index
        alone = terms_and_slopes(lp, loss_inputs(name, x, lp))
        assert (terms[mine] == alone[0][mine]).all() and (slopes[mine] == alone[1][mine]).all()


# ---- the unembedding with its loss


def row_batch(name: str, x: dict[str, np.ndarray], targets: np.ndarray) -> RowBatch:
    f32 = {key: np.float32(value) for key, value in x.items() if key != "segment_ids"}
    ints = {"segment_ids": np.int32(x["segment_ids"]), "target_tokens": np.int32(targets)}
    nothing = np.zeros(targets.shape[:2], np.int32)
    rows = {"slots": np.zeros(2, np.int32), "scale": np.array([4.0, 2.0], np.float32)}
    loss_fn = np.full(targets.shape[:2], LOSS_FNS.index(name), np.int32)
    return RowBatch(tokens=nothing, positions=nothing, loss_fn=loss_fn, **rows, **ints, **f32)


def total_loss(name, x, targets, hidden, w, a, b, scale, frozen=None):
    """float64, the whole [L, V] at once. -> (log-probabilities of the targets, sum of the loss)"""
    logits = hidden @ w + (hidden @ a) @ b * scale[:, None, None]
    lse = np.log(np.exp(logits).sum(-1, keepdims=True))
    lp = np.take_along_axis(logits - lse, targets, -1)
    terms = reference(name, lp, x, lp if frozen is None else frozen)
    return lp, np.where(x["segment_ids"] > 0, terms, 0).sum()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LOSS_FNS)
def test_the_chunked_head_gives_the_gradients_of_the_whole(name, k, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_TOKENS", 14)  # seven positions a row: the last of eight chunks is not full
    rng = np.random.default_rng(11)
    x = random_inputs(12, k)
    x["weights"] /= 100
    hidden, w = rng.standard_normal((2, LENGTH, HIDDEN)), rng.standard_normal((HIDDEN, VOCAB))
    a, b = rng.standard_normal((2, HIDDEN, RANK)), 0.1 * rng.standard_normal((2, RANK, VOCAB))
    targets = rng.integers(0, VOCAB, (2, LENGTH, k))
    targets[0, :5] = targets[0, :5, :1]  # the same target several times
    batch = row_batch(name, x, targets)
    unembedding = head.Unembedding(*(np.float32(v) for v in (w.T, a, b)), batch.scale)
    run = jax.jit(head.forward_backward)
    logprobs, losses, gradients = run(np.float32(hidden), unembedding, batch)

    scale = np.asarray(batch.scale, float)
    lp, total = total_loss(name, x, targets, hidden, w, a, b, scale)
    valid = (x["segment_ids"] > 0)[..., None]
    np.testing.assert_allclose(logprobs, np.where(valid, lp, 0), atol=2e-5)
    np.testing.assert_allclose(np.sum(losses, dtype=float), total, rtol=1e-4)
    only_forward = jax.jit(head.forward)(np.float32(hidden), unembedding, batch)
    np.testing.assert_allclose(only_forward[0], logprobs, atol=1e-6)
    np.testing.assert_allclose(only_forward[1], losses, rtol=1e-5, atol=1e-5)

    arguments = {"hidden": hidden, "a": a, "b": b}
    for argument, value in arguments.items():
        direction = rng.standard_normal(value.shape)
        step = 1e-6
        shifted = (arguments | {argument: value + sign * step * direction} for sign in (1, -1))
        up, down = (total_loss(name, x, targets, v["hidden"], w, v["a"], v["b"], scale, frozen=lp)[1] for v in shifted)
        found = (np.asarray(getattr(gradients, argument), float) * direction).sum()
        np.testing.assert_allclose(found, (up - down) / (2 * step), rtol=2e-3, atol=2e-3)


# ---- what is not finite


RATIO_LOSSES = ("importance_sampling", "ppo", "cispo", "gspo")


def overflowing(advantage: float, q: float, **more: float) -> dict[str, np.ndarray]:
    """One segment of three positions; the middle one has a placeholder for its log-probability."""
    x = {key: np.ones((1, 3)) for key in random_inputs(0, 1)} | {"weights": np.ones((1, 3, 1))}
    x |= {"logprobs": np.array([[-3.0, q, -3.0]]), "advantages": np.array([[1.0, advantage, 1.0]])}
    x |= {key: np.full((1, 3), value) for key, value in more.items()}
    return x | {"segment_ids": np.ones((1, 3), int)}


@pytest.mark.parametrize("high", [1.2, np.inf])
@pytest.mark.parametrize("q", [-120.0, -9999.0, -3e38])
@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_advantage_zero_times_a_ratio_that_overflows_is_zero(name, q, high):
    x = overflowing(0.0, q, clip_low_threshold=0.0, clip_high_threshold=high)
    x["sequence_ratio_mask"] = np.array([[1.0, 0.0, 1.0]])
    lp = np.full((1, 3, 1), -3.0)
    terms, slopes = terms_and_slopes(lp, loss_inputs(name, x, lp))
    middle = slopes[0, 1, 0]
    assert terms[0, 1] == 0 and middle == 0
    assert np.isfinite(terms).all() and (slopes[0, [0, 2], 0] == -1).all()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_a_ratio_is_clamped_only_where_its_product_is_not_finite(name):
    """exp(80) is a number of fp32, and its product with the advantage too: that one is exact."""
    for q, expected in ((-83.0, np.exp(80.0)), (-9999.0, np.exp(20.0))):
        x = overflowing(-2.0, q)
        lp = np.full((1, 3, 1), -3.0)
        terms, slopes = terms_and_slopes(lp, loss_inputs(name, x, lp))
        np.testing.assert_allclose([terms[0, 1], slopes[0, 1, 0]], 2 * expected, rtol=1e-5)


def test_the_ratio_of_a_sequence_with_placeholders_is_clamped_too():
    """gspo without a mask takes every position: the mean is huge where one of them is."""
    x = overflowing(0.0, -9999.0)
    lp = np.full((1, 3, 1), -3.0)
    terms, slopes = terms_and_slopes(lp, loss_inputs("gspo", x, lp))
    assert np.isfinite(terms).all() and np.isfinite(slopes).all() and terms[0, 1] == 0


def test_weight_zero_hides_infinity_but_not_nan():
    x = overflowing(0.0, -3.0) | {"weights": np.zeros((1, 3, 1))}
    lp = np.array([[[-np.inf], [-3.0], [np.nan]]])
    terms, _ = terms_and_slopes(lp, loss_inputs("cross_entropy", x, lp))
    assert (terms[0, :2] == 0).all() and np.isnan(terms[0, 2])
