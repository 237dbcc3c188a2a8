"""Agreement of networks: fidelity, calibration error and CKA."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("torchmetrics")
from kdkernels.analysis import MinibatchCKA, calibration_error, fidelity


def test_fidelity():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 2.0]])
    teacher = torch.tensor([[9.0, 1.0], [5.0, 1.0], [3.0, 0.0], [0.0, 0.1]])
    assert fidelity(logits, teacher).item() == 0.75
    assert fidelity(logits, logits).item() == 1.0


def test_calibration_error_of_hand_made_predictions():
    """Two bins: confidence 0.6 with accuracy 1/2, and confidence 0.9 with accuracy 1."""
    probability = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    found = calibration_error(probability.log(), torch.tensor([0, 1, 1, 1]), bins=10)
    assert found.item() == pytest.approx((2 * 0.1 + 2 * 0.1) / 4, rel=1e-5)


def _u_statistic(k, m):
    """Return HSIC_1 as a mean over all ordered quadruples of different samples."""
    n = len(k)
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(n), 4)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n", [4, 6])
def test_cka_is_the_ratio_of_u_statistics(n):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, d, generator=generator, dtype=torch.float64) + 1 for d in (2, 4))
    cka = MinibatchCKA()
    cka.update(x, y)
    k, m = (z.flatten(1) @ z.flatten(1).T for z in (x, y))
    want = _u_statistic(k, m) / (_u_statistic(k, k) * _u_statistic(m, m)).sqrt()
    assert cka.compute().item() == pytest.approx(want.item(), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(4, 20), st.integers(1, 4))
def test_properties_of_cka(seed, n, batches):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for _ in range(batches)]
    ys = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))

    def cka(first, second):
        metric = MinibatchCKA()
        for a, b in zip(first, second, strict=True):
            metric.update(a, b)
        return metric.compute().item()

    assert cka(xs, xs) == pytest.approx(1.0)
    assert cka(xs, [3 * x @ rotation + 2 for x in xs]) == pytest.approx(1.0)
    assert cka(xs, ys) == pytest.approx(cka(ys, xs), nan_ok=True)


def test_cka_of_independent_features_is_about_zero():
    """The biased estimator would give about 0.6 for 32 samples of 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    cka = MinibatchCKA()
    for _ in range(100):
        cka.update(torch.randn(32, 64, generator=generator), torch.randn(32, 64, generator=generator))
    assert abs(cka.compute().item()) < 0.03
    cka.reset()
    with pytest.raises(RuntimeError, match="has no batch yet"):
        cka.compute()


def test_cka_keeps_float64_sums():
    features = 30 * torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    whole = nn.Sequential(nn.Linear(2, 2), MinibatchCKA()).half()
    whole[1].update(features, features.half())
    assert whole[1].sums.dtype == torch.float64
    assert whole.bfloat16()[1].compute().item() == pytest.approx(1.0, rel=1e-3)
    assert whole[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fidelity(torch.zeros(2, 3), torch.zeros(3, 3)), r"must have the same shape \[N, K\]"),
        (lambda: fidelity(torch.zeros(0, 3), torch.zeros(0, 3)), r"must have the same shape \[N, K\]"),
        (lambda: fidelity([1.0], torch.zeros(2, 3)), "logits must be a tensor"),
        (lambda: calibration_error(torch.zeros(2, 3), torch.zeros(3).long()), r"labels \[N\]"),
        (lambda: calibration_error(torch.zeros(2, 3), torch.zeros(2)), "labels must be a tensor of integers"),
        (lambda: calibration_error(torch.zeros(2, 3), torch.tensor([0, -100])), r"labels must lie in \[0, 3\)"),
        (lambda: calibration_error(torch.zeros(2, 3), torch.tensor([0, 3])), r"labels must lie in \[0, 3\)"),
        (lambda: calibration_error(torch.full((2, 3), torch.nan), torch.tensor([0, 1])), "logits must not have NaN"),
        (lambda: fidelity(torch.full((2, 3), torch.nan), torch.zeros(2, 3)), "logits must not have NaN"),
        (lambda: fidelity(torch.zeros(2, 3), torch.full((2, 3), torch.nan)), "teacher_logits must not have NaN"),
        (lambda: MinibatchCKA().update([1.0], torch.zeros(3, 2)), "features must be tensors, got list"),
        (lambda: calibration_error(torch.zeros(2, 3), torch.zeros(2).long(), bins=0), "bins must be at least 1"),
        (lambda: MinibatchCKA().update(torch.zeros(3, 2), torch.zeros(3, 2)), "of the same B >= 4"),
        (lambda: MinibatchCKA().update(torch.zeros(5, 2), torch.zeros(4, 2)), "of the same B >= 4"),
    ],
)
def test_wrong_input_raises(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
