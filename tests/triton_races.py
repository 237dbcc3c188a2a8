"""Finds races between the threads of Triton kernels, in Triton's interpreter.

The interpreter computes a program as one thread, so it cannot show a missing barrier. On a GPU, the
threads of a program see each other's stores in a certain order only across ``tl.debug_barrier()``.
Which thread holds an element of a tensor is decided by the compiler, with two certainties: if a
tensor has as many elements as the program has threads, the thread that loads element i of it also
stores element i of a tensor of the same shape; and if it has fewer, several threads hold (and load)
an element, but only one of them stores it.

`recorded_races` collects the races of all kernels that run within it: two accesses to the same
address, at least one of them a store, without a barrier between them, unless one thread makes both.
A store of the value that is there already is no race. Programs are not ordered at all, so an
address that one program stores must not be accessed by another one, except by atomic operations.

The compiler also waits for all threads within reductions over many elements. This is not relied
upon, because it depends on the sizes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import triton
from triton.runtime import interpreter

_NOT_KERNELS = (str(Path(triton.__file__).parent), __file__)


class _Accesses:
    """The accesses of one launch: those since the last barrier, and the stores of each program."""

    def __init__(self, kernel: str, threads: int):
        self.kernel, self.threads = kernel, threads
        self.program = 0
        self.loads: dict[int, dict[tuple, str]] = {}  # address: the element that was loaded from it, and where
        self.stores: dict[int, tuple] = {}
        self.stored_by: dict[int, int] = {}
        self.loaded_by: dict[int, set[int]] = {}
        self.races: set[str] = set()

    def next_program(self) -> None:
        self.program += 1
        self.wait()

    def wait(self) -> None:
        self.loads.clear()
        self.stores.clear()

    def _lanes(self, pointers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield the index and the address of each element that is accessed."""
        used = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
        return zip(used.tolist(), pointers.reshape(-1)[used].tolist(), strict=True)

    def _add(self, kind: str, *lines: str) -> None:
        self.races.add(f"{self.kernel}: {kind}: {', '.join(lines)}")

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        shape, line = pointers.shape, _line()
        for i, address in self._lanes(pointers, mask):
            earlier = self.stores.get(address)
            if earlier is not None and (earlier[:2] != (shape, i) or pointers.size < self.threads):
                self._add("load after store", earlier[2], line)
            if self.stored_by.get(address, self.program) != self.program:
                self._add("load of what another program stores", line)
            self.loads.setdefault(address, {})[shape, i] = line
            self.loaded_by.setdefault(address, set()).add(self.program)

    def store(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
        shape, line = pointers.shape, _line()
        flat = np.broadcast_to(values, shape).reshape(-1)
        for i, address in self._lanes(pointers, mask):
            value = flat[i].tobytes()
            stored = self.stores.get(address)
            for element, loaded_at in self.loads.get(address, {}).items():
                if element != (shape, i) or pointers.size < self.threads:
                    self._add("store after load", loaded_at, line)
            if stored is not None and stored[:2] != (shape, i) and stored[3] != value:
                self._add("store after store", stored[2], line)
            others = self.loaded_by.get(address, set()) - {self.program}
            if others or self.stored_by.get(address, self.program) != self.program:
                self._add("store to what another program accesses", line)
            self.stores[address] = (shape, i, line, value)
            self.stored_by[address] = self.program


def _line() -> str:
    """Return the file and line of the kernel that is being interpreted."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@contextlib.contextmanager
def recorded_races() -> Iterator[set[str]]:
    """Run kernels of the interpreter within this context; the set then describes their races."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx")
    originals = {name: getattr(builder, name) for name in names}
    launch = executor.__call__
    races: set[str] = set()
    current: list[_Accesses] = []

    def masked_load(self, ptrs, mask, *rest, **options):
        current[-1].load(ptrs.data, mask.data)
        return originals["create_masked_load"](self, ptrs, mask, *rest, **options)

    def masked_store(self, ptrs, value, mask, *rest, **options):
        current[-1].store(ptrs.data, mask.data, value.data)
        return originals["create_masked_store"](self, ptrs, value, mask, *rest, **options)

    def barrier(self, *rest, **options):
        current[-1].wait()
        return originals["create_barrier"](self, *rest, **options)

    def grid_index(self, *index):
        current[-1].next_program()
        return originals["set_grid_idx"](self, *index)

    def run(self, *arguments, **options):
        current.append(_Accesses(self.fn.__name__, 32 * options.get("num_warps", 4)))
        try:
            return launch(self, *arguments, **options)
        finally:
            races.update(current.pop().races)

    for name, replacement in zip(names, (masked_load, masked_store, barrier, grid_index), strict=True):
        setattr(builder, name, replacement)
    executor.__call__ = run
    try:
        yield races
    finally:
        executor.__call__ = launch
        for name, original in originals.items():
            setattr(builder, name, original)
