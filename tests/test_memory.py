"""Large gradients reuse the memory of freed gradients."""

import os
import subprocess
import sys

import pytest
import torch

from kdkernels import temperature_kl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="recycling is for Linux")


def _gradient(rows: int) -> torch.Tensor:
    s = torch.randn(rows, 1000, requires_grad=True)
    temperature_kl(s, torch.randn(rows, 1000)).backward()
    return s.grad


def test_next_gradient_reuses_freed_memory():
    gradient = _gradient(1500)
    address = gradient.data_ptr()
    del gradient
    assert _gradient(1500).data_ptr() == address
    assert _gradient(1400).data_ptr() == address  # a slightly smaller gradient fits


def test_live_gradients_do_not_share_memory():
    first = _gradient(1500)
    copy = first.clone()
    others = [_gradient(1500) for _ in range(12)]
    assert len({g.data_ptr() for g in (first, *others)}) == 13
    del others
    _gradient(1500)
    assert torch.equal(first, copy)


def test_gradient_can_be_resized_and_filled():
    gradient = _gradient(1500)
    gradient.resize_(2000, 1000).zero_()
    assert gradient.sum() == 0


def test_reuse_of_memory_can_be_disabled():
    code = (
        "import torch, resource, kdkernels as k; s = torch.randn(40000, 1000, requires_grad=True); t = s.detach() + 1\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "before = resident(); k.temperature_kl(s, t).backward(); held = resident() - before; s.grad = None\n"
        "print(held > 140, resident() - before < 60)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"KDKERNELS_KEEP_MB": "0"})
    assert run.stdout.split() == ["True", "True"], run.stdout + run.stderr


def test_kept_memory_can_be_released():
    """Freed memory is kept for the next gradient until release_memory is called, which does not
    affect memory in use.
    """
    code = (
        "import torch, kdkernels as k; s = torch.randn(40000, 1000, requires_grad=True); t = s.detach() + 1\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "k.temperature_kl(s, t).backward(); held = s.grad; total = held.double().sum(); k.release_memory(); same = held.double().sum() == total\n"
        "before = resident(); del held; s.grad = None; kept = before - resident(); k.release_memory()\n"
        "print(bool(same), kept < 60, before - resident() > 140)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True", "True", "True"], run.stdout + run.stderr
