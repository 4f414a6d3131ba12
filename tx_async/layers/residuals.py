"""What a layer keeps for its backward pass: the outputs of its large products; all between them is recomputed.

Elementwise work is cheap to repeat, but its results are as large as those of the products: without this choice a layer
keeps twice as much memory, and moving it costs more than recomputing it.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
KEPT_ONLY = jax.checkpoint_policies.save_only_these_names(NAME)
"""Policy of `jax.checkpoint`."""


def keep(x: Any) -> Any:
    """Mark arrays that are worth their memory."""
    return checkpoint_name(x, NAME)
