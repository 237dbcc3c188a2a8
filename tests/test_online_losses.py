"""FFL, deep mutual learning and ONE: known answers, gradients and wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels.nn import DMLLoss, FFLLoss, ONELoss, dml_loss, ffl_loss, ffl_ramp, one_loss

Z_1, Z_2 = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([2])
NEAR = math.log(1 + math.exp(-1) + math.exp(-2))  # cross-entropy of Z_1
FAR = math.log(1 + math.exp(1) + math.exp(2))  # of Z_2
KL_3 = 1.3092218847  # T^2 KL(Z_2 || Z_1) at T = 3, also with both exchanged
KL_3_EPS = 1.3092245847  # with 1e-7 added to each target probability


def _random(*shape, seed=0, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


def _kl(target, learner, temperature, eps=0.0):
    """T^2 KL as a mean over the rows."""
    p = (target / temperature).softmax(1) + eps
    return temperature**2 * (p * (p.log() - (learner / temperature).log_softmax(1))).sum(1).mean()


def test_known_losses():
    one = torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64)  # the ensemble of Z_1 and Z_2
    fused = ffl_loss([Z_1, Z_2], one, LABEL, target_eps=0.0).item()
    to_sub_networks = (_kl(one, Z_1, 3.0) + _kl(one, Z_2, 3.0)).item()
    assert fused == pytest.approx(NEAR + FAR + math.log(3) + to_sub_networks, rel=1e-12, abs=0)
    learners = ffl_loss([Z_1, Z_1], Z_2, LABEL, target_eps=0.0).item()  # Z_2 learns from Z_1, and Z_1 twice from Z_2
    assert learners == pytest.approx(2 * NEAR + FAR + 3 * KL_3, rel=1e-9, abs=0)
    assert ffl_loss([Z_1, Z_1], Z_2, LABEL).item() == pytest.approx(2 * NEAR + FAR + 3 * KL_3_EPS, rel=1e-9, abs=0)
    assert dml_loss([Z_1, Z_2], LABEL, temperature=3.0).item() == pytest.approx(NEAR + FAR + 2 * KL_3, rel=1e-9, abs=0)
    assert dml_loss([Z_1, Z_2], LABEL, temperature=3.0, variant="symmetric").item() == pytest.approx(NEAR + FAR + KL_3, rel=1e-9, abs=0)
    assert one_loss([Z_1, Z_1], Z_2, LABEL).item() == pytest.approx(2 * NEAR + FAR + 2 * KL_3, rel=1e-9, abs=0)


def test_known_ramp():
    assert [ffl_ramp(epoch) for epoch in (0, 40, 80, 300)] == pytest.approx([0.0067379470, 0.2865047969, 1.0, 1.0], rel=1e-8, abs=0)
    assert ffl_ramp(0, 0) == 1.0


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 4),
    dense=st.booleans(),
    temperature=st.sampled_from([1.0, 3.0]),
    alpha=st.sampled_from([0.0, 0.6]),
    eps=st.sampled_from([0.0, 1e-7]),
)
def test_losses_and_gradients_equal_the_definition(seed, count, dense, temperature, alpha, eps):
    """Compared with the formulas in plain float64 PyTorch, pair by pair."""
    shape = (3, 5, 2, 2) if dense else (3, 5)
    *logits, fused = _random(*shape, seed=seed, count=count + 1)
    labels = torch.randint(5, (3, *shape[2:]))
    options = {"temperature": temperature, "alpha": alpha}

    def of(target, learner, eps=0.0):
        return alpha * _kl(target, learner, temperature, eps)

    entropies = sum(F.cross_entropy(z, labels) for z in logits)
    ensemble = torch.stack(logits).mean(0).detach()
    pairs = [(k, m) for k in range(count) for m in range(count) if k != m]
    cases = [
        (
            ffl_loss(logits, fused, labels, target_eps=eps, **options),
            entropies + F.cross_entropy(fused, labels) + of(ensemble, fused, eps) + sum(of(fused.detach(), z, eps) for z in logits),
        ),
        (dml_loss(logits, labels, **options), entropies + sum(of(logits[m].detach(), logits[k]) for k, m in pairs) / (count - 1)),
        (dml_loss(logits, labels, variant="symmetric", **options), entropies + sum(of(logits[m], logits[k]) for k, m in pairs) / 2 / (count - 1)),
        (one_loss(logits, fused, labels, **options), entropies + F.cross_entropy(fused, labels) + sum(of(fused.detach(), z) for z in logits)),
    ]
    for got, want in cases:
        assert got.item() == pytest.approx(want.item(), rel=1e-10, abs=0)
        gradients = [torch.autograd.grad(loss, [*logits, fused], retain_graph=True, allow_unused=True) for loss in (got, want)]
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_targets_receive_no_gradient():
    """The divergences alone: the loss without its cross-entropies."""
    *logits, fused = _random(2, 4, count=3)
    labels = torch.tensor([0, 3])

    def gradients(loss, **options):
        values = [loss(**options, alpha=alpha) for alpha in (1.0, 0.0)]
        return torch.autograd.grad(values[0] - values[1], [*logits, fused], allow_unused=True)

    constants = [z.detach() for z in logits]
    ensemble_learns = gradients(lambda **o: ffl_loss(constants, fused, labels, **o))
    assert ensemble_learns[:2] == (None, None)
    first = gradients(lambda **o: ffl_loss([logits[0], constants[1]], fused.detach(), labels, **o))[0]
    torch.testing.assert_close(first, torch.autograd.grad(_kl(fused.detach(), logits[0], 3.0, 1e-7), logits[0])[0], rtol=1e-9, atol=1e-12)
    assert gradients(lambda **o: one_loss(constants, fused, labels, **o))[2].abs().max() < 1e-12
    paper = gradients(lambda **o: dml_loss([logits[0], constants[1]], labels, **o))[0]
    torch.testing.assert_close(paper, torch.autograd.grad(_kl(constants[1], logits[0], 1.0), logits[0])[0], rtol=1e-9, atol=1e-12)


def test_networks_that_agree_have_no_divergence():
    (z,) = _random(3, 4)
    labels = torch.tensor([0, 1, 2])
    for loss in (ffl_loss([z, z], z, labels, target_eps=0.0), one_loss([z, z], z, labels)):
        assert loss.item() == pytest.approx(3 * F.cross_entropy(z, labels).item(), rel=1e-12, abs=0)
    assert dml_loss([z, z], labels).item() == pytest.approx(2 * F.cross_entropy(z, labels).item(), rel=1e-12, abs=0)


def test_probabilities_half_precision_and_modules():
    logits = [z.detach() for z in _random(3, 4, count=3)]
    labels = torch.tensor([0, 1, 2])
    dense = F.one_hot(labels, 4).double()
    for module, function, arguments in (
        (FFLLoss(temperature=2.0), ffl_loss, (logits[:2], logits[2])),
        (ONELoss(temperature=2.0), one_loss, (logits[:2], logits[2])),
        (DMLLoss(temperature=2.0), dml_loss, (logits,)),
    ):
        want = function(*arguments, labels, temperature=2.0)
        assert module(*arguments, labels) == want
        assert function(*arguments, dense, temperature=2.0).item() == pytest.approx(want.item(), rel=1e-12, abs=0)
        half = [[z.bfloat16() for z in x] if isinstance(x, list) else x.bfloat16() for x in arguments]
        got = function(*half, labels, temperature=2.0)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=0.02, abs=0)
        assert "temperature=2.0" in repr(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ffl_loss(Z_1, Z_1, LABEL), "logits must be a list of logits, one tensor for each network"),
        (lambda: dml_loss([Z_1], LABEL), "at least two networks, got 1"),
        (lambda: one_loss([Z_1, Z_2[:, :2]], Z_1, LABEL), r"logits\[1\] must have the shape \(1, 3\)"),
        (lambda: ffl_loss([Z_1, Z_2], Z_1[:, :2], LABEL), r"fused_logits must have the shape \(1, 3\)"),
        (lambda: one_loss([Z_1, Z_2], Z_1[:, :2], LABEL), r"gated_logits must have the shape \(1, 3\)"),
        (lambda: dml_loss([Z_1[0], Z_2[0]], LABEL), r"logits must have the shape \[B, K, ...\], got \(3,\)"),
        (lambda: dml_loss([Z_1, "z"], LABEL), r"logits\[1\] must be"),
        (lambda: dml_loss([Z_1, Z_2], torch.tensor([0, 1])), r"labels must have the shape \(1,\)"),
        (lambda: dml_loss([Z_1, Z_2], LABEL, variant="code"), "variant must be one of"),
        (lambda: dml_loss([Z_1, Z_2], LABEL, temperature=0.0), "temperature must"),
        (lambda: ffl_loss([Z_1, Z_2], Z_1, LABEL, alpha=-1.0), "alpha must"),
        (lambda: ffl_loss([Z_1, Z_2], Z_1, LABEL, target_eps=-1.0), "target_eps must"),
        (lambda: ffl_ramp(-1), "epoch must be a finite number >= 0"),
        (lambda: ffl_ramp(1, 0.5), "ramp_epochs must be an int, got float"),
        (lambda: FFLLoss(beta=1.0), "unexpected keyword argument 'beta'"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
