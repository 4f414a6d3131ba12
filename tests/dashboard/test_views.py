"""What the page is told and may change, over HTTP, in front of a fake scheduler."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.support.events import read_events, scope_of
from tx_async import keys
from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.dashboard import picture
from tx_async.dashboard.news import PAGES_PER_KEY_MAX, no_room
from tx_async.dashboard.pages import STATIC, is_on
from tx_async.dashboard.viewer import Viewer
from tx_async.testing.fake_scheduler import FakeScheduler
from tx_async.wire.records import CheckpointRecord, ModelRecord, SessionRecord
from tx_async.wire.worker import AdapterConfig

HOST = "http://127.0.0.1:8000"


def new_run(scheduler: FakeScheduler, owner: str, name: str, **session: object) -> str:
    record = SessionRecord(session_id=name, owner=owner, created_at=1.0, **session)  # type: ignore[arg-type]
    lora = AdapterConfig(rank=8, seed=1)
    model = ModelRecord(
        model_id=f"{name}:train:0", session_id=name, owner=owner, base_model="b", lora=lora, created_at=1.0
    )
    scheduler.sessions[name], scheduler.models[model.model_id] = record, model
    scheduler.histories[model.model_id] = [{"index": float(i), "loss:sum": 2.0 - i} for i in range(3)]
    checkpoint = CheckpointRecord(
        path=f"tinker://{model.model_id}/weights/a",
        model_id=model.model_id,
        owner=owner,
        kind="weights",
        name="a",
        storage_key=f"{model.model_id}/a",
        base_model="b",
        lora=lora,
        created_at=2.0,
        size_bytes=10,
    )
    scheduler.checkpoints[checkpoint.path] = checkpoint
    return model.model_id


class Site:
    """A server with a page, and browsers on it."""

    def __init__(self, scheduler: FakeScheduler, config: ServerConfig):
        self.scheduler = scheduler
        self.app = create_api(scheduler, config, scheduler.files)

    def browser(self, key: str = "", address: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
        headers = {"sec-fetch-site": "same-origin", **headers} | ({"x-api-key": key} if key else {})
        transport = httpx.ASGITransport(app=self.app, client=(address, 40000), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=HOST, headers=headers)


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def open_site(scheduler: FakeScheduler) -> Site:
    """Without keys, on loopback."""
    return Site(scheduler, ServerConfig())


@pytest.fixture
def people(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys"
    return {"alice": keys.add(file, "alice"), "bob": keys.add(file, "bob"), "root": keys.add(file, "root", "admin")}


@pytest.fixture
def keyed_site(scheduler: FakeScheduler, people: dict[str, str], tmp_path: Path) -> Site:
    config = ServerConfig(host="0.0.0.0", dashboard=True, api_keys_file=str(tmp_path / "keys"), worker_token="s3cret")
    return Site(scheduler, config)


@pytest.fixture
def runs(scheduler: FakeScheduler, people: dict[str, str]) -> dict[str, str]:
    from tx_async.api.owner import owner_of

    return {name: new_run(scheduler, owner_of(people[name]), f"of-{name}") for name in ("alice", "bob")}


@contextlib.asynccontextmanager
async def token_of(browser: httpx.AsyncClient) -> AsyncIterator[str]:
    async with browser:
        answer = await browser.get("/dashboard/viewer")
        browser.headers["x-dashboard-token"] = answer.json()["token"]
        yield answer.json()["token"]


# ---- the page's own files


async def test_the_page_is_html_with_landmarks_and_a_policy_that_lets_nothing_else_in(open_site: Site):
    async with open_site.browser() as browser:
        page = await browser.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        for part in (
            '<html lang="en">',
            "<title>",
            'name="viewport"',
            "<main",
            "<nav aria-label",
            "<header",
            "<footer",
        ):
            assert part in page.text
        named = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.text))
        assert {"/dashboard/app.js", "/dashboard/app.css", "/dashboard/icon.svg"} <= named
        for path in named | {f"/dashboard/{file.name}" for file in STATIC.glob("*.js")} | {"/"}:
            file = await browser.get(path)
            policy = dict(part.split(" ", 1) for part in file.headers["content-security-policy"].split("; "))
            assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            again = await browser.get(path, headers={"if-none-match": file.headers["etag"]})
            assert again.status_code == 304


def test_the_page_s_files_name_no_other_host_and_write_no_markup():
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), file
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\balert\(|\bconfirm\(|style=", text
        )


@pytest.mark.parametrize(
    ("host", "setting", "expected"),
    [("127.0.0.1", None, True), ("0.0.0.0", None, False), ("0.0.0.0", True, True), ("localhost", False, False)],
)
def test_the_page_is_on_where_only_this_machine_sees_it(host: str, setting: bool | None, expected: bool):
    assert is_on(ServerConfig(host=host, dashboard=setting)) is expected


async def test_who_looks_under_dashboard_is_sent_to_the_page(open_site: Site):
    async with open_site.browser() as browser:
        for path in ("/dashboard", "/dashboard/"):
            answer = await browser.get(path)
            assert answer.is_redirect and answer.headers["location"] == "/"


async def test_a_server_without_the_page_has_none_of_its_routes(scheduler: FakeScheduler):
    async with Site(scheduler, ServerConfig(dashboard=False)).browser() as browser:
        for path in ("/", "/dashboard", "/dashboard/events", "/dashboard/viewer", "/dashboard/app.js"):
            assert (await browser.get(path)).status_code == 404


# ---- who sees what


async def test_without_keys_this_machine_sees_everything(open_site: Site, runs: dict[str, str]):
    async with open_site.browser() as browser:
        assert (await browser.get("/dashboard/viewer")).json()["role"] == "admin"
        events = await read_events(open_site.app, "/dashboard/events", 1)
        assert events[0][0] == "state" and set(events[0][1]["runs"]) == set(runs.values())
        nothing_lost = {"operations_to_replay": 0, "operations_lost": 0}
        assert events[0][1]["ready"] == {"is_ready": True, "waiting_for": []} | nothing_lost
        assert (await browser.get("/dashboard/operator")).status_code == 200


async def test_a_user_sees_its_own_runs_only(keyed_site: Site, people: dict[str, str], runs: dict[str, str]):
    async with keyed_site.browser(people["alice"]) as browser:
        assert (await browser.get("/dashboard/viewer")).json()["role"] == "user"
        events = await read_events(keyed_site.app, "/dashboard/events", 1, key=people["alice"])
        assert set(events[0][1]["runs"]) == {runs["alice"]} and "workers" not in events[0][1]
        assert (await browser.get(f"/dashboard/runs/{runs['alice']}")).status_code == 200
        assert (await browser.get(f"/dashboard/runs/{runs['bob']}")).status_code == 404
        listed = (await browser.get("/dashboard/checkpoints")).json()["checkpoints"]
        assert [item["path"] for item in listed] == [f"tinker://{runs['alice']}/weights/a"]
        assert (await browser.get("/dashboard/operator")).status_code == 403


async def test_an_admin_sees_all_by_the_names_of_their_keys(
    keyed_site: Site, people: dict[str, str], runs: dict[str, str]
):
    events = await read_events(keyed_site.app, "/dashboard/events", 1, key=people["root"])
    assert {run["key"] for run in events[0][1]["runs"].values()} == {"alice", "bob"}
    assert "workers" in events[0][1]


@pytest.mark.parametrize("path", ["/dashboard/viewer", "/dashboard/events", "/dashboard/runs/r", "/dashboard/operator"])
async def test_where_there_are_keys_nothing_is_told_without_one(keyed_site: Site, path: str):
    async with keyed_site.browser() as browser:
        assert (await browser.get(path)).status_code == 401


async def test_a_tenant_elsewhere_is_told_no_path_of_the_server(keyed_site: Site, people: dict[str, str]):
    keyed_site.scheduler.missing = ["worker w0: it reads /secret/model"]
    keyed_site.scheduler.details = " (last said: a secret)"
    events = await read_events(keyed_site.app, "/dashboard/events", 1, key=people["alice"])
    assert events[0][1]["ready"]["waiting_for"] == ["worker w0: it reads …"]


# ---- events


async def test_a_change_says_what_is_another_and_nothing_else(open_site: Site, scheduler: FakeScheduler):
    first, second = new_run(scheduler, "o", "first"), new_run(scheduler, "o", "second")

    def happen() -> None:
        scheduler.models[first] = msgspec.structs.replace(scheduler.models[first], last_request_at=9.0)
        del scheduler.models[second]

    ((kind, change),) = (await read_events(open_site.app, "/dashboard/events", 2, after_first=happen))[1:]
    assert kind == "change" and set(change) <= {"runs", "num_runs", "hour", "shares"}
    assert change["runs"].keys() == {first, second}
    assert change["runs"][second] is None and change["runs"][first]["used_at"] == 9.0


async def test_nobody_looks_when_no_page_is_open_and_all_pages_share_a_look(open_site: Site, scheduler: FakeScheduler):
    news = open_site.app.routes[0].endpoint._api.news  # type: ignore[attr-defined]
    assert news.num_looks == 0
    await read_events(open_site.app, "/dashboard/events", 1, pages=5)
    assert news.num_looks == 1 and news.num_pages == 0 and news._ticking is None


@pytest.mark.parametrize(("pages", "read_every_s"), [(1, 2.5), (50, 12.5)])
async def test_many_pages_read_less_often(open_site: Site, pages: int, read_every_s: float):
    events = await read_events(open_site.app, "/dashboard/events", 1 if pages == 1 else 2, pages=pages)
    assert [event["read_every_s"] for _, event in events if "read_every_s" in event][-1] == read_every_s


async def test_pages_that_one_key_opens_at_once_leave_room_for_others(
    keyed_site: Site, people: dict[str, str], runs: dict[str, str]
):
    news = keyed_site.app.routes[0].endpoint._api.news  # type: ignore[attr-defined]
    statuses: Counter[int] = Counter()
    have_all_answers = asyncio.Event()

    async def open_page() -> None:
        """It is answered, and never reads what it is sent."""
        received = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> dict[str, object]:
            return next(received, None) or await asyncio.Future()

        async def send(message: dict[str, int]) -> None:
            if message["type"] == "http.response.start":
                statuses[message["status"]] += 1
                if statuses.total() == PAGES_PER_KEY_MAX + 3:
                    have_all_answers.set()
            await asyncio.Future()

        await keyed_site.app(scope_of("/dashboard/events", people["bob"]), receive, send)  # type: ignore[arg-type]

    pages = [asyncio.create_task(open_page()) for _ in range(PAGES_PER_KEY_MAX + 3)]
    await have_all_answers.wait()
    assert statuses == {200: PAGES_PER_KEY_MAX, 429: 3}
    async with keyed_site.browser(people["bob"]) as browser:
        assert "This key has 64 pages open" in (await browser.get("/dashboard/events")).json()["detail"]
    events = await read_events(keyed_site.app, "/dashboard/events", 1, key=people["alice"])
    assert set(events[0][1]["runs"]) == {runs["alice"]}
    for page in pages:
        page.cancel()
    await asyncio.gather(*pages, return_exceptions=True)
    assert news.num_pages == 0 and news._ticking is None


def test_many_keys_leave_room_for_admins():
    pages = {Viewer(f"o{number}", "", False, True): PAGES_PER_KEY_MAX for number in range(7)}
    user, admin = Viewer("user", "", False, True), Viewer("root", "", True, True)
    assert "shows 448 pages already" in no_room(pages, user) and not no_room(pages, admin)
    pages[admin] = PAGES_PER_KEY_MAX - 1
    assert not no_room(pages, admin)
    pages[admin] = PAGES_PER_KEY_MAX
    assert "This key" in no_room(pages, admin) and "shows 512 pages" in no_room(pages, Viewer("other", "", True, True))


def test_a_key_keeps_its_share_when_its_role_changes():
    pages = {Viewer("o", "", False, True): PAGES_PER_KEY_MAX}
    assert "This key" in no_room(pages, Viewer("o", "", True, True))


async def test_a_revoked_key_s_stream_ends(keyed_site: Site, people: dict[str, str], tmp_path: Path):
    events = await read_events(
        keyed_site.app,
        "/dashboard/events",
        100,
        key=people["alice"],
        after_first=lambda: keys.revoke(tmp_path / "keys", "alice"),
    )
    assert len(events) < 100 and events[0][0] == "state"


async def test_runs_beyond_the_newest_are_found(
    keyed_site: Site, people: dict[str, str], scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
):
    from tx_async.api.owner import owner_of

    monkeypatch.setattr(picture, "RUNS_MAX", 2)
    mine = [new_run(scheduler, owner_of(people["alice"]), f"s{n}", tags=(f"Tag-{n % 2}",)) for n in range(5)]
    new_run(scheduler, owner_of(people["bob"]), "theirs", tags=("Tag-0",))
    events = await read_events(keyed_site.app, "/dashboard/events", 1, key=people["alice"])
    assert list(events[0][1]["runs"]) == mine[:2:-1] and events[0][1]["num_runs"] == 5
    async with keyed_site.browser(people["alice"]) as browser:

        async def asked(query: str) -> tuple[list[str], int]:
            answer = (await browser.get(f"/dashboard/runs{query}")).json()
            return [run["id"] for run in answer["runs"]], answer["total"]

        assert await asked("?offset=2") == (mine[2:0:-1], 5)
        assert await asked("?offset=4") == (mine[:1], 5)
        assert await asked("?find=tag-0%20alice") == ([mine[4], mine[2]], 3)
        assert await asked("?find=tag-0&offset=2") == ([mine[0]], 3)
        assert await asked("?find=theirs") == ([], 0)
        assert await asked("?offset=2&limit=1") == (mine[2:1:-1], 5)


@pytest.mark.parametrize("limit", ["-1", "0", "201", "1.5", "x", "", "%D9%A3", "9" * 5000])
async def test_a_limit_that_is_no_number_of_runs_is_refused(open_site: Site, limit: str):
    async with open_site.browser() as browser:
        answer = await browser.get(f"/dashboard/runs?limit={limit}")
        assert answer.status_code == 400 and "a whole number from 1 to 200" in answer.json()["detail"]


# ---- one run


async def test_a_run_s_page_gets_only_what_it_has_not_yet(open_site: Site, scheduler: FakeScheduler):
    run = new_run(scheduler, "o", "s")
    async with open_site.browser() as browser:
        whole = (await browser.get(f"/dashboard/runs/{run}")).json()
        assert [row["index"] for row in whole["steps"]] == [0, 1, 2] and whole["run"]["steps"] == 3
        assert whole["checkpoints"][0]["path"].endswith("/weights/a")
        rest = (await browser.get(f"/dashboard/runs/{run}?since=2")).json()
        assert [row["index"] for row in rest["steps"]] == [2]


async def test_markup_travels_as_text(open_site: Site, scheduler: FakeScheduler):
    new_run(scheduler, "o", "s", display_name="<script>x</script>", tags=("<b>",))
    events = await read_events(open_site.app, "/dashboard/events", 1)
    (run,) = events[0][1]["runs"].values()
    assert run["name"] == "<script>x</script>" and run["tags"] == ["<b>"]


@pytest.mark.parametrize(
    ("session", "of_run", "shown"),
    [
        ({"display_name": "shown", "user_metadata": {"name": "session's"}}, {"name": "run's"}, "run's"),
        ({"display_name": "shown", "user_metadata": {"name": "session's"}}, {}, "shown"),
        ({"user_metadata": {"name": "session's"}}, {"name": 7}, "session's"),
        ({}, {}, ""),
    ],
)
async def test_a_run_is_shown_by_its_own_name_or_its_session_s(
    open_site: Site, scheduler: FakeScheduler, session: dict[str, object], of_run: dict[str, object], shown: str
):
    run = new_run(scheduler, "o", "s", **session)
    scheduler.models[run] = msgspec.structs.replace(scheduler.models[run], user_metadata=of_run)
    async with open_site.browser() as browser:
        assert (await browser.get(f"/dashboard/runs/{run}")).json()["run"]["name"] == shown


# ---- changes


async def test_the_page_publishes_gives_time_and_deletes(open_site: Site, scheduler: FakeScheduler):
    path = f"tinker://{new_run(scheduler, 'somebody', 's')}/weights/a"
    browser = open_site.browser(origin=HOST)
    async with token_of(browser):

        async def act(**body: object) -> None:
            answer = await browser.post("/dashboard/checkpoints", json={"path": path, **body})
            assert answer.status_code == 200, answer.text

        await act(action="publish")
        assert scheduler.checkpoints[path].public
        await act(action="unpublish")
        assert not scheduler.checkpoints[path].public
        await act(action="ttl", ttl_seconds=7200)
        assert scheduler.checkpoints[path].expires_at
        await act(action="ttl", ttl_seconds=None)
        assert scheduler.checkpoints[path].expires_at is None
        await act(action="delete")
        assert path not in scheduler.checkpoints


@pytest.mark.parametrize(
    ("headers", "with_token"),
    [
        ({"origin": HOST}, False),
        ({"origin": "http://127.0.0.1:3000"}, True),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "https://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"sec-fetch-site": "same-site"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
    ],
)
async def test_nothing_is_changed_from_elsewhere_or_without_the_page_s_token(
    open_site: Site, scheduler: FakeScheduler, headers: dict[str, str], with_token: bool
):
    path = f"tinker://{new_run(scheduler, 'somebody', 's')}/weights/a"
    async with token_of(open_site.browser()) as token:
        pass
    async with open_site.browser(**headers, **({"x-dashboard-token": token} if with_token else {})) as browser:
        for route in ("/dashboard/checkpoints", "/dashboard/downloads"):
            answer = await browser.post(route, json={"path": path, "action": "delete"})
            assert answer.status_code == 403, answer.text
    assert path in scheduler.checkpoints


async def test_another_key_s_checkpoint_is_not_there(keyed_site: Site, people: dict[str, str], runs: dict[str, str]):
    browser = keyed_site.browser(people["alice"])
    async with token_of(browser):
        body = {"path": f"tinker://{runs['bob']}/weights/a", "action": "delete"}
        assert (await browser.post("/dashboard/checkpoints", json=body)).status_code == 404
        assert (await browser.post("/dashboard/downloads", json=body)).status_code == 404


async def test_one_key_s_token_is_not_another_s(keyed_site: Site, people: dict[str, str], runs: dict[str, str]):
    async with token_of(keyed_site.browser(people["bob"])) as token:
        pass
    async with keyed_site.browser(people["alice"], **{"x-dashboard-token": token}) as browser:
        body = {"path": f"tinker://{runs['alice']}/weights/a", "action": "delete"}
        assert (await browser.post("/dashboard/checkpoints", json=body)).status_code == 403


# ---- the operator's view


async def test_the_operator_sees_keys_audit_sessions_settings_and_versions(
    keyed_site: Site, people: dict[str, str], runs: dict[str, str], scheduler: FakeScheduler
):
    scheduler.note("key.added", "alice")
    async with keyed_site.browser(people["root"]) as browser:
        report = (await browser.get("/dashboard/operator")).json()
    by_name = {key["name"]: key for key in report["keys"]}
    assert by_name["alice"]["runs"] == 1 and by_name["alice"]["bytes"] == 10 and by_name["root"]["role"] == "admin"
    assert report["audit"][0]["event"] == "key.added"
    assert {session["key"] for session in report["sessions"]} == {"alice", "bob"}
    assert {"tx_async", "python", "jax"} <= report["versions"].keys()
    settings = {setting["name"]: setting for setting in report["settings"]}
    assert settings["host"] == {"name": "host", "value": "0.0.0.0", "is_default": False}
    assert set(settings) == set(ServerConfig.__struct_fields__)


async def test_the_operator_s_view_has_no_secret(scheduler: FakeScheduler):
    config = ServerConfig(
        worker_token="s3cret-a",
        database_url="postgresql://user:s3cret-b@host/db?password=s3cret-c",
        external_inference_api_key="s3cret-d",
        checkpoints_base="s3://id:s3cret-e@bucket/x",
    )
    async with Site(scheduler, config).browser() as browser:
        answer = await browser.get("/dashboard/operator")
    assert answer.status_code == 200 and "s3cret" not in answer.text
    assert "postgresql://user:…@host/db" in answer.text
