"""Running of the trainings in several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NamedTuple

import torch


class Job(NamedTuple):
    """A call ``function(*arguments)`` in another process, and the line that reports its end."""

    function: Callable
    arguments: tuple
    report: str


def processes_of(device_count: int) -> int:
    """Return the number of processes that are used by default: one for each core or GPU."""
    if device_count:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs jobs in ``processes`` processes, or in this one if it is 1."""

    def __init__(self, processes: int):
        self.processes = processes
        self.executor: ProcessPoolExecutor | None = None
        if processes > 1:
            threads = max(1, torch.get_num_threads() // processes)
            self.executor = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (threads,))

    def run(self, jobs: list[Job], on_result: Callable[[Any], str]) -> None:
        """Run the jobs; print a line for each, with what ``on_result`` returns for its result.

        Raises:
            RuntimeError: a process was ended by the system.
            Exception: the first error of a job; those that have not begun are left out.
        """
        start = time.monotonic()
        for done, (job, result) in enumerate(self._results(jobs), start=1):
            print(f"[{done}/{len(jobs)}] {job.report}  {on_result(result)}  ({time.monotonic() - start:.0f} s)", flush=True)

    def _results(self, jobs: list[Job]) -> Iterator[tuple[Job, Any]]:
        if self.executor is None:
            for job in jobs:
                yield job, job.function(*job.arguments)
            return
        futures: dict[Future, Job] = {self.executor.submit(job.function, *job.arguments): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process of the {self.processes} was ended, perhaps because the memory was too small: give fewer with --jobs; the trainings that "
                "have finished are kept"
            ) from error

    def close(self) -> None:
        """Leave out the jobs that have not begun, and end the processes."""
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def pool_of(processes: int) -> Iterator[Pool]:
    pool = Pool(processes)
    try:
        yield pool
    finally:
        pool.close()


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """Call a function in a process that has done nothing else, and return its result."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin) as executor:
        return executor.submit(function, *arguments).result()


def _begin(threads: int | None = None) -> None:
    """Prepare a process: it ends when its parent has been killed, and not only when asked to."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
