"""Launches of the Triton kernels for GPUs that are not present.

A driver would accept every launch, and kernels compile without spills.

No kernel runs and no result is computed here; the tests in Triton's interpreter compute results.
triton_launches.py documents the checks. For sm_90 all calls are made: the cases of the other tests,
shapes as in training and tensors beyond 32 bits. Kernels are translated by Triton's front end, and
the main variants are compiled to machine code, also in float64. For the other targets only the main
variants are compiled, without float64.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton_launches

# Run in a separate process, because Triton reads TRITON_INTERPRET at import, and the kernels must
# be compiled here, not interpreted.
SCRIPT = Path(triton_launches.__file__)
KERNEL_SOURCES = list((SCRIPT.parent.parent / "kdkernels" / "triton").glob("*.py"))


def _run(script: str, arguments: list[str], cache: Path) -> str:
    root = SCRIPT.parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(SCRIPT.parent / script), *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _check_launches(targets: str, calls: str, ops: list[str], cache: Path) -> str:
    return _run(SCRIPT.name, [targets, calls, *ops], cache)


# Two processes that take about the same time.
@pytest.mark.parametrize("ops", [("temperature_kl",), ("attention_pool", "rbf_correlation", "truncated_svd")], ids=" ".join)
def test_every_call_can_be_launched(ops, pytestconfig):
    print(_check_launches("sm_90", "main,double,shapes,cases,large", list(ops), pytestconfig.cache.mkdir("triton")))


OTHER_TARGETS = ["sm_80", "sm_100", "gfx942"]
if triton_launches.STACK:
    OTHER_TARGETS.remove("gfx942")  # Triton 3.6's compiler fails an assertion if a pointer is chosen by `if` (see README.md)


KERNELS = {
    "temperature_kl": ["_kl_kernel", "_rescale_kernel", "_rescale_rows_kernel", "_short_rows_kernel", "_long_rows_kernel"],
    "attention_pool": ["_pool_kernel", "_normalize_kernel", "_weight_kernel", "_transfer_kernel", "_scatter_kernel"],
    "rbf_correlation": ["_mark_kernel", "_terms_kernel", "_pairs_kernel", "_correlation_kernel", "_correlation_backward_kernel"],
    "truncated_svd": [
        "_gram_kernel", "_decompose_kernel", "_project_kernel", "_finish_kernel", "_product_kernel", "_solve_kernel", "_update_kernel",
        "_align_kernel", "_align_backward_kernel",
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_main_variants_compile_for_every_target(target, op, pytestconfig):
    lines = _check_launches(target, "main", [op], pytestconfig.cache.mkdir("triton")).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{target} {kernel}" for kernel in sorted(KERNELS[op])]
    assert all(" 0 compiled" not in line for line in lines)


# The widest loads and stores of a thread, in bits, for float32 and bfloat16.
WIDTHS = {
    "rows of 1000 classes": ("_short_rows_kernel", (128, 128), (128, 128)),
    "few rows of 1000 classes": ("_kl_kernel", (128, 128), (64, 64)),  # a thread has 4 classes
    "rows of 1000 classes behind one element": ("_short_rows_kernel", (32, 128), (16, 128)),  # only the gradient is aligned
    "rows of 1000 classes, 1001 apart": ("_short_rows_kernel", (32, 32), (16, 32)),
    "rows of 1002 classes": ("_short_rows_kernel", (64, 64), (32, 32)),
    "rows of 10004 classes": ("_long_rows_kernel", (128, 128), (64, 64)),
}


@pytest.mark.parametrize("names", [["rows of 1000 classes"], list(WIDTHS)], ids=["main", "all"])
def test_loads_are_as_wide_as_the_rows_are_aligned(names, pytestconfig):
    """The stores of other results than the gradient have 32 bits."""
    expected = {
        f"{name} torch.{dtype}: {kernel} {load} {store}"
        for name, (kernel, *widths) in WIDTHS.items()
        if name in names
        for dtype, (load, store) in zip(("float32", "bfloat16"), widths, strict=True)
    }
    assert set(_run("triton_loads.py", ["sm_90", *names], pytestconfig.cache.mkdir("triton")).splitlines()) == expected


def _constants(tree: ast.Module) -> set[str]:
    """Return the names of a module's tl.constexpr objects."""
    values = [(n.targets[0] if isinstance(n, ast.Assign) else n.target, n.value) for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))]
    return {target.id for target, value in values if value is not None and ast.unparse(value).startswith("tl.constexpr(")}


def _constants_before_tensors(tree: ast.Module, constants: set[str]) -> list[str]:
    """Return the operations whose left operand consists of these constants only, and whose right
    operand does not.
    """

    def names(node: ast.expr) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    operations = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    return [ast.unparse(o) for o in operations if names(o.left) and names(o.left) <= constants and names(o.right) - constants]


def test_constants_are_the_right_operand_of_tensors():
    """In the interpreter of Triton 3.8, the result of constant * tensor cannot be compared; tensor
    * constant works in every release.
    """
    wrong = ast.parse("A = tl.constexpr(2.0)\ndef f(x):\n    return (1 - A) * x < A * A * x, x * (A * A)")
    assert _constants_before_tensors(wrong, _constants(wrong)) == ["(1 - A) * x", "A * A * x"]
    trees = {path.name: ast.parse(path.read_text()) for path in KERNEL_SOURCES}
    constants = set().union(*map(_constants, trees.values()))
    assert {"ILL_CONDITIONED", "SIGN_TIES", "TIES"} <= constants
    found = {name: _constants_before_tensors(tree, constants) for name, tree in trees.items()}
    assert not any(found.values()), found


def _kernel_functions_that_return_none(tree: ast.Module) -> list[str]:
    def parts(value: ast.expr | None) -> list[ast.expr | None]:
        if isinstance(value, ast.Tuple):
            return [part for element in value.elts for part in parts(element)]
        return [*parts(value.body), *parts(value.orelse)] if isinstance(value, ast.IfExp) else [value]

    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in n.decorator_list)]
    returned = [(f.name, part) for f in functions for n in ast.walk(f) if isinstance(n, ast.Return) for part in parts(n.value)]
    return [name for name, part in returned if isinstance(part, ast.Constant) and part.value is None]


def test_functions_of_kernels_do_not_return_none():
    """Triton 3.6, which torch 2.10 and 2.11 use, cannot compile them."""
    wrong = ast.parse("@triton.jit\ndef f(x):\n    if x is None:\n        return None\n    else:\n        return x\ndef g():\n    return None")
    assert _kernel_functions_that_return_none(wrong) == ["f"]
    found = {path.name: _kernel_functions_that_return_none(ast.parse(path.read_text())) for path in KERNEL_SOURCES}
    assert len(found) > 10
    assert not any(found.values()), found


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (2**20, 2**11, 1)])
def test_grid_that_a_driver_rejects_raises(grid):
    with pytest.raises(AssertionError, match="kernel"):
        triton_launches.FakeDriver("sm_90").check("kernel", grid, ())


def test_tensor_on_another_device_raises():
    with triton_launches.FakeTensorMode():
        x = triton_launches.torch.empty(2, device="cuda:1")
    fake_driver = triton_launches.FakeDriver("sm_90")
    with pytest.raises(AssertionError, match="takes a tensor of cuda:1"):
        fake_driver.check("kernel", (1, 1, 1), (x,))
    with pytest.raises(AssertionError, match="takes a tensor of cuda:1"):
        fake_driver.check("kernel", (1, 1, 1), (3, (x, 1)))
    with fake_driver.current(x.device):
        fake_driver.check("kernel", (1, 1, 1), (x, (x, 1)))
