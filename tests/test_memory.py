"""Whether freed memory is used again, also by threads, each of which has an arena of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
import numpy as np
from knet_jax.system.backend import keep_memory

def touch():
    np.ones(1 << 25)

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_memory()
print(count_faults(), count_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_arrays_of_a_thread_are_used_again():
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    first, second = map(int, output.stdout.split())
    assert second < first / 10, output
