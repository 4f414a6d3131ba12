"""Compiles the programs that some cases need side by side, as an engine does at its start, but only for so long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from tx_async.engine.compilation import Program

TOLD_S = 0.1


def compile_all(
    programs: Sequence[Program],
    threads: int,
    seconds: float,
    say: Callable[[str], None],
    beside: Sequence[Callable[[], None]] = (),
) -> dict[str, str]:
    """-> why some were not compiled within so many seconds. beside: what else is done meanwhile. What has begun goes on
    in the background: nobody can stop the compiler."""
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compiling")
    futures = {pool.submit(partial(_compile, program, failed, say)): program.name for program in programs}
    others = [pool.submit(task) for task in beside]
    _, late = wait([*futures, *others], timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for name in (futures[future] for future in late if future in futures):
        failed[name] = f"{name} was not compiled in time"
    return failed


def _compile(program: Program, failed: dict[str, str], say: Callable[[str], None]) -> None:
    began = time.monotonic()
    try:
        program.compile()
        if (seconds := time.monotonic() - began) > TOLD_S:
            say(f"{program.name} was compiled or loaded in {seconds:.1f} s")
    except Exception as error:  # whatever it is, the other cases may still work
        failed[program.name] = f"{program.name} does not compile: {str(error).splitlines()[:1]}"
