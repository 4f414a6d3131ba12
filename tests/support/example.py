"""Run an example as `python -m tx_async.examples.NAME` does, and end the SDK's thread before the interpreter goes.

The SDK leaves a daemon thread behind, which may wake up while the interpreter ends. CPython before 3.14 then ends the
thread by `pthread_exit`, which now and then aborts a process that has done all its work.
"""

from __future__ import annotations

import runpy
import sys

from tinker.lib.internal_client_holder import _internal_client_holder_thread_singleton as sdk_thread

ENDING_S = 10.0


def main(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"tx_async.examples.{name}", run_name="__main__", alter_sys=True)
    finally:
        loop, thread = sdk_thread.loop_if_started(), sdk_thread._thread
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(ENDING_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
