"""Ties: the sign of a singular vector with tied entries, and the match of a teacher's vector with
tied cosines. Ties are decided by position, not by rounding.
"""

import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch
from conftest import SVD
from matrix_cases import with_layout

from kdkernels import align_singular_vectors, reference, truncated_svd
from kdkernels.testing import implementation

IMPLEMENTATIONS = ["fastest", "cuda", "torch"]


def _tied(m, n, near=0.0, seed=0):
    """Return matrices whose first right singular vector has two entries of largest magnitude with
    opposite signs. The magnitude of the first is smaller by the fraction `near`.
    """
    g = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(5):
        first, second = torch.randperm(n, generator=g)[:2].sort().values.tolist()
        v = 0.1 * torch.rand(n, 1, generator=g, dtype=torch.float64)
        v[first], v[second] = 1 - near, -1.0
        u = torch.randn(m, 1, generator=g, dtype=torch.float64)
        noise = torch.randn(m, n, generator=g, dtype=torch.float64)
        noise -= noise @ v @ v.mT / v.square().sum()
        batch.append(u @ v.mT + 0.05 * noise)
    return torch.stack(batch)


def _signs(x, k=1, kernels="fastest", **options):
    _, _, v = implementation(kernels)(truncated_svd)(x, k, **options)
    magnitude = v[..., 0].abs()
    first = (magnitude >= (1 - 1e-4) * magnitude.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    assert (v[..., 0].gather(-1, first) > 0).all()
    return v[..., 0].sign()


def test_known_value():
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    for kernels in IMPLEMENTATIONS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for k in (1, 2):
                assert implementation(kernels)(truncated_svd)(x.to(dtype), k)[2][:, 0].sign().tolist() == [1, -1]
                assert implementation(kernels)(truncated_svd)(-x.to(dtype), k)[2][:, 0].sign().tolist() == [1, -1]
    assert reference.truncated_svd(x, 1)[2][:, 0].sign().tolist() == [1, -1]


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (30, 17), (100, 90)])
@pytest.mark.parametrize("near", [0.0, 1e-5, 5e-5, 2e-4], ids=str)
def test_signs_are_the_same_for_any_call(m, n, near):
    """The signs do not depend on k, batch, dtype, layout, implementation, and the sign of the
    matrix, also for a near tie and for no tie.
    """
    x = _tied(m, n, near)
    expected = _signs(x)
    for kernels in IMPLEMENTATIONS:
        for dtype in (torch.float32, torch.float64):
            given = x.to(dtype)
            for k in (1, 2, min(m, n)) if n < 50 else (1, 2):
                assert torch.equal(_signs(given, k, kernels=kernels).double(), expected)
            for layout in ("columns", "neither"):
                assert torch.equal(_signs(with_layout(given, layout), kernels=kernels).double(), expected)
            assert torch.equal(_signs(-given, kernels=kernels).double(), expected)
            assert torch.equal(_signs(given, return_u=True, kernels=kernels).double(), expected)
            assert torch.equal(torch.stack([_signs(own, kernels=kernels) for own in given]).double(), expected)
    half = x.bfloat16()  # the rounded entries decide
    assert torch.equal(_signs(half), _signs(half.double()).float())


def test_signs_and_matches_in_triton(monkeypatch):
    pytest.importorskip("triton")
    svd = SVD("cuda" if torch.cuda.is_available() else "cpu", "triton")
    for near in (0.0, 3e-5, 1e-3):
        x = _tied(7, 6, near).float()
        expected = _signs(x.double()).float()
        for options in ({}, {"return_u": True}):
            assert torch.equal(_signs(x.to(svd.device), 2, kernels="triton", **options).cpu(), expected)
    for teacher, student in (_equal_cosines(),):
        s, _ = svd.align(student.to(svd.device), teacher.to(svd.device))
        torch.testing.assert_close(s[..., 0].cpu(), student[..., 0])


def _equal_cosines(dtype=torch.float32):
    """Return two student vectors at 45 degrees to either side of the teacher's.

    Rounding favours the second.
    """
    teacher = torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype)
    root = 0.5**0.5
    student = torch.tensor([[root, root + 1e-7, 0.1], [root, -root, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)
    return teacher, student


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tied_cosines_match_the_first_vector(kernels, dtype):
    teacher, student = _equal_cosines(dtype)
    for own in (student, student * torch.tensor([1.0, -1.0, 1.0], dtype=dtype)):
        s, _t = implementation(kernels)(align_singular_vectors)(own, teacher)
        torch.testing.assert_close(s[..., 0], own[..., 0], rtol=0, atol=0)
        torch.testing.assert_close(reference.align_singular_vectors(own, teacher)[0], s)
    better = student.clone()
    better[0, 1] += 1e-4  # not a tie
    torch.testing.assert_close(implementation(kernels)(align_singular_vectors)(better, teacher)[0][..., 0], better[..., 1], rtol=0, atol=0)
