"""The Triton launchers, rehearsed for GPUs that are not there: every launch is one that a driver takes, and every kernel compiles without spills.

No kernel runs and no result is computed here (see triton_launches.py). For sm_90 the calls of all cases, of shapes as in training and of tensors
beyond 32 bits are rehearsed; for the other targets the main shapes of each kernel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton_launches

# The kernels must be compiled, not interpreted: a process of its own, because TRITON_INTERPRET is read at import.
SCRIPT = Path(triton_launches.__file__)


def _rehearse(target: str, calls: str, ops: list[str], cache: Path) -> str:
    root = SCRIPT.parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(SCRIPT), target, calls, *ops], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("op", triton_launches.CALLS)
def test_every_case_can_be_launched(op, pytestconfig):
    print(_rehearse("sm_90", "shapes,cases,large", [op], pytestconfig.cache.mkdir("triton")))


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_the_main_shapes_compile_for_every_target(target, pytestconfig):
    assert _rehearse(target, "main", [], pytestconfig.cache.mkdir("triton")).count("launches") == len(KERNELS)


KERNELS = [
    "_kl_kernel", "_rescale_kernel", "_pool_kernel", "_normalize_kernel", "_weight_kernel", "_transfer_kernel", "_scatter_kernel", "_mark_kernel",
    "_terms_kernel", "_pairs_kernel", "_correlation_kernel", "_correlation_backward_kernel", "_gram_kernel", "_decompose_kernel", "_project_kernel",
    "_finish_kernel", "_product_kernel", "_solve_kernel", "_update_kernel", "_align_kernel", "_align_backward_kernel",
]  # fmt: skip


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (2**20, 2**11, 1)])
def test_a_grid_that_a_driver_refuses_is_an_error(grid):
    with pytest.raises(AssertionError, match="kernel"):
        triton_launches.StandIn("sm_90").check("kernel", grid, ())


def test_a_tensor_of_another_device_is_an_error():
    with triton_launches.FakeTensorMode():
        x = triton_launches.torch.empty(2, device="cuda:1")
    stand_in = triton_launches.StandIn("sm_90")
    with pytest.raises(AssertionError, match="takes a tensor of cuda:1"):
        stand_in.check("kernel", (1, 1, 1), (x,))
    with stand_in.current(x.device):
        stand_in.check("kernel", (1, 1, 1), (x,))
