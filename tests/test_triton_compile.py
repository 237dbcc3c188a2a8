"""Triton kernels compiled ahead of time for GPUs that are not there: over the block sizes the launcher can choose, without spills."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

# The kernels must be compiled by the compiler, not interpreted: a process of its own, because TRITON_INTERPRET is read at import.
SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, str(SCRIPT), target, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    names = [line.split()[1] for line in run.stdout.splitlines()]
    assert len(names) > 10
    if target.startswith("gfx"):
        return
    cuobjdump = _cuobjdump()
    for name in names:
        usage = subprocess.run([cuobjdump, "-res-usage", str(tmp_path / target / f"{name}.cubin")], capture_output=True, text=True, check=True).stdout
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack, usage
        assert int(stack.group(1)) == 0, f"{name} on {target} spills: {usage}"


def _cuobjdump() -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    assert found, "cuobjdump ships with triton and with the CUDA toolkit; neither is here"
    return found
