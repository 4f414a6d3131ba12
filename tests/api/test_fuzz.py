"""Whatever arrives: JSON comes back, with a status that says whose fault it is."""

import asyncio
import json
import re
from urllib.parse import quote

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tx_async.api.routes import ROUTES, create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler

FIELDS = [
    "model_id",
    "seq_id",
    "session_id",
    "model_seq_id",
    "base_model",
    "lora_config",
    "rank",
    "path",
    "optimizer",
    "kind",
    "data",
    "loss_fn",
    "loss_fn_inputs",
    "forward_backward_input",
    "forward_input",
    "model_input",
    "chunks",
    "tokens",
    "type",
    "target_tokens",
    "weights",
    "dtype",
    "shape",
    "sparse_crow_indices",
    "sparse_col_indices",
    "adam_params",
    "learning_rate",
    "prompt",
    "sampling_params",
    "sampling_session_id",
    "sampling_session_seq_id",
    "num_samples",
    "max_tokens",
    "stop",
    "request_id",
    "reason",
    "cursor",
    "last_created_at",
    "user_metadata",
    "owner",
    "statuses",
    "ttl_seconds",
    "tinker_path",
]
WORDS = ["int64", "float32", "encoded_text", "cross_entropy", "fake/model", "snapshot", "own", "success", "2026-01-01"]
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 2**64, 2**70, -(2**63), 1e300, 0.5]),
    st.integers(-10, 2000),
    st.floats(),
)


def values(known: dict[str, str]):
    """JSON of any shape, made of the words that the server looks for."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        NUMBERS,
        st.sampled_from([*WORDS, *known.values()]),
        st.text(max_size=8),
        st.lists(st.integers(-1, 1001), max_size=6),
    )
    names = st.one_of(st.sampled_from(FIELDS), st.text(max_size=4))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=6)),
        max_leaves=20,
    )


def bodies(known: dict[str, str]):
    """Objects that carry real ids, so that they get past the door."""
    ids = st.fixed_dictionaries({}, optional={name: st.just(value) for name, value in known.items()})
    numbers = st.fixed_dictionaries({}, optional={"seq_id": st.integers(0, 3), "model_seq_id": st.integers(0, 3)})
    fields = st.dictionaries(st.sampled_from(FIELDS), values(known), max_size=8)
    objects = st.tuples(fields, numbers, ids).map(lambda parts: parts[0] | parts[1] | parts[2])
    texts = st.one_of(objects, values(known)).map(lambda value: json.dumps(value, ensure_ascii=False))
    return st.one_of(texts.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=40))


class Fuzzed:
    """One server with one session, model and sampler for all examples."""

    def __init__(self):
        self.scheduler = FakeScheduler()
        self.app = create_api(self.scheduler, ServerConfig(long_poll_ms=1), self.scheduler.files)
        self.known = asyncio.run(self._begin())

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"x-api-key": "tml-a"})

    async def _begin(self) -> dict[str, str]:
        async with self.client() as client:
            session_id = (await client.post("/api/v1/create_session", json={})).json()["session_id"]
            body = {"session_id": session_id, "model_seq_id": 9, "base_model": "fake/model"}
            created = (await client.post("/api/v1/create_model", json=body)).json()
            sampler = {"session_id": session_id, "sampling_session_seq_id": 9, "base_model": "fake/model"}
            sampler_id = (await client.post("/api/v1/create_sampling_session", json=sampler)).json()
        return {
            "session_id": session_id,
            "model_id": created["model_id"],
            "request_id": created["request_id"],
            "sampling_session_id": sampler_id["sampling_session_id"],
        }

    async def call(self, method: str, path: str, body: bytes, content_type: str) -> httpx.Response:
        async with self.client() as client:
            return await client.request(method, path, content=body, headers={"content-type": content_type})


fuzzed = Fuzzed()


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.is_redirect:  # of the page's older address
        assert response.headers["location"] == "/"
        return
    if response.headers["content-type"] in ("application/x-protobuf", "application/x-tar"):
        return
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) > 0
    answer = json.loads(response.content, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    if response.status_code >= 400:
        if "error" in answer:  # of the compatible routes
            assert answer["error"]["message"] and answer["error"]["type"]
        else:
            assert answer["detail"] and answer["category"] in ("user", "server")


def ends(row) -> bool:
    """The page's events are a stream without end."""
    return row.path != "/dashboard/events"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([row for row in ROUTES if row.decodes or row.request]), st.data())
def test_no_body_breaks_a_route(row, data):
    path = re.sub(r"{session_id}", fuzzed.known["session_id"], row.path)
    path = re.sub(r"{\w+}", "weights", path)
    content_type = data.draw(st.sampled_from(["application/json", "application/x-protobuf", "text/plain", ""]))
    body = data.draw(bodies(fuzzed.known))
    check(asyncio.run(fuzzed.call(row.method, path, body, content_type)))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([row for row in ROUTES if "{" in row.path or row.method == "GET"]).filter(ends), st.data())
def test_no_path_or_query_breaks_a_route(row, data):
    words = st.one_of(
        st.sampled_from([*fuzzed.known.values(), "..", "%2e%2e", "weights", "-1", "٣"]), st.text(max_size=6)
    )

    def word(_: re.Match[str]) -> str:
        return quote(data.draw(words) or "x", safe="%", errors="replace")

    path = re.sub(r"{\w+(:path)?}", word, row.path)
    query = data.draw(
        st.dictionaries(st.sampled_from(["limit", "offset", "access_scope", "project_id"]), words, max_size=3)
    )
    url = httpx.URL("http://test" + path).copy_merge_params(query)
    check(asyncio.run(fuzzed.call(row.method, str(url), b"{}", "application/json")))
