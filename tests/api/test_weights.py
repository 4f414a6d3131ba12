"""Saving, loading and copying weights."""

import pytest

AGE = "age1sx6da049n2g3lhwnj9rth6v3csmrp8hqh2t9paxvfxp66y93w9sqdurj2k"
"""A public key."""


@pytest.fixture
def call(client, result):
    async def send(route, /, **body):
        return (await result(await client.post(f"/api/v1/{route}", json=body))).json()

    return send


async def test_each_kind_is_saved_under_its_path(call, model_id):
    saved = await call("save_weights", model_id=model_id, path="final", seq_id=1, overwrite=False)
    assert saved["path"] == f"tinker://{model_id}/weights/final"
    sampler = await call("save_weights_for_sampler", model_id=model_id, path="final", kind="snapshot", seq_id=2)
    assert sampler["path"] == f"tinker://{model_id}/sampler_weights/final"
    export = await call("save_weights_external", model_id=model_id, path="final", seq_id=3, ttl_seconds=3600)
    assert export["path"] == f"tinker://{model_id}/external_weights/final"


async def test_an_ephemeral_sampler_has_a_session_and_no_name(call, client, model_id, scheduler):
    answer = await call(
        "save_weights_for_sampler", model_id=model_id, sampling_session_seq_id=0, kind="inflight", seq_id=1
    )
    assert "path" not in answer
    sampler = await client.get(f"/api/v1/samplers/{answer['sampling_session_id']}")
    assert sampler.json()["base_model"] == "fake/model"
    assert scheduler.operations[-1].inflight is True


@pytest.mark.parametrize(
    "path, change, word",
    [
        ("save_weights", {"path": "a/b"}, "a/b"),
        ("save_weights", {"path": "../../etc"}, "checkpoint name"),
        ("save_weights", {"path": ".."}, "checkpoint name"),
        ("save_weights", {"path": "a..b"}, "checkpoint name"),
        ("save_weights", {"path": ".hidden"}, "checkpoint name"),
        ("save_weights", {"path": ""}, "checkpoint name"),
        ("save_weights", {"path": "x" * 129}, "128"),
        ("save_weights", {"path": "a\nb"}, "checkpoint name"),
        ("save_weights", {"path": "ä"}, "checkpoint name"),
        ("save_weights", {"path": None}, "name"),
        ("save_weights", {"path": 7}, "path"),
        ("save_weights", {"ttl_seconds": 3599}, "ttl_seconds"),
        ("save_weights", {"ttl_seconds": 10**12}, "ttl_seconds"),
        ("save_weights", {"user_metadata": {"n": 2**70}}, "user_metadata"),
        ("save_weights_for_sampler", {"path": None}, "sampling_session_seq_id"),
        ("save_weights_for_sampler", {"sampling_session_seq_id": 1}, "sampling_session_seq_id"),
        ("save_weights_for_sampler", {"kind": "forever"}, "kind"),
        ("save_weights_external", {"age_encryption_recipients": ["age1x"]}, "[0], 'age1x', is not a recipient"),
        ("save_weights_external", {"age_encryption_recipients": [AGE, "age1x" * 9]}, "[1], 'age1xage'…, is not a"),
        ("load_weights", {"path": "final", "optimizer": True}, "tinker://"),
        ("load_weights", {"path": "tinker://a/b/c", "optimizer": True}, "tinker://"),
        ("load_weights", {"path": "tinker://none/weights/x", "optimizer": True}, "checkpoint"),
        ("load_weights", {"path": "tinker://a/weights/c", "optimizer": None}, "optimizer"),
        ("load_weights", {"path": "tinker://a/weights/c", "optimizer": False, "optimizer_config": {"type": "d"}}, "d"),
    ],
)
async def test_what_cannot_be_saved_or_loaded_fails_in_its_place(call, model_id, path, change, word):
    failure = await call(path, **{"model_id": model_id, "seq_id": 1, "path": "good"} | change)
    assert failure["category"] == "user" and word in failure["error"]
    saved = await call("save_weights", model_id=model_id, path="after", seq_id=2)
    assert saved["path"].endswith("/after")


@pytest.mark.parametrize("secret", ["AGE-SECRET-KEY-1QQSECRETX", "age-secret-key-1qqsecretx", "ssh-ed25519 QQSECRETX"])
async def test_no_part_of_a_secret_comes_back_in_the_failure(call, model_id, secret, caplog):
    caplog.set_level("DEBUG")
    sent = {"path": "good", "age_encryption_recipients": [AGE, secret]}
    failure = await call("save_weights_external", model_id=model_id, seq_id=1, **sent)
    assert failure["category"] == "user" and "age_encryption_recipients[1]" in failure["error"]
    assert ("private key" in failure["error"]) == ("key" in secret.lower())
    for said in (str(failure), caplog.text):
        assert "QQSECRET" not in said.upper()


async def test_the_same_name_again_needs_overwrite(call, model_id):
    await call("save_weights", model_id=model_id, path="a", seq_id=1)
    assert "overwrite" in (await call("save_weights", model_id=model_id, path="a", seq_id=2))["error"]
    assert (await call("save_weights", model_id=model_id, path="a", seq_id=3, overwrite=True))["path"]


async def test_a_checkpoint_becomes_a_new_model_with_its_own_configuration(call, client, session_id, model_id):
    path = (await call("save_weights", model_id=model_id, path="a", seq_id=1))["path"]
    loaded = await call("load_weights", session_id=session_id, model_seq_id=1, path=path, optimizer=True)
    assert loaded["model_id"] == f"{session_id}:train:1"
    info = await client.post("/api/v1/get_info", json={"model_id": loaded["model_id"]})
    assert info.json()["lora_rank"] == 8
    again = await call("load_weights", model_id=loaded["model_id"], seq_id=1, path=path, optimizer=False)
    assert again["path"] == path


@pytest.mark.parametrize(
    "change, status",
    [
        ({"path": "final"}, 400),
        ({"base_model": "someone/else"}, 400),
        ({"optimizer_config": {"type": "dimuon"}}, 400),
        ({"session_id": "s-none"}, 404),
        ({"model_seq_id": None}, 400),
    ],
)
async def test_a_new_model_from_a_checkpoint_is_refused_at_once(client, session_id, change, status):
    body = {"session_id": session_id, "model_seq_id": 1, "path": "tinker://a/weights/b", "optimizer": True}
    response = await client.post("/api/v1/load_weights", json=body | change)
    assert response.status_code == status and response.json()["detail"]


async def test_weights_info_reports_the_adapter(call, client, other, model_id):
    path = (await call("save_weights", model_id=model_id, path="a", seq_id=1))["path"]
    info = (await client.post("/api/v1/weights_info", json={"tinker_path": path})).json()
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("fake/model", 8, True)
    assert (await other.post("/api/v1/weights_info", json={"tinker_path": path})).status_code == 404
    await client.post(f"/api/v1/training_runs/{model_id}/checkpoints/weights/a/publish")
    assert (await other.post("/api/v1/weights_info", json={"tinker_path": path})).status_code == 200


async def test_a_copy_belongs_to_a_new_run(call, client, session_id, model_id, scheduler):
    path = (await call("save_weights", model_id=model_id, path="a", seq_id=1))["path"]
    body = {"source_path": path, "session_id": session_id, "model_seq_id": 5, "ttl_seconds": 7200}
    copy = (await client.post("/api/v1/copy_weights", json=body)).json()["tinker_path"]
    assert copy == f"tinker://{session_id}:train:5/weights/a"
    assert scheduler.checkpoints[copy].expires_at is not None and scheduler.checkpoints[path].expires_at is None


async def test_a_copy_for_a_project_is_made_once_however_often_it_is_asked_for(call, client, model_id, scheduler):
    path = (await call("save_weights", model_id=model_id, path="a", seq_id=1))["path"]
    body, headers = {"source_path": path, "destination_project_id": "p"}, {"x-idempotency-key": "k"}
    copies = [await client.post("/api/v1/copy_weights", json=body, headers=headers) for _ in range(2)]
    assert copies[0].status_code == 200 and copies[0].json() == copies[1].json()
    assert "p" in [session.project_id for session in scheduler.sessions.values()]
    assert (await client.post("/api/v1/copy_weights", json={"source_path": path})).status_code == 400
