"""Set-up calls, sessions and health."""

import httpx
import pytest

from tx_async.api.routes import create_api


async def test_healthz_says_what_it_waits_for_until_a_request_could_run(connect, scheduler):
    async with connect(None) as anyone:
        scheduler.missing = ["worker: loading weights (40 %)"]
        response = await anyone.get("/api/v1/healthz")
        assert response.status_code == 503
        assert response.json() == {"status": "starting", "waiting_for": ["worker: loading weights (40 %)"]}
        scheduler.missing = []
        response = await anyone.get("/api/v1/healthz")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_a_worker_s_last_words_are_told_to_operators_only(scheduler, config):
    scheduler.missing, scheduler.details = ["worker w0.0: restarting"], " (last said: a secret)"
    app = create_api(scheduler, config, scheduler.files)
    for peer, is_told in (("127.0.0.1", True), ("192.0.2.7", False)):
        transport = httpx.ASGITransport(app=app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as anyone:
            answer = (await anyone.get("/api/v1/healthz")).json()
        assert ("secret" in str(answer)) is is_told, answer


async def test_what_is_not_ready_yet_answers_503_with_a_time_to_retry(client, scheduler, model_id):
    scheduler.missing = ["worker"]
    body = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    response = await client.post("/api/v1/optim_step", json=body)
    assert response.status_code == 503 and float(response.headers["retry-after"]) > 0
    assert response.json()["category"] == "server"


async def test_client_flags(client):
    flags = (await client.post("/api/v1/client/config", json={"sdk_version": "0.38.0"})).json()
    assert flags["pjwt_auth_enabled"] is False and flags["custom_loss_server_side"] is False
    dynamic = (await client.post("/api/v1/client/dynamic_config", json={"sdk_version": "0.38.0"})).json()
    assert dynamic["refresh_interval_sec"] > 0


async def test_capabilities_name_the_base_model(client):
    (model,) = (await client.get("/api/v1/get_server_capabilities")).json()["supported_models"]
    assert model == {"model_name": "fake/model", "max_context_length": 512, "trainable": True, "sampleable": True}


async def test_a_session_begins_beats_and_ends(client, scheduler, session_id):
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    assert (await client.post("/api/v1/session_heartbeat", json=beat)).json() == {"type": "session_heartbeat"}
    finish = {"reason": {"type": "interrupted"}, "detail": "ctrl-c"}
    assert (await client.post(f"/api/v1/sessions/{session_id}/finish", json=finish)).status_code == 200
    assert scheduler.sessions[session_id].status == "interrupted"
    assert (await client.post("/api/v1/session_heartbeat", json=beat)).status_code == 410


async def test_another_tenants_session_does_not_exist(client, other, session_id):
    for client_, status in ((other, 404), (client, 200)):
        response = await client_.post("/api/v1/session_heartbeat", json={"session_id": session_id})
        assert response.status_code == status


async def test_metadata_that_cannot_be_stored_is_refused(client):
    for metadata in ({"n": 2**70}, {"text": "x" * 100_000}):
        response = await client.post("/api/v1/create_session", json={"user_metadata": metadata})
        assert response.status_code == 400 and "user_metadata" in response.json()["detail"]


async def test_telemetry_of_any_shape_is_accepted(client):
    for body in (b'{"events": []}', b"", b"\xff"):
        response = await client.post("/api/v1/telemetry", content=body)
        assert response.json() == {"status": "accepted"}


async def test_the_key_describes_itself_as_the_cli_reads_it(client):
    key = (await client.get("/api/v1/auth/apikey/me")).json()
    assert isinstance(key["key_id"], int) and {"name", "note"} <= key.keys()
    assert "email" in key["details"]["user_details"] and "name" in key["details"]["org_details"]


@pytest.mark.parametrize("field", ["sdk_version", "project_id", "display_name", "tags"])
async def test_every_text_of_a_session_has_a_limit_with_a_name(client, field):
    for size, status in ((1024, 200), (1025, 400)):
        value = ["x" * size] if field == "tags" else "x" * size
        answer = await client.post("/api/v1/create_session", json={field: value})
        assert answer.status_code == status
        assert status == 200 or "text_bytes_max" in answer.json()["detail"]


async def test_a_session_has_so_many_tags_and_so_much_metadata(client):
    answer = await client.post("/api/v1/create_session", json={"tags": ["a"] * 65})
    assert answer.status_code == 400 and "tags_max" in answer.json()["detail"]
    answer = await client.post("/api/v1/create_session", json={"user_metadata": {"a": "x" * 65_536}})
    assert answer.status_code == 400 and "user_metadata_bytes_max" in answer.json()["detail"]
