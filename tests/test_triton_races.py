"""No thread of a Triton kernel reads what another one may be writing.

A test with 64 x 16 matrices failed on an H100, and in no run of the interpreter: warps that had
read the diagonal of a matrix scaled it while other warps could still read it.
"""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled for the GPU; races are found in the interpreter", allow_module_level=True)

import triton
import triton.language as tl
import triton_launches
from triton_races import recorded_races


@triton.jit
def _shift_kernel(x_ptr, n, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    """Store n numbers after the first n, then copy each to the place before it."""
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + n + i, tl.load(x_ptr + i, i < n) + i, i < n)
    if WAIT:
        tl.debug_barrier()
    y = tl.load(x_ptr + n + i + 1, i + 1 < n)
    if WAIT:
        tl.debug_barrier()
    tl.store(x_ptr + n + i, y, i + 1 < n)


@triton.jit
def _fill_kernel(x_ptr, BLOCK: tl.constexpr):
    """Store 0 everywhere, then 1 at every second place."""
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 0.0 * i)
    tl.store(x_ptr + 2 * i, 1.0 + 0.0 * i, 2 * i < BLOCK)


@triton.jit
def _scale_in_place_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2.0 * tl.load(x_ptr + i))


@triton.jit
def _add_to_first_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


def _kinds(races):
    return sorted(race.split(": ")[1] for race in races)


def test_missing_barriers_are_found():
    with recorded_races() as races:
        _shift_kernel[(1,)](torch.zeros(64), 32, BLOCK=32, WAIT=False)
    assert _kinds(races) == ["load after store", "store after load"]
    with recorded_races() as races:
        _shift_kernel[(1,)](torch.zeros(64), 32, BLOCK=32, WAIT=True)
    assert not races
    with recorded_races() as races:
        _fill_kernel[(1,)](torch.zeros(128), BLOCK=128)
    assert _kinds(races) == ["store after store"]


def test_a_thread_may_store_what_only_it_has_loaded():
    with recorded_races() as races:
        _scale_in_place_kernel[(1,)](torch.zeros(256), BLOCK=256, num_warps=8)
    assert not races
    with recorded_races() as races:  # two threads hold each element, and one of them stores it
        _scale_in_place_kernel[(1,)](torch.zeros(128), BLOCK=128, num_warps=8)
    assert _kinds(races) == ["store after load"]


def test_programs_must_not_share_what_they_store():
    with recorded_races() as races:
        _add_to_first_kernel[(2,)](torch.zeros(1), num_warps=1)
    assert "store to what another program accesses" in _kinds(races)


# Small sizes, for which several threads hold an element. They reach every kernel.
CALLS = {
    "truncated_svd": ["5 x 3", "5 x 3, gradients us", "align torch.float32"],
    "attention_pool": ["one element, all options", "one element, loss in parts", "plain, loss in parts"],
    "rbf_correlation": ["one pair, loss", "few pairs, loss", "few pairs"],
    "temperature_kl": ["one_by_one in parts", "odd", "vector", "classes_first", "map_mask"],
}


@pytest.mark.parametrize("op", CALLS)
def test_kernels_have_no_races(op, monkeypatch):
    monkeypatch.setattr(triton_launches, "as_fake_cuda", lambda x: x)
    monkeypatch.setattr(triton_launches, "empty", lambda *shape, dtype=torch.float32: torch.randn(shape, dtype=dtype))
    calls = dict(triton_launches.CALLS[op]("cases"))
    with recorded_races() as races:
        for name in CALLS[op]:
            calls[name]()
    assert not races
