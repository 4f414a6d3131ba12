"""A run's history: the reports of its forward_backwards and optimizer steps, as rows that join their commits.

Only reported results count, so an operation that runs again for its effect is not counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import numpy as np

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.history import INDEX, gathered
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.training.lanes import Step
from tx_async.scheduler.training.rollout_gap import num_sampled
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.records import Change
from tx_async.wire.worker import Stepped

METRICS_MAX = 32
"""How many names one step may have: a custom engine may report any."""


class HistoryRecorder:
    """Makes the rows. It has no state of its own: they are in the catalog."""

    def __init__(self, decisions: Decisions, policy: Policy):
        self.decisions = decisions
        self.policy = policy

    def trained(self, step: Step, operation: ForwardBackward, metrics: Mapping[str, float]) -> tuple[Change, ...]:
        """A forward_backward is about to be reported, and its gradients wait for an optimizer step."""
        histories = self.decisions.catalog.histories
        batch = {
            "started_at": step.request.created_at,
            "num_batches": 1.0,
            "sequences": float(len(operation.data)),
            "tokens": float(sum(datum.num_tokens for datum in operation.data)),
            **_finite(metrics),
        }
        if (weights := _sum_of_weights(operation)) is not None:
            batch["weights:sum"] = weights
        row = gathered(histories.gathering(step.model_id), batch, num_sampled(operation))
        return histories.gather(step.model_id, row)

    def stepped(self, step: Step, result: Stepped) -> tuple[Change, ...]:
        """An optimizer step is about to be reported."""
        histories = self.decisions.catalog.histories
        row = {
            INDEX: histories.next_index(step.model_id),
            "started_at": step.request.created_at,
            **histories.gathering(step.model_id),
            **_finite(result.metrics),
            "step": float(result.step),
            "finished_at": self.decisions.now,
        }
        return histories.append(step.model_id, row, self.policy.history_steps_max)

    def dropped(self, model_id: str) -> tuple[Change, ...]:
        """The gradients so far belong to no step."""
        return self.decisions.catalog.histories.drop_gathered(model_id)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    finite = ((name, float(value)) for name, value in metrics.items() if math.isfinite(value))
    return dict(islice(finite, METRICS_MAX))


def _sum_of_weights(operation: ForwardBackward) -> float | None:
    """The divisor that makes a mean of cross_entropy's `loss:sum`; None for losses without weights."""
    if operation.loss_fn != "cross_entropy":
        return None
    return math.fsum(
        float(np.sum(inputs["weights"].numpy(), dtype=np.float64)) if "weights" in inputs else _num_targets(datum)
        for datum in operation.data
        for inputs in (datum.loss_fn_inputs,)
    )


def _num_targets(datum: Datum) -> float:
    return float(math.prod(datum.loss_fn_inputs["target_tokens"].shape))
