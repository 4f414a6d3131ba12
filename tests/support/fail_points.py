"""Named moments at which a process kills itself with SIGKILL: what a crash just there leaves behind.

`install()` wraps the functions around each await on journal, dispatch and storage; the product itself knows nothing of
it. The environment variable FAIL_POINTS holds `name:n:file`, separated by commas: die when the moment comes for the
n-th time in this life, unless the file exists (it is made just before, so that each strikes once).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tx_async.scheduler.training.lanes import Step
from tx_async.scheduler.training.micro_batches import MicroBatches
from tx_async.wire.worker import EngineInfo

VARIABLE = "FAIL_POINTS"

SERVER_POINTS = {
    "journal_open": "tx_async.journal.sqlite:SqliteDriver.open",
    "recovery": "tx_async.scheduler.scheduler:Scheduler._recover",
    "journal_commit": "tx_async.journal.sqlite:SqliteDriver.apply",
    "payload_write": "tx_async.journal.payloads:Payloads.write",
    "body_read": "tx_async.journal.journal:Journal.read_body",
    "accept": "tx_async.scheduler.acceptance:Acceptance._commit",
    "outbox_show": "tx_async.scheduler.performer:Performer._show",
    "command_send": "tx_async.dispatch.router:Router.send",
    "result_handle": "tx_async.scheduler.scheduler:Scheduler.tell",
    "result_read": "tx_async.journal.journal:Journal.read_result",
    "files_list": "tx_async.storage.store:Store.list_keys",
    "files_delete": "tx_async.storage.store:Store.delete_prefix",
}
WORKER_POINTS = {
    "engine_execute": "tx_async.testing.fake_engine:FakeEngine.execute",
    "adapter_save": "tx_async.testing.fake_engine:FakeEngine._save",
    "adapter_load": "tx_async.testing.fake_engine:FakeEngine._load",
    "reply": "tx_async.dispatch.dealer:Dealer.reply",
}
NAMES = [f"{when}_{name}" for name in SERVER_POINTS | WORKER_POINTS for when in ("before", "after")]


POISON_VARIABLE = "POISON_LENGTH"
"""A request whose first datum has so many tokens kills the server whenever it is to be packed."""


def poison(length: int) -> None:
    prepare = MicroBatches.prepare

    def deadly(self: MicroBatches, step: Step, info: EngineInfo) -> None:
        if len(step.operation.data[0].tokens) == 4 * length:  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGKILL)
        prepare(self, step, info)

    MicroBatches.prepare = deadly


def install() -> None:
    """Arm the fail points that the environment names."""
    if POISON_VARIABLE in os.environ:
        poison(int(os.environ[POISON_VARIABLE]))
    for spec in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, count, file = spec.split(":")
        if not Path(file).exists():
            _arm(name, _Countdown(int(count), Path(file)))


def _arm(name: str, countdown: _Countdown) -> None:
    when, _, point = name.partition("_")
    owner, function_name = owner_of(point)
    setattr(owner, function_name, _wrap(getattr(owner, function_name), when, countdown))  # type: ignore[arg-type]


def owner_of(point: str) -> tuple[type, str]:
    """The class that has the point's function, and the function's name."""
    module, _, attribute = (SERVER_POINTS | WORKER_POINTS)[point].partition(":")
    owner_name, _, function_name = attribute.partition(".")
    return getattr(importlib.import_module(module), owner_name), function_name


class _Countdown:
    def __init__(self, count: int, file: Path):
        self.count = count
        self.file = file

    def tick(self) -> None:
        self.count -= 1
        if self.count == 0 and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _wrap(function: Callable[..., Any], when: Literal["before", "after"], countdown: _Countdown) -> Callable[..., Any]:
    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            countdown.tick()
        result = await function(*args, **kwargs)
        if when == "after":
            countdown.tick()
        return result

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            countdown.tick()
        result = function(*args, **kwargs)
        if when == "after":
            countdown.tick()
        return result

    return awaited if inspect.iscoroutinefunction(function) else called
