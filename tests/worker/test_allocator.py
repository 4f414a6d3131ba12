"""What a worker's environment is for: large arrays come back without a word to the system."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from tx_async.worker.allocator import ENVIRONMENT

PAGES = 25_600
"""Of 4 KiB, in an array of 100 MB."""
FAULTS_OF_SECOND_USE = """
import resource, threading

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray({pages} * 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def second_use():
    faults()
    return faults()

found = [second_use()]
thread = threading.Thread(target=lambda: found.append(second_use()))
thread.start()
thread.join()
print(*found)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults_of_second_use(environ):
    """Page faults of a large array in a process that has freed an equal one; in its main thread, in another."""
    program = FAULTS_OF_SECOND_USE.format(pages=PAGES)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    return [int(number) for number in done.stdout.split()]


@glibc
def test_large_arrays_are_made_of_memory_that_was_freed():
    assert max(faults_of_second_use(os.environ | ENVIRONMENT)) < PAGES / 100


@glibc
def test_without_it_each_is_mapped_anew():
    """Otherwise the settings are of no use, and should go."""
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert resource.getpagesize() > 4096 or min(faults_of_second_use(plain)) >= PAGES / 2
