"""What processes that train or are timed on CPUs are started with."""

import os
import sys

# glibc gives large buffers back to the system after each use and faults them in anew; let it keep them.
# Waiting threads that spin slow other processes down.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "40000000000",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def restart_with_cpu_environment() -> None:
    """Run this program anew with :data:`CPU_ENVIRONMENT`, unless it has it: glibc reads it only at the start."""
    if not CPU_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **CPU_ENVIRONMENT})
