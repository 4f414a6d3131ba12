"""What a scrape tells of keys: by role, and by each key's id where a setting says so."""

from tests.scheduler.test_scheduler import MODEL, result_of, with_model
from tests.support.actor import running
from tx_async.exposition import key_bytes
from tx_async.wire.operations import SaveWeights


async def test_bytes_are_told_by_role_unless_a_setting_asks_for_keys():
    async with running() as server:
        scheduler = await with_model(server)
        save = await scheduler.submit("alice", SaveWeights(model_id=MODEL, seq_id=1, kind="weights", name="a"))
        await result_of(scheduler, save.request_id)
        stored = sum(checkpoint.size_bytes for checkpoint in scheduler.checkpoints.values())
        roles = {"alice": ("admin", "12ab34cd"), "bob": ("user", "99999999")}
        by_role, by_key = (key_bytes(scheduler, roles, by_key) for by_key in (False, True))
        unknown = key_bytes(scheduler, {}, True)
        await scheduler.delete_checkpoint("alice", f"tinker://{MODEL}/weights/a")
        deleted = key_bytes(scheduler, roles, True)
    assert stored > 0
    assert by_role["checkpoints", "admin", ""] == by_key["checkpoints", "admin", "12ab34cd"] == stored
    assert {key for _, _, key in by_role} == {""} and len(by_role) == 4 * 3
    assert by_role["records", "admin", ""] > 0 and by_role["records", "user", ""] == 0
    assert by_role["queued", "admin", ""] == 0
    assert unknown["checkpoints", "any", ""] == stored, "an owner whom no registry knows has no id to tell"
    assert ("checkpoints", "admin", "12ab34cd") not in deleted
