"""Limits that answer 429 at the door, and never touch what was admitted."""

import pytest

from tx_async.config import ServerConfig
from tx_async.errors import Overloaded
from tx_async.scheduler.quota import Quota
from tx_async.wire.records import RequestRecord


def request(name: str, owner: str = "alice", num_bytes: int = 10, num_samples: int = 0) -> RequestRecord:
    return RequestRecord(
        request_id=name,
        owner=owner,
        kind="Sample",
        subject="s",
        seq_id=1,
        body_digest="",
        body_bytes=num_bytes,
        created_at=0.0,
        sample_sequence_ids=("x",) * num_samples,
    )


def test_a_full_queue_refuses_the_next_request_until_one_has_ended():
    quota = Quota(ServerConfig(queued_requests_max=2))
    for name in "ab":
        quota.check(request(name))
        quota.take(request(name))
    with pytest.raises(Overloaded):
        quota.check(request("c"))
    quota.give_back("a")
    quota.give_back("a")
    quota.check(request("c"))
    assert len(quota) == 1


def test_bytes_are_bounded():
    quota = Quota(ServerConfig(queued_bytes_max=100))
    quota.take(request("a", num_bytes=60))
    with pytest.raises(Overloaded, match="queued_bytes_max"):
        quota.check(request("b", num_bytes=41))
    quota.check(request("b", num_bytes=40))


def test_samples_are_bounded_for_each_tenant():
    quota = Quota(ServerConfig(tenant_queued_samples_max=10))
    quota.take(request("a", num_samples=8))
    with pytest.raises(Overloaded, match="tenant_queued_samples_max"):
        quota.check(request("b", num_samples=3))
    quota.check(request("b", owner="bob", num_samples=10))
    quota.check(request("c", num_samples=0))
    quota.give_back("a")
    assert quota.num_bytes == 0 and not quota.num_samples


def test_a_key_leaves_room_for_the_next_one_whatever_it_sends():
    quota = Quota(ServerConfig(queued_requests_max=120))
    for owner, expected in (("first", 60), ("second", 40), ("third", 10)):
        accepted = 0
        for i in range(200):
            try:
                quota.check(request(f"{owner}-{i}", owner))
            except Overloaded as error:
                assert "queued_requests_max" in str(error)
                break
            quota.take(request(f"{owner}-{i}", owner))
            accepted += 1
        assert accepted >= expected
    assert len(quota) < 120, "and a fourth one is served"
    quota.check(request("last", "fourth"))


def test_bytes_of_a_key_leave_room_for_the_next_one():
    quota = Quota(ServerConfig(queued_bytes_max=100 * 2**20))
    quota.take(request("a", "first", num_bytes=50 * 2**20))
    with pytest.raises(Overloaded, match=r"queued_bytes_max.*by this key"):
        quota.check(request("b", "first", num_bytes=2**20))
    quota.check(request("b", "second", num_bytes=30 * 2**20))
    quota.give_back("a")
    assert not quota.bytes.parts and not quota.requests.parts
