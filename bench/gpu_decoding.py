"""Prompts and decode steps of the base model and of adapters, and both beside training, on an engine that a `Driver`
drives.

Sequences with adapters find the keys and values of the base model's in the prefix cache: whose they are costs the same,
and nothing is prefilled twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from gpu_card import Card
from gpu_driver import Answer, Driver, Work, for_seconds, rates
from gpu_engine import RANK, Model
from gpu_table import Result, Skipped
from machine import num_multiplied

from tx_async.engine.decode_batches import bucket, prefill_rows
from tx_async.engine.kv_cache import token_bytes
from tx_async.wire.worker import (
    BASE_SLOT,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    LoadSampler,
    SampleQuantum,
    SaveAdapter,
    SequenceSpec,
)

KEY = "bench/adapter"
QUANTA_MAX = 32
"""A batch decodes no longer than this, so that its contexts stay about as long as the case says."""
QUANTA_SPARE = 8
"""For the first one, those in flight at the end, and beside training."""
QUANTA_MIN = 8
BESIDE_SECONDS = 1.5
"""Beside training a case takes so many times as long: its quanta take turns."""


class Rollouts:
    """What one engine samples, one batch at a time."""

    def __init__(self, model: Model, driver: Driver, card: Card, seconds: float):
        self.model, self.driver, self.card, self.seconds = model, driver, card, seconds
        self.sampling = driver.engine.sampling
        self.token_bytes = token_bytes(model.decoder, self.sampling.params["embed"].dtype)
        #: (batch, context, adapters) -> tokens/s
        self.rates: dict[tuple[int, int, int], float] = {}
        #: (batch, context) -> seconds until everybody had a token, if all prompts were prefilled for it
        self.first_tokens_s: dict[tuple[int, int], float] = {}
        self._num_loaded = 0

    # ---- adapters

    def load_adapters(self, count: int) -> None:
        """One adapter, saved from training slot 0, in as many sampler slots. Its files are not waited for: it is kept
        in memory."""
        engine, room = self.driver.engine, self.driver.info.num_sampler_slots
        if count > room:
            raise Skipped(f"the memory has room for {room} sampler slots")
        if count > self._num_loaded:
            config = AdapterConfig(rank=RANK)
            engine.execute(SaveAdapter(slot=0, config=config, key=KEY, kind="sampler"), [])
            for slot in range(self._num_loaded, count):
                self.driver.do(LoadSampler(sampler_slot=slot, key=KEY))
            engine.checkpoints.kept(KEY).to_host()
            self._num_loaded = count

    # ---- programs

    def program(self, batch: int, adapters: int) -> str:
        programs = self.sampling.programs
        plain = (name.split() for name in programs if name.startswith("decode "))
        sizes = sorted(int(words[1]) for words in plain if len(words) == 2)
        name = f"decode {bucket(sizes, batch)}"
        return name if adapters or f"{name} base" not in programs else f"{name} base"

    def prefill_programs(self, batch: int, context: int) -> list[str]:
        tiles = batch * -(-context // self.sampling.tile_tokens)
        return [f"prefill {rows}" for rows in set(prefill_rows(tiles, self.sampling.prefill_rows))]

    # ---- prompts

    def long_prompt(self, context: int) -> Result:
        """One prompt, in quanta as the scheduler sends them, until the first token after it. The first of two warms
        up."""
        command = SampleQuantum(decode_steps=1, prefill_tokens=self.driver.info.prefill_tokens)
        seconds = 0.0
        for seed in range(2):
            began = time.perf_counter()
            with self._admitted(1, context, 0, max_tokens=QUANTA_SPARE, seed=seed):
                answers = self.driver.run({"sample": lambda: (command, [])}, _until_a_token)
            seconds = next(answer.at for answer in answers if answer.tokens) - began
        return self._prefilled(1, context, seconds)

    def prompts(self, batch: int, context: int) -> Result:
        """Of the batch that was decoded first with such prompts."""
        seconds = self.first_tokens_s.get((batch, context))
        if seconds is None:
            raise Skipped(f"decode {batch} at {context} did not run")
        return self._prefilled(batch, context, seconds)

    def _prefilled(self, batch: int, context: int, seconds: float) -> Result:
        """FLOP: products of the layers, and those of causal attention."""
        flop = 2 * context * (self.model.num_in_layers + self.model.attention_width * context)
        note = f"{1e3 * seconds:,.0f} ms to the first token" + " of everybody" * (batch > 1)
        return Result(batch * context / seconds, "tokens/s", *self.card.of_flops(batch * flop / seconds), note)

    # ---- decode steps

    def decode(self, batch: int, context: int, adapters: int) -> dict[str, Result]:
        case = decode_case(batch, context, adapters)
        with self._decoding(batch, context, adapters) as quanta:
            answers = self._sample(batch, self.seconds, quanta)
        rate = rates(answers, ["sample"])["sample"]
        self.rates[batch, context, adapters] = rate
        moved, share_of_kv = self._bytes_of_step(batch, context, adapters, answers)
        note = f"{1e3 * batch / rate:.2f} ms a step, {share_of_kv:.0%} of its bytes are KV"
        found = {case: Result(rate, "tokens/s", *self.card.of_bytes(moved * rate / batch), note)}
        base = self.rates.get((batch, context, 0))
        if adapters > 1 and base:
            found[ratio_case(batch, context, adapters)] = Result(rate / base, "")
        return found

    def beside(self, training: Work, batch: int, context: int, adapters: int) -> tuple[Result, Result]:
        """(training, decoding) in turns, as the scheduler gives them, and the share that is left of each alone."""
        seconds = BESIDE_SECONDS * self.seconds
        alone = rates(self.driver.run({"train": training}, for_seconds(self.seconds, ["train"])), ["train"])
        with self._decoding(batch, context, adapters) as quanta:
            half = quanta // 2
            alone |= rates(self._sample(batch, self.seconds / 2, half), ["sample"])
            both = self._sample(batch, seconds, quanta - half, training)
        together = rates(both, ["train", "sample"])
        shares = {kind: together[kind] / alone[kind] for kind in alone}
        notes = {kind: f"{shares[kind]:.0%} of {alone[kind]:,.0f} alone" for kind in alone}
        notes["sample"] += f"; both together {sum(shares.values()):.0%}"
        trained, sampled = (Result(together[kind], "tokens/s", note=notes[kind]) for kind in ("train", "sample"))
        return trained, sampled

    def _sample(self, batch: int, seconds: float, quanta: int, training: Work | None = None) -> list[Answer]:
        """Decode the admitted batch, beside training if there is any."""
        steps = self.sampling.decode_steps
        command = SampleQuantum(decode_steps=steps, prefill_tokens=self.driver.info.prefill_tokens)
        work: dict = {"sample": lambda: (command, [])} | ({"train": training} if training else {})
        answers = self.driver.run(work, for_seconds(seconds, list(work), {"sample": quanta}))
        for answer in answers:
            if answer.kind == "sample" and answer.tokens != batch * steps:
                raise RuntimeError(f"a quantum sampled {answer.tokens} tokens and not {batch * steps}: {answer.reply}")
        return answers

    def _bytes_of_step(self, batch: int, context: int, adapters: int, answers: Sequence[Answer]) -> tuple[float, float]:
        """(what a step must read on average, the share of keys and values)."""
        weights = self.sampling.params["embed"].dtype.itemsize * num_multiplied(self.sampling.params)
        slots = self.driver.engine.samplers
        of_slots = sum(x.nbytes for x in jax.tree.leaves(slots.weights)) / len(slots.scale) * min(adapters, batch)
        position = context + 1 + sum(answer.tokens for answer in answers) / batch / 2
        kv = batch * position * self.token_bytes
        return weights + of_slots + kv, kv / (weights + of_slots + kv)

    # ---- a batch

    @contextmanager
    def _decoding(self, batch: int, context: int, adapters: int) -> Iterator[int]:
        """A batch whose prompts are all prefilled; -> how many quanta it can decode."""
        self.load_adapters(adapters)
        steps = self.sampling.decode_steps
        room = self._room(batch) - context - 1
        quanta = min(QUANTA_MAX, room // steps - QUANTA_SPARE)
        if quanta < QUANTA_MIN:
            raise Skipped(
                f"the KV cache holds {self.sampling.kv_cache_tokens:,} tokens: {self._room(batch):,} for each"
            )
        began = time.perf_counter()
        with self._admitted(batch, context, adapters, (quanta + QUANTA_SPARE) * steps):
            # Nobody shares the budget: half of what is left is always a whole prompt.
            reply = self.driver.do(SampleQuantum(decode_steps=1, prefill_tokens=4 * batch * context))
            if reply.num_running != batch or reply.num_waiting:
                raise RuntimeError(f"{reply.num_running} of {batch} sequences run")
            if reply.num_prefilled_tokens == batch * context:
                self.first_tokens_s[batch, context] = time.perf_counter() - began
            yield quanta

    @contextmanager
    def _admitted(self, batch: int, context: int, adapters: int, max_tokens: int, seed: int = 0) -> Iterator[None]:
        """Prompts of context + 1 tokens, the same ones each time: the last token is the first that is decoded."""
        draws = (np.random.default_rng([context, i, seed]) for i in range(batch))
        prompts = [draw.integers(0, self.driver.info.vocab_size, context + 1).astype(np.int32) for draw in draws]
        sequences = tuple(
            SequenceSpec(
                sequence_id=i,
                sampler_slot=i % adapters if adapters else BASE_SLOT,
                adapter_version="base",
                prompt_index=i,
                max_tokens=max_tokens,
                seed=i,
            )
            for i in range(batch)
        )
        self.driver.do(AdmitSequences(sequences=sequences), prompts)
        try:
            yield
        finally:
            self.driver.do(CancelSequences(sequence_ids=tuple(range(batch))))

    def _room(self, batch: int) -> int:
        """Tokens for each of so many sequences: none ever gives up its pages to another one."""
        page = self.sampling.layout.page_size
        return min(self.sampling.kv_cache_tokens // batch // page * page - 2 * page, self.driver.engine.context)


def _until_a_token(answers: Sequence[Answer]) -> bool:
    return not any(answer.tokens for answer in answers)


def decode_case(batch: int, context: int, adapters: int) -> str:
    of = f", {adapters} adapter{'s' * (adapters > 1)}" if adapters else ""
    return f"decode {batch} at {context}{of}"


def ratio_case(batch: int, context: int, adapters: int) -> str:
    return f"{decode_case(batch, context, adapters)} / none"
