"""Reads and writes of runs, checkpoints and sessions, and downloads."""

import io
import tarfile

import msgspec
import pytest

from tests.support.http import asgi_client
from tx_async import errors
from tx_async.api.owner import hash_key
from tx_async.api.routes import create_api
from tx_async.errors import StorageError
from tx_async.testing.fake_scheduler import FAKE_FILES


@pytest.fixture
async def path(client, model_id, result) -> str:
    body = {"model_id": model_id, "seq_id": 1, "path": "one", "user_metadata": {"score": 7}}
    return (await result(await client.post("/api/v1/save_weights", json=body))).json()["path"]


@pytest.fixture
def url(path, model_id) -> str:
    return f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"


# ---- training runs


async def test_a_run_knows_its_newest_checkpoints(client, model_id, path):
    run = (await client.get(f"/api/v1/training_runs/{model_id}?access_scope=owned")).json()
    assert run["training_run_id"] == model_id and run["lora_rank"] == 8
    assert run["last_checkpoint"]["tinker_path"] == path and "last_sampler_checkpoint" not in run
    assert run["last_request_time"].endswith(("Z", "+00:00"))


async def test_runs_are_listed_by_page(client, session_id):
    for i in range(5):
        body = {"session_id": session_id, "model_seq_id": i, "base_model": "fake/model"}
        await client.post("/api/v1/create_model", json=body)
    listed = (await client.get("/api/v1/training_runs?limit=2&offset=4")).json()
    assert len(listed["training_runs"]) == 1
    assert listed["cursor"] == {"offset": 4, "limit": 2, "total_count": 5}
    assert (await client.get("/api/v1/training_runs?project_id=none")).json()["training_runs"] == []


@pytest.mark.parametrize("query", ["limit=-1", "limit=x", "offset=1.5", "offset=٣", "access_scope=all"])
async def test_a_bad_query_is_a_400(client, model_id, query):
    response = await client.get(f"/api/v1/training_runs?{query}")
    assert response.status_code == 400 and query.split("=")[0] in response.json()["detail"]


async def test_a_published_checkpoint_makes_its_run_accessible(client, other, model_id, url):
    run = f"/api/v1/training_runs/{model_id}"
    assert (await other.get(f"{run}?access_scope=accessible")).status_code == 404
    assert (await client.post(f"{url}/publish")).status_code == 200
    assert (await client.post(f"{url}/publish")).status_code == 200
    assert (await other.get(run)).status_code == 404
    shared = (await other.get(f"{run}?access_scope=accessible")).json()
    assert shared["last_checkpoint"]["public"] is True
    assert (await client.delete(f"{url}/publish")).status_code == 200
    assert (await other.get(f"{run}?access_scope=accessible")).status_code == 404


# ---- checkpoints


async def test_checkpoints_are_listed_as_the_sdk_reads_them(client, other, model_id, path):
    for listing in (f"/api/v1/training_runs/{model_id}/checkpoints", "/api/v1/checkpoints"):
        (checkpoint,) = (await client.get(listing)).json()["checkpoints"]
        assert checkpoint["checkpoint_id"] == "weights/one" and checkpoint["checkpoint_type"] == "training"
        assert checkpoint["tinker_path"] == path and checkpoint["user_metadata"] == {"score": "7"}
    assert (await other.get("/api/v1/checkpoints")).json()["checkpoints"] == []
    assert (await other.get(f"/api/v1/training_runs/{model_id}/checkpoints")).status_code == 404


async def test_ttl_is_set_and_cleared_within_its_limits(client, url, scheduler, path):
    assert (await client.put(f"{url}/ttl", json={"ttl_seconds": 3600})).status_code == 200
    assert scheduler.checkpoints[path].expires_at is not None
    assert (await client.put(f"{url}/ttl", json={"ttl_seconds": None})).status_code == 200
    assert scheduler.checkpoints[path].expires_at is None
    assert (await client.put(f"{url}/ttl", json={"ttl_seconds": 5})).status_code == 400


async def test_only_its_owner_changes_or_deletes_a_checkpoint(client, other, url, path, scheduler):
    for method, tail in (("POST", "/publish"), ("DELETE", "/publish"), ("DELETE", "")):
        assert (await other.request(method, f"{url}{tail}")).status_code == 404
    assert (await other.put(f"{url}/ttl", json={"ttl_seconds": 3600})).status_code == 404
    assert (await client.delete(url)).status_code == 200
    assert path not in scheduler.checkpoints and (await client.delete(url)).status_code == 404


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fsecret", "one%2f..", "a%00b"])
async def test_no_name_leaves_its_folder(client, model_id, path, name):
    response = await client.get(f"/api/v1/training_runs/{model_id}/checkpoints/weights/{name}/external_weights_urls")
    assert response.status_code == 404


# ---- downloads


async def test_files_are_downloaded_without_a_key_by_link(client, connect, url):
    answer = (await client.get(f"{url}/external_weights_urls")).json()
    assert set(answer["urls"]) == set(FAKE_FILES)
    async with connect(None) as anyone:
        for name, link in answer["urls"].items():
            response = await anyone.get(link)
            assert response.content == FAKE_FILES[name]
            assert int(response.headers["content-length"]) == len(FAKE_FILES[name])
        link = answer["urls"]["adapter_config.json"]
        for wrong in (
            link + "x",
            link.replace("adapter_config.json", "../../other"),
            link.replace("/external_weights/", "/external_weights/A"),
        ):
            assert (await anyone.get(wrong)).status_code == 404


async def test_links_end_with_their_checkpoint_and_belong_to_their_owner(client, other, connect, url):
    link = (await client.get(f"{url}/external_weights_urls")).json()["urls"]["adapter_config.json"]
    assert (await other.get(f"{url}/external_weights_urls")).status_code == 404
    await client.delete(url)
    async with connect(None) as anyone:
        assert (await anyone.get(link)).status_code == 404


async def test_a_link_is_for_the_checkpoint_that_it_was_made_for(client, connect, url, model_id, result):
    """Deleted and saved again under the same name, it is another one."""
    link = (await client.get(f"{url}/external_weights_urls")).json()["urls"]["adapter_config.json"]
    archive = (await client.get(f"{url}/archive")).headers["location"]
    await client.delete(url)
    body = {"model_id": model_id, "seq_id": 2, "path": "one"}
    assert (await result(await client.post("/api/v1/save_weights", json=body))).status_code == 200
    async with connect(None) as anyone:
        assert (await anyone.get(link)).status_code == 404
        assert (await anyone.get(archive)).status_code == 404
        again = (await client.get(f"{url}/external_weights_urls")).json()["urls"]["adapter_config.json"]
        assert (await anyone.get(again)).status_code == 200


async def test_a_link_ends_with_the_key_that_asked_for_it(client, scheduler, config, url, tmp_path):
    """It is good for an hour, and its key is revoked before: whoever has it gets nothing any more."""
    file = tmp_path / "keys"
    file.write_text(f"{hash_key('tml-alice')} alice\n{hash_key('tml-bob')} bob\n")
    app = create_api(scheduler, msgspec.structs.replace(config, api_keys_file=str(file)), scheduler.files)
    async with asgi_client(app) as anyone:
        key = {"x-api-key": "tml-alice"}
        link = (await anyone.get(f"{url}/external_weights_urls", headers=key)).json()["urls"]["adapter_config.json"]
        archive = (await anyone.get(f"{url}/archive", headers=key)).headers["location"]
        assert [(await anyone.get(each)).status_code for each in (link, archive)] == [200, 200]
        file.write_text(f"{hash_key('tml-bob')} bob\n")
        gone = [await anyone.get(each) for each in (link, archive)]
        assert [response.status_code for response in gone] == [404, 404]
        assert "API key" in gone[0].json()["detail"]


def damage(scheduler, name, content):
    (key,) = (key for key in scheduler.files.content if key.endswith(f"/{name}"))
    if content is None:
        del scheduler.files.content[key]
    else:
        scheduler.files.content[key] = content


@pytest.mark.parametrize("content", [b"\1" * 64, b"\0" * 63, None], ids=["another bit", "shorter", "gone"])
async def test_damaged_files_are_not_served(client, connect, scheduler, url, content):
    link = (await client.get(f"{url}/external_weights_urls")).json()["urls"]["adapter_model.safetensors"]
    archive = (await client.get(f"{url}/archive")).headers["location"]
    damage(scheduler, "adapter_model.safetensors", content)
    async with connect(None) as anyone:
        response = await anyone.get(link)
        assert response.status_code == 400 and "damaged: adapter_model.safetensors" in response.json()["detail"]
        if content is None or len(content) != 64:
            assert (await anyone.get(archive)).status_code == 400
        else:  # its first file is whole, and on its way
            assert b"\1" * 64 not in (await anyone.get(archive)).content


async def test_a_damaged_list_of_files_is_not_served(client, connect, scheduler, url):
    link = (await client.get(f"{url}/external_weights_urls")).json()["urls"]["adapter_config.json"]
    damage(scheduler, "metadata.json", b"{}")
    async with connect(None) as anyone:
        assert "damaged" in (await anyone.get(link)).json()["detail"]
    damage(scheduler, "metadata.json", None)
    assert (await client.get(f"{url}/external_weights_urls")).status_code == 400


async def test_what_a_failure_of_the_server_says_is_not_where_it_happened(client, scheduler, path, url, monkeypatch):
    async def broken(prefix):
        raise StorageError(f"{prefix} could not be listed in s3://bucket/base: http://10.0.0.7:9000 says 403")

    monkeypatch.setattr(scheduler.files, "list", broken)
    response = await client.get(f"{url}/external_weights_urls")
    assert response.status_code == 503
    assert response.json()["detail"].endswith("could not be listed in …: … says 403")


async def test_older_sdks_are_redirected_to_a_tar(client, connect, url):
    response = await client.get(f"{url}/archive")
    assert response.status_code == 302 and response.headers["expires"].endswith("GMT")
    async with connect(None) as anyone:
        packed = (await anyone.get(response.headers["location"])).content
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {entry.name: tar.extractfile(entry).read() for entry in tar} == FAKE_FILES  # pyright: ignore[reportOptionalMemberAccess]


# ---- sessions


async def test_a_session_lists_what_belongs_to_it(client, other, session_id, model_id, sampler_id):
    session = (await client.get(f"/api/v1/sessions/{session_id}?access_scope=owned")).json()
    assert session["training_run_ids"] == [model_id] and session["sampler_ids"] == [sampler_id]
    assert session["user_metadata"] == {"team": "red"}
    assert (await client.get("/api/v1/sessions")).json() == {"sessions": [session_id]}
    assert (await other.get("/api/v1/sessions")).json() == {"sessions": []}
    assert (await other.get(f"/api/v1/sessions/{session_id}")).status_code == 404


async def test_sessions_are_found_by_name_metadata_status_and_page(client):
    names = ["Red apple", "green Apple", "pear"]
    ids = []
    for name in names:
        body = {"display_name": name, "user_metadata": {"fruit": name}}
        ids.append((await client.post("/api/v1/create_session", json=body)).json()["session_id"])
    await client.post(f"/api/v1/sessions/{ids[2]}/finish", json={"reason": {"type": "errored"}, "detail": "x"})

    async def search(**query):
        return (await client.post("/api/v1/sessions/search", json={"user_metadata": {}, "limit": 50} | query)).json()

    async def found(**query):
        return {session["session_id"] for session in (await search(**query))["sessions"]}

    assert await found() == set(ids)
    assert await found(display_name="apple RED") == {ids[0]}
    assert await found(display_name="apple", session_id=ids[2]) == set(ids)
    assert await found(user_metadata={"fruit": "pear"}) == {ids[2]}
    assert await found(statuses=[{"type": "active"}]) == {ids[0], ids[1]}
    assert await found(statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == {ids[2]}
    assert await found(statuses=[{"type": "failed"}]) == set()
    assert await found(owner={"type": "user", "owner_urns": ["someone"]}) == set()
    first = await search(limit=2)
    second = await search(limit=2, cursor=first["next_cursor"])
    assert [s["session_id"] for s in first["sessions"] + second["sessions"]] == ids[::-1]
    assert "next_cursor" not in second


async def test_a_session_moves_to_a_project(client, session_id, scheduler):
    assert (await client.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "p"})).status_code == 200
    assert scheduler.sessions[session_id].project_id == "p"


async def test_what_is_not_kept_here_is_said_so(client, session_id, path):
    usage = await client.get("/api/v1/billing/usage/events?starting_on=2026-01-01T00:00:00Z")
    assert usage.json() == {"data": [], "sessions": {}}
    (storage,) = (await client.get("/api/v1/billing/usage/checkpoints/current")).json()["data"]
    assert storage["checkpoint_count"] == 1 and storage["size_bytes"] > 0


@pytest.mark.parametrize("path", ["training_runs/none", "training_runs/none/checkpoints", "samplers/none"])
async def test_a_404_names_what_was_asked_for_in_one_line(client, path):
    response = await client.get(f"/api/v1/{path}")
    noun = "sampling_session_id" if "samplers" in path else "training run"
    assert response.status_code == 404 and noun in response.json()["detail"]


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TxError)]


@pytest.mark.parametrize("error", ERRORS)
def test_no_default_message_holds_the_sources_line_breaks(error):
    message = error().message
    assert message and "\n" not in message and "  " not in message
