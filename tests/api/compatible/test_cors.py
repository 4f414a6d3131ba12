"""Pages from elsewhere are refused until the operator names them, and then get these routes only."""

import httpx
import pytest

from tx_async.api.routes import create_api
from tx_async.config import ServerConfig

CHAT = "/oai/api/v1/chat/completions"
ASKED = {"model": "fake/model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def served(scheduler, origins: str) -> httpx.AsyncClient:
    app = create_api(scheduler, ServerConfig(cors_origins=origins), scheduler.files)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


async def test_nothing_is_said_to_pages_until_they_are_named(scheduler):
    async with served(scheduler, "") as client:
        answer = await client.post(CHAT, json=ASKED, headers={"origin": "https://a.example"})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert (await client.options(CHAT, headers={"origin": "https://a.example", **PREFLIGHT})).status_code == 405


@pytest.mark.parametrize(("origin", "is_named"), [("https://a.example", True), ("https://b.example", False)])
async def test_a_named_page_may_ask_and_read(scheduler, origin, is_named):
    async with served(scheduler, "https://c.example, https://a.example/") as client:
        preflight = await client.options(CHAT, headers={"origin": origin, **PREFLIGHT})
        answer = await client.post(CHAT, json=ASKED | {"stream": True}, headers={"origin": origin})
        for response in (preflight, answer):
            assert (response.headers.get("access-control-allow-origin") == origin) == is_named
        other = await client.post("/api/v1/create_session", json={}, headers={"origin": origin})
        assert "access-control-allow-origin" not in other.headers
