"""Every kernel that the engine knows, beside its plain version, on the device: what differs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tx_async.engine.kernels import (
    Differences,
    Paged,
    TrainedHeads,
    flash_differences,
    grouped_differences,
    paged_difference,
    prefill_difference,
)

HEADS = {
    "": TrainedHeads(128, 128),
    ", Mistral": TrainedHeads(128, 128, has_window=True),
    ", gpt-oss": TrainedHeads(64, 64, has_window=True, has_sinks=True),
    ", Phi-3": TrainedHeads(96, 96),
    ", DeepSeek V3": TrainedHeads(192, 128),
    ", Gemma 3": TrainedHeads(256, 256, has_window=True),
}
OVER_PAGES = {
    "": Paged(features=128),
    ", gpt-oss": Paged(features=64, has_sinks=True),
    ", Gemma 3": Paged(features=256),
    ", DeepSeek V3": Paged(128, 576, 512),
    ", DeepSeek V3 on eight devices": Paged(16, 576, 512),
}


def comparisons() -> dict[str, Callable[[], Differences]]:
    return {
        **{
            f"flash_attention {case.features}/{case.values}{kind}": partial(flash_differences, case)
            for kind, case in HEADS.items()
        },
        "grouped_product": grouped_differences,
        **{
            f"{name} {case.features}{kind}": partial(_forward_only, difference, case)
            for name, difference in (("paged_attention", paged_difference), ("paged_prefill", prefill_difference))
            for kind, case in OVER_PAGES.items()
        },
    }


def interpreted() -> dict[str, Callable[[], Differences]]:
    """What a CPU can try in little time; the suite tries the others."""
    return {"paged_prefill, interpreted": lambda: _forward_only(prefill_difference, Paged(), True)}


def _forward_only(difference: Callable[[Paged, bool], float], case: Paged, interpret: bool = False) -> Differences:
    return Differences(difference(case, interpret))
