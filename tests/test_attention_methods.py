"""Attention transfer of activations and gradients, and FSP: known values, training, and errors."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
import lightning as L

from kdkernels import attention_transfer_loss, reference
from kdkernels.data import ClutterDigits
from kdkernels.distill import (
    FSP,
    AttentionTransfer,
    GradientAttentionTransfer,
    fsp_loss,
    fsp_matrix,
    gradient_attention_loss,
    input_gradient,
)
from kdkernels.models import TinyCNN

BLOCKS = ["block1", "block2"]


@pytest.fixture(scope="module")
def data():
    module = ClutterDigits(train_size=64, val_size=32, test_size=16, batch_size=16)
    module.setup()
    return module


def _fit(method, data, tmp_path, **options):
    trainer = L.Trainer(**dict(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path) | options)
    trainer.fit(method, data)
    return trainer


# Attention transfer.


def test_attention_transfer_loss_is_the_sum_over_pairs(data):
    method = AttentionTransfer(
        TinyCNN(4), TinyCNN(6), BLOCKS, BLOCKS, p=[1.0, 2.0], reduce=["sum", "max"], variant="paper", beta=0.3, alpha=0.9, gamma=0.1, temperature=3.0
    ).eval()
    batch = data.finish(next(iter(data.val_dataloader())))
    logits, losses = method.losses(batch)
    _, s = method.student_taps(batch["image"])
    _, t = method.teacher_taps(batch["image"])
    pairs = [(s[name].double(), t[name].double()) for name in BLOCKS]
    expected = reference.attention_transfer_loss(*pairs[0], 1.0, variant="paper", reduce="sum")
    expected = expected + reference.attention_transfer_loss(*pairs[1], 2.0, variant="paper", reduce="max")
    assert losses["attention"].item() == pytest.approx(0.3 * expected.item(), rel=1e-5, abs=0)
    assert losses["cross_entropy"].item() == pytest.approx(0.1 * nn.functional.cross_entropy(logits, batch["label"]).item(), rel=1e-5, abs=0)
    kl = reference.temperature_kl(logits.double(), method.teacher(batch["image"]).double(), 3.0)
    assert losses["kl"].item() == pytest.approx(0.9 * kl.item(), rel=1e-5, abs=0)


def test_attention_transfer_brings_the_student_maps_closer_to_the_teacher(data, tmp_path):
    """Student and teacher have different numbers of channels, and maps of different size, which are
    average pooled.
    """
    torch.manual_seed(0)
    method = AttentionTransfer(TinyCNN(4), TinyCNN(6), ["block1", "block2"], ["block2", "block3"], gamma=0.0, beta=1000.0)
    batch = data.finish(next(iter(data.val_dataloader())))
    before = method.losses(batch)[1]["attention"].item()
    _fit(method, data, tmp_path, max_epochs=8)
    assert method.eval().losses(batch)[1]["attention"].item() < 0.7 * before


def test_attention_transfer_raises_for_taps_that_do_not_match(data, tmp_path):
    with pytest.raises(ValueError, match="must pair up"):
        _fit(AttentionTransfer(TinyCNN(2), TinyCNN(2), BLOCKS, BLOCKS[:1]), data, tmp_path)
    with pytest.raises(ValueError, match="at least one pair of layers"):
        AttentionTransfer(TinyCNN(2), TinyCNN(2), [], [])
    with pytest.raises(ValueError, match=r"student tap 'fc' \[2, 10\] and teacher tap 'fc' \[2, 10\] must both be maps"):
        _fit(AttentionTransfer(TinyCNN(2), TinyCNN(2), ["fc"], ["fc"]), data, tmp_path)
    with pytest.raises(ValueError, match="p must be one value, or one for each of the 2 pairs"):
        _fit(AttentionTransfer(TinyCNN(2), TinyCNN(2), BLOCKS, BLOCKS, p=[1.0, 2.0, 3.0]), data, tmp_path)


# Gradients.


def test_known_values_of_gradient_attention():
    """f = w.x with loss f^2 / 2 at x = (1, 1), w_S = (1, 2), w_T = (2, 1): J = f w, half the
    squared distance is 9, and its gradient (-6, 12).
    """
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (student_gradient,) = torch.autograd.grad((w @ x) ** 2 / 2, x, create_graph=True)
    assert student_gradient.tolist() == [3, 6]
    loss = gradient_attention_loss(student_gradient[None], torch.tensor([[6.0, 3.0]], dtype=torch.float64))
    assert loss.item() == 9
    assert torch.autograd.grad(loss, w)[0].tolist() == [-6, 12]
    with pytest.raises(ValueError, match="must have the same shape"):
        gradient_attention_loss(student_gradient, student_gradient[None])


def _smooth_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)).double()


def test_input_gradient_is_that_of_each_samples_loss():
    network, image, label = _smooth_network(), torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5, 9])
    gradients_of_batch, logits = input_gradient(network, image, label)
    assert not gradients_of_batch.requires_grad
    torch.testing.assert_close(logits, network(image))
    for i in range(3):
        single_image = image[i : i + 1].clone().requires_grad_()
        nn.functional.cross_entropy(network(single_image), label[i : i + 1]).backward()
        torch.testing.assert_close(gradients_of_batch[i], single_image.grad[0])


@pytest.mark.parametrize("symmetry", [False, True])
def test_gradient_attention_is_differentiated_twice(symmetry):
    """The gradient of the loss matches finite differences in the student's weights."""
    torch.manual_seed(1)
    student, teacher = _smooth_network(), _smooth_network()
    method = GradientAttentionTransfer(student, None if symmetry else teacher, beta=7.0, symmetry=symmetry)
    batch = {"image": torch.randn(3, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([1, 5, 9])}

    def loss():
        return sum(method.losses(batch)[1].values())

    weight = student[0].weight
    (analytic,) = torch.autograd.grad(loss(), weight)
    direction, step = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(loss().item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (analytic * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6, abs=0)
    if not symmetry:
        student_gradient, _ = input_gradient(student, batch["image"], batch["label"])
        teacher_gradient, _ = input_gradient(teacher, batch["image"], batch["label"])
        assert method.losses(batch)[1]["gradient"].item() == pytest.approx(7 * 0.5 * (student_gradient - teacher_gradient).square().sum().item() / 3)
    else:
        mirrored = {**batch, "image": batch["image"] + batch["image"].flip(-1)}  # equal to its mirror image
        pointwise = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).double()
        assert GradientAttentionTransfer(pointwise, symmetry=True).losses(mirrored)[1]["gradient"].item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("symmetry", [False, True])
def test_gradient_attention_trains(data, tmp_path, symmetry):
    method = GradientAttentionTransfer(TinyCNN(2), None if symmetry else TinyCNN(3), symmetry=symmetry)
    assert _fit(method, data, tmp_path).callback_metrics["train/loss_gradient"] > 0


def test_network_check_before_training_changes_no_state(data, tmp_path):
    """The check changes neither batch norm statistics, nor training modes, nor gradients."""
    student = TinyCNN(2)
    student.block1[1].eval()  # frozen by the user
    before = copy.deepcopy(student.state_dict())
    seen = []

    class RecordStates(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 0:
                seen.append((copy.deepcopy(student.state_dict()), student.block1[1].training, student.block2[1].training))
                seen.append([p.grad for p in student.parameters()])

    _fit(GradientAttentionTransfer(student, TinyCNN(3)), data, tmp_path, callbacks=[RecordStates()], num_sanity_val_steps=0)
    (state, frozen, trained), gradients = seen
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    assert (frozen, trained) == (False, True)
    assert gradients == [None] * len(gradients)


class SquareOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class OnceDifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = TinyCNN(2)

    def forward(self, x):
        return self.body(SquareOnce.apply(x))


def test_operation_without_double_backward_raises_before_training(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"OnceDifferentiable cannot be differentiated twice: .* has no double backward: .*OnceBackward"):
        _fit(GradientAttentionTransfer(OnceDifferentiable(), TinyCNN(2)), data, tmp_path)
    with pytest.raises(ValueError, match="needs a teacher, or symmetry=True"):
        GradientAttentionTransfer(TinyCNN(2))


# FSP.

F1, F2 = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 6.0]]])


def test_known_values_of_fsp():
    assert fsp_matrix(F1, F2).tolist() == [[[8.5], [19.5]]]
    assert torch.equal(fsp_matrix(2 * F1, -3 * F2), -6 * fsp_matrix(F1, F2))
    assert torch.equal(fsp_matrix(F1.flip(2), F2.flip(2)), fsp_matrix(F1, F2))
    # the teacher's matrix is (8, 20), so the differences are 1/2 and -1/2
    teacher = (torch.tensor([[[8.0, 0.0], [20.0, 0.0]]]), torch.tensor([[[2.0, 0.0]]]))
    assert fsp_matrix(*teacher).tolist() == [[[8], [20]]]
    expected = {"paper": 0.5, "repdistiller": 0.25, "sskd": 0.125, "torchdistill": 0.5**0.5}
    for variant, value in expected.items():
        assert fsp_loss([(F1, F2)], [teacher], variant=variant).item() == pytest.approx(value)


def test_fsp_pools_the_larger_map():
    first, second = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    pooled = nn.functional.max_pool2d(first, 2)
    torch.testing.assert_close(fsp_matrix(first, second), torch.einsum("bihw,bjhw->bij", pooled, second) / 16)
    pooled = nn.functional.avg_pool2d(first, 2)
    torch.testing.assert_close(fsp_matrix(first, second, pooling="avg"), torch.einsum("bihw,bjhw->bij", pooled, second) / 16)
    large = torch.full((1, 2, 64, 64), 200.0, dtype=torch.float16)  # unscaled sums over the positions would overflow
    assert fsp_matrix(large, large).eq(40000).all()


def test_fsp_trains_in_two_stages(data, tmp_path):
    """The first stage trains only the layers up to the last tap."""
    method = FSP(TinyCNN(4), TinyCNN(4, depth=2), BLOCKS, BLOCKS, first_stage_epochs=1)
    before = copy.deepcopy(method.student.state_dict())
    states = []

    class RecordStates(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            states.append((copy.deepcopy(module.student.state_dict()), dict(trainer.callback_metrics)))

    _fit(method, data, tmp_path, max_epochs=2, callbacks=[RecordStates()])
    (first, metrics), (second, later) = states
    assert metrics["train/loss_cross_entropy"] == 0
    assert metrics["train/loss_fsp"] > 0
    assert later["train/loss_cross_entropy"] > 0
    for name in ("block3.0.weight", "fc.weight", "fc.bias"):
        assert torch.equal(first[name], before[name])
        assert not torch.equal(second[name], before[name])
    assert not torch.equal(first["block2.0.weight"], before["block2.0.weight"])


def test_fsp_trains_in_one_stage(data):
    method = FSP(TinyCNN(4), TinyCNN(4), BLOCKS, BLOCKS, alpha=0.5, beta=2.0)
    losses = method.losses(data.finish(next(iter(data.val_dataloader()))))[1]
    assert set(losses) == {"fsp", "cross_entropy", "kl"}
    assert all(value > 0 for value in losses.values())


def test_fsp_raises_for_features_that_do_not_match(data, tmp_path):
    with pytest.raises(ValueError, match=r"must have the same number of channels, got 4 and 6"):
        _fit(FSP(TinyCNN(4), TinyCNN(6), BLOCKS, BLOCKS), data, tmp_path)
    with pytest.raises(ValueError, match="at least two layers each"):
        FSP(TinyCNN(4), TinyCNN(4), BLOCKS[:1], BLOCKS[:1])
    with pytest.raises(ValueError, match="variant must be one of"):
        fsp_loss([(F1, F2)], [(F1, F2)], variant="mean")
    with pytest.raises(ValueError, match="pair 0: student and teacher must have the same numbers of channels"):
        fsp_loss([(F1, F2)], [(F1, F1)])
    with pytest.raises(ValueError, match="pooling must be"):
        fsp_matrix(F1, F2, pooling="min")
    with pytest.raises(ValueError, match="of one batch"):
        fsp_matrix(F1, F2.expand(2, -1, -1))


def test_teacher_receives_no_gradient():
    s, t = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    fsp_loss([(s, s)], [(t, t)]).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0
    attention_transfer_loss(s, t.detach()).backward()
