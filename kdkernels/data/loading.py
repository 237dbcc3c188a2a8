"""Sampler that assigns samples to batches, and loader that can start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from .keyed_random import permuted


class BatchRequest(NamedTuple):
    """The index with which a loader asks a dataset for a batch."""

    index: list[int]  # type: ignore[assignment]  # positions of the samples in the dataset; tuple.index is not used
    view: int | None  # number of the augmentation; None: samples are not augmented
    share: float  # weight of the mean loss of this batch, see Batches


class Batches(DistributedSampler):  # Lightning does not replace a sampler that is a DistributedSampler
    """Sampler of the batches of one process.

    The batches of all processes at the same position form a joint batch of ``batch_size * world``
    samples. Each sample is in one joint batch per epoch. The order depends only on the seed and the
    epoch, so the joint batches are the same for any number of processes with the same product
    ``batch_size * world``. If the last joint batch would have less than ``min_samples`` samples per
    process, its samples are added to the joint batch before it. Each process therefore has samples;
    in training it has at least two, because batch norm has no variance of a single sample.

    ``share`` is the weight with which the mean losses of batches of different sizes average to the
    mean over all samples: with ``accumulate`` micro-batches of n_i samples in each of ``world``
    processes, the mean over processes and micro-batches of ``share_i * mean_i`` is the mean over
    all samples of the optimizer step.

    Args:
        size: number of samples.
        batch_size: samples per batch and process.
        shuffle: true for a new random order each epoch, false for the order of the dataset.
        seed: seed of the order.
        views: see :class:`Augment`; 0 for batches that are not augmented.
        accumulate: micro-batches per optimizer step, or a function that returns this number when an
            epoch begins.
        limit: number of batches (int), or fraction of the batches (float), after which an epoch
            ends; the last optimizer step then uses the micro-batches that remain. ``None``: all
            batches.
        min_samples: smallest number of samples per process in a batch, if the data have that many.
        rank, world: index of this process, and number of processes.
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
        min_samples: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(cast(Dataset, range(size)), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.size, self.batch_size, self.views, self.accumulate, self.world = size, batch_size, views, accumulate, world
        if size < world:
            raise ValueError(f"the data must have at least one sample per process, got {size} samples for {world} processes")
        joint = batch_size * world
        full_batches, remainder = divmod(size, joint)
        self.count = full_batches + (remainder >= min_samples * world or not full_batches)
        # Lightning's limits are a fraction of the batches (float) or a number of batches (int).
        self.end = self.count if limit is None else int(self.count * limit) if isinstance(limit, float) else min(self.count, limit)
        self.start = 0  # number of batches that the next iteration skips

    def __len__(self) -> int:
        return self.count

    def first_sample(self, i: int) -> int:
        """Return the position in the epoch of the first sample of the joint batch i."""
        return self.size if i >= self.count else i * self.batch_size * self.world

    def __iter__(self) -> Iterator[BatchRequest]:
        start, self.start = self.start, 0
        accumulate = self.accumulate() if callable(self.accumulate) else self.accumulate
        view = None if self.views == 0 else self.epoch if self.views is None else self.epoch % self.views
        chunk = max(1, 2**16 // (self.batch_size * self.world))  # number of batches whose order is computed in one call
        for i in range(start, self.count):
            if (i - start) % chunk == 0:
                offset = self.first_sample(i)
                order = torch.arange(offset, self.first_sample(i + chunk))
                if self.shuffle:
                    order = permuted(order, self.size, self.seed, self.epoch)
            joint = self.first_sample(i + 1) - self.first_sample(i)
            low, high = (self.first_sample(i) + joint * r // self.world for r in (self.rank, self.rank + 1))
            window = i - i % accumulate
            last = window + accumulate if i >= self.end else min(window + accumulate, self.end)
            samples = self.first_sample(last) - self.first_sample(window)
            share = (high - low) * self.world * accumulate / samples
            yield BatchRequest(order[low - offset : high - offset].tolist(), view, share)


class OrderedBatches(Batches, SequentialSampler):  # type: ignore[misc]  # Lightning's overfit_batches accepts only a SequentialSampler
    """Sampler of batches in the order of the dataset."""


class Loader(DataLoader):
    """Loader of batches as dicts. Its state contains the position in the epoch.

    Lightning passes ``shuffle`` and ``batch_sampler`` when it recreates a loader for ``predict``;
    they have no effect.
    """

    sampler: Batches

    def __init__(self, dataset: Dataset, sampler: Batches, num_workers: int = 0, shuffle: bool = False, batch_sampler: None = None):
        super().__init__(dataset, sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
        self.returned = 0  # number of batches returned in this epoch
        self._resume: dict | None = None  # state to resume from

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # Lightning only iterates
        # As this method is a generator, it runs when the first batch is requested, after the epoch
        # is set.
        epoch = self.sampler.epoch
        state, self._resume = self._resume, None
        if state and state["epoch"] == epoch and 0 < state["given"] < state.get("of", 0) and state["order"] != self._order():
            raise ValueError(
                f"the run was stopped within an epoch of {state['order']}, and cannot be resumed within it with {self._order()}: use the same data "
                "options, or resume from a checkpoint written at the end of an epoch"
            )
        self.returned = state["given"] if state and state["epoch"] == epoch and state["given"] < len(self) else 0
        self.sampler.start = self.returned
        for batch in super().__iter__():
            self.returned += 1
            yield batch

    def state_dict(self) -> dict:
        return {"epoch": self.sampler.epoch, "given": self.returned, "of": len(self), "order": self._order()}

    def _order(self) -> str:
        """Describe the settings that determine the samples of a joint batch."""
        batches = self.sampler
        return f"{batches.size} samples in batches of {batches.batch_size * batches.world} (order_seed {batches.seed})"

    def load_state_dict(self, state: dict) -> None:
        self._resume = dict(state)
