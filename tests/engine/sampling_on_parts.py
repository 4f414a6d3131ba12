"""Draws and prompt scores on meshes whose devices have a part of the vocabulary each, against those of one device, from
the same logits. A part of `sharding_on_eight_devices.py`.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from tx_async.engine import decode_programs as programs
from tx_async.engine.decode_programs import ScoreBatch
from tx_async.engine.platform import current
from tx_async.engine.sampler import Choices, stream_key
from tx_async.engine.shaping import Shaping, shaping_of, tally
from tx_async.engine.sharding import make_mesh
from tx_async.engine.vocabulary import Cuts
from tx_async.wire.worker import EngineConfig

ROWS, CANDIDATES, STEPS = 8, 5, 12
CASES = (
    ((1, 1, 8), 1024, False),  # parts of whole segments
    ((2, 2, 2), 1003, True),  # a vocabulary that the devices do not divide, parts that begin within a segment, cut rows
)
"""(fsdp, expert, tensor), vocabulary, whether logits are shaped"""
NAN_ROW = 7


def differing() -> dict[str, list[str]]:
    """case -> the results of a mesh that are not those of one device."""
    return {f"{sizes} {vocab}": _differing(sizes, vocab, is_shaped) for sizes, vocab, is_shaped in CASES}


def _differing(sizes: tuple[int, int, int], vocab: int, is_shaped: bool) -> list[str]:
    fsdp, expert, tensor = sizes
    config = EngineConfig(
        fully_sharded_data_parallel_size=fsdp, expert_parallel_size=expert, tensor_parallel_size=tensor
    )
    logits, shaping = logits_of(vocab), shaping_of_rows(vocab) if is_shaped else None
    alone, on_mesh = (_results(Cuts.of(mesh, vocab, ROWS), logits, shaping) for mesh in (None, make_mesh(config)))
    return [name for name in alone if not _equal(alone[name], on_mesh[name])]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Tokens are the same ones; sums of several devices are added in another order. Of NaN nobody wants to know more
    than that it stays in its row."""
    a, b = a[:NAN_ROW], b[:NAN_ROW]
    return np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) if a.dtype == np.float32 else bool((a == b).all())


def _results(cuts: Cuts, logits: np.ndarray, shaping: Shaping | None) -> dict[str, np.ndarray]:
    rows, all_rows, v = cuts.rows, PartitionSpec(), cuts.vocabulary
    draw = partial(programs._draw, current(), v, CANDIDATES)
    draw = jax.jit(cuts.run(draw, (cuts.logits, rows, all_rows, rows, cuts.parts), (rows, cuts.parts)))
    spread = jax.jit(cuts.run(lambda shaping: tally(shaping, v), (rows,), cuts.parts))
    told = None if shaping is None else spread(shaping)
    token, found = np.zeros(ROWS, np.int32), []
    for step in range(STEPS):
        alive, wanted = np.arange(ROWS) != step, (np.True_, np.bool_(step < 3))
        place = np.full(ROWS, step, np.int32)
        of_rows: Any = (choices(), place, place, token, alive)
        row = programs._Row(*of_rows)
        drawn, told = draw(np.roll(logits, 97 * step, axis=1), row, wanted, shaping, told)
        token = drawn.token
        found.append(drawn._asdict())
    results = {name: np.stack([np.asarray(step[name]) for step in found], axis=1) for name in found[0]}
    if told is not None:
        results |= {f"tally {name}": np.asarray(x)[:, : v.size] for name, x in told._asdict().items()}
    of_batch: Any = ScoreBatch(*[rows] * 10)._replace(any_topk=all_rows, any_alt=all_rows)
    score = jax.jit(cuts.run(partial(programs._scores, v), (cuts.logits, of_batch), rows))
    names = ("next", "topk", "topk logprobs", "targets", "alt", "alt logprobs")
    scores = score(logits, scored(v.size))
    return results | {name: np.asarray(x) for name, x in zip(names, scores, strict=True)}


def logits_of(vocab: int) -> np.ndarray:
    """Rows of few values, so that equals stand on several devices at every edge; and one of NaN."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((ROWS, vocab)) * 3).astype(np.float32)
    logits[1::2] = np.round(logits[1::2])
    logits[5] = 0.25
    logits[NAN_ROW, vocab // 3 :] = np.nan
    return logits


def choices() -> Choices:
    """Greedy, plain, top-k, top-p and both among equals, and of equals alone."""
    seeds = np.arange(2 * ROWS, dtype=np.uint32).reshape(ROWS, 2)
    return Choices(
        temperature=np.float32([1.0, 0.0, 0.7, 1.0, 1.0, 1.0, 3.0, 1.0]),  # type: ignore[arg-type]
        top_k=np.int32([0, 0, 20, 7, 0, 0, 400, 3]),  # type: ignore[arg-type]
        top_p=np.float32([1.0, 1.0, 1.0, 0.8, 0.6, 0.3, 0.95, 0.5]),  # type: ignore[arg-type]
        key=jax.jit(stream_key)(seeds, np.zeros(ROWS, np.int32)),
    )


def shaping_of_rows(vocab: int) -> Shaping:
    """Every row asks for everything; one has a grammar."""
    rng = np.random.default_rng(0)
    asks = shaping_of([], ROWS, 40, vocab)
    allowed = np.full((ROWS, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    allowed[2] = rng.integers(0, 2**32, allowed.shape[1], np.uint32)
    full = partial(np.full, ROWS)
    asks = asks._replace(
        presence=full(np.float32(0.5)),
        frequency=full(np.float32(0.25)),
        repetition=full(np.float32(1.3)),
        min_tokens=full(np.int32(4)),
        num_prompt=full(np.int32(30)),
        text=rng.integers(0, vocab, asks.text.shape, np.int32),
        allowed=allowed,
    )
    asks.bias_tokens[:, :9] = rng.integers(0, vocab, (ROWS, 9))
    asks.bias[:, :9] = 2.0
    asks.held_back[:, :50] = rng.integers(0, vocab, (ROWS, 50))
    return asks


def scored(vocab: int) -> ScoreBatch:
    rng = np.random.default_rng(1)
    return ScoreBatch(
        row=np.arange(ROWS, dtype=np.int32),
        adapter=np.full(ROWS, -1, np.int32),
        next_token=rng.integers(0, vocab, ROWS, np.int32),
        targets=rng.integers(-1, vocab, (ROWS, 16), np.int32),
        temperature=np.ones(ROWS, np.float32),
        seed=np.zeros((ROWS, 2), np.uint32),
        sample_index=np.arange(ROWS, dtype=np.int32),
        position=np.arange(ROWS, dtype=np.int32),
        any_topk=np.True_,
        any_alt=np.True_,
    )
