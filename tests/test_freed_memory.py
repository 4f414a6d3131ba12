"""A process of its own, because the setting is for the whole process."""

import os
import subprocess
import sys

import pytest

BODIES = """
import resource, sys
from tx_async import freed_memory
print(freed_memory.keep(2**26) if sys.argv[1] == "keep" else None)
for _ in range(8):
    [b"x" * (2**22 + i) for i in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
PAGES = 64 * 2**22 // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="a setting of glibc")
def test_large_blocks_are_used_again_and_not_cleared_each_time_unless_the_operator_wants_otherwise():
    def run(argument: str, **environ: str) -> list[str]:
        command = [sys.executable, "-c", BODIES, argument]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environ)
        return done.stdout.split()

    kept, faults = run("keep")
    assert kept == "True" and int(faults) < PAGES / 4
    assert int(run("leave")[1]) > PAGES / 2
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
