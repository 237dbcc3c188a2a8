"""Tasks side by side, each on one thread."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["SideBySide"]


class SideBySide:
    """Calls ``function(resource, *task)`` for many tasks at once, each on one CPU thread.

    Small tensors are faster so than with operators that divide themselves among the threads: there
    is nothing to wait for between two operators. Results are the same for every number of threads.

    Args:
        function: what to call.
        resource: its first argument. Each thread has a deep copy of it, so that a network may store
            what it likes during its forward pass.
        threads: number of tasks at once; 1: no threads are started.
    """

    def __init__(self, function: Callable[..., Any], resource: Any, threads: int):
        self.function, self.resource, self.threads = function, resource, threads
        self.pool: ThreadPoolExecutor | None = None
        self.local = threading.local()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Allow calls in this block. Torch's number of threads is restored behind it."""
        if self.threads == 1:
            yield
            return
        before = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads, "kdkernels", self._begin)
        try:
            yield
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None
            torch.set_num_threads(before)

    def __call__(self, tasks: Iterable[tuple]) -> Iterator[Any]:
        """Yield the results in the order of the tasks."""
        if self.pool is None:
            return (self.function(self.resource, *task) for task in tasks)
        return self.pool.map(self._call, tasks)

    def _begin(self) -> None:
        torch.set_num_threads(1)  # of this thread
        self.local.resource = copy.deepcopy(self.resource)

    def _call(self, task: tuple) -> Any:
        return self.function(self.local.resource, *task)
