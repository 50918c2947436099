"""What processes that train on CPUs are started with."""

# glibc gives large buffers back to the system after each use and faults them in anew; let it keep them.
# Waiting threads that spin slow other processes down.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "40000000000",
    "OMP_WAIT_POLICY": "PASSIVE",
}
