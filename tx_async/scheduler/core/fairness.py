"""Fair turns: deficit round robin by levels between flows, weighted shares between classes of work."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Generic, TypeVar

Key = TypeVar("Key")
Flow = tuple[str, ...]
"""The owner of some work, from the outside in: (API key, session, run). Fairness is decided level by level."""

NEW = math.inf
"""The charge of somebody who has come with the present turn."""
QUANTUM_MS_MAX = 2000.0
PREFIXES_KEPT = 4096
"""For how many flows the prefixes are kept, so that they are not made anew in each quantum."""


@lru_cache(PREFIXES_KEPT)
def prefixes_of(flow: Flow) -> tuple[Flow, ...]:
    """The key, its session, its run."""
    return tuple(flow[:depth] for depth in range(1, len(flow) + 1))


class _Node:
    """A prefix of flows: a key, a session of it, a run of that."""

    __slots__ = ("before", "charged", "children", "flow", "ordered")

    def __init__(self):
        #: tokens, on a scale shared by the children of one parent; NEW until `settle` levels it with its siblings
        self.charged = NEW
        #: by name, in the order in which this turn's flows came
        self.children: dict[str, _Node] = {}
        #: children of the previous turn that have not come again
        self.before: dict[str, _Node] = {}
        #: the flow that ends here, if one does
        self.flow: Flow | None = None
        #: the flows that end here or below, least served first; None when one has come, gone, or been charged since
        self.ordered: list[Flow] | None = None

    def begin(self) -> None:
        """Begin a turn: `enter` will name those who have work."""
        self.before, self.children, self.flow, self.ordered = self.children, {}, None, None

    def enter(self, name: str, flow: Flow) -> _Node:
        """Add a child with its first flow of this turn. If nothing else was below it, it stays as it is."""
        self.ordered = None
        known = self.before.pop(name, None)
        if known and known.ordered != [flow]:
            known.begin()
        child = self.children[name] = known or _Node()
        return child

    def settle(self) -> list[Flow]:
        """All flows have been named: level the children, and order their flows."""
        if self.ordered is None:
            self.before = {}
            ordered = [] if self.flow is None else [self.flow]
            for child in self._leveled():
                ordered += child.ordered or child.settle()
            self.ordered = ordered
        return self.ordered

    def _leveled(self) -> list[_Node]:
        """The children, least served first."""
        children = list(self.children.values())
        if len(children) == 1:  # most sessions have one run
            children[0].charged = 0.0
            return children
        charges = [child.charged for child in children]
        level = min(charges, default=0.0)
        if level or NEW in charges:
            for child in children:
                child.charged = 0.0 if child.charged == NEW else child.charged - level
        return sorted(children, key=_charged)


_charged = operator.attrgetter("charged")


class FairQueue:
    """Serves the least served first, in tokens, at each level among the children of one parent: the guarantee of
    deficit round robin without its rounds. A key has its share of the device however many sessions it opens, a session
    its share of its key's, a run its share of its session's.

    A flow that was idle starts level with the least served busy one: nobody may save up a claim to a burst.
    """

    def __init__(self):
        #: the flows of the last `order`
        self._busy: list[Flow] = []
        #: the parent of all keys; below it is every prefix of these flows
        self._root = _Node()

    def order(self, busy: Iterable[Flow]) -> list[Flow]:
        """The flows that have work, each once, least served first. Flows that have none are forgotten; siblings that
        were served alike stay in their order."""
        busy = list(busy)
        if busy != self._busy:
            self._busy = busy
            self._enter(busy)
        return list(self._root.settle())

    def _enter(self, busy: list[Flow]) -> None:
        self._root.begin()
        for flow in busy:
            node = self._root
            for name in flow:
                node = node.children.get(name) or node.enter(name, flow)
                if node.ordered and node.ordered != [flow]:
                    node.ordered = None  # another flow was all that was below it
            node.flow = flow
            node.ordered = None if node.children else [flow]

    def ranked(self, flows: Iterable[Flow]) -> list[Flow]:
        """Some of the flows of the last `order`, in its order; siblings that were served alike stay in theirs."""
        places: dict[Flow, int] = {}

        def rank(flow: Flow) -> list[tuple[float, int]]:
            prefixes, nodes = prefixes_of(flow), self._nodes(flow)
            charged = [node.charged for node in nodes] + [0.0] * (len(flow) - len(nodes))
            return [
                (charge, places.setdefault(prefix, len(places)))
                for charge, prefix in zip(charged, prefixes, strict=True)
            ]

        return sorted(flows, key=rank)

    def charged(self, flow: Flow) -> float:
        nodes = self._nodes(flow)
        return nodes[-1].charged if len(nodes) == len(flow) else 0.0

    def charge(self, flow: Flow, tokens: float) -> None:
        node = self._root
        for name in flow:
            child = node.children.get(name)
            if child is None:
                break
            node.ordered = None
            child.charged += tokens
            node = child

    def _nodes(self, flow: Flow) -> list[_Node]:
        """The nodes of its prefixes, as far as they are known."""
        nodes: list[_Node] = []
        children = self._root.children
        for name in flow:
            node = children.get(name)
            if node is None:
                break
            nodes.append(node)
            children = node.children
        return nodes


class Shares(Generic[Key]):
    """Classes of work share the device's time by weight; an idle class leaves its share to the others.

    A quantum is charged when it is sent, so that another class has the next turn; as nobody knows yet what it will
    cost, it is charged what the last one of its class cost.
    """

    def __init__(self, weights: dict[Key, float]):
        self._weights = weights
        self._used = dict.fromkeys(weights, 0.0)
        self._last_ms = dict.fromkeys(weights, 0.0)

    def order(self, is_busy: Callable[[Key], bool]) -> list[Key]:
        """The classes that have work, or quanta on the device, least served first."""
        busy = [name for name in self._weights if is_busy(name)]
        if len(busy) < 2:
            self._used = dict.fromkeys(self._weights, 0.0)
            return busy
        level = min(map(self._used.__getitem__, busy))
        # Idle time is not credit: an idle class comes back level with the busy one.
        self._used = {name: used - level if name in busy else 0.0 for name, used in self._used.items()}
        return sorted(busy, key=self._used.__getitem__)

    def is_ahead(self, name: Key, num_quanta: int) -> bool:
        """Whether it is ahead of the least served class of the last `order` by more than `num_quanta` of its quanta."""
        return self._used[name] > num_quanta * self._cost(name)

    def weigh(self, name: Key, weight: float) -> None:
        """Give it another weight from now on."""
        self._weights[name] = weight

    def charge(self, name: Key) -> None:
        """Note that one of its quanta is sent."""
        self._used[name] += self._cost(name)

    def _cost(self, name: Key) -> float:
        return self._last_ms[name] / self._weights[name]

    def measured(self, name: Key, cost_ms: float) -> None:
        """Note what a quantum cost. One that took very long was compiled first, which counts against nobody's share."""
        self._last_ms[name] = min(cost_ms, QUANTUM_MS_MAX)
