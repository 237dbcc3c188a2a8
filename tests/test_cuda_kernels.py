"""The CUDA kernels without a GPU: their bodies on the host, and their resources after compilation.

The bodies run with various thread orders and amounts of shared memory. The tests of truncated_svd
and align_singular_vectors with the implementation "cuda" check the numbers.
"""

import json

import pytest
import testing_ops  # noqa: F401  registers the ops
import torch
from cuda_sources import BUDGET, SOURCES, TARGETS, nvcc, resources, table
from matrix_cases import named_matrices
from svd_checks import check_triplets

import kdkernels
from kdkernels import truncated_svd
from kdkernels.options import Sign
from kdkernels.testing import implementation

OP = torch.ops.kdkernels
LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@pytest.fixture
def host():
    """Return a function that sets the shared memory of a block and the order of threads on the
    host.
    """
    yield lambda limit=227 << 10, order=1: OP._svd_host(limit, order)
    OP._svd_host(227 << 10, 1)


def test_host_execution_detects_faults():
    """A correct body gives the same result in any order of threads.

    Each fault is detected: as an error, as NaN, or as a difference between orders.
    """
    good = [OP._cta_check("none", order) for order in range(8)]
    assert all(run == good[0] for run in good)
    assert all(value == value for value in good[0])
    racy = [OP._cta_check("no barrier between neighbours", order) for order in range(8)]
    assert any(run != racy[0] for run in racy)
    with pytest.raises(RuntimeError, match="a race: a phase wrote a value that all threads were reading"):
        OP._cta_check("a value all threads read is written", 1)
    for fault in ("shared memory is read before it is written", "a copy is read before it arrives"):
        assert any(value != value for value in OP._cta_check(fault, 1))


def _outputs_and_gradient(x, k):
    leaf = x.clone().requires_grad_()
    u, s, v = implementation("cuda")(truncated_svd)(leaf, k, return_u=True)
    (v[..., 0] ** 3).sum().add((u[..., -1] * s[..., :1]).sum()).backward()
    return [u, s, v, leaf.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(20, 12, 3), (40, 50, 9), (130, 140, 2)])
def test_results_do_not_depend_on_the_order_of_threads(m, n, k, dtype, host):
    """The results are bitwise equal: no phase depends on the order of its threads, and sums have a
    fixed order.
    """
    x = torch.cat([named_matrices(m, n)[name][:1] for name in ("relu", "graded", "low rank", "1e30")]).to(dtype)
    first = _outputs_and_gradient(x, k)
    for order in (2, 3, 17):
        host(order=order)
        for a, b in zip(first, _outputs_and_gradient(x, k), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limit", [99, 64, 48])
def test_results_do_not_depend_on_shared_memory(limit, dtype, host):
    """If shared memory is too small, the matrix and then the vectors are stored in the workspace.

    The results do not change.
    """
    for m, n, k in ((90, 70, 20), (70, 200, 3), (30, 20, 15)):
        x = named_matrices(m, n)["relu"].to(dtype)
        host()
        whole = _outputs_and_gradient(x, k)
        host(limit=limit << 10)
        if not OP._truncated_svd_fits_cuda(min(m, n), k, dtype == torch.float64, limit << 10):
            with pytest.raises(ValueError, match="takes matrices whose smaller side is at most 1024"):
                _outputs_and_gradient(x, k)
            continue
        small = _outputs_and_gradient(x, k)
        check_triplets(x, k, *small[:3])
        for a, b in zip(whole, small, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("target", "limit"), LIMITS.items())
def test_usual_shapes_fit_in_shared_memory(target, limit):
    """Usual sizes of feature maps fit on each GPU, also small ones with one warp per matrix.

    In float32, all sides up to 1024 fit if a block may have 163 KiB of shared memory, and sides up
    to 512 if it may have 99 KiB. In float64, half of these sizes fit.
    """
    largest_side = 1024 if limit > 100 << 10 else 512
    for p in (1, 16, 32, 33, 49, 64, 128, 196, 256, 512, 1024):
        for k in (1, 4, 8):
            if p <= largest_side:
                assert OP._truncated_svd_fits_cuda(p, min(k, p), False, limit), (p, k)
            if p <= largest_side // 2:
                assert OP._truncated_svd_fits_cuda(p, min(k, p), True, limit), (p, k)
    assert not OP._truncated_svd_fits_cuda(1025, 1, False, limit)


def test_too_large_matrices_and_unknown_implementations_raise():
    with pytest.raises(ValueError, match='implementation "cuda" takes matrices whose smaller side is at most 1024'):
        implementation("cuda")(truncated_svd)(torch.ones(1, 1100, 1025), 1)
    with pytest.raises(ValueError, match="implementation must be one of"):
        implementation("metal")(truncated_svd)(torch.ones(1, 3, 2), 1)
    with pytest.raises(ValueError, match="implementation must be one of"):
        OP.truncated_svd(torch.ones(1, 3, 2), 1, Sign.NONE, False, 1e-6, False, 4)


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", sorted(path.parent.name for path in SOURCES.glob("*/kernels.cu")))
def test_registers_and_spills_are_within_the_budget(op, target):
    """No kernel uses more registers, stack, spills or static shared memory than the committed
    budget allows.
    """
    budget, found = json.loads(BUDGET.read_text()), resources([target], op)[target]
    assert set(budget) == set(TARGETS)
    assert found
    prefix = {"align_singular_vectors": ("align",), "temperature_kl": ("long_rows",), "truncated_svd": ("forward", "solve", "update")}[op]
    assert set(found) == {kernel for kernel in budget[target] if kernel.startswith(prefix)}
    over = [
        f"{kernel}: {name} {value}, budget {budget[target][kernel][name]}"
        for kernel, uses in found.items()
        for name, value in uses.items()
        if value > budget[target][kernel][name]
    ]
    assert not over, over


def test_table_in_the_docs_matches_the_budget():
    assert table() in (SOURCES.parent / "docs" / "truncated_svd.md").read_text()


def test_kernel_sources_do_not_include_torch():
    """csrc/*/kernels.cu and the files they include can be compiled with nvcc, without torch."""
    files, seen = list(SOURCES.glob("*/kernels.cu")), set()
    assert files
    while files:
        file = files.pop()
        seen.add(file)
        for line in file.read_text().splitlines():
            if line.startswith("#include"):
                name = line.split()[1]
                assert "torch" not in name, f"{file.name}: {line}"
                assert "ATen" not in name, f"{file.name}: {line}"
                if name.startswith('"'):
                    included = (file.parent / name.strip('"')).resolve()
                    if included not in seen:
                        files.append(included)
    assert len(seen) > 10


def test_show_config_names_the_implementation(capsys):
    kdkernels.show_config()
    printed = capsys.readouterr().out
    assert "truncated_svd: cpu -> C++" in printed
    assert "align_singular_vectors: cpu -> C++" in printed
    assert ("CUDA C++" in printed) == kdkernels.config.HAS_CUDA_KERNELS
