"""Starts worker processes, starts them again when they end, and says why they did.

This is the server's side, so JAX is not imported here. The server supervises `local_workers` processes;
`attach_forever` does the same for `tx-async worker` on another host, so that a mesh comes back without an operator
wherever its processes run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from msgspec import Struct

from tx_async.config import ServerConfig
from tx_async.dispatch.groups import describe
from tx_async.dispatch.router import Router
from tx_async.errors import BaseModelError
from tx_async.metrics import Counter, Gauge
from tx_async.worker import allocator, external_settings
from tx_async.worker.exit_codes import ExitCode
from tx_async.worker.external_settings import ExternalSettings, read_key_file
from tx_async.worker.main import CAPABILITIES, DEFAULT_ENGINE, TOKEN_VARIABLE
from tx_async.worker.pulse import PULSE_VARIABLE, Pulse

logger = logging.getLogger(__name__)

RESTART_DELAY_MIN_S = 0.1
RESTART_DELAY_MAX_S = 30.0
"""The delay before a restart doubles from the first value to the second while a worker keeps dying."""
EXTERNAL_DELAY_MAX_S = 10.0
"""The maximum for a worker of an external engine, which must attach within 30 s of that engine's return."""
HEALTHY_AFTER_S = 60.0
"""A process that lived this long restarts with the shortest delay."""
AT_ONCE = (ExitCode.STOPPED, ExitCode.DETACHED, ExitCode.SENT_AWAY)
"""Ends after which the next process starts with the shortest delay, too."""
LAST_LINE_CHARACTERS_MAX = 500
FORCED_STOP_S = 10.0
PULSE_POLL_S = 0.25

OnExit = Callable[["WorkerProcess", int, str], None]
"""(process, its pid, what happened)"""


class WorkerProcess:
    """One worker process after another, in one place of one worker group."""

    def __init__(
        self,
        connect: str,
        *,
        name: str = "w0",
        process_id: int = 0,
        num_processes: int = 0,
        coordinator_address: str = "",
        engine: str = DEFAULT_ENGINE,
        capabilities: str = ",".join(CAPABILITIES),
        external: ExternalSettings | None = None,
        must_start: bool = True,
        environment: Mapping[str, str] | None = None,
        on_exit: OnExit = lambda process, pid, text: None,
        log_level: str = "info",
        log_format: str = "text",
    ):
        """`must_start`: `run` ends if the first process finds that none can run; otherwise the next ones try."""
        self.name = name
        self._is_json = log_format == "json"
        self.must_start = must_start
        self._delay_max_s = EXTERNAL_DELAY_MAX_S if external else RESTART_DELAY_MAX_S
        self.process_id = process_id
        self.num_starts = 0
        self._command = [
            sys.executable, "-m", "tx_async.worker.main", "--connect", connect, "--name", name, "--process-id",
            str(process_id), "--engine", engine, "--capabilities", capabilities, "--parent-pid", str(os.getpid()),
            "--log-level", log_level, "--log-format", log_format, "--num-processes", str(num_processes),
            "--coordinator-address", coordinator_address, *(external.arguments if external else ()),
        ]  # fmt: skip
        own = dict(environment or {}) | (external.environment if external else {})
        self._environment = {**allocator.ENVIRONMENT, **os.environ, **own}
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._last_line = ""
        #: why no process runs at the moment; "" while one runs
        self.exit_text = ""
        #: how the previous process ended; "" while none has
        self.last_exit_text = ""
        self.is_external = external is not None
        self._stopping = asyncio.Event()
        #: set unless `run` is running
        self._ended = asyncio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.label} [{self.exit_text or f'pid {self.pid}'} | {self.num_starts} starts]>"

    @property
    def label(self) -> str:
        return f"{self.name}.{self.process_id}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def run(self) -> None:
        """Keep a process running until `stop`. Raises `BaseModelError` when the first one finds that none can run."""
        self._ended.clear()
        try:
            await self._live_again_and_again()
        finally:
            self._ended.set()

    async def _live_again_and_again(self) -> None:
        delay_s = RESTART_DELAY_MIN_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                code = await self._live()
            except OSError as error:  # no descriptor, process or memory left: this passes
                code, self.exit_text = None, f"could not be started: {error}"
            if self._stopping.is_set():
                return
            # At the first start, the operator must change something. Later, it has worked before and may work again.
            if code == ExitCode.CONFIGURATION and self.num_starts == 1 and self.must_start:
                raise BaseModelError(self._last_line or None)
            if time.monotonic() - started > HEALTHY_AFTER_S or code in AT_ONCE:
                delay_s = RESTART_DELAY_MIN_S
            level = logging.INFO if code == ExitCode.SENT_AWAY else logging.WARNING
            logger.log(level, "worker process %s %s; it starts again in %.1f s", self.label, self.exit_text, delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            delay_s = min(2 * delay_s, self._delay_max_s)

    async def _live(self) -> int:
        self._last_line = ""
        pulse = Pulse()
        try:
            process = await self._start(pulse)
            watching = asyncio.create_task(self._watch(process, pulse))
            try:
                await self._relay(process)
                code = await process.wait()
            finally:
                watching.cancel()
                if process.returncode is None:
                    await self._kill(process)
        finally:
            pulse.close()
        cause = _exit_cause(code)
        self.exit_text = cause + (f" (last said: {self._last_line})" if self._last_line else "")
        # Without the last line of its log: the reason may reach tenants, and the line may hold what is another's.
        self._on_exit(self, process.pid, cause)
        return code

    async def _start(self, pulse: Pulse) -> asyncio.subprocess.Process:
        environment = self._environment | {PULSE_VARIABLE: str(pulse.descriptor)}
        try:
            # A session of its own: Ctrl-C reaches the server alone, which then stops its workers in order.
            process = await asyncio.create_subprocess_exec(
                *self._command, env=environment, stderr=asyncio.subprocess.PIPE, start_new_session=True,
                pass_fds=(pulse.descriptor,),
            )  # fmt: skip
        finally:
            pulse.close_writer()
        self._process, self.exit_text, self.last_exit_text = process, "", self.exit_text
        self.num_starts += 1
        if self._stopping.is_set():  # it was told to stop while it started
            process.kill()
        return process

    async def _watch(self, process: asyncio.subprocess.Process, pulse: Pulse) -> None:
        while (silent_s := pulse.silence()) is None:  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(PULSE_POLL_S)
        logger.warning("worker process %s has been stuck for %.1f s and is ended", self.label, silent_s)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    async def _relay(self, process: asyncio.subprocess.Process) -> None:
        """Pass stderr on, line by line, and remember the last one (progress bars end theirs with \\r)."""
        assert process.stderr is not None
        rest = ""
        while chunk := await process.stderr.read(1 << 16):
            *lines, rest = (rest + chunk.decode(errors="replace").replace("\r", "\n")).split("\n")
            rest = rest[-LAST_LINE_CHARACTERS_MAX:]
            self._pass_on(lines)
        self._pass_on([rest])

    def _pass_on(self, lines: list[str]) -> None:
        for line in filter(str.strip, lines):
            self._last_line = line[-LAST_LINE_CHARACTERS_MAX:]
            if self._is_json and not line.startswith("{"):
                logger.info("worker process %s says: %s", self.label, line)
            else:
                print(line, file=sys.stderr)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; after `timeout_s`, end it."""
        self._stopping.set()
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                logger.warning("worker process %s did not stop within %.1f s and is killed", self.label, timeout_s)
                await self._kill(process)
        await self._ended.wait()


class SupervisorStatistics(Struct, frozen=True):
    processes: Gauge
    """Running worker processes of this server."""
    starts: Counter
    """Starts of worker processes, the first ones included."""


class Supervisor:
    """The server's own worker processes. Worker i is process i mod `num_processes` of group w⌊i / num_processes⌋."""

    name = "supervisor"

    def __init__(self, config: ServerConfig, router: Router, *, engine: str = DEFAULT_ENGINE):
        """`router` must have been started: the processes get its address."""
        self._router = router
        num_processes = config.backend_config.num_processes
        self.processes = [
            WorkerProcess(
                router.address,
                name=f"w{index // num_processes}",
                process_id=index % num_processes,
                engine=engine,
                on_exit=self._handle_exit,
                log_level=config.log_level,
                log_format=config.log_format,
            )
            for index in range(config.local_workers)
        ] + [self._external_process(config, settings) for settings in external_engines(config)]

    def _external_process(self, config: ServerConfig, settings: ExternalSettings) -> WorkerProcess:
        """The process for an external engine. The server can do without it, so a failed start ends nothing."""
        return WorkerProcess(
            self._router.address,
            name=settings.name,
            engine=external_settings.ENGINE,
            capabilities=external_settings.CAPABILITIES,
            external=settings,
            must_start=False,
            on_exit=self._handle_exit,
            log_level=config.log_level,
            log_format=config.log_format,
        )

    def __repr__(self) -> str:
        running = sum(process.pid is not None for process in self.processes)
        return f"<Supervisor [Processes: {running} running of {len(self.processes)}]>"

    def statistics(self) -> SupervisorStatistics:
        return SupervisorStatistics(
            processes=sum(process.pid is not None for process in self.processes),
            starts=sum(process.num_starts for process in self.processes),
        )

    async def run(self) -> None:
        """Keep all processes running until `stop`. Raises `BaseModelError` when a worker can never start. Then, and
        when cancelled, no process is left."""
        tasks = [asyncio.create_task(process.run(), name=process.label) for process in self.processes]
        try:
            await asyncio.gather(*tasks)
        finally:
            await self.stop(0.0)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, timeout_s: float) -> None:
        """Leave no process behind."""
        await asyncio.gather(*(process.stop(timeout_s) for process in self.processes))

    def waiting_for(self, in_full: bool = False) -> list[str]:
        """What keeps this server's own workers from being ready. in_full: for operators, with how a process ended and
        the last line of its log."""
        local = {(process.name, process.process_id) for process in self.processes}
        lines = [line for process in self.processes if (line := self._why_not_ready(process, in_full))]
        return lines + self._router.waiting_for(without=local)

    def external_waiting_for(self, in_full: bool = False) -> list[str] | None:
        """Which external engines are not attached, and why; None where there are none. The server works without them,
        slower, so `waiting_for` is empty meanwhile."""
        external = [process for process in self.processes if process.is_external]
        return [line for process in external if (line := self._why_external(process, in_full))] if external else None

    def _why_external(self, process: WorkerProcess, in_full: bool) -> str | None:
        line = self._why_not_ready(process, in_full)
        before = process.last_exit_text if in_full and not process.exit_text else ""
        return f"{line}; the one before {before}" if line and before else line

    def _why_not_ready(self, process: WorkerProcess, in_full: bool) -> str | None:
        worker = f"worker {process.label}"
        if process.exit_text:
            return f"{worker} {process.exit_text}" if in_full else f"{worker}: restarting"
        if self._router.is_member_ready(process.name, process.process_id):
            return None
        return f"{worker}: {describe(self._router.member_progress(process.name, process.process_id))}"

    def _handle_exit(self, process: WorkerProcess, pid: int, text: str) -> None:
        self._router.process_exited(process.name, process.process_id, pid, text)


def external_engines(config: ServerConfig) -> list[ExternalSettings]:
    """Settings of every external engine that the configuration names. Raises `ConfigError`."""
    if not config.external_inference_url:
        return []
    from_file = read_key_file(config.external_inference_api_key_file, "external_inference_api_key_file")
    return [
        ExternalSettings(
            url=url.strip(),
            lora_dir=config.resolved_external_inference_lora_base,
            api_key=config.external_inference_api_key or from_file,
            allow_unproven=config.external_inference_allow_unproven,
        ).check("external_inference_url", "external_inference_lora_base")
        for url in config.external_inference_url.split(",")
    ]


def _exit_cause(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


async def attach_forever(
    connect: str,
    token: str,
    process_id: int,
    engine: str = DEFAULT_ENGINE,
    *,
    num_processes: int = 0,
    coordinator_address: str = "",
    name: str = "w0",
    capabilities: str = ",".join(CAPABILITIES),
    external: ExternalSettings | None = None,
) -> None:
    """Run a worker by hand (`tx-async worker`): it attaches, and after every loss attaches again, until a signal.

    Raises `BaseModelError` for a failure that no new attempt can change.
    """
    process = WorkerProcess(
        connect, name=name, process_id=process_id, num_processes=num_processes,
        coordinator_address=coordinator_address, engine=engine or DEFAULT_ENGINE, capabilities=capabilities,
        external=external, environment={TOKEN_VARIABLE: token} if token else None,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stopping.append(loop.create_task(process.stop(FORCED_STOP_S))))
    try:
        await process.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await asyncio.gather(process.stop(FORCED_STOP_S), *stopping)
