"""What stands before every route: proxies that are believed, Host names and Origins that are answered."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.support.http import asgi_client
from tx_async.api.gate import Gate, GateMiddleware
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError


def client(*, address: str = "127.0.0.1", **settings: str):
    async def seen(request: Request) -> JSONResponse:
        return JSONResponse({"url": str(request.base_url), "local": gate.is_local(request.scope)})

    gate = Gate(ServerConfig(**settings))  # type: ignore[arg-type]
    app = Starlette(routes=[Route("/", seen, methods=["GET", "POST"])], middleware=[Middleware(GateMiddleware)])
    app.state.gate = gate
    return asgi_client(app, address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.3.2.1", "a.localhost"]
)
async def test_a_keyless_server_answers_to_names_of_loopback(host):
    async with client() as http:
        assert (await http.get("/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.7", "", "[", "a b"]
)
async def test_a_keyless_server_answers_to_no_other_name(host):
    """DNS rebinding: the page's own name leads to 127.0.0.1, but the browser says the name."""
    async with client() as http:
        response = await http.get("/", headers={"host": host})
    assert response.status_code == 403 and "allowed_hosts" in response.json()["detail"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", "http://"]
)
async def test_a_page_from_elsewhere_cannot_act_on_a_keyless_server(origin):
    async with client() as http:
        response = await http.post("/", headers={"origin": origin, "host": "localhost"}, content=b"{}")
    assert response.status_code == 403 and "allowed_origins" in response.json()["detail"]
    assert response.headers["x-request-id"]


async def test_a_page_of_this_machine_and_a_client_without_origin_may():
    async with client() as http:
        assert (
            await http.post("/", headers={"origin": "http://localhost:3000", "host": "localhost"})
        ).status_code == 200
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            headers = {"content-type": content_type, "host": "localhost"}
            assert (await http.post("/", headers=headers, content=b"x")).status_code == 200


async def test_the_operator_may_name_hosts_and_origins():
    headers = {"host": "gpu-box", "origin": "https://lab.example"}
    async with client(allowed_hosts="gpu-box, other", allowed_origins="https://lab.example/") as http:
        assert (await http.get("/", headers=headers)).status_code == 200
        assert (await http.get("/", headers=headers | {"host": "third"})).status_code == 403
        assert (await http.get("/", headers=headers | {"origin": "http://lab.example"})).status_code == 403
    async with client(allowed_hosts="*", allowed_origins="*") as http:
        assert (await http.get("/", headers=headers | {"host": "third"})).status_code == 200


async def test_a_server_with_keys_answers_to_every_name(tmp_path):
    async with client(api_keys_file=str(tmp_path)) as http:
        assert (await http.get("/", headers={"host": "api.example", "origin": "https://x.example"})).status_code == 200


# ---- proxies

FORWARDED = {"x-forwarded-proto": "https", "x-forwarded-host": "api.example"}


async def test_a_trusted_proxy_says_how_it_was_called(tmp_path):
    keys = str(tmp_path)
    async with client(address="10.1.2.3", trusted_proxies="10.0.0.0/8, ::1", api_keys_file=keys) as http:
        assert (await http.get("/", headers=FORWARDED)).json()["url"] == "https://api.example/"
        # Only the last value is the proxy's own: the client may have sent the others.
        spoofed = FORWARDED | {"x-forwarded-host": "evil.example, api.example", "x-forwarded-proto": "gopher"}
        assert (await http.get("/", headers=spoofed)).json()["url"] == "http://api.example/"


@pytest.mark.parametrize("proxies", ["", "10.1.2.4"])
async def test_nobody_else_is_believed(proxies, tmp_path):
    async with client(address="10.1.2.3", trusted_proxies=proxies, api_keys_file=str(tmp_path)) as http:
        assert (await http.get("/", headers=FORWARDED | {"host": "real"})).json()["url"] == "http://real/"


async def test_the_name_that_a_proxy_was_called_by_is_checked_like_any_other():
    async with client(trusted_proxies="127.0.0.1") as http:
        assert (await http.get("/", headers=FORWARDED)).status_code == 403
    async with client(trusted_proxies="127.0.0.1", allowed_hosts="api.example") as http:
        assert (await http.get("/", headers=FORWARDED)).json()["url"] == "https://api.example/"


@pytest.mark.parametrize("proxies", ["proxy.example", "10.0.0.0/99", "10.0.0.7;10.0.0.8"])
def test_a_proxy_that_is_no_address_is_refused_at_start(proxies):
    with pytest.raises(ConfigError, match="trusted_proxies"):
        Gate(ServerConfig(trusted_proxies=proxies))


async def test_what_came_through_a_proxy_is_not_local(tmp_path):
    """Metrics need no key on this machine: a proxy on it speaks for others."""
    keys, host = str(tmp_path), {"host": "127.0.0.1:8000"}
    async with client(api_keys_file=keys) as http:
        assert (await http.get("/", headers=host)).json()["local"] is True
        for headers in ({"host": "api.example"}, host | {"x-forwarded-for": "8.8.8.8"}, host | {"via": "1.1 proxy"}):
            assert (await http.get("/", headers=headers)).json()["local"] is False
    async with client(api_keys_file=keys, trusted_proxies="127.0.0.1") as http:
        assert (await http.get("/", headers=host)).json()["local"] is False
    async with client(address="10.1.2.3", api_keys_file=keys) as http:
        assert (await http.get("/", headers=host)).json()["local"] is False
