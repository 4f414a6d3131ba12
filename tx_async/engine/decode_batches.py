"""Turns sequences into the arrays of the sampling programs: every shape is one of a short list, the rest is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tx_async.engine.decode_programs import STOP_TOKENS_MAX, DecodeBatch, PrefillBatch, ScoreBatch, seed_words
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.page_tables import num_left
from tx_async.engine.paged_attention import TileStates
from tx_async.engine.platform import Platform
from tx_async.engine.prompt_scores import PromptScoring
from tx_async.engine.sampler import TOPK_MAX
from tx_async.engine.sequences import PrefillPiece, SequenceState
from tx_async.engine.state_slots import NULL_SLOT
from tx_async.wire.worker import BASE_SLOT, INT32_MAX

SCORE_ROWS = 128
"""The prompt positions that one scoring call handles."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""The row counts that decode calls have."""


@dataclass(frozen=True)
class Tile:
    """One row of a prefill call: tokens [start, stop) of a sequence."""

    sample: SequenceState
    start: int
    stop: int
    load: int = NULL_SLOT
    """Slot of the recurrent state before it, unless the row before it in the call is the same sequence's."""
    save: int = NULL_SLOT
    """Slot of a snapshot of the state after it."""


@dataclass(frozen=True)
class ScoringPiece:
    """Consecutive positions of one prompt within a scoring call: its rows `first` … `first + count`."""

    scoring: PromptScoring
    start: int
    first: int
    count: int


def batch_sizes(num_sequences_max: int, platform: Platform) -> tuple[int, ...]:
    """Ascending. When there are more sequences than the last size, some decode in one quantum, the others in the
    next."""
    least, limit = platform.least_decode_rows, platform.decode_rows_max or num_sequences_max
    most = max(least, min(num_sequences_max, limit))
    return (*(size for size in BATCHES if least <= size < most), most)


def bucket(sizes: Sequence[int], count: int) -> int:
    """The smallest of `sizes` (ascending) that is at least `count`; there always is one."""
    return next(size for size in sizes if size >= count)


def prefill_calls(
    segments: Sequence[PrefillPiece], tile_tokens: int, sizes: Sequence[int]
) -> Iterator[tuple[int, list[Tile]]]:
    """The tiles in order, call by call, with each call's row count. A tile reads what earlier tiles have written, also
    within its call."""
    tiles = [tile for segment in segments for tile in _tiles(segment, tile_tokens)]
    for rows in prefill_rows(len(tiles), sizes):
        yield rows, tiles[:rows]
        tiles = tiles[rows:]


def _tiles(segment: PrefillPiece, tile_tokens: int) -> Iterator[Tile]:
    for start in range(segment.start, segment.stop, tile_tokens):
        stop = min(start + tile_tokens, segment.stop)
        load = segment.load if start == segment.start else segment.sample.slot
        yield Tile(segment.sample, start, stop, load, segment.saves.get(stop, NULL_SLOT))


def prefill_rows(num_tiles: int, sizes: Sequence[int]) -> Iterator[int]:
    """The rows of each call: the largest of `sizes` that the remaining tiles fill more than half."""
    while num_tiles > 0:
        rows = max((rows for rows in sizes if num_tiles > rows // 2), default=sizes[0])
        yield rows
        num_tiles -= rows


def page_tables(samples: Sequence[SequenceState], rows: int, layout: CacheLayout) -> np.ndarray:
    """int32 [rows, table_pages], or [tables, rows, table_pages] where there are several: each sequence's pages in
    order, then the null page."""
    tables = np.zeros((layout.paging.num_tables, rows, layout.table_pages), np.int32)
    for row, sample in enumerate(samples):
        for table, (pages, window) in enumerate(zip(sample.tables, layout.paging.windows, strict=False)):
            first = num_left(pages, len(pages)) if window else 0
            tables[table, row, first : len(pages)] = pages[first:]
    return tables if len(tables) > 1 else tables[0]


def prefill_batch(tiles: Sequence[Tile], rows: int, tile_tokens: int, layout: CacheLayout) -> PrefillBatch:
    """One prefill call: a row for each tile, [rows, tile_tokens]; rows without a tile are not alive."""
    tokens = np.zeros((rows, tile_tokens), np.int32)
    start = np.zeros(rows, np.int32)
    adapter = np.full(rows, BASE_SLOT, np.int32)
    states = _tile_states(tiles, rows)
    for row, tile in enumerate(tiles):
        tokens[row, : tile.stop - tile.start] = tile.sample.tokens[tile.start : tile.stop]
        start[row] = tile.start
        adapter[row] = tile.sample.spec.sampler_slot
    tables = page_tables([tile.sample for tile in tiles], rows, layout)
    return PrefillBatch(tokens, start, np.arange(rows) < len(tiles), adapter, tables, states)


def _tile_states(tiles: Sequence[Tile], rows: int) -> TileStates:
    """A sequence's rows stand together and in order; the last one leaves its state in the sequence's slot."""
    count, load, store, save = np.zeros((4, rows), np.int32)
    states = TileStates(count, load, store, save, np.zeros(rows, bool))
    for row, tile in enumerate(tiles):
        states.count[row], states.load[row], states.save[row] = tile.stop - tile.start, tile.load, tile.save
        states.continues[row] = row > 0 and tiles[row - 1].sample is tile.sample
        is_last = row + 1 == len(tiles) or tiles[row + 1].sample is not tile.sample
        states.store[row] = tile.sample.slot if is_last else NULL_SLOT
    return states


def decode_batch(samples: Sequence[SequenceState], rows: int, layout: CacheLayout) -> DecodeBatch:
    """One decode call: a row for each sequence; unused rows have nothing left to sample."""
    specs = [sample.spec for sample in samples]

    def column(values: Sequence, dtype: type, unused: float = 0) -> np.ndarray:
        array = np.full(rows, unused, dtype)
        array[: len(samples)] = values
        return array

    stops = np.full((rows, STOP_TOKENS_MAX), -1, np.int32)
    seeds = np.zeros((rows, 2), np.uint32)
    for row, spec in enumerate(specs):
        listed = spec.stop_token_ids[:STOP_TOKENS_MAX]
        stops[row, : len(listed)] = listed
        seeds[row] = seed_words(spec.seed)
    return DecodeBatch(
        token=column([sample.tokens[-1] for sample in samples], np.int32),
        position=column([len(sample.tokens) - 1 for sample in samples], np.int32),
        # What a grammar allows next is known once the host knows the token before it: one step a quantum.
        remaining=column([min(sample.num_left, 1 if sample.constraint else INT32_MAX) for sample in samples], np.int32),
        adapter=column([spec.sampler_slot for spec in specs], np.int32, BASE_SLOT),
        temperature=column([spec.temperature for spec in specs], np.float32),
        top_k=column([min(spec.top_k, INT32_MAX) for spec in specs], np.int32),
        top_p=column([spec.top_p for spec in specs], np.float32, 1.0),
        seed=seeds,
        sample_index=column([spec.sample_index for spec in specs], np.int32),
        stop_tokens=stops,
        tables=page_tables(samples, rows, layout),
        any_topk=np.bool_(any(spec.topk_logprobs or spec.head_tokens for spec in specs)),
        slot=column([sample.slot for sample in samples], np.int32, NULL_SLOT),
        any_head=np.bool_(any(spec.head_tokens for spec in specs)),
    )


def score_batches(tiles: Sequence[Tile], tile_tokens: int) -> Iterator[tuple[list[ScoringPiece], ScoreBatch]]:
    """Those positions of these tiles that somebody wants scored, SCORE_ROWS at a time."""
    batch, pieces, filled = empty_scores(), [], 0
    for row, tile in enumerate(tiles):
        scoring = tile.sample.scoring
        if scoring is None:
            continue
        start = max(tile.start, scoring.next)
        stop = min(tile.stop, scoring.num_prompt - 1)
        scoring.next = max(scoring.next, stop)
        while start < stop:
            count = min(stop - start, SCORE_ROWS - filled)
            _fill_scores(batch, filled, tile.sample, scoring, start, count, row * tile_tokens + start - tile.start)
            pieces.append(ScoringPiece(scoring, start, filled, count))
            start, filled = start + count, filled + count
            if filled == SCORE_ROWS:
                yield pieces, batch
                batch, pieces, filled = empty_scores(), [], 0
    if pieces:
        yield pieces, batch


def empty_scores() -> ScoreBatch:
    """SCORE_ROWS unused rows, as numpy arrays that `score_batches` fills."""
    rows = SCORE_ROWS
    zeros = lambda: np.zeros(rows, np.int32)  # noqa: E731
    return ScoreBatch(
        row=zeros(),
        adapter=np.full(rows, BASE_SLOT, np.int32),
        next_token=zeros(),
        targets=np.full((rows, TOPK_MAX), -1, np.int32),
        temperature=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        sample_index=zeros(),
        position=zeros(),
        any_topk=np.zeros((), np.bool_),
        any_alt=np.zeros((), np.bool_),
    )


def _fill_scores(
    batch: ScoreBatch, first: int, sample: SequenceState, scoring: PromptScoring, start: int, count: int, row: int
) -> None:
    """Positions start … start + count, whose hidden states begin at `row`, become rows `first` … of the batch."""
    rows = slice(first, first + count)
    arrays = batch._asdict()
    arrays["row"][rows] = np.arange(row, row + count)
    arrays["adapter"][rows] = sample.spec.sampler_slot
    arrays["next_token"][rows] = sample.tokens[start + 1 : start + count + 1]
    arrays["temperature"][rows] = sample.spec.temperature
    arrays["seed"][rows] = seed_words(sample.spec.seed)
    arrays["sample_index"][rows] = sample.spec.sample_index
    arrays["position"][rows] = np.arange(start + 1, start + count + 1)
    if scoring.targets is not None:
        arrays["targets"][rows, : scoring.targets.shape[1]] = scoring.targets[start : start + count]
    arrays["any_topk"] |= scoring.wanted.topk > 0
    arrays["any_alt"] |= scoring.wanted.alt_tokens_k > 0
