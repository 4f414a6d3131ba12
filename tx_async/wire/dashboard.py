"""Server ⇄ browsers and whoever plots a run: what hosted Tinker has no route for."""

from __future__ import annotations

from msgspec import Struct


class TrainingRunHistory(Struct, kw_only=True):
    """What a run has been through, thinned with age."""

    training_run_id: str
    columns: list[str]
    """Every name that some step has a number for."""
    steps: list[dict[str, float]]
    """Oldest first: `index` counts the run's optimizer steps from 0, `step` is the optimizer's own count, `started_at`
    and `finished_at` are seconds since the epoch, `tokens`, `sequences` and `num_batches` what was trained on, and the
    metrics what forward_backward and optim_step have reported, added up by the part behind the colon."""
