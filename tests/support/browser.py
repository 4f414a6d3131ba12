"""A headless Chromium, and an app served to it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.types import ASGIApp, Receive, Scope, Send

from tx_async.testing.server import free_port

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""
DRIVER = shutil.which("chromedriver") or ""
WAIT_S = 60
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def why_not() -> str:
    """ "" where a browser can be driven."""
    missing = [name for name, path in (("chromium", BROWSER), ("chromedriver", DRIVER)) if not path]
    return f"{' and '.join(missing)} not installed (Debian: chromium, chromium-driver)" if missing else ""


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(
    driver: Any, is_it: Callable[[str], bool], script: str = "return document.body.innerText", wait_s: float = WAIT_S
) -> str:
    deadline, text = time.monotonic() + wait_s, ""
    while time.monotonic() < deadline:
        text = driver.execute_script(script) or ""
        if is_it(text):
            return text
        time.sleep(0.1)
    raise AssertionError(f"it never showed: {text[:2000]}")


def find(driver: Any, selector: str) -> Any:
    until(driver, bool, f"return document.querySelector({selector!r}) ? 'yes' : ''")
    return driver.find_element("css selector", selector)


class Serving:
    """An app on a loopback port, in a thread. `cut` breaks open answers off and refuses what comes, until `mend`."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._is_cut = False
        #: of each open answer: set when it is to break
        self._ends: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(is_up)), daemon=True)
        self._thread.start()
        assert is_up.wait(30)

    async def _serve(self, is_up: threading.Event) -> None:
        config = Config()
        config.bind = [f"127.0.0.1:{self.port}"]
        config.graceful_timeout = 0.1
        config.errorlog = None
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, is_up.set)
        await serve(self._answer, config, shutdown_trigger=self._stop.wait)  # type: ignore[arg-type]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._is_cut:
            raise ConnectionError("cut")
        end = asyncio.Event()
        self._ends.add(end)
        answering, ending = asyncio.ensure_future(self.app(scope, receive, send)), asyncio.ensure_future(end.wait())
        try:
            await asyncio.wait((answering, ending), return_when=asyncio.FIRST_COMPLETED)
            if end.is_set():
                raise ConnectionError("cut")
            await answering
        finally:
            self._ends.discard(end)
            for task in (answering, ending):
                task.cancel()

    def cut(self) -> None:
        assert self._loop
        self._is_cut = True
        self._loop.call_soon_threadsafe(lambda: [end.set() for end in self._ends])

    def mend(self) -> None:
        self._is_cut = False

    def stop(self) -> None:
        assert self._loop and self._stop and self._thread
        self.cut()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[Serving]:
    serving = Serving(app)
    serving.start()
    try:
        yield serving
    finally:
        serving.stop()
