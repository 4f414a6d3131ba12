"""What happens before an external engine's worker is ready: wait for the engine, check that it is the right one, and
let it sample a trial."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np

from tx_async.errors import BaseModelError, ConfigError
from tx_async.storage.store import Store
from tx_async.wire.worker import BASE_SLOT, EngineConfig, EngineInfo, SequenceSpec, Trial
from tx_async.worker import external_trial
from tx_async.worker.dialect import Dialect, EncodedPrompt, RejectedByEngine, Served, Unreachable
from tx_async.worker.engine_api import ReportProgress
from tx_async.worker.external_adapters import AdapterFolder
from tx_async.worker.external_trial import Subject

NUM_SEQUENCES_MAX = 256
"""Requests in flight at once; the engine itself queues those beyond its own limit."""
RETRY_S = 1.0
ATTEMPT_S = 900.0
"""Time for one attempt: an engine's first samples may wait for its compiler."""

logger = logging.getLogger(__name__)


class Attachment:
    """What is needed to find out whether an engine may serve."""

    def __init__(self, dialect: Dialect, adapters: AdapterFolder, store: Store, config: EngineConfig, base_model: str):
        self.dialect, self.adapters, self.store, self.config = dialect, adapters, store, config
        self.base_model = base_model

    @property
    def named(self) -> str:
        return named(self.dialect)

    async def wait(self, subject: Subject, progress: ReportProgress) -> tuple[Served, EngineInfo]:
        """Wait until the engine answers, for as long as it takes. Raises `ConfigError` when it cannot serve this
        server."""
        said = ""
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    return await self._try(subject, progress)
            except (Unreachable, TimeoutError) as error:
                reason = str(error) or "it is not ready in time"
            except RejectedByEngine as error:
                if not error.is_failure:
                    raise ConfigError(f"{self.named} cannot be used: {error.message} ({error.status}).") from error
                reason = f"{error.message} ({error.status})"
            progress(f"waiting for {self.named}", 0, 0)
            if reason != said:
                logger.warning("waiting for %s: %s", self.named, reason)
                said = reason
            await asyncio.sleep(RETRY_S)

    async def _try(self, subject: Subject, progress: ReportProgress) -> tuple[Served, EngineInfo]:
        dialect = self.dialect
        await dialect.check_health()
        if untested := dialect.why_untested(await dialect.version()):
            logger.warning("%s", untested)
        served = await dialect.served()
        if not same_model(self.base_model, served):
            raise ConfigError(f"{self.named} serves {served.root}, this server {self.base_model}.")
        await self._remove_leftovers(served)
        progress(f"trying {self.named}", 0, 0)
        trial = await self._sample_trial(subject, served)
        topk = await largest(dialect.limits.topk_logprobs_max, lambda k: self._returns_candidates(served, k))
        info = self._describe(subject, served, trial, topk)
        logger.info("%s serves %s: context %d, %d candidates", self.named, served.root, info.max_context_length, topk)
        return served, info

    async def _remove_leftovers(self, served: Served) -> None:
        """Remove the adapters of this worker's earlier life."""
        for name in filter(self.adapters.is_own, served.adapters):
            with contextlib.suppress(RejectedByEngine):
                await self.dialect.unload_adapter(name)
        self.adapters.remove_leftovers()

    async def _sample_trial(self, subject: Subject, served: Served) -> Trial:
        key = await asyncio.to_thread(external_trial.save_adapter, self.store, subject)
        name, folder = await asyncio.to_thread(self.adapters.write, key, served.root)
        try:
            await self._load(name, folder)
            sequences = await external_trial.sample(self.dialect, served.name, name, subject.model.vocab_size)
            with contextlib.suppress(RejectedByEngine):
                await self.dialect.unload_adapter(name)
        finally:
            self.adapters.remove(name)
        return Trial(key=key, sequences=sequences, tolerance=subject.tolerance)

    async def _load(self, name: str, folder: str) -> None:
        try:
            await self.dialect.load_adapter(name, folder)
        except RejectedByEngine as error:
            await self.dialect.check_health()
            raise ConfigError(
                f"{self.named} does not load adapters from {folder}: {error.message} ({error.status}). "
                f"{self.dialect.how_to_load_adapters}"
            ) from error

    async def _returns_candidates(self, served: Served, number: int) -> bool:
        """Whether the engine returns `number` log-probabilities for each token."""
        try:
            await self.dialect.complete(served.name, EncodedPrompt(np.zeros(1, np.int32)), probe_spec(number))
        except RejectedByEngine as error:
            if error.is_failure:
                raise
            return False
        return True

    def _describe(self, subject: Subject, served: Served, trial: Trial, topk: int) -> EngineInfo:
        config = self.config
        contexts = (subject.model.max_position_embeddings, config.max_context_length, served.max_context_length)
        context = min(limit for limit in contexts if limit)
        return EngineInfo(
            vocab_size=subject.model.vocab_size,
            max_context_length=context,
            row_shapes=(),
            row_length_preferred=0,
            target_tokens_k=(1,),
            num_training_slots=0,
            num_sampler_slots=config.max_sampler_adapters,
            max_lora_rank=config.max_lora_rank,
            num_sequences_max=NUM_SEQUENCES_MAX,
            decode_steps=context,
            prefill_tokens=context,
            platform=self.dialect.product.lower(),
            continuous=True,
            limits=msgspec.structs.replace(self.dialect.limits, topk_logprobs_max=topk),
            trial=trial,
        )


def read_subject(base_model: str, allow_unproven: bool) -> Subject:
    """Raises `BaseModelError` for a model whose adapters external engines may not apply as we do."""
    subject = external_trial.read_subject(base_model)
    if subject.has_experts and not allow_unproven:
        raise BaseModelError(
            f"{base_model} is a mixture of experts, whose adapters external engines are not proven to apply: "
            "--vllm-allow-unproven (external_inference_allow_unproven of the server) tries it all the same."
        )
    return subject


def named(dialect: Dialect) -> str:
    return f"{dialect.product} at {dialect.url}"


def same_model(base_model: str, served: Served) -> bool:
    """Compares the last part of the names: a folder may be mounted elsewhere, and a hub name may be a folder here. The
    trial shows whether the weights agree."""
    last = base_model.rstrip("/").rpartition("/")[2]
    return any(name.rstrip("/").rpartition("/")[2] == last for name in (served.root, served.name))


async def largest(limit: int, is_allowed: Callable[[int], Awaitable[bool]]) -> int:
    """The largest number up to `limit` that is allowed, when all below it are."""
    if await is_allowed(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await is_allowed(middle) else (low, middle)
    return low


def probe_spec(topk: int = 0) -> SequenceSpec:
    return SequenceSpec(
        sequence_id=0, sampler_slot=BASE_SLOT, adapter_version="", prompt_index=0, max_tokens=1, temperature=0.0,
        topk_logprobs=topk,
    )  # fmt: skip
