"""The newest results are kept in memory, within a number of bytes."""

from tx_async.scheduler.polls.payload_cache import RECORD_BYTES, PayloadCache
from tx_async.wire.records import ResultRecord


def result(request_id: str, payload: bytes = b"") -> ResultRecord:
    return ResultRecord(request_id=request_id, finished_at=0.0, content="json", payload=payload)


def test_the_oldest_results_go_first():
    cache = PayloadCache(3 * RECORD_BYTES)
    for name in "abcd":
        cache.put(result(name))
    assert cache.get("a") is None and cache.get("b") and len(cache) == 3
    cache.put(result("e", b"x" * RECORD_BYTES))
    assert [name for name in "abcde" if cache.get(name)] == ["d", "e"]


def test_results_without_a_payload_take_memory_too():
    cache = PayloadCache(2**20)
    for number in range(10_000):
        cache.put(result(str(number)))
    assert len(cache) == 2**20 // RECORD_BYTES


def test_a_result_that_comes_again_counts_once():
    cache = PayloadCache(2**20)
    cache.put(result("a", b"first"))
    cache.put(result("a", b"again"))
    assert len(cache) == 1 and cache.num_bytes == RECORD_BYTES + 5
    cache.forget("a")
    assert cache.num_bytes == 0


def test_the_newest_stays_however_large_it_is():
    cache = PayloadCache(0)
    cache.put(result("a", b"x" * 1000))
    assert cache.get("a")
