"""Which sequences wait, which run, and what the next quantum does for each: the host's side of continuous batching.

It is pure bookkeeping, a function of the calls and their order, without clock or device. `schedule` decides,
`decode.py` dispatches. A sequence waits, then is prefilled (all of its tokens but the last one, in chunks that begin at
page boundaries), then decodes: a decode step computes the last token and samples the next. When pages run out the
youngest running sequence goes back to the head of the queue; its tokens are kept, so it continues where it was.
Sequences that somebody watches (`SequenceSpec.stream`) come first where there is no room for all: they are prefilled
first, decode in every quantum, and give way last. Nothing here outlives the process: after its death the scheduler
admits the samples again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse, takewhile

import numpy as np

from tx_async.engine.page_tables import PageTables, Tables, owned
from tx_async.engine.prefix_cache import PageKey, PageKeys, PrefixCache
from tx_async.engine.prompt_scores import PromptScoring
from tx_async.engine.sequence_times import Times
from tx_async.engine.state_slots import NULL_SLOT, StateSlots
from tx_async.engine.stops import StopStrings
from tx_async.grammar import Constraint
from tx_async.wire.worker import SequenceSpec

PromptKey = tuple[str, bytes]


@dataclass(eq=False)
class SequenceState:
    """One sequence, from admission to its end."""

    order: int
    """Its place in the line: lower is older."""
    spec: SequenceSpec
    prompt_key: PromptKey
    num_prompt: int
    limit: int
    """How many tokens, prompt included, it may have at its end."""
    tokens: list[int]
    keys: PageKeys
    stops: StopStrings | None = None
    constraint: Constraint | None = None
    """What its grammar allows next; None where it has no grammar."""
    scoring: PromptScoring | None = None
    tables: Tables = field(default_factory=list)
    """Its pages, in each of its page tables."""
    slot: int = NULL_SLOT
    """The slot of its recurrent state while it runs."""
    loads: int = NULL_SLOT
    """The slot in which its next tile finds the state before it: a snapshot's, then its own."""
    shared_tokens: int = 0
    """Whole pages of its prompt that others had computed without a snapshot at their end, which is then worth
    making."""
    num_computed: int = 0
    """How many tokens have their keys and values in its pages, or had them; all but one while it decodes."""
    last_turn: int = 0
    """The quantum in which it last decoded, or in which it began."""
    num_cached: int = 0
    """How many prompt tokens it found in the prefix cache when it was first admitted."""
    was_admitted: bool = False
    times: Times = field(default_factory=Times)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    heads: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """(token ids, probabilities, whether they are complete) of the recorded draws, a piece for each quantum."""

    @property
    def num_to_prefill(self) -> int:
        return len(self.tokens) - 1 - self.num_computed

    @property
    def scoring_start(self) -> int | None:
        """The first position whose hidden state must still be computed for its prompt scores."""
        return None if self.scoring is None or self.scoring.is_planned else self.scoring.next

    @property
    def num_left(self) -> int:
        """How many tokens it may still sample."""
        return self.limit - len(self.tokens)


@dataclass(frozen=True)
class PrefillPiece:
    """Tokens [start, stop) of a sequence that one quantum prefills; start is a multiple of the page size."""

    sample: SequenceState
    start: int
    stop: int
    load: int = NULL_SLOT
    """Slot of the recurrent state before it."""
    saves: dict[int, int] = field(default_factory=dict)
    """position -> slot of the snapshot of the state after that many tokens."""


@dataclass
class Schedule:
    """What a quantum does, in this order."""

    prefill: list[PrefillPiece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source page, target page)"""
    state_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source slot, target slot)"""
    decoding: list[SequenceState] = field(default_factory=list)
    num_preempted: int = 0


class Sequences:
    """Owner of every sequence between admission and end, and of their pages."""

    def __init__(
        self,
        cache: PrefixCache,
        num_running_max: int,
        num_decoding_max: int,
        states: StateSlots | None = None,
        windows: tuple[int, ...] = (0,),
    ):
        """num_decoding_max: sequences that one quantum decodes; more take turns. states: the slots of a model with
        recurrent layers. windows: those of the page tables, as `Paging` has them."""
        self.cache = cache
        self.pages = PageTables(cache, windows)
        self.states = states or StateSlots()
        self.num_running_max = num_running_max
        self.num_decoding_max = num_decoding_max
        #: the newest quantum's number, its decode steps, and the tokens that it computes of one sequence at most
        self._turn = 0
        self._decode_steps = 0
        self._ahead = 0
        #: oldest first; disjoint from `running`
        self.waiting: deque[SequenceState] = deque()
        #: by order, oldest first: prefilling or decoding; only these own pages
        self.running: list[SequenceState] = []
        #: pages that this quantum copies from: nobody may get them before its end
        self._held: list[int] = []
        #: running sequences of each prompt, oldest first
        self._by_prompt: dict[PromptKey, list[SequenceState]] = {}

    def __repr__(self) -> str:
        return f"<Sequences [{len(self.running)} running, {len(self.waiting)} waiting | {self.cache!r}]>"

    @property
    def num_decoding(self) -> int:
        return sum(sample.num_to_prefill == 0 for sample in self.running)

    def admit(self, sample: SequenceState) -> None:
        watched = sum(1 for _ in takewhile(_is_watched, self.waiting))
        self.waiting.insert(watched if _is_watched(sample) else len(self.waiting), sample)

    def cancel(self, sequence_ids: Iterable[int]) -> None:
        ids = set(sequence_ids)
        self.waiting = deque(sample for sample in self.waiting if sample.spec.sequence_id not in ids)
        for sample in [sample for sample in self.running if sample.spec.sequence_id in ids]:
            self.finish(sample)

    def finish(self, sample: SequenceState) -> None:
        """The sequence leaves; what it computed can still be found in the prefix cache."""
        self._register(sample, min(sample.num_computed, len(sample.tokens)))
        self.pages.release(sample.tables)
        self.states.release(sample.slot)
        sample.tables, sample.slot = [], NULL_SLOT
        self.running.remove(sample)
        mates = self._by_prompt[sample.prompt_key]
        mates.remove(sample)
        if not mates:
            del self._by_prompt[sample.prompt_key]

    # ---- one quantum

    def schedule(self, decode_steps: int, prefill_tokens: int, only_first_tokens: bool = False) -> Schedule:
        """Decide a quantum (see `SampleQuantum`). Afterwards `num_computed` counts what its prefill will have
        computed."""
        schedule = Schedule()
        self._decode_steps, self._ahead = decode_steps, prefill_tokens + decode_steps
        self.states.begin()
        self._leave_windows()
        self._reserve(schedule)
        budget = self._continue_prefill(prefill_tokens, schedule)
        if not schedule.num_preempted:
            self._admit_waiting(budget, schedule)
        self.cache.release(self._held)
        self._held = []
        schedule.decoding = self._decoding(only_first_tokens)
        return schedule

    def _decoding(self, only_first_tokens: bool) -> list[SequenceState]:
        """Which sequences decode now. Where not all can, up to three quarters of the places go to watched sequences,
        those that waited longest first."""
        self._turn += 1
        ready = [sample for sample in self.running if sample.num_to_prefill == 0]
        if only_first_tokens:
            ready = list(filter(_awaits_first_token, ready)) or ready
        if len(ready) > self.num_decoding_max:
            watched = sorted(filter(_is_watched, ready), key=lambda sample: (sample.last_turn, sample.order))
            watched = watched[: self.num_decoding_max - self.num_decoding_max // 4]
            others = [sample for sample in ready if sample not in watched]
            ready = watched + self._most_urgent(others, self.num_decoding_max - len(watched))
        for sample in ready:
            sample.last_turn = self._turn
        return ready

    def _most_urgent(self, ready: list[SequenceState], num_places: int) -> list[SequenceState]:
        """A quarter of the places goes to the sequences nearest to their end: only a finished sequence is worth
        anything to its client. The other places go by tokens left times quanta waited: a client of many sequences waits
        for the longest, which must not be left to run alone at the end.
        """
        ready.sort(key=lambda sample: (sample.num_left, sample.order))
        near = num_places // 4
        others = sorted(
            ready[near:],
            key=lambda sample: (-sample.num_left * (self._turn - sample.last_turn), sample.order),
        )
        return ready[:near] + others[: num_places - near]

    def _leave_windows(self) -> None:
        """Free the pages that lie before the windows of their layers. Those of a prompt can still be found; nobody goes
        on from the middle of a completion."""
        if any(self.pages.windows):
            for sample in self.running:
                keys = sample.keys.upto(sample.tokens, min(sample.num_computed, sample.num_prompt))
                self.pages.leave(sample.tables, sample.num_computed, keys)

    def _reserve(self, schedule: Schedule) -> None:
        """Allocate pages for the next tokens of every running sequence; the youngest gives way, unwatched ones before
        watched ones."""
        for sample in list(self.running):
            # One without tables was preempted a moment ago.
            while sample.tables and not self._has_next_pages(sample, sample.tables, sample.num_computed):
                victim = next(filterfalse(_is_watched, reversed(self.running)), self.running[-1])
                self._preempt(victim)
                schedule.num_preempted += 1

    def _preempt(self, sample: SequenceState) -> None:
        self.finish(sample)
        sample.num_computed = 0
        self.waiting.appendleft(sample)

    def _continue_prefill(self, budget: int, schedule: Schedule) -> int:
        """Continue the prompts under way, watched ones first, then the oldest; none takes more than half of a quantum
        that another prompt needs too."""
        unfinished = [sample for sample in self.running if sample.num_to_prefill]
        unfinished.sort(key=_is_watched, reverse=True)
        for sample in unfinished:
            contested = len(unfinished) > 1 or self._has_room
            budget -= self._prefill(sample, self._share(budget, contested), schedule)
        return budget

    def _admit_waiting(self, budget: int, schedule: Schedule) -> None:
        skipped: list[SequenceState] = []
        while self._has_room:
            sample = self.waiting.popleft()
            if self._leader_under_way(sample):
                skipped.append(sample)
                continue
            if not self._start(sample, budget, schedule):
                skipped.append(sample)
                break
            budget -= self._prefill(sample, self._share(budget, self._has_room), schedule)
        self.waiting.extendleft(reversed(skipped))

    @property
    def _has_room(self) -> bool:
        """Whether a sequence waits and may run."""
        return bool(self.waiting) and len(self.running) < self.num_running_max

    def _share(self, budget: int, contested: bool) -> int:
        return max(0, budget // 2 if contested and budget >= 8 * self.cache.page_size else budget)

    def _leader_under_way(self, sample: SequenceState) -> bool:
        """Whether its prompt is being computed for an earlier sequence: then it waits, and shares the pages."""
        if not self.cache.enabled or sample.scoring_start is not None:
            return False
        return any(mate.num_computed < mate.num_prompt - 1 for mate in self._by_prompt.get(sample.prompt_key, ()))

    def _start(self, sample: SequenceState, budget: int, schedule: Schedule) -> bool:
        """Give a sequence its pages, shared ones first. False when there is no room, or no budget to prefill it."""
        end = len(sample.tokens) - 1
        keys = sample.keys.upto(sample.tokens, self._cacheable(sample))
        borders = self.pages.borders(keys)
        source, state, border = self._tail_source(sample, borders[-1]), NULL_SLOT, borders[-1]
        if self.states.enabled:
            source, state, border = self._with_state(sample, keys, borders, source)
        tables, matched = self.pages.take(keys, border), border * self.cache.page_size
        remaining = 0 if source else end - matched
        if (remaining and not budget) or not self._has_pages_for(sample, tables, end if source else matched):
            self.cache.release(source)
            self.pages.release(tables)
            return False
        schedule.copies += [(page, pages[border]) for page, pages in zip(source, tables, strict=False)]
        self._held += source
        self._run(sample, tables, end if source else matched)
        sample.slot, sample.loads = self.states.take(), state
        if not remaining and state:
            schedule.state_copies.append((state, sample.slot))
        return True

    def _has_pages_for(self, sample: SequenceState, tables: Tables, num_computed: int) -> bool:
        """Give a newcomer's tables their first pages, if there is room for all that it will need. The running ones may
        need pages soon, too: without room for those the newcomer would only be preempted again."""
        soon = sum(len(other.tables) + self._to_come(other, other.tables) for other in self.running)
        if self.running and self._to_come(sample, tables) + soon > self.cache.num_available:
            return False
        return self._has_next_pages(sample, tables, num_computed)

    def _to_come(self, sample: SequenceState, tables: Tables) -> int:
        return self.pages.still_to_come(tables, self._needed(sample), self._ahead)

    def _with_state(
        self, sample: SequenceState, keys: Sequence[PageKey], borders: Sequence[int], source: list[int]
    ) -> tuple[list[int], int, int]:
        """The part of a known prefix that has a state: -> (its last page in part, the state's slot, its border)."""
        end = len(sample.tokens) - 1
        if source:
            tail = sample.keys.tail(sample.tokens, end)
            if tail and (state := self.states.find(tail, after_prefill=True)) is not None:
                return source, state, borders[-1]
            self.cache.release(source)
        sample.shared_tokens = borders[-1] * self.cache.page_size
        for border in reversed(borders[1:]):
            whole = border * self.cache.page_size == end  # nothing is left to prefill: the state is copied afterwards
            state = self.states.find(keys[border - 1], after_prefill=whole)
            if state is not None:
                return [], state, border
        return [], NULL_SLOT, 0

    def _run(self, sample: SequenceState, tables: Tables, num_computed: int) -> None:
        sample.tables, sample.num_computed, sample.last_turn = tables, num_computed, self._turn
        if not sample.was_admitted:
            sample.was_admitted, sample.num_cached = True, num_computed
        place = sum(other.order < sample.order for other in self.running)
        self.running.insert(place, sample)
        self._by_prompt.setdefault(sample.prompt_key, []).append(sample)

    def _cacheable(self, sample: SequenceState) -> int:
        """How many tokens may come from the cache: not the last one, and none whose hidden state is still wanted."""
        start = sample.scoring_start
        return len(sample.tokens) - 1 if start is None else min(start, len(sample.tokens) - 1)

    def _tail_source(self, sample: SequenceState, border: int) -> list[int]:
        """The page of each table, with a reference, copies of which complete `sample`'s tokens but for the last one."""
        end = len(sample.tokens) - 1
        if border != end // self.cache.page_size or sample.scoring_start is not None:
            return []
        key = sample.keys.tail(sample.tokens, end)
        return self.pages.tail(key) if key else []

    def _prefill(self, sample: SequenceState, share: int, schedule: Schedule) -> int:
        """Plan the next chunk of a prompt; -> the tokens that it costs, rounded up to whole pages: a partial page costs
        as much as a whole one."""
        start, end = sample.num_computed, len(sample.tokens) - 1
        stop = end if end - start <= share else start + share // self.cache.page_size * self.cache.page_size
        stop = self._with_pages(sample, stop) if stop > start else start
        if stop <= start:
            return 0
        schedule.prefill.append(PrefillPiece(sample, start, stop, sample.loads, self._snapshots(sample, start, stop)))
        sample.num_computed, sample.loads = stop, sample.slot
        self._register(sample, stop)
        return -(-(stop - start) // self.cache.page_size) * self.cache.page_size

    def _with_pages(self, sample: SequenceState, stop: int) -> int:
        """Give tables with a window the pages of the next chunk; -> where it ends: earlier where pages are short."""
        needed, end, page_size = self._needed(sample), len(sample.tokens) - 1, self.cache.page_size
        near = needed if stop == end else stop
        spare = max(0, self.cache.num_available - len(self.running) * len(self.pages.windows))
        if self.pages.missing(sample.tables, needed, near) > spare:
            near = stop = min(stop, self.pages.reach(sample.tables, spare), (end - 1) // page_size * page_size)
        is_there = self.pages.grow(sample.tables, needed, near)
        assert is_there, "pages that were there a moment ago"
        return stop

    def _snapshots(self, sample: SequenceState, start: int, stop: int) -> dict[int, int]:
        """Which states within [start, stop] are kept: those at the prompt's end, at the end of its last whole page,
        which a longer prompt shares, and at the end of what it was found to share with others."""
        if not self.states.enabled or not self.cache.enabled:
            return {}
        end, size = sample.num_prompt - 1, self.cache.page_size
        saves = {}
        for position in sorted({end, end // size * size, sample.shared_tokens}):
            if start < position <= stop and position <= end:
                full = sample.keys.upto(sample.tokens, position)
                key = full[-1] if position % size == 0 else sample.keys.tail(sample.tokens, position)
                if key and (slot := self.states.snapshot(key)):
                    saves[position] = slot
        return saves

    def _register(self, sample: SequenceState, num_tokens: int) -> None:
        """Its first `num_tokens` are computed: full pages can be found now, a prompt's partial page by equal
        prompts."""
        self.pages.register(sample.tables, sample.keys.upto(sample.tokens, num_tokens))
        end = sample.num_prompt - 1
        if num_tokens == end and (key := sample.keys.tail(sample.tokens, end)):
            self.pages.register_tail(sample.tables, end // self.cache.page_size, key)

    def _needed(self, sample: SequenceState) -> int:
        """How many tokens it has with those that a quantum may decode."""
        return min(len(sample.tokens) + self._decode_steps, sample.limit)

    def _has_next_pages(self, sample: SequenceState, tables: Tables, num_computed: int) -> bool:
        """Give its tables what it needs to go on at all: of a window, the pages up to the end, or one of the prompt."""
        needed, page_size = self._needed(sample), self.cache.page_size
        is_last = len(sample.tokens) - 1 - num_computed <= page_size
        return self.pages.grow(tables, needed, needed if is_last else num_computed + page_size)

    def check(self) -> None:
        """Assert every invariant; tests call it after each change."""
        self.cache.check(owned(sample.tables) for sample in self.running)
        self.states.check([sample.slot for sample in self.running])
        assert len(self.running) <= self.num_running_max
        orders = [sample.order for sample in self.running]
        assert orders == sorted(set(orders))
        assert not any(sample.tables for sample in self.waiting)
        mates = sorted(sample.order for group in self._by_prompt.values() for sample in group)
        assert mates == orders

    def __iter__(self) -> Iterator[SequenceState]:
        yield from self.running
        yield from self.waiting


def _is_watched(sample: SequenceState) -> bool:
    return sample.spec.stream


def _awaits_first_token(sample: SequenceState) -> bool:
    return sample.spec.stream and len(sample.tokens) == sample.num_prompt


def prompt_key(spec: SequenceSpec, prompt: Sequence[int] | np.ndarray) -> PromptKey:
    """Equal for sequences whose prompts have the same keys and values: same tokens, same adapter version."""
    return spec.adapter_version, np.asarray(prompt, np.int32).tobytes()
