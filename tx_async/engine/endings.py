"""Where a sequence ends: stop tokens, stop strings, its length; or because its grammar cannot go on."""

from __future__ import annotations

from tx_async.engine.decode_programs import STOP_TOKENS_MAX
from tx_async.engine.sequences import SequenceState
from tx_async.grammar import GrammarError


def obey(sample: SequenceState, count: int) -> str:
    """Tell a sequence's grammar the tokens that have come; -> why it cannot go on, "" where it can."""
    try:
        if count and sample.constraint:
            sample.constraint.accept(sample.tokens[-count:])
    except GrammarError as error:
        return f"grammar: {error.message}"
    return ""


def ending(sample: SequenceState, tokens: list[int]) -> tuple[int, str | None]:
    """-> (how many of the new tokens stay, why it ends with them)."""
    stop_ids = sample.spec.stop_token_ids
    count = len(tokens)
    if len(stop_ids) > STOP_TOKENS_MAX:
        count = next((n for n, token in enumerate(tokens, 1) if token in stop_ids), count)
    if sample.stops:
        too_early = min(count, max(0, sample.spec.min_tokens - (len(sample.tokens) - sample.num_prompt)))
        sample.stops.pass_over(tokens[:too_early])
        completed = sample.stops.feed(tokens[too_early:count])
        if completed is not None:
            return too_early + completed, "stop"
    if count and tokens[count - 1] in stop_ids:
        return count, "stop"
    return count, "length" if len(sample.tokens) + count >= sample.limit else None
