"""The audit route, and what it is told of keys."""

from datetime import UTC, datetime

import httpx
import pytest

from tests.support.durability import serving
from tx_async import keys
from tx_async.api.audit import follow_keys
from tx_async.api.key_file import KeyFile
from tx_async.api.owner import owner_of
from tx_async.testing.fake_scheduler import FakeScheduler
from tx_async.wire.records import AuditRecord


def event(number: int, name: str, subject: str, owner: str, **fields) -> AuditRecord:
    return AuditRecord(
        event_id=str(number), at=number * 24 * 3600.0, event=name, subject=subject, owner=owner, **fields
    )


@pytest.fixture
def path(scheduler) -> str:
    path = "tinker://run/weights/one"
    alice, mallory = owner_of("tml-alice"), owner_of("tml-mallory")
    events = [
        event(0, "run.created", "run", alice, details={"rank": 8}),
        event(1, "checkpoint.saved", path, alice),
        event(2, "checkpoint.deleted", "tinker://other/weights/x", mallory),
        event(3, "key.added", "carol", "", details={"key_id": "12345678"}),
    ]
    scheduler.audits |= {e.event_id: e for e in events}
    return path


async def audit(client: httpx.AsyncClient, query: str = "") -> list[dict]:
    return (await client.get(f"/api/v1/audit{query}")).json()["entries"]


async def test_all_of_ones_own_where_nothing_is_asked_for(client, other, path):
    created, saved = await audit(client)
    assert (created["event"], created["event_details"]["training_run_id"]) == ("run.created", "run")
    assert created["event_details"]["rank"] == 8 and created["timestamp"].startswith("1970-01-01")
    assert (saved["event"], saved["tinker_path"], saved["model_id"]) == ("checkpoint.saved", path, "run")
    assert saved["event_details"]["actor"] == owner_of("tml-alice")
    assert [entry["event"] for entry in await audit(other)] == ["checkpoint.deleted"]


async def test_events_are_chosen_by_type_and_day(client, path):
    assert [e["event"] for e in await audit(client, "?event_type=checkpoints")] == ["checkpoint.saved"]
    assert [e["event"] for e in await audit(client, "?event_type=all&day=1970-01-01")] == ["run.created"]
    assert await audit(client, "?event_type=teams") == await audit(client, "?day=1970-01-05") == []


@pytest.mark.parametrize("query", ["event_type=secrets", "day=yesterday", "day=2026-13-01"])
async def test_a_question_that_nobody_can_answer_is_a_400(client, query):
    assert (await client.get(f"/api/v1/audit?{query}")).status_code == 400


def told(scheduler: FakeScheduler) -> list[tuple[str, str]]:
    return [(event.event, event.subject) for event in scheduler.audits.values()]


def test_the_log_is_told_of_keys_also_of_what_changed_while_no_server_ran(tmp_path):
    scheduler, path = FakeScheduler(), tmp_path / "keys"
    keys.add(path, "alice")
    file = KeyFile(str(path))
    follow_keys(file, scheduler)
    keys.add(path, "ops", "admin")
    file.current()
    keys.revoke(path, "alice")
    file.current()
    path.write_text(path.read_text().replace("role=admin ", ""))
    file.current()
    expected = [("key.added", "alice"), ("key.added", "ops"), ("key.revoked", "alice"), ("key.changed", "ops")]
    assert told(scheduler) == expected
    assert scheduler.audits["000000000001"].details["role"] == "admin"
    follow_keys(KeyFile(str(path)), scheduler)
    assert told(scheduler) == expected, "the next server has seen nothing new"
    keys.revoke(path, "ops")
    keys.add(path, "bob")
    follow_keys(KeyFile(str(path)), scheduler)
    assert told(scheduler)[4:] == [("key.added", "bob"), ("key.revoked", "ops")]


def test_an_admin_sees_all_and_a_user_its_own(tiny_qwen3, tmp_path):
    """A real server, and again after a restart."""
    file = tmp_path / "keys"
    alice, bob, ops = keys.add(file, "alice"), keys.add(file, "bob"), keys.add(file, "ops", "admin")
    headers = {"x-api-key": alice}

    def entries(key: str) -> list[tuple[str, str]]:
        answer = httpx.get(f"{server.base_url}/api/v1/audit", headers={"x-api-key": key}).json()["entries"]
        assert all(datetime.fromisoformat(e["timestamp"]) <= datetime.now(UTC) for e in answer)
        return [(entry["event"], entry["event_details"]["actor"]) for entry in answer]

    with serving(tmp_path / "data", tiny_qwen3, api_keys_file=file) as server:
        session = httpx.post(f"{server.base_url}/api/v1/create_session", json={"tags": []}, headers=headers).json()
        model = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": str(tiny_qwen3)}
        body = model | {"lora_config": {"rank": 8}}
        assert httpx.post(f"{server.base_url}/api/v1/create_model", json=body, headers=headers).status_code == 200
        assert entries(alice) == [("key.added", "operator"), ("run.created", "alice")]
        assert entries(bob) == [("key.added", "operator")]
        keys.revoke(file, "bob")
        everything = [*[("key.added", "operator")] * 3, ("run.created", "alice"), ("key.revoked", "operator")]
        assert entries(ops) == everything
        runs = f"{server.base_url}/api/v1/training_runs"
        admin = {"x-api-key": ops}
        assert len(httpx.get(runs, headers=admin).json()["training_runs"]) == 1
        assert httpx.get(f"{runs}?access_scope=owned", headers=admin).json()["training_runs"] == []
        run = httpx.get(runs, headers=headers).json()["training_runs"][0]["training_run_id"]
        assert httpx.get(f"{runs}/{run}", headers=admin).status_code == 200
        assert httpx.get(f"{runs}/{run}/checkpoints", headers=admin).status_code == 200
    with serving(tmp_path / "data", tiny_qwen3, api_keys_file=file) as server:
        assert entries(ops) == everything
