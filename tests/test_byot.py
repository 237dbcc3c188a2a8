"""Deep supervision and Be Your Own Teacher: known answers, gradients, exits and training."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdkernels.nn import BYOTLoss, byot_loss
from kdkernels.nn.byot import byot_feature_losses, byot_weights

Z1, Z2 = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([2])
VARIANTS = ["paper", "authors", "luanyunteng"]


def _features(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def _entropy(z, temperature):
    p = (z / temperature).softmax(1)
    return -(p * p.log()).sum().item()


def test_known_losses():
    """Values computed by hand."""
    soft_cross_entropy = 1.2080463420  # of z1 with the target z2, T = 3
    kl = soft_cross_entropy - _entropy(Z2, 3.0)
    near, far = math.log(1 + math.exp(-1) + math.exp(-2)), math.log(1 + math.exp(1) + math.exp(2))  # cross-entropies of z1 and z2
    for variant, expected in (
        ("paper", 0.7 * near + 0.3 * kl + far),
        ("authors", 0.7 * near + 0.3 * kl + far),
        ("luanyunteng", 0.9 * near + 0.1 * 9 * kl + 0.9 * far),
    ):
        assert byot_loss([Z1, Z2], LABEL, variant=variant).item() == pytest.approx(expected, rel=1e-9, abs=0)
    assert 9 * soft_cross_entropy == pytest.approx(10.8724170779, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("variant", "first", "last", "expected"),
    [
        ("luanyunteng", (1.0, 0.0, 2.0), (0.0, 0.0, -1.0), 10.0),
        ("luanyunteng", (-1.0, 0.0, 2.0), (0.0, 0.0, -1.0), 9.0),  # the first pair is left out: neither is positive
        ("paper", (-1.0, 0.0, 2.0), (0.0, 0.0, -1.0), 10.0),
        ("authors", (1.0, 0.0, 2.0), (0.0, 0.0, -1.0), 3.1622776602),
    ],
)
def test_known_feature_losses(variant, first, last, expected):
    losses = byot_feature_losses(_features(first, first, last), variant)
    assert losses[0].item() == pytest.approx(expected, rel=1e-9, abs=0)
    assert losses[1].item() == (0.0 if variant == "authors" else losses[0].item())


@given(seed=st.integers(0, 1000), variant=st.sampled_from(VARIANTS), count=st.integers(2, 4), dense=st.booleans())
def test_loss_is_the_sum_of_its_terms(seed, variant, count, dense):
    """Compared with the formula in plain float64 PyTorch."""
    torch.manual_seed(seed)
    shape = (3, 5, 2, 2) if dense else (3, 5)
    logits = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    features = [torch.randn((3, 4, 2, 2) if dense else (3, 4), dtype=torch.float64) for _ in range(count)]
    labels = torch.randint(5, (3, *shape[2:]))
    temperature, alpha, beta = 2.5, 0.4, 0.01
    got = byot_loss(logits, labels, features, temperature=temperature, alpha=alpha, beta=beta, variant=variant)
    want = F.cross_entropy(logits[-1], labels) * (1 - alpha if variant == "luanyunteng" else 1)
    for i in range(count - 1):
        target = (logits[-1] / temperature).softmax(1)
        kl = (target * (target.log() - (logits[i] / temperature).log_softmax(1))).sum(1).mean()
        difference = features[i] - features[-1]
        if variant == "paper":
            distance = difference.square().flatten(1).sum(1).mean()
        elif variant == "authors":
            distance = difference.norm() if i < count - 2 else 0.0
        else:
            distance = difference.square()[(features[i] > 0) | (features[-1] > 0)].sum()
        scale = temperature**2 if variant == "luanyunteng" else 1
        want = want + (1 - alpha) * F.cross_entropy(logits[i], labels) + alpha * scale * kl + beta * distance
    assert got.item() == pytest.approx(want.item(), rel=1e-11, abs=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_receive_no_gradient(variant):
    """The last logits are trained by the cross-entropy alone, the last features by nothing."""
    logits = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    features = [torch.rand(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3])
    byot_loss(logits, labels, features, variant=variant).backward()
    weight = byot_weights(variant).last_cross_entropy
    last = logits[2].detach().requires_grad_()
    (weight * F.cross_entropy(last, labels)).backward()
    torch.testing.assert_close(logits[2].grad, last.grad)
    assert features[2].grad is None
    assert features[0].grad.abs().sum() > 0
    assert (features[1].grad.abs().sum() > 0) == (variant != "authors")
    assert all(z.grad.abs().sum() > 0 for z in logits)


def test_without_alpha_and_beta_it_is_deep_supervision():
    logits = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3])
    want = sum(F.cross_entropy(z, labels) for z in logits)
    for variant in VARIANTS:
        assert byot_loss(logits, labels, logits, alpha=0.0, beta=0.0, variant=variant).item() == pytest.approx(want.item(), rel=1e-12, abs=0)


def test_gradcheck_and_equal_features():
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    features = [torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 1, 2])
    detached = [logits[2].detach(), features[2].detach()]  # targets have no gradient, so they are constants here
    torch.autograd.gradcheck(
        lambda a, b, f, g: byot_loss([a, b, detached[0]], labels, [f, g, detached[1]], variant="paper"), (*logits[:2], *features[:2])
    )
    same = features[2].detach().clone().requires_grad_()
    byot_feature_losses([same, same, features[2]], "authors")[0].backward()
    assert not same.grad.any()  # the norm has no derivative at 0; the gradient is defined as 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([Z1], LABEL), {}, "logits must be at least two tensors of the same shape"),
        (([Z1, Z2[:, :2]], LABEL), {}, "logits must be at least two tensors of the same shape"),
        (([Z1, Z2], LABEL[:0]), {}, r"labels must have the shape \(1,\)"),
        (([Z1, Z2], LABEL, [Z1]), {}, "features must have one tensor for each of the 2 logits, got 1"),
        (([Z1, Z2], LABEL, [Z1, Z2[:, :2]]), {}, "features must have the same shape"),
        (([Z1, Z2], LABEL), {"alpha": 1.5}, "alpha must be at most 1"),
        (([Z1, Z2], LABEL), {"alpha": -0.1}, "alpha must"),
        (([Z1, Z2], LABEL), {"beta": float("nan")}, "beta must"),
        (([Z1, Z2], LABEL), {"temperature": 0.0}, "temperature must"),
        (([Z1, Z2], LABEL), {"variant": "code"}, "variant must be one of"),
    ],
)
def test_invalid_arguments_raise(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        byot_loss(*arguments, **options)
    if len(arguments) == 2 and len(arguments[0]) == 2 and options:
        with pytest.raises(ValueError, match=message):
            BYOTLoss(**options)


def test_module_and_half_precision():
    logits, labels = [torch.randn(4, 5).bfloat16().requires_grad_() for _ in range(2)], torch.tensor([0, 1, 2, 3])
    loss = BYOTLoss(variant="luanyunteng", temperature=4.0)(logits, labels, logits)
    assert loss.dtype == torch.float32
    want = byot_loss([z.double() for z in logits], labels, [z.double() for z in logits], variant="luanyunteng", temperature=4.0)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=0)
    loss.backward()
    assert logits[0].grad.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="logits must be a list"):
        byot_loss(logits[0], labels)


# Exits and trainers.

pytest.importorskip("lightning")
import lightning as L  # noqa: E402
from tiny_runs import IMAGES, Small, data_of, fit, loader_of  # noqa: E402

from kdkernels.data import SegmentedClutterDigits  # noqa: E402
from kdkernels.distill import BYOT, KD, DeepSupervision  # noqa: E402
from kdkernels.models import Exits, TinyCNN, TinyFCN, load_weights  # noqa: E402
from kdkernels.tasks import Segmentation  # noqa: E402

BLOCKS = ["block1", "block2", "block3"]


@pytest.mark.parametrize("branch", ["bottleneck", "separable"])
@pytest.mark.parametrize("label_maps", [False, True])
def test_shapes_of_exits(branch, label_maps):
    shapes = {"a": (4, 16, 8), "b": (6, 8, 4), "c": (12, 4, 4)}
    exits = Exits(shapes, 5, label_maps, branch, adapters=True)
    logits, features = exits([torch.randn(2, *shape) for shape in shapes.values()], (32, 16))
    assert [z.shape for z in logits] == [(2, 5, 32, 16) if label_maps else (2, 5)] * 2
    assert [f.shape for f in features] == [(2, 12, 4, 4) if label_maps else (2, 12)] * 3
    with pytest.raises(ValueError, match="sizes of the tapped layers must be multiples of the last one's size: 'a' has 9x8, 'b' has 4x4"):
        Exits({"a": (4, 9, 8), "b": (6, 4, 4)}, 5)
    with pytest.raises(ValueError, match="'a' must be those of the last layer times a power of two, got the ratios 3 and 2"):
        Exits({"a": (4, 12, 8), "b": (6, 4, 4)}, 5, branch="separable")


def _byot(**options):
    return BYOT(TinyCNN(4, num_classes=3), BLOCKS, image_shape=[3, 8, 8], **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_computes_the_pure_loss(variant):
    torch.manual_seed(0)
    method = _byot(variant=variant).double()
    batch = {"image": torch.rand(4, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([0, 1, 2, 0])}
    method.eval()
    logits, outputs = method.run_exits(batch["image"])
    beta = method.weights.features * (128 / 4 if variant == "luanyunteng" else 1)
    want = byot_loss([*outputs.logits, logits], batch["label"], outputs.features, beta=beta, variant=variant)
    assert sum(method.losses(batch)[1].values()).item() == pytest.approx(want.item(), rel=1e-9, abs=0)


def test_which_parameter_receives_which_gradient():
    """KL and feature loss train neither the student's classifier nor the last layer's own features
    through their targets, but they train the layers before the exits.
    """
    method = _byot()
    method.train()
    batch = {"image": torch.rand(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0])}
    terms = method.losses(batch)[1]
    (terms["kl_1"] + terms["kl_2"] + terms["features"]).backward()
    student = method.student
    assert student.fc.weight.grad is None
    assert all(p.grad is None for p in student.block3.parameters())  # only targets depend on the last block
    assert all(p.grad is not None for p in [*student.block1.parameters(), *student.block2.parameters()])
    assert all(p.grad is not None for p in method.branches.parameters())
    method.zero_grad()
    sum(method.losses(batch)[1].values()).backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("make", [lambda s, **o: BYOT(s, BLOCKS, **o), lambda s, **o: DeepSupervision(s, BLOCKS, exit_weight=[0.3, 0.5], **o)])
def test_training_evaluates_every_exit_and_exports_the_plain_network(make, tmp_path):
    data = data_of()
    method = make(TinyCNN(4, num_classes=3), image_shape=[3, 8, 8])
    before = [p.detach().clone() for p in method.branches.parameters()]
    trainer = fit(method, data, max_epochs=2)
    names = {"val/accuracy", "val/accuracy_exit_1", "val/accuracy_exit_2", "val/accuracy_ensemble"}
    assert names <= set(trainer.callback_metrics)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.branches.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = load_weights(TinyCNN(4, num_classes=3), tmp_path / "a.ckpt")
    assert all(torch.equal(v, method.student.state_dict()[k]) for k, v in plain.state_dict().items())
    again = make(TinyCNN(4, num_classes=3))
    assert again.branches is None
    trainer.validate(again, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(again.branches.parameters(), method.branches.parameters(), strict=True))


def test_exits_on_label_maps():
    data = SegmentedClutterDigits(train_size=8, val_size=4, test_size=2, batch_size=4)
    trainer = fit(BYOT(TinyFCN(4), BLOCKS, task=Segmentation()), data)
    assert {"val/mean_iou", "val/mean_iou_exit_1", "val/pixel_accuracy_ensemble"} <= set(trainer.callback_metrics)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.pool(self.conv(x)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1)
        self.again = self.conv
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.again(self.conv(x)).mean((2, 3)))


class Repeated(nn.Module):
    """Runs the layer ``conv`` twice."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.last(self.conv(self.conv(self.first(x)))).mean((2, 3)))


def test_batch_without_images_raises():
    batches = [{"image": torch.zeros(0, 3, 8, 8), "label": torch.zeros(0, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="batch 0 of epoch 0 has no image"):
        fit(_byot(), torch.utils.data.DataLoader(batches, batch_size=None))


def test_exits_need_all_features():
    exits = Exits({"a": (2, 4, 4), "b": (3, 2, 2)}, 3)
    with pytest.raises(ValueError, match="maps of 1 exits and of the last layer, got 1"):
        exits([torch.zeros(1, 2, 4, 4)], (8, 8))
    for options in ({"num_classes": 0}, {"num_classes": 2.0}, {"num_classes": 3, "label_maps": "x"}):
        with pytest.raises((TypeError, ValueError), match=r"num_classes must be an integer >= 1|label_maps must be True or False"):
            Exits({"a": (2, 4, 4), "b": (3, 2, 2)}, **options)


def test_invalid_options_raise_before_training():
    with pytest.raises(ValueError, match="student_taps must name at least 2 layers"):
        BYOT(Small(), ["features"])
    with pytest.raises(ValueError, match="the network is its own teacher"):
        BYOT(Small(), ["features.0", "features"], teacher=Small())
    with pytest.raises(ValueError, match=r"the output of layer 'pool' must be a feature map \[B, C, H, W\], got \[2, 4\]"):
        BYOT(Pooled(), ["conv", "pool"], image_shape=[3, 8, 8])
    with pytest.raises(ValueError, match="exit_weight must be one number, or one for each of the 2 exits, got 1"):
        DeepSupervision(TinyCNN(4), BLOCKS, exit_weight=[1.0])
    with pytest.raises(ValueError, match="exit_weight, the weight of a term"):
        DeepSupervision(TinyCNN(4), BLOCKS, exit_weight=-1.0)
    with pytest.raises(TypeError, match="exit_weight, the weight of a term of the loss, must be a number, got 'a'"):
        DeepSupervision(TinyCNN(4), BLOCKS, exit_weight=[1, "a"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'adapters'"):
        DeepSupervision(TinyCNN(4), BLOCKS, adapters=True)
    with pytest.raises(TypeError, match="student_taps must be a list of names of layers, got 'block1'"):
        BYOT(TinyCNN(4), "block1")
    with pytest.raises(ValueError, match="layer 'again' of Shared is the same module as 'conv'"):
        BYOT(Shared(), ["conv", "again"])
    with pytest.raises(ValueError, match=r"layer 'conv' of Repeated runs 2 times for an image, so it cannot have an exit"):
        BYOT(Repeated(), ["conv", "last"], image_shape=[3, 8, 8])
    BYOT(Repeated(), ["first", "conv"], image_shape=[3, 8, 8])  # the last layer has no exit
    with pytest.raises(ValueError, match=r"image_shape must be \[C, H, W\], three integers >= 1, got \[8, 8\]"):
        BYOT(TinyCNN(4), BLOCKS, image_shape=[8, 8])
    with pytest.raises(ValueError, match=r"image_shape is \[3, 16, 16\], but the data have images \[3, 8, 8\]"):
        fit(BYOT(TinyCNN(4, num_classes=3), BLOCKS, image_shape=[3, 16, 16]))
    images, labels = torch.stack([image for image, _ in IMAGES]), torch.tensor([label for _, label in IMAGES])
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"BYOT needs image_shape=\[C, H, W\], because the data do not give it"):
        trainer.fit(BYOT(TinyCNN(4, num_classes=3), BLOCKS), loader_of(images, labels))
    with pytest.raises(ValueError, match="EarlyStopping monitors 'val/accuracy_exit_3', which is not logged: use val/accuracy, val/accuracy_exit_1"):
        fit(_byot(), callbacks=[L.pytorch.callbacks.EarlyStopping(monitor="val/accuracy_exit_3")])
    unlabelled = torch.utils.data.DataLoader([{"image": image} for image, _ in IMAGES], batch_size=4)
    for method in (_byot(), DeepSupervision(TinyCNN(4, num_classes=3), BLOCKS, image_shape=[3, 8, 8])):
        with pytest.raises(ValueError, match="labels alone, and the first training batch has none"):
            fit(method, unlabelled)
    assert KD(Small(), Small()).prediction_names() == [""]
