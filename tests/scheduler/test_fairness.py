import itertools
import random
from collections import Counter

from tx_async.scheduler.core.fairness import FairQueue, Shares, prefixes_of


def test_who_was_served_least_is_next():
    fair = FairQueue()
    served: dict[tuple[str, ...], int] = {("a",): 0, ("b",): 0}
    for _ in range(300):
        flow = fair.order([("a",), ("b",)])[0]
        tokens = 30 if flow == ("a",) else 10
        fair.charge(flow, tokens)
        served[flow] += tokens
    assert abs(served["a",] - served["b",]) <= 30


def test_idle_time_is_not_credit():
    """A flow that was away for long does not get the device for itself when it comes back."""
    fair = FairQueue()
    for _ in range(1000):
        fair.order([("a",)])
        fair.charge(("a",), 10)
    turns = []
    for _ in range(20):
        flow = fair.order([("a",), ("b",)])[0]
        fair.charge(flow, 10)
        turns.append(flow)
    assert turns.count(("b",)) in (9, 10, 11)


def served_of(fair: FairQueue, flows: list[tuple[str, ...]], num_turns: int, tokens: dict[str, int]) -> Counter[str]:
    """Tokens of each key and session, when all of them always have work; `tokens`: of one turn of a key's flows."""
    served: Counter[str] = Counter()
    for _ in range(num_turns):
        flow = fair.order(flows)[0]
        fair.charge(flow, tokens[flow[0]])
        for name in flow:
            served[name] += tokens[flow[0]]
    return served


def test_a_key_gains_nothing_by_opening_sessions_and_a_session_nothing_by_opening_runs():
    flows = [("light", "l", "l0"), *(("heavy", f"h{i}", f"h{i}-0") for i in range(20))]
    flows += [("heavy", "h0", f"h0-{i}") for i in range(1, 10)]
    served = served_of(FairQueue(), flows, 4000, {"light": 10, "heavy": 30})
    assert abs(served["light"] - served["heavy"]) <= 30
    sessions = [served[f"h{i}"] for i in range(20)]
    assert max(sessions) - min(sessions) <= 30
    runs = [served[f"h0-{i}"] for i in range(10)]
    assert max(runs) - min(runs) <= 30


def test_a_key_whose_sessions_take_turns_is_not_forgotten_with_each_of_them():
    """One session of the heavy key goes and another one comes, each time: the key is as well served as it is."""
    fair, served = FairQueue(), Counter[str]()
    for turn in range(300):
        flow = fair.order([("light", "l", "l0"), ("heavy", f"h{turn}", "run")])[0]
        fair.charge(flow, 10)
        served[flow[0]] += 10
    assert abs(served["light"] - served["heavy"]) <= 10


def test_some_of_the_flows_are_ranked_without_forgetting_the_others():
    fair = FairQueue()
    flows = [("a", "s", "r"), ("b", "s", "r"), ("c", "s", "r")]
    fair.order(flows)
    for flow, tokens in zip(flows, (30, 10, 20), strict=True):
        fair.charge(flow, tokens)
    assert fair.ranked(flows[:2]) == [flows[1], flows[0]]
    assert fair.order(flows) == [flows[1], flows[2], flows[0]]


class Definition:
    """What the tree of `FairQueue` computes, said directly: charges by prefix, ranks as lists."""

    def __init__(self):
        self.charged: dict[tuple[str, ...], float] = {}

    def order(self, busy: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        prefixes = dict.fromkeys(prefix for flow in busy for prefix in prefixes_of(flow))
        charged = {}
        for prefix in prefixes:
            siblings = [other for other in prefixes if other[:-1] == prefix[:-1]]
            level = min((self.charged[other] for other in siblings if other in self.charged), default=0.0)
            charged[prefix] = self.charged.get(prefix, level) - level
        self.charged = charged
        return self.ranked(busy)

    def ranked(self, flows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        places = list(dict.fromkeys(prefix for flow in flows for prefix in prefixes_of(flow)))
        return sorted(flows, key=lambda flow: [(self.charged.get(p, 0.0), places.index(p)) for p in prefixes_of(flow)])

    def charge(self, flow: tuple[str, ...], tokens: float) -> None:
        for prefix in prefixes_of(flow):
            if prefix in self.charged:
                self.charged[prefix] += tokens


def test_the_tree_decides_as_the_definition_does():
    flows = [(key, f"{key}{s}", f"{key}{s}{run}") for key in "abc" for s in range(3) for run in range(2)]
    for seed in range(20):
        draw, fair, definition = random.Random(seed), FairQueue(), Definition()
        for _ in range(40):
            busy = draw.sample(flows, draw.randint(0, 9))
            assert fair.order(busy) == definition.order(busy)
            some = draw.sample(flows, 4)
            assert fair.ranked(some) == definition.ranked(some)
            for flow in draw.sample(flows, 3):
                tokens = draw.choice([1, 10, 10, 0.3])
                fair.charge(flow, tokens)
                definition.charge(flow, tokens)
                assert fair.charged(flow) == definition.charged.get(flow, 0.0)


def turns_of(shares: Shares[str], num_turns: int, cost_ms: float) -> list[str]:
    """Whose quantum is sent each time, when all of them have work and each is answered before the next."""
    turns = []
    for _ in range(num_turns):
        name = shares.order(lambda _: True)[0]
        shares.charge(name)
        shares.measured(name, cost_ms)
        turns.append(name)
    return turns


def test_shares_follow_their_weights():
    shares = Shares({"train": 3.0, "sample": 1.0})
    assert 290 <= turns_of(shares, 400, cost_ms=10).count("train") <= 310


def test_shares_are_of_time_and_not_of_turns():
    shares = Shares({"train": 1.0, "sample": 1.0})
    shares.measured("train", 500)
    shares.measured("sample", 100)
    turns = []
    for _ in range(120):
        name = shares.order(lambda _: True)[0]
        shares.charge(name)
        turns.append(name)
    assert 18 <= turns.count("train") <= 22
    assert ("train", "train") not in itertools.pairwise(turns), "a long quantum is charged before its answer"


def test_an_idle_class_leaves_its_share_to_the_other_and_saves_none_up():
    shares = Shares({"train": 1.0, "sample": 1.0})
    for name in ("train", "sample"):
        shares.measured(name, 10)
    for _ in range(100):
        assert shares.order(lambda name: name == "train") == ["train"]
        shares.charge("train")
    assert turns_of(shares, 20, cost_ms=10).count("sample") in (9, 10, 11)


def test_a_quantum_that_was_compiled_first_does_not_cost_its_class_the_next_minute():
    shares = Shares({"train": 1.0, "sample": 1.0})
    shares.measured("train", 60_000)
    assert turns_of(shares, 300, cost_ms=20).count("train") > 90
