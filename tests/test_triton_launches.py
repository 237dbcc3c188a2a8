"""The Triton launchers, rehearsed for GPUs that are not there: every launch is one that a driver takes, and every kernel compiles without spills.

No kernel runs and no result is computed here; the tests in Triton's interpreter compute results. triton_launches.py says what is checked of a call.
For sm_90 all calls are rehearsed: the cases of the other tests, shapes as in training and tensors beyond 32 bits. Kernels are translated by Triton's
front end, and the main variants are compiled to the end, in float64 too. For the other targets the main variants alone are compiled, without float64.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton_launches

# The kernels must be compiled, not interpreted: a process of its own, because TRITON_INTERPRET is read at import.
SCRIPT = Path(triton_launches.__file__)


def _rehearse(targets: str, calls: str, ops: list[str], cache: Path) -> str:
    root = SCRIPT.parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(SCRIPT), targets, calls, *ops], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# Two processes of about the same length.
@pytest.mark.parametrize("ops", [("temperature_kl",), ("attention_pool", "rbf_correlation", "truncated_svd")], ids=" ".join)
def test_every_case_can_be_launched(ops, pytestconfig):
    print(_rehearse("sm_90", "main,double,shapes,cases,large", list(ops), pytestconfig.cache.mkdir("triton")))


OTHER_TARGETS = ["sm_80", "sm_100", "gfx942"]
if triton_launches.STACK:
    OTHER_TARGETS.remove("gfx942")  # Triton 3.6's own compiler fails an assertion on pointers chosen by `if` (README says so)


def test_the_main_variants_compile_for_every_target(pytestconfig):
    lines = _rehearse(",".join(OTHER_TARGETS), "main", [], pytestconfig.cache.mkdir("triton")).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{target} {kernel}" for target in OTHER_TARGETS for kernel in sorted(KERNELS)]
    assert all(" 0 compiled" not in line for line in lines)


KERNELS = [
    "_kl_kernel", "_rescale_kernel", "_rescale_rows_kernel", "_pool_kernel", "_normalize_kernel", "_weight_kernel", "_transfer_kernel",
    "_scatter_kernel", "_mark_kernel", "_terms_kernel", "_pairs_kernel", "_correlation_kernel", "_correlation_backward_kernel", "_gram_kernel",
    "_decompose_kernel", "_project_kernel", "_finish_kernel", "_product_kernel", "_solve_kernel", "_update_kernel", "_align_kernel",
    "_align_backward_kernel",
]  # fmt: skip


def _constants(tree: ast.Module) -> set[str]:
    """The names of a module's tl.constexpr objects."""
    values = [(n.targets[0] if isinstance(n, ast.Assign) else n.target, n.value) for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))]
    return {target.id for target, value in values if value is not None and ast.unparse(value).startswith("tl.constexpr(")}


def _constants_before_tensors(tree: ast.Module, constants: set[str]) -> list[str]:
    """The arithmetic whose left side consists of such constants alone, and whose right side does not."""

    def names(node: ast.expr) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    operations = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    return [ast.unparse(o) for o in operations if names(o.left) and names(o.left) <= constants and names(o.right) - constants]


def test_constants_stand_behind_tensors():
    """The interpreter of Triton 3.8 makes constant * tensor a value that it cannot compare; tensor * constant is right in every release."""
    wrong = ast.parse("A = tl.constexpr(2.0)\ndef f(x):\n    return (1 - A) * x < A * A * x, x * (A * A)")
    assert _constants_before_tensors(wrong, _constants(wrong)) == ["(1 - A) * x", "A * A * x"]
    trees = {path.name: ast.parse(path.read_text()) for path in (SCRIPT.parent.parent / "kdkernels" / "triton").glob("*.py")}
    constants = set().union(*map(_constants, trees.values()))
    assert {"ILL_CONDITIONED", "SIGN_TIES", "TIES"} <= constants
    found = {name: _constants_before_tensors(tree, constants) for name, tree in trees.items()}
    assert not any(found.values()), found


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
    with pytest.raises(AssertionError, match="takes a tensor of cuda:1"):
        stand_in.check("kernel", (1, 1, 1), (3, (x, 1)))
    with stand_in.current(x.device):
        stand_in.check("kernel", (1, 1, 1), (x, (x, 1)))
