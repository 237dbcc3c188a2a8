"""Which samples make a batch, and a loader that can start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from .keyed_random import permuted


class Draw(NamedTuple):
    """What a dataset is indexed with: a batch."""

    index: list[int]
    view: int | None  # which augmentation of the samples; None: as they are
    share: float  # weight of this batch's mean loss, see Batches


class Batches(DistributedSampler):  # so that Lightning leaves it as it is
    """The batches of one process. All processes together take ``batch_size * world`` samples at a time, each sample once an epoch.

    The order is a function of the seed and the epoch. The joint batches are the same for every number of processes with the same product
    ``batch_size * world``. A remainder of less than ``least`` samples for each process joins the batch before it: no process is without
    samples, and in training none has a single one, of which batch norm has no variance.

    ``share`` makes means of uneven batches add up: with ``accumulate`` micro-batches of n_i samples in each of ``world`` processes, the mean
    over processes and micro-batches of ``share_i * mean_i`` is the mean over all samples of the optimizer's step.

    Args:
        size: number of samples.
        batch_size: samples per batch and process.
        shuffle: a new order each epoch, or the order of the dataset.
        seed: of the order.
        views: see :class:`Augment`; 0 for batches that are not augmented.
        accumulate: micro-batches per step of the optimizer, or a function that gives them when an epoch begins.
        limit: batches after which an epoch ends; the last step of the optimizer is made of what is left. ``None``: all.
        least: samples of each process in the smallest batch, if there are as many.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        views: int | None = 0,
        accumulate: int | Callable[[], int] = 1,
        limit: int | float | None = None,
        least: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.size, self.batch_size, self.views, self.accumulate, self.world = size, batch_size, views, accumulate, world
        if size < world:
            raise ValueError(f"{size} samples cannot be split on {world} processes")
        joint = batch_size * world
        whole, rest = divmod(size, joint)
        self.count = whole + (rest >= least * world or not whole)
        # A share or a number, as Lightning takes them.
        self.end = self.count if limit is None else int(self.count * limit) if isinstance(limit, float) else min(self.count, limit)
        self.start = 0  # batches to leave out at the next iteration

    def __len__(self) -> int:
        return self.count

    def first(self, i: int) -> int:
        """The place in the order of the first sample of the joint batch i."""
        return self.size if i >= self.count else i * self.batch_size * self.world

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        accumulate = self.accumulate() if callable(self.accumulate) else self.accumulate
        view = None if self.views == 0 else self.epoch if self.views is None else self.epoch % self.views
        together = max(1, 2**16 // (self.batch_size * self.world))  # batches whose order is computed at once
        for i in range(start, self.count):
            if (i - start) % together == 0:
                offset = self.first(i)
                order = torch.arange(offset, self.first(i + together))
                if self.shuffle:
                    order = permuted(order, self.size, self.seed, self.epoch)
            joint = self.first(i + 1) - self.first(i)
            low, high = (self.first(i) + joint * r // self.world for r in (self.rank, self.rank + 1))
            window = i - i % accumulate
            last = window + accumulate if i >= self.end else min(window + accumulate, self.end)
            samples = self.first(last) - self.first(window)
            share = (high - low) * self.world * accumulate / samples
            yield Draw(order[low - offset : high - offset].tolist(), view, share)


class OrderedBatches(Batches, SequentialSampler):  # so that Lightning takes it for overfit_batches
    """Batches in the order of the dataset."""


class Loader(DataLoader):
    """Batches as dicts; the place in the epoch is part of its state.

    ``shuffle`` and ``batch_sampler`` are there for Lightning, which makes loaders for ``predict`` anew: nothing but None and False.
    """

    def __init__(self, dataset: Dataset, sampler: Batches, num_workers: int = 0, shuffle: bool = False, batch_sampler: None = None):
        super().__init__(dataset, sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
        self.given, self._resume = 0, None

    def __iter__(self) -> Iterator[dict]:
        # A generator: nothing runs before the first batch is asked for, when the epoch has been set.
        epoch = self.sampler.epoch
        state, self._resume = self._resume, None
        if state and state["epoch"] == epoch and 0 < state["given"] < state.get("of", 0) and state["order"] != self._order():
            raise ValueError(
                f"the run was stopped within an epoch of {state['order']}, and cannot go on there with {self._order()}: take the same, or a "
                "checkpoint from the end of an epoch"
            )
        self.given = state["given"] if state and state["epoch"] == epoch and state["given"] < len(self) else 0
        self.sampler.start = self.given
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict:
        return {"epoch": self.sampler.epoch, "given": self.given, "of": len(self), "order": self._order()}

    def _order(self) -> str:
        """What the samples of a joint batch depend on."""
        batches = self.sampler
        return f"{batches.size} samples in batches of {batches.batch_size * batches.world} (order_seed {batches.seed})"

    def load_state_dict(self, state: dict) -> None:
        self._resume = dict(state)
