"""A session's requests on a timeline, as Perfetto loads it."""

import itertools
import json
from collections import defaultdict
from typing import Any

import httpx
import pytest

from tx_async.api.traces import trace
from tx_async.scheduler.interface import STATIONS, Passage


def passage(number: int, **times: Any) -> Passage:
    return Passage(request_id=f"r{number}", kind="optim_step", subject="s:train:0", seq_id=number, **times)


def done(number: int, at: float) -> Passage:
    """A second at each station."""
    return passage(
        number, accepted_at=at, durable_at=at + 1, begun_at=at + 2, ended_at=at + 3, published_at=at + 4,
        fetched_at=at + 5,
    )  # fmt: skip


def slices(content: bytes) -> list[dict]:
    """Checked as the trace event format has them: on each lane they lie in each other, or side by side."""
    found = json.loads(content)
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    lanes = defaultdict(list)
    for event in events:
        assert isinstance(event["ts"], int) and isinstance(event["dur"], int) and event["dur"] >= 0
        lanes[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        for (a, b), (c, d) in itertools.combinations(spans, 2):
            assert b <= c or d <= a or (a <= c and d <= b) or (c <= a and b <= d)
    named = {event["tid"] for event in found["traceEvents"] if event["ph"] == "M"}
    assert set(lanes) <= named
    return events


def stations_of(events: list[dict], request_id: str) -> list[str]:
    return [
        event["name"]
        for event in events
        if event["cat"] == "station" and event["args"]["request_id"] == request_id and event["dur"]
    ]


def test_a_request_has_a_slice_for_each_station():
    events = slices(trace("s", [done(1, 100.0)], 200.0))
    assert stations_of(events, "r1") == list(STATIONS)
    (request,) = [event for event in events if event["cat"] == "request"]
    assert (request["ts"], request["dur"]) == (100_000_000, 5_000_000)
    assert request["args"]["outcome"] == "finished"


def test_requests_that_are_open_together_lie_on_lanes_of_their_own():
    events = slices(trace("s", [done(1, 100.0), done(2, 101.0), done(3, 106.0)], 200.0))
    lanes = {event["args"]["request_id"]: event["tid"] for event in events if event["cat"] == "request"}
    assert lanes["r1"] == lanes["r3"] != lanes["r2"]


@pytest.mark.parametrize(
    ("times", "stations"),
    [
        ({"durable_at": 101.0, "begun_at": 102.0}, ["accept", "queue", "run"]),
        ({"durable_at": 101.0, "published_at": 102.0}, ["accept", "queue"]),  # needs no device, and nobody has asked
        ({"published_at": 102.0}, ["accept"]),  # of before a restart
        ({}, ["accept"]),
    ],
)
def test_what_is_open_or_not_known_is_drawn_as_far_as_it_is(times, stations):
    assert stations_of(slices(trace("s", [passage(1, accepted_at=100.0, **times)], 110.0)), "r1") == stations


def test_a_sample_shows_its_first_token():
    sample = done(1, 100.0)
    sample.first_token_at = 102.5
    names = [event["name"] for event in slices(trace("s", [sample], 200.0)) if event["cat"] == "worker"]
    assert names == ["first token", "decode"]


async def test_a_link_gives_the_trace_to_whoever_follows_it(client, connect, session_id, model_id):
    await client.post("/api/v1/optim_step", json={"model_id": model_id, "seq_id": 1, "adam_params": {}})
    answer = (await client.get(f"/api/v1/sessions/{session_id}/trace_export")).json()
    assert answer["status"] == "ready"
    async with connect(None) as anybody:
        response = await anybody.get(answer["url"])
        forged = await anybody.get(answer["url"][:-4] + "AAAA")
    events = slices(response.content)
    kinds = {event["name"].split()[0] for event in events if event["cat"] == "request"}
    assert kinds == {"create_model", "optim_step"} and {event["cat"] for event in events} >= {"station"}
    assert forged.status_code == 404


async def test_a_trace_is_its_owner_s(client, connect, session_id):
    async with connect("tml-mallory") as mallory:
        response: httpx.Response = await mallory.get(f"/api/v1/sessions/{session_id}/trace_export")
    assert response.status_code == 404


async def test_a_link_to_a_trace_opens_no_checkpoint(client, session_id):
    url = (await client.get(f"/api/v1/sessions/{session_id}/trace_export")).json()["url"]
    assert (await client.get(url.replace("/traces/", "/archives/"))).status_code == 404
