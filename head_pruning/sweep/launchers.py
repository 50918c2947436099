"""Where cells run: processes of this machine, a Ray cluster, Slurm.

A launcher is a function that runs a job somewhere, waits for it, and returns what :func:`run_job` returned there. One
thread of the sweep waits for each cell. Ray and submitit are imported when they are asked for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from ..errors import HeadPruningError, one_line
from .cell import Job, end_all, run_job

Launcher = Callable[[Job], dict[str, Any]]

_MOMENT = 0.5  # seconds to wait for further cells of one array of Slurm
_RAY_RETRIES = 3  # of a cell whose node or process is lost
_FAR_JOBS = 64  # cells that wait in a cluster's queue at a time, unless --jobs says otherwise


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return []


@contextlib.contextmanager
def open_launcher(
    name: str, *, jobs: int, threads: int, gpus: int, options: Mapping[str, Any] = {}
) -> Iterator[tuple[Launcher, int, Callable[[], None]]]:
    """A launcher, how many cells it takes at a time, and what ends those that it runs.

    Args:
        name: local, ray or slurm.
        jobs: cells at a time; 0: as many as there are cores (and GPUs) for, or 64 where others queue them.
        threads: cores of each cell.
        gpus: GPUs of each cell.
        options: of ``ray.init``, or of submitit's ``update_parameters`` (``cluster`` names its executor, ``folder``
            where its own logs go).

    Raises:
        HeadPruningError: there are not enough GPUs, or Ray or submitit is not installed or does not start.
    """
    opened = {"local": _local, "ray": _ray, "slurm": _slurm}[name]
    with opened(jobs, threads, gpus, dict(options)) as found:
        yield found


@contextlib.contextmanager
def _local(
    jobs: int, threads: int, gpus: int, options: dict[str, Any]
) -> Iterator[tuple[Launcher, int, Callable[[], None]]]:
    if options:
        raise HeadPruningError(f"The local launcher has no option {next(iter(options))}; leave it out.")
    jobs = jobs or max(1, cores() // threads)
    if not gpus:
        yield run_job, jobs, end_all
        return
    found = visible_gpus()
    if len(found) < gpus:
        raise HeadPruningError(f"A cell needs {gpus} GPUs, and {len(found)} are here; lower gpus in the plan.")
    jobs = min(jobs, len(found) // gpus)
    sets: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
    for number in range(jobs):
        sets.put(found[number * gpus : (number + 1) * gpus])

    def launch(job: Job) -> dict[str, Any]:
        mine = sets.get()
        try:
            return run_job(replace(job, gpus=mine))
        finally:
            sets.put(mine)

    yield launch, jobs, end_all


@contextlib.contextmanager
def _ray(
    jobs: int, threads: int, gpus: int, options: dict[str, Any]
) -> Iterator[tuple[Launcher, int, Callable[[], None]]]:
    try:
        import ray
    except ImportError as error:
        raise HeadPruningError(f"Ray cannot be imported ({error}); pip install 'head-pruning[ray]'.") from error
    try:
        ray.init(**{"ignore_reinit_error": True, "log_to_driver": False, **options})
    except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
        raise HeadPruningError(f"Ray does not start ({one_line(error):.300}); correct its options.") from error
    # A cell of a lost node is run again, on another: Ray's own errors are retried, ours are what a cell returns.
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RAY_RETRIES)(run_job)
    errors = ray.exceptions
    lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError, errors.ObjectLostError)
    running: set[Any] = set()

    def launch(job: Job) -> dict[str, Any]:
        reference = task.remote(job)
        running.add(reference)
        try:
            return ray.get(reference)
        except lost as error:
            reason = f"its process was lost, and so in {_RAY_RETRIES} further tries ({one_line(error):.300})"
            return {"error": f"{reason}; find out what ends it, then start the sweep again"}
        finally:
            running.discard(reference)

    def stop() -> None:
        for reference in list(running):
            ray.cancel(reference)  # interrupts it, so that it ends its command

    try:
        yield launch, jobs or _FAR_JOBS, stop
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _slurm(
    jobs: int, threads: int, gpus: int, options: dict[str, Any]
) -> Iterator[tuple[Launcher, int, Callable[[], None]]]:
    try:
        import submitit
    except ImportError as error:
        raise HeadPruningError(f"submitit cannot be imported ({error}); pip install 'head-pruning[slurm]'.") from error
    cluster = options.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=options.pop("folder", "submitit-logs"), cluster=cluster)
        executor.update_parameters(
            **{
                "name": "head-pruning",
                "cpus_per_task": threads,
                "gpus_per_node": gpus,
                "timeout_min": 24 * 60,
                **options,
            }
        )
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise HeadPruningError(f"submitit does not start ({one_line(error):.300}); correct its options.") from error

    running: set[Any] = set()
    ended = threading.Event()
    tickets: queue.SimpleQueue[Optional[tuple[Job, Future]]] = queue.SimpleQueue()

    def submit() -> None:
        """Submit what is asked for within a moment as one array."""
        while (ticket := tickets.get()) is not None:
            time.sleep(_MOMENT)
            together = [ticket]
            with contextlib.suppress(queue.Empty):
                while (ticket := tickets.get_nowait()) is not None:
                    together.append(ticket)
                tickets.put(None)
            asked, futures = zip(*together)
            try:
                if ended.is_set():
                    raise HeadPruningError("The sweep was ended; start it again to go on.")
                for future, submitted in zip(futures, executor.map_array(run_job, asked)):
                    future.set_result(submitted)
            except Exception as error:  # of Slurm's commands; every cell that waits says it
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

    threading.Thread(target=submit, daemon=True).start()

    def launch(job: Job) -> dict[str, Any]:
        future: Future = Future()
        tickets.put((job, future))
        submitted = future.result()
        running.add(submitted)
        try:
            return submitted.result()
        except submitit.core.utils.UncompletedJobError as error:  # killed, out of time, or it raised
            return {"error": f"the job {submitted.job_id} was lost ({one_line(error):.300}); start the sweep again"}
        finally:
            running.discard(submitted)

    def stop() -> None:
        ended.set()
        for submitted in list(running):
            submitted.cancel()

    try:
        yield launch, jobs or _FAR_JOBS, stop
    finally:
        tickets.put(None)
