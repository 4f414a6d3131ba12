"""What holds for every route: JSON always, keys, limits, and the same table in the documentation."""

import re
from pathlib import Path

import pytest
import zstandard

from tx_async.api import openapi
from tx_async.api.routes import ROUTES

OWN = [row for row in ROUTES if not row.path.startswith(("/services/", "/v1/"))]
"""Without the other paths of the same handlers."""
# The playground's routes look at their checkpoint first, then hand the body to those below /oai/.
DECODED = [
    row
    for row in OWN
    if (row.decodes or row.request)
    and row.path != "/api/v1/import_adapter"
    and not row.path.startswith("/dashboard/playground/")
]
OPENAPI = Path(__file__).parents[2] / "schemas" / "openapi.json"


def url(row) -> str:
    return re.sub(r"{\w+(:path)?}", "x", row.path)


def said(response) -> str:
    """What an error says, in whichever API's form."""
    answer = response.json()
    if "error" in answer:
        assert answer["error"]["type"]
        return answer["error"]["message"]
    assert answer["category"] in ("user", "server")
    return answer["detail"]


def ids(row) -> str:
    return f"{row.method} {row.path}"


async def test_unknown_routes_and_methods_answer_in_json(client):
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("POST", "/api/v1/from_the_future", 404),
        ("GET", "/api/v1/create_session", 405),
        ("DELETE", "/api/v1/training_runs", 405),
        ("POST", "/api/v1/create_session/", 404),
    ]:
        response = await client.request(method, path)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), path
        assert response.json()["category"] == "user" and response.json()["detail"]


@pytest.mark.parametrize("row", DECODED, ids=ids)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 10_000,
    ],
    ids=repr,
)
async def test_a_malformed_body_is_a_400_that_says_why(client, row, body):
    body = body[:200_000]
    response = await client.request(row.method, url(row), content=body, headers={"content-type": "application/json"})
    if row.decodes and response.status_code == 404:
        return  # the thing that the path names does not exist, and the empty object would have been fine
    assert response.status_code == 400, response.text
    assert len(said(response)) > 10
    assert int(response.headers["content-length"]) > 0


@pytest.mark.parametrize("row", [row for row in OWN if not row.public], ids=ids)
async def test_with_a_key_registry_no_route_answers_strangers(scheduler, tmp_path, row):
    import httpx

    from tx_async.api.owner import hash_key
    from tx_async.api.routes import create_api
    from tx_async.config import ServerConfig

    keys = tmp_path / "keys"
    keys.write_text(f"# keys\n{hash_key('tml-alice')} alice\n")
    app = create_api(scheduler, ServerConfig(api_keys_file=str(keys)), scheduler.files)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        for headers in ({}, {"x-api-key": "tml-mallory"}, {"x-api-key": ""}, {"authorization": "tml-alice"}):
            response = await client.request(row.method, url(row), content=b"{}", headers=headers)
            assert response.status_code == 401, response.text
            assert said(response)
        if row.path == "/dashboard/events":
            return  # known keys get a stream that has no end
        known = await client.request(row.method, url(row), content=b"{}", headers={"x-api-key": "tml-alice"})
        assert known.status_code != 401


async def test_a_body_over_the_limit_is_a_413(client):
    for path in ("/api/v1/asample", "/api/v1/optim_step", "/api/v1/forward_backward"):
        response = await client.post(path, content=b" " * 300_000)
        assert response.status_code == 413 and "200000" in response.json()["detail"]
    response = await client.post("/api/v1/create_session", content=b" " * (2**20 + 1))
    assert response.status_code == 413


async def test_zstd_bodies_are_unpacked_whether_or_not_they_announce_their_size(client):
    body = b'{"tags": []}'
    streaming = zstandard.ZstdCompressor().compressobj()
    for packed in (zstandard.compress(body), streaming.compress(body) + streaming.flush()):
        response = await client.post("/api/v1/create_session", content=packed, headers={"content-encoding": "zstd"})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "packed, status",
    [
        (b"no zstd", 400),
        (b"", 400),
        (zstandard.compress(b'{"tags": []}')[:-3], 400),
        (zstandard.compress(b'{"tags": []}') + b"more", 400),
        (zstandard.compress(b" " * 10**8), 413),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b" " * 10**8), 413),
    ],
    ids=["garbage", "empty", "truncated", "trailing", "bomb", "silent bomb"],
)
async def test_broken_or_explosive_zstd_is_refused(client, packed, status):
    response = await client.post("/api/v1/create_session", content=packed, headers={"content-encoding": "zstd"})
    assert response.status_code == status, response.text
    assert response.json()["detail"]


async def test_other_encodings_are_refused_by_name(client):
    response = await client.post("/api/v1/create_session", content=b"{}", headers={"content-encoding": "br"})
    assert response.status_code == 400 and "br" in response.json()["detail"]


async def test_an_unforeseen_exception_is_a_500_without_its_text(client, scheduler, caplog):
    def fail(owner, session_id):
        raise RuntimeError("secret")

    scheduler.heartbeat = fail
    response = await client.post("/api/v1/session_heartbeat", json={"session_id": "s"})
    assert response.status_code == 500 and response.json()["category"] == "server"
    assert "secret" not in response.text and "secret" in caplog.text


def test_every_route_stands_once_and_says_what_it_does():
    assert len({(row.method, row.path) for row in ROUTES}) == len(ROUTES)
    assert all(row.summary and row.response for row in ROUTES)


def test_the_openapi_file_is_the_route_tables():
    assert OPENAPI.read_bytes() == openapi.render(), "routes or structs changed: run tx-async schemas"


def test_openapi_names_every_route_and_every_reference_resolves():
    document = openapi.generate()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(row.method, row.path.replace(":path}", "}")) for row in ROUTES}
    references = set(re.findall(r"#/components/schemas/(\w+)", openapi.render().decode()))
    assert references <= set(document["components"]["schemas"])


async def test_a_server_without_keys_does_not_answer_other_machines(client):
    """Under a bare ASGI server nothing has checked where it listens."""
    path = "/api/v1/get_server_capabilities"
    assert (await client.get(path)).status_code == 200
    refused = await client.get(f"http://192.168.7.1{path}")
    assert refused.status_code == 401 and "api_keys_file" in refused.text
    assert (await client.get("http://192.168.7.1/api/v1/healthz")).status_code in (200, 503)


@pytest.mark.parametrize("row", DECODED, ids=ids)
async def test_json_nests_to_a_limit_everywhere(client, row):
    """Also in what nobody reads: a parser, and whoever stores or shows it, would go down level by level."""
    for depth in (64, 65, 978, 8_000):
        nested = '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)
        body = f'{{"unknown":{nested},"user_metadata":{nested}}}'
        answer = await client.request(row.method, url(row), content=body)
        is_too_deep = "json_depth_max" in said(answer) if answer.status_code >= 400 else False
        assert is_too_deep == (depth > 64), answer.text
        assert answer.status_code == 400 if is_too_deep else answer.status_code < 500


@pytest.mark.parametrize("body", [b"", b"no tar", b'{"a": 1}'])
async def test_an_upload_that_is_no_tar_is_a_400_with_the_reason(client, body):
    answer = await client.post("/api/v1/import_adapter?name=x", content=body)
    assert answer.status_code == 400 and "adapter_config.json" in answer.json()["detail"]
    unnamed = await client.post("/api/v1/import_adapter", content=body)
    assert unnamed.status_code == 400 and "name" in unnamed.json()["detail"]
