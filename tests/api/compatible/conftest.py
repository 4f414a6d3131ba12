"""Both APIs in front of a fake scheduler, whose answers the tests write, with a byte-level tokenizer."""

import json
from collections.abc import Sequence

import msgspec
import pytest

from tests.support.chat_templates import QWEN3, make_chat_tokenizer
from tx_async.api.compatible.tokenizer import load
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FAKE_BASE_MODEL, FakeScheduler

END = 256
"""The token that ends an answer."""


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    return make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "model", QWEN3)


@pytest.fixture(scope="session")
def tokenizer(chat_folder):
    return load(str(chat_folder))


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(sample_num_samples_max=64)


@pytest.fixture
def scheduler(chat_folder) -> FakeScheduler:
    base = msgspec.structs.replace(
        FAKE_BASE_MODEL,
        path=str(chat_folder),
        eos_token_ids=(END,),
        fingerprint="0123456789abcdef",
        aliases=("alias",),
        max_context_length=1024,
    )
    return FakeScheduler(base)


@pytest.fixture
def says(scheduler, tokenizer):
    """Make the next answer say something."""

    def script(*answers: str | Sequence[int], ends: bool = True) -> None:
        for answer in answers:
            tokens = tokenizer.encode(answer, framed=False) if isinstance(answer, str) else list(answer)
            scheduler.live.answers.append([*tokens, *([END] if ends else [])])

    return script


@pytest.fixture
def header_of():
    return lambda key: {"authorization": f"Bearer {key}"}


@pytest.fixture
def ask(client):
    """POST JSON to a route -> (status, answer)."""

    async def post(path: str, **body) -> tuple[int, dict]:
        response = await client.post(path, json=body)
        return response.status_code, response.json()

    return post


@pytest.fixture
def listen(client):
    """POST JSON with stream -> the events' data, in order."""

    async def post(path: str, **body) -> list[dict]:
        response = await client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    return post
