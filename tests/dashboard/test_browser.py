"""The page in a real browser, in front of a fake scheduler: it shows what there is, loads nothing from elsewhere, takes
nothing for markup, works by keyboard, asks before it deletes, and comes back when its stream breaks."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.dashboard.test_views import new_run
from tests.support.browser import Serving, browsing, find, served, until, why_not
from tests.support.chat_templates import QWEN3, make_chat_tokenizer
from tx_async import keys
from tx_async.api.compatible import tokenizer
from tx_async.api.owner import owner_of
from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.dashboard import picture
from tx_async.testing.fake_scheduler import FAKE_BASE_MODEL, FakeScheduler
from tx_async.wire.records import RequestRecord, ResultRecord

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "a browser is here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
MARKUP = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "model", QWEN3)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def scheduler(folder: Path) -> FakeScheduler:
    base = msgspec.structs.replace(FAKE_BASE_MODEL, path=str(folder), eos_token_ids=(256,), max_context_length=1024)
    return FakeScheduler(base)


@pytest.fixture
def site(driver: Any, scheduler: FakeScheduler) -> Iterator[Serving]:
    with served(create_api(scheduler, ServerConfig(), scheduler.files)) as serving:
        yield serving
        driver.get("about:blank")


@pytest.fixture
def run(scheduler: FakeScheduler) -> str:
    run = new_run(scheduler, "somebody", "s-markup", display_name=MARKUP, tags=(MARKUP,), user_metadata={"a": MARKUP})
    scheduler.histories[run] = [
        {
            "index": float(i),
            "step": i + 1.0,
            "loss:sum": 9.0 - i,
            "tokens": 3.0,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
        }
        | {"started_at": float(i), "finished_at": i + 0.5}
        for i in range(6)
    ]
    return run


@pytest.fixture(autouse=True)
def clean(driver: Any) -> Iterator[None]:
    """Nothing went wrong in the page that a test has not asked for, and nothing went elsewhere."""
    yield
    logged = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [line for line in logged if "net::ERR_" not in line and "status of" not in line], logged
    hosts = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            hosts |= {url.hostname} if url.scheme.startswith(("http", "ws")) else set()
    assert hosts <= {"127.0.0.1"}


def new_request(scheduler: FakeScheduler, run: str) -> None:
    scheduler._requests["r-1"] = RequestRecord(
        request_id="r-1", owner="o", kind="OptimStep", subject=run, seq_id=1, body_digest="", body_bytes=0,
        created_at=1000.0,
    )  # fmt: skip


def test_every_view_shows_what_there_is_and_markup_is_text(driver: Any, site: Serving, run: str):
    driver.get(site.url)
    until(driver, lambda text: "Ready" in text and "The server is ready" in text and "Tokens per second" in text)
    driver.get(f"{site.url}/#/runs")
    until(driver, lambda text: run in text and MARKUP in text)
    driver.get(f"{site.url}/#/runs/{run}")
    until(driver, lambda text: "Loss per token" in text and "newest: 1.333" in text and "weights/a" in text)
    driver.get(f"{site.url}/#/operator")
    until(driver, lambda text: "s-markup" in text and "Settings" in text and MARKUP in text)
    assert driver.execute_script("return document.querySelectorAll('main img, main b > b').length") == 0
    assert "hacked" not in driver.title


def test_a_request_s_stations_have_their_times(driver: Any, site: Serving, scheduler: FakeScheduler, run: str):
    new_request(scheduler, run)
    driver.get(f"{site.url}/#/runs/{run}")
    cells = "return [...document.querySelectorAll('td')].map((e) => `${e.dataset.label} ${e.textContent}`).join('|')"
    until(driver, lambda text: "What optim_step|" in text and "Queued +1 s|Sent –|Finished –" in text, cells)
    scheduler._results["r-1"] = ResultRecord(request_id="r-1", finished_at=1002.5, content="result", payload=b"")
    scheduler.models[run] = msgspec.structs.replace(scheduler.models[run], last_request_at=1000.0)
    until(driver, lambda text: "Queued +1 s|Sent +2 s|Finished +2.5 s" in text, cells)


def test_runs_that_the_events_leave_out_are_loaded_and_found(
    driver: Any, site: Serving, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(picture, "RUNS_MAX", 2)
    runs = [new_run(scheduler, "o", f"s-{number}") for number in range(5)]
    driver.get(f"{site.url}/#/runs")
    until(driver, lambda text: "2 of 5 are here" in text)
    find(driver, "main .more:not([hidden])").click()
    until(driver, lambda text: "4 of 5 are here" in text and runs[1] in text and runs[0] not in text)
    find(driver, "input[type=search]").send_keys("s-0")
    until(driver, lambda text: runs[0] in text and runs[1] not in text)
    find(driver, "input[type=search]").send_keys("0")
    until(driver, lambda text: "No run matches" in text)


def test_the_page_says_what_the_server_waits_for(driver: Any, site: Serving, scheduler: FakeScheduler):
    scheduler.missing = ["worker w0: compiling, 3 of 12"]
    driver.get(site.url)
    waiting = "It waits for: worker w0: compiling, 3 of 12"
    until(driver, lambda text: "Starting" in text and waiting in " ".join(text.split()))
    until(driver, lambda text: "No worker is attached." in text and "Nothing waits." in text)
    scheduler.missing = ["worker w0: compiling, 4 of 12"]
    until(driver, lambda text: "4 of 12" in text and "3 of 12" not in text)
    scheduler.missing, scheduler.operations_to_replay, scheduler.operations_lost = [], 7, 9
    until(driver, lambda text: "Ready; 2 of 9 operations have run again" in text and "4 of 12" not in text)
    scheduler.operations_to_replay = 0
    until(driver, lambda text: "The server is ready: requests run at once." in text)


def test_where_there_is_no_run_the_page_says_how_one_begins(driver: Any, site: Serving):
    driver.get(f"{site.url}/#/runs")
    until(driver, lambda text: "No run yet." in text and f"TINKER_BASE_URL={site.url}" in text)


def test_an_address_that_names_nothing_says_so(driver: Any, site: Serving, run: str):
    driver.get(f"{site.url}/#/runs/%zz")
    until(driver, lambda text: "%zz" in text and "All runs" in text)
    for name in ("__proto__", "toString"):
        driver.get(f"{site.url}/#/runs")
        until(driver, lambda text: run in text)
        driver.get(f"{site.url}/#/{name}")
        until(driver, lambda text: "The server is ready" in text)


def test_the_policy_stops_inline_script(driver: Any, site: Serving):
    driver.get(site.url)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert driver.execute_script("return window.ran") is None
    logged = [entry["message"] for entry in driver.get_log("browser")]
    assert any("Content Security Policy" in line for line in logged)


def test_what_is_sampled_is_text_with_its_log_probabilities(
    driver: Any, site: Serving, scheduler: FakeScheduler, folder: Path
):
    answer = "<b>x</b> ökay \N{GRINNING FACE}"  # letters beyond ASCII are several tokens each
    scheduler.live.answers.append([*tokenizer.load(str(folder)).encode(answer, framed=False), 256])
    driver.get(f"{site.url}/#/playground")
    find(driver, "select[name=model] option")
    find(driver, "textarea").send_keys("hello")
    find(driver, "button.main").click()
    until(driver, lambda text: "ended by stop" in text)
    assert answer in driver.execute_script("return document.querySelector('.answer .text').textContent")
    assert driver.execute_script("return document.querySelectorAll('.answer .text b').length") == 0
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    read = "return document.querySelector('.answer .read').textContent"
    find(driver, ".answer .text").send_keys(Keys.ARROW_RIGHT)
    until(driver, lambda text: text.startswith('"<"  logprob -'), read)
    ActionChains(driver).move_to_element(driver.find_elements("css selector", ".answer .token")[1]).perform()
    until(driver, lambda text: text.startswith('"b"  logprob -'), read)


def test_a_checkpoint_is_deleted_when_that_was_confirmed_in_the_page(
    driver: Any, site: Serving, scheduler: FakeScheduler, run: str
):
    path = f"tinker://{run}/weights/a"
    driver.get(f"{site.url}/#/runs/{run}")
    find(driver, "button.danger").click()
    find(driver, "dialog button[type=button]").click()
    until(driver, lambda text: text == "no", "return document.querySelector('dialog') ? 'yes' : 'no'")
    assert path in scheduler.checkpoints
    find(driver, "button.danger").click()
    find(driver, "dialog button.main").click()
    until(driver, lambda text: "No checkpoint was saved yet" in text)
    assert path not in scheduler.checkpoints


def test_the_page_works_by_keyboard(driver: Any, site: Serving, run: str):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver.get(f"{site.url}/#/runs/{run}")
    until(driver, lambda text: "newest: 1.333" in text)
    driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    walked = []
    for _ in range(14):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        walked.append(
            driver.execute_script(
                "const e = document.activeElement; return e.className + '|' + e.textContent.trim().slice(0, 20)"
            )
        )
    assert walked[0].startswith("skip|")
    assert [
        name for name in ("Now", "Runs", "Playground", "Operator") if not any(f"|{name}" in step for step in walked)
    ] == []
    plot = next(i for i, step in enumerate(walked) if step.startswith("plot"))
    for _ in range(len(walked) - 1 - plot):
        ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    until(driver, lambda text: "step 2: 2.667" in text)


def test_curves_are_zoomed_together_by_pointer_and_by_key(driver: Any, site: Serving, run: str):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    numbers = "return [...document.querySelectorAll('.plot')].map((plot) => plot.textContent).join('|')"
    driver.get(f"{site.url}/#/runs/{run}")
    whole = until(driver, lambda text: "step 6" in text, numbers)
    plot = find(driver, ".plot svg")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    hand = ActionChains(driver).move_to_element_with_offset(plot, -60, 0).click_and_hold().move_by_offset(90, 0)
    hand.release().perform()
    zoomed = until(driver, lambda text: text != whole and "step 6" not in text, numbers)
    find(driver, ".chart button:not([hidden])").click()
    until(driver, lambda text: text == whole, numbers)
    find(driver, ".plot").send_keys("+")
    until(driver, lambda text: text not in (whole, zoomed), numbers)
    find(driver, ".plot").send_keys(Keys.ESCAPE)
    until(driver, lambda text: text == whole, numbers)


def test_a_stream_that_breaks_comes_back_with_the_present_state(
    driver: Any, site: Serving, scheduler: FakeScheduler, run: str
):
    driver.get(f"{site.url}/#/runs")
    until(driver, lambda text: run in text)
    site.cut()
    until(driver, lambda text: "Reconnecting" in text)
    later = new_run(scheduler, "somebody", "s-later")
    site.mend()
    until(driver, lambda text: "Ready" in text and later in text)


def test_a_page_from_before_a_restart_can_still_change_something(
    driver: Any, site: Serving, scheduler: FakeScheduler, run: str
):
    driver.get(f"{site.url}/#/runs/{run}")
    find(driver, "button.danger")
    site.app = create_api(scheduler, ServerConfig(), scheduler.files)  # its tokens have another secret
    find(driver, "button.danger").click()
    find(driver, "dialog button.main").click()
    until(driver, lambda text: "No checkpoint was saved yet" in text)
    assert not scheduler.checkpoints


def test_where_there_are_keys_the_page_asks_for_one_and_shows_its_runs_only(
    driver: Any, scheduler: FakeScheduler, tmp_path: Path
):
    file = tmp_path / "keys"
    alice, bob = keys.add(file, "alice"), keys.add(file, "bob")
    mine, theirs = (new_run(scheduler, owner_of(key), name) for key, name in ((alice, "of-alice"), (bob, "of-bob")))
    with served(create_api(scheduler, ServerConfig(api_keys_file=str(file)), scheduler.files)) as site:
        driver.get(f"{site.url}/#/runs")
        field = find(driver, "input[type=password]")
        assert driver.get_log("browser") == []  # it asks before it is refused
        field.send_keys("tml-wrong")
        find(driver, "button.main").click()
        find(driver, ".problem")
        field = find(driver, "input[type=password]")
        field.send_keys("tml-…")
        find(driver, "button.main").click()
        until(driver, lambda text: "This is not a key" in text)
        field.clear()
        driver.execute_script("sessionStorage.setItem('tx_async.key', 'tml-…')")
        driver.refresh()  # a page of before, which took such a key
        find(driver, "input[type=password]").send_keys(alice)
        find(driver, "button.main").click()
        text = until(driver, lambda text: mine in text)
        assert theirs not in text and "Operator" not in text
        assert alice not in driver.page_source and not driver.get_cookies()
        driver.get(f"{site.url}/#/runs/{theirs}")
        until(driver, lambda text: "No training run" in text or "not" in text.lower())
        assert not driver.find_elements("css selector", ".charts")
        driver.get(f"{site.url}/#/operator")
        until(driver, lambda text: "This part needs an admin's key" in text and "Audit log" not in text)
        assert "/dashboard/operator" not in driver.execute_script(
            "return performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)"
        )
        find(driver, "#leave").click()
        find(driver, "input[type=password]")
        driver.get("about:blank")


@contextlib.contextmanager
def window(driver: Any, width: int) -> Iterator[None]:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_fault(
    driver: Any, scheduler: FakeScheduler, site: Serving, run: str, folder: Path, theme: str, width: int
):
    """Contrast, names, roles, landmarks, the order of headings: what a program can find of WCAG's rules."""
    scheduler.missing = ["worker w0: it compiles"]
    scheduler.live.answers.append([*tokenizer.load(str(folder)).encode("sampled", framed=False), 256])
    new_request(scheduler, run)
    with window(driver, width):
        driver.get(site.url)
        driver.execute_script("localStorage.setItem('tx_async.theme', arguments[0])", theme)
        driver.refresh()
        faults = {}
        for view, shown in (
            ("now", "it compiles"),
            ("runs", run),
            (f"runs/{run}", "optim_step"),
            ("operator", "s-markup"),
            ("playground", "Ctrl+Enter"),
        ):
            driver.get(f"{site.url}/#/{view}")
            until(driver, lambda text, shown=shown: shown in text)
            faults[view] = faults_of(driver)
        scheduler.missing = []
        find(driver, "textarea").send_keys("hello")
        find(driver, "button.main").click()
        until(driver, lambda text: "ended by stop" in text)
        faults["sample"] = faults_of(driver)
        driver.get(f"{site.url}/#/runs/{run}")
        find(driver, "button.danger").click()
        find(driver, "dialog[open]")
        faults["dialog"] = faults_of(driver)
        assert driver.execute_script("return document.documentElement.dataset.theme") == theme
        driver.execute_script("localStorage.removeItem('tx_async.theme')")
    assert not {view: found for view, found in faults.items() if found}


def faults_of(driver: Any) -> list[str]:
    from axe_core_python.selenium import Axe

    report = Axe().run(driver)
    assert "color-contrast" in {rule["id"] for rule in report["passes"]}
    return [f"{rule['id']}: {node['html'][:300]}" for rule in report["violations"] for node in rule["nodes"]]


def test_no_view_is_wider_than_the_window(driver: Any, site: Serving, run: str):
    for width in (360, 820, 1440):
        with window(driver, width):
            for view in ("now", "runs", f"runs/{run}", "playground", "operator"):
                driver.get(f"{site.url}/#/{view}")
                find(driver, "main h1")
                assert driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0, view
