"""parallel_for of the C++ kernels: every index once, on threads that help each other."""

from __future__ import annotations

import math

import pytest
import testing_ops  # noqa: F401 (registers the op)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

parallel_for = torch.ops.kdkernels._parallel_for


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@settings(max_examples=100)
@given(count=st.integers(0, 300), grain=st.integers(0, 40), threads=st.integers(1, 5))
def test_every_index_is_processed_once(count, grain, threads):
    torch.set_num_threads(threads)
    thread, ranges, visits, states = parallel_for(count, grain, -1, -1)
    assert visits.tolist() == [1] * count
    assert count == 0 or 0 <= thread.min() <= thread.max() < threads
    assert states == thread.unique().numel()  # one for each thread that processed anything
    if count > 0:  # no part of a share is smaller than the grain, except the last one
        shares = min(threads, math.ceil(count / max(1, grain)))
        sizes = ranges.unique_consecutive(return_counts=True)[1]
        assert (sizes < min(grain, math.ceil(count / shares))).sum() <= shares
        assert len(sizes) <= 8 * shares


@pytest.mark.parametrize("slow", [0, 1])
def test_other_threads_take_the_work_of_a_slow_one(slow):
    torch.set_num_threads(2)
    thread, _, visits, _ = parallel_for(160, 1, slow, -1)
    assert visits.tolist() == [1] * 160
    # The slow thread waits in the first of the eight parts of its share.
    assert (thread == slow).sum() <= 10


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_exception_of_any_thread_is_raised(threads):
    torch.set_num_threads(threads)
    for fault in (0, 50, 99):
        with pytest.raises(ValueError, match=f"index {fault} is the fault"):
            parallel_for(100, 1, -1, fault)
        assert parallel_for(100, 1, -1, -1)[2].tolist() == [1] * 100
