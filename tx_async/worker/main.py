"""The worker process: `python -m tx_async.worker.main`, spawned by the server or by `tx-async worker`.

It is one life of one engine. The exit code says what ended it (`exit_codes.py`); the last line on stderr says why.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import logging
import os
import signal
import sys
import threading
from typing import get_args

from tx_async import logs
from tx_async.dispatch.dealer import Dealer, Detached
from tx_async.engine.devices import MEMORY_FRACTION
from tx_async.errors import ConfigError, EngineGone, TxError, WorkerRefused
from tx_async.wire.worker import Capability, Welcome
from tx_async.worker import external_settings
from tx_async.worker.engine_api import Engine, ReportProgress
from tx_async.worker.exit_codes import ExitCode
from tx_async.worker.external_settings import ExternalSettings, api_key_from_environment
from tx_async.worker.pulse import beat
from tx_async.worker.worker import CreateEngine, Worker

logger = logging.getLogger(__name__)

DEFAULT_ENGINE = "tx_async.engine.engine:create"
TOKEN_VARIABLE = "TX_WORKER_TOKEN"
CAPABILITIES = get_args(Capability)
PR_SET_PDEATHSIG = 1
AGAIN_S = 0.05


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    logs.configure(options.log_level, options.log_format, f"{options.name}.{options.process_id}")
    # Silence warnings of libraries that miss what nobody needs here: a TPU's driver, PyTorch.
    logging.getLogger("jax").setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    token = options.token or os.environ.get(TOKEN_VARIABLE, "")
    code = run(
        options.connect,
        token,
        options.process_id,
        options.engine,
        external=_external(options),
        num_processes=options.num_processes,
        coordinator_address=options.coordinator_address,
        name=options.name,
        parent_pid=options.parent_pid,
        capabilities=frozenset(options.capabilities.split(",")),
    )
    _exit(code)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tx_async.worker.main", description="Run one worker process.")
    parser.add_argument("--connect", required=True, help="address of the server's worker door, ipc:// or tcp://")
    parser.add_argument("--token", default="", help=f"shared secret of a tcp door; better set {TOKEN_VARIABLE}")
    parser.add_argument("--process-id", type=int, default=0, help="this process's place in its mesh")
    parser.add_argument("--num-processes", type=int, default=0, help="processes of its mesh; 0 = the server knows")
    parser.add_argument("--coordinator-address", default="", help="where they join; empty = the server knows")
    parser.add_argument("--name", default="w0", help="the worker that this process belongs to")
    parser.add_argument("--engine", default=DEFAULT_ENGINE, help="module:function that makes the engine, or vllm")
    parser.add_argument("--capabilities", default=",".join(CAPABILITIES), help="capabilities of the engine")
    parser.add_argument("--vllm-url", default="")
    parser.add_argument("--vllm-lora-dir", default="")
    parser.add_argument("--vllm-allow-unproven", action="store_true")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is no longer our parent")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    return parser.parse_args(arguments)


def _external(options: argparse.Namespace) -> ExternalSettings | None:
    if options.engine != external_settings.ENGINE:
        return None
    return ExternalSettings(
        url=options.vllm_url,
        lora_dir=options.vllm_lora_dir,
        api_key=api_key_from_environment(),
        allow_unproven=options.vllm_allow_unproven,
        worker_name=options.name,
    )


def run(
    connect: str,
    token: str,
    process_id: int,
    engine: str,
    *,
    external: ExternalSettings | None = None,
    num_processes: int = 0,
    coordinator_address: str = "",
    name: str = "w0",
    parent_pid: int = 0,
    capabilities: frozenset[str] = frozenset(CAPABILITIES),
) -> ExitCode:
    """Attach, serve, and say how it ended. Must run on the process's main thread (it installs signal handlers)."""
    # JAX's default share is three quarters; the plan of `engine/memory_plan.py` says what each byte is for.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    if parent_pid:
        _die_with_parent()
    try:
        with Dealer(
            connect, name=name, process_id=process_id, num_processes=num_processes,
            coordinator_address=coordinator_address, token=token, parent_pid=parent_pid, capabilities=capabilities,
            on_beat=beat,
        ) as dealer:  # fmt: skip
            return _serve(dealer, _factory(engine, external))
    except ConfigError as error:
        return _report(ExitCode.CONFIGURATION, error)


def _serve(dealer: Dealer, create_engine: CreateEngine) -> ExitCode:
    worker = Worker(dealer, create_engine)
    stop_on_signals(worker)
    try:
        return worker.run()
    except WorkerRefused as error:
        return _report(ExitCode.REFUSED, error)
    except Detached as error:
        return _report(ExitCode.SENT_AWAY if error.is_meant else ExitCode.DETACHED, error)
    except EngineGone as error:
        dealer.goodbye(error.message)
        return _report(ExitCode.ENGINE_GONE, error)
    except ConfigError as error:
        dealer.goodbye(error.message)
        return _report(ExitCode.CONFIGURATION, error)
    except Exception as error:
        logger.critical("this worker cannot go on", exc_info=error)
        dealer.goodbye(f"{type(error).__name__}: {error}")
        return _report(ExitCode.CRASHED, error)
    except SystemExit:
        dealer.goodbye("stopped while it started")
        return ExitCode.STOPPED


def _factory(engine: str, external: ExternalSettings | None) -> CreateEngine:
    """The engine's factory, imported when it is called: the server hears of this worker before it imports JAX."""
    if external:
        return functools.partial(_create_external, external)

    def create(welcome, progress):
        module_name, _, attribute = engine.partition(":")
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"--engine {engine!r} cannot be imported (it must be module:function): {error}"
            ) from error
        return factory(welcome, progress)

    return create


def _create_external(settings: ExternalSettings, welcome: Welcome, progress: ReportProgress) -> Engine:
    from tx_async.worker.vllm import create

    return create(welcome, progress, settings)


def stop_on_signals(worker: Worker) -> None:
    """Once the worker serves, a signal lets it finish what is running; before that there is nothing to finish."""

    def handle(number: int, _frame: object) -> None:
        logger.info("stopping: %s", signal.Signals(number).name)
        if not worker.is_serving:
            raise SystemExit
        worker.dealer.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    sys.unraisablehook = _signal_again


def _signal_again(unraisable: sys.UnraisableHookArgs) -> None:
    """What a signal raises inside a destructor or a callback of the garbage collector is lost: send it once more."""
    if isinstance(unraisable.exc_value, SystemExit):
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _die_with_parent() -> None:
    """Linux: the kernel ends this process with the one that spawned it. Elsewhere the dealer's thread looks every
    half second."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _report(code: ExitCode, error: Exception) -> ExitCode:
    text = error.message if isinstance(error, TxError) else f"{type(error).__name__}: {error}"
    print(text, file=sys.stderr, flush=True)
    return code


def _exit(code: ExitCode) -> None:
    """Exit at once: the accelerator's libraries may wait at exit for processes that are gone."""
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
