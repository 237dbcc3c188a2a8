"""FRSKD: known answers, gradients and training."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels.nn import FRSKDLoss, frskd_feature_losses, frskd_loss, frskd_ramp, overhaul_loss, overhaul_margins

Z_C, Z_T = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([2])
FEATURE_LOSSES = ["att", "fit", "od"]


def _maps(*channels, size=4):
    return [torch.randn(3, c, size, size, dtype=torch.float64) for c in channels]


def _one(*channels):
    return [x[:1] for x in _maps(*channels)]


# Losses.


def test_known_loss():
    """Values computed by hand."""
    near, far = math.log(1 + math.exp(-1) + math.exp(-2)), math.log(1 + math.exp(1) + math.exp(2))  # cross-entropies
    kl = 1.3196299122  # T^2 KL at T = 4
    assert frskd_loss(Z_C, Z_T, LABEL).item() == pytest.approx(near + far + 2 * kl, rel=1e-9, abs=0)
    assert frskd_loss(Z_C, Z_T, LABEL, alpha=0.0).item() == pytest.approx(near + far, rel=1e-12, abs=0)
    features, refined = [torch.tensor([[[[1.0, 0.0]]]])], [torch.tensor([[[[0.0, 2.0]]]])]  # attention maps (1, 0) and (0, 1)
    got = frskd_loss(Z_C, Z_T, LABEL, features, refined, beta=100.0).item()
    assert got == pytest.approx(near + far + 2 * kl + 100 * 1.0, rel=1e-6, abs=0)  # mean of 1 and 1


def test_known_ramp():
    """Epochs 41, 50 and 60 of 60, counted from 1, with 40 epochs before the ramp."""
    assert [frskd_ramp(epoch, 40, 20) for epoch in (0, 39)] == [0.0, 0.0]
    for epoch, expected in ((40, 0.0109709984), (49, 0.2865047969), (59, 1.0), (80, 1.0)):
        assert frskd_ramp(epoch, 40, 20) == pytest.approx(expected, rel=1e-8, abs=0)
    assert frskd_ramp(0, 0, 0) == 1.0
    assert [frskd_ramp(epoch, 2, 0) for epoch in (1, 2)] == [0.0, 1.0]


def _feature_loss_by_formula(kind, feature, target, margin, layer, count, variant):
    if kind == "att":
        maps = [x.square().mean(1).flatten(1) for x in (feature, target)]
        first, second = (a / a.norm(dim=1, keepdim=True) for a in maps)
        return (first - second).square().mean() if variant == "authors" else (first - second).norm(dim=1).mean()
    if kind == "fit":
        return (feature - target).square().mean()
    bounded = torch.max(target, margin[:, None, None])
    counted = (feature > bounded) | (bounded > 0)
    return (feature - bounded)[counted].square().sum() / len(feature) / 2 ** (count - 1 - layer)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(FEATURE_LOSSES),
    count=st.integers(1, 3),
    dense=st.booleans(),
    variant=st.sampled_from(["authors", "paper"]),
)
def test_loss_is_the_sum_of_its_terms(seed, kind, count, dense, variant):
    """Compared with the formula in plain float64 PyTorch."""
    torch.manual_seed(seed)
    shape = (3, 5, 2, 2) if dense else (3, 5)
    logits, teacher_logits = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(5, (3, *shape[2:]))
    channels = [2 + i for i in range(count)]
    features, refined, margins = _maps(*channels), _maps(*channels), [-torch.rand(c, dtype=torch.float64) for c in channels]
    options = dict(temperature=2.5, alpha=0.4, beta=0.7, feature_loss=kind, variant=variant)
    got = frskd_loss(logits, teacher_logits, labels, features, refined, margins=margins, **options)
    first, second = teacher_logits / 2.5, logits / 2.5
    if variant == "paper":
        first, second = second, first
    kl = (first.softmax(1) * (first.log_softmax(1) - second.log_softmax(1))).sum(1).mean()
    want = F.cross_entropy(logits, labels) + F.cross_entropy(teacher_logits, labels) + 0.4 * 2.5**2 * kl
    for i in range(count):
        want = want + 0.7 * _feature_loss_by_formula(kind, features[i], refined[i], margins[i], i, count, variant)
    assert got.item() == pytest.approx(want.item(), rel=1e-10, abs=0)


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_self_teacher_receives_gradient_from_labels_alone(kind):
    logits, teacher_logits = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    features, refined = ([x.requires_grad_() for x in _maps(2, 4)] for _ in range(2))
    margins = [torch.full((c,), -0.5, dtype=torch.float64) for c in (2, 4)]
    labels = torch.tensor([0, 1, 2])
    frskd_loss(logits, teacher_logits, labels, features, refined, feature_loss=kind, margins=margins).backward()
    alone = teacher_logits.detach().requires_grad_()
    F.cross_entropy(alone, labels).backward()
    torch.testing.assert_close(teacher_logits.grad, alone.grad)
    assert all(x.grad is None for x in refined)
    assert all(x.grad.abs().sum() > 0 for x in [logits, *features])


def test_gradcheck():
    logits, target = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    features, refined = [x.requires_grad_() for x in _maps(1, 2, size=2)], _maps(1, 2, size=2)
    labels, margins = torch.tensor([0, 1, 2]), [torch.full((c,), -0.5, dtype=torch.float64) for c in (1, 2)]
    for kind in FEATURE_LOSSES:
        torch.autograd.gradcheck(
            lambda z, *f, kind=kind: frskd_loss(z, target, labels, f, refined, feature_loss=kind, margins=margins),
            (logits, *features),
            fast_mode=True,
        )


def test_known_overhaul_margins_and_loss():
    margins = overhaul_margins(torch.tensor([1.0, -1.0, 2.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 4.0, -0.5, 0.5]))
    expected = [-math.sqrt(2 / math.pi), -math.sqrt(2 / math.pi), -2 * math.sqrt(2 / math.pi), -3.0, -0.5, 0.0]
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    student, teacher = torch.tensor([[[-3.0, 0.0, 1.0, 4.0]]]), torch.tensor([[[-5.0, -5.0, 2.0, 2.0]]])
    # The targets are -1, -1, 2 and 2. The first does not count: it is negative, and the student is
    # below.
    assert overhaul_loss(student, teacher, torch.tensor([-1.0])).item() == 0 + 1 + 1 + 4


@given(weight=st.floats(0.05, 3).map(lambda w: -w if w > 2 else w), bias=st.floats(-3, 3))
def test_overhaul_margin_is_the_mean_of_the_negative_outputs(weight, bias):
    """Compared with the numerical integral over the normal distribution."""
    std = abs(weight)
    x = torch.linspace(min(bias, 0) - 12 * std, 0, 20001, dtype=torch.float64)
    density = torch.exp(-(((x - bias) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    negative, moment = torch.trapezoid(density, x).item(), torch.trapezoid(x * density, x).item()
    if abs(negative - 0.001) < 1e-6:
        return  # at the threshold
    want = moment / negative if negative > 0.001 else -3 * std
    got = overhaul_margins(*(torch.tensor([v], dtype=torch.float64) for v in (weight, bias))).item()
    assert got == pytest.approx(want, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Z_C, Z_T[:, :2], LABEL), {}, "logits and teacher_logits must have the same shape"),
        ((Z_C, Z_T, LABEL[:0]), {}, r"labels must have the shape \(1,\)"),
        ((Z_C, Z_T, LABEL, _maps(2)), {}, "features and teacher_features must be given together"),
        ((Z_C, Z_T, LABEL, _one(2), _one(2, 3)), {}, "the same number of layers, at least one, got 1 and 2"),
        (
            (Z_C, Z_T, LABEL, _one(2), _one(3)),
            {"feature_loss": "fit"},
            "with feature_loss='fit', features and teacher_features must have the same shapes",
        ),
        ((Z_C, Z_T, LABEL, _maps(2), _maps(2)), {}, r"features\[0\] must have the batch size 1 of the logits, got the shape \(3, 2, 4, 4\)"),
        ((Z_C, Z_T, LABEL, _one(2), _maps(2)), {}, r"teacher_features\[0\] must have the batch size 1"),
        ((Z_C, Z_T, LABEL, _one(2), _one(2)), {"feature_loss": "od"}, "feature_loss='od' needs margins"),
        ((Z_C, Z_T, LABEL), {"feature_loss": "at"}, "feature_loss must be one of"),
        ((Z_C, Z_T, LABEL), {"alpha": -0.1}, "alpha must"),
        ((Z_C, Z_T, LABEL), {"beta": float("inf")}, "beta must"),
        ((Z_C, Z_T, LABEL), {"temperature": 0.0}, "temperature must"),
    ],
)
def test_invalid_arguments_raise(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        frskd_loss(*arguments, **options)
    if len(arguments) == 3 and options:
        with pytest.raises(ValueError, match=message):
            FRSKDLoss(**options)


def test_other_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"margins must have the shape \(2,\), one for each channel, got \(3,\)"):
        overhaul_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight and bias must have the same shape \[C\]"):
        overhaul_margins(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="ramp_start must be a finite number >= 0, got -1"):
        frskd_ramp(0, -1, 2)
    with pytest.raises(TypeError, match="features must be a list"):
        frskd_feature_losses(torch.ones(1, 1, 1), [torch.ones(1, 1, 1)])
    with pytest.raises(TypeError, match="FRSKDLoss has no option 'margins'"):
        FRSKDLoss(margins=[])


def test_module_and_half_precision():
    logits, labels = [torch.randn(4, 5).bfloat16().requires_grad_() for _ in range(2)], torch.tensor([0, 1, 2, 3])
    features = [torch.randn(4, 3, 2, 2).bfloat16().requires_grad_() for _ in range(2)]
    loss = FRSKDLoss(beta=50.0, feature_loss="fit")(*logits, labels, features[:1], features[1:])
    assert loss.dtype == torch.float32
    exact = [x.detach().double() for x in (*logits, *features)]
    want = frskd_loss(exact[0], exact[1], labels, exact[2:3], exact[3:], beta=50.0, feature_loss="fit")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=0)
    loss.backward()
    assert features[0].grad.dtype == torch.bfloat16


# The trainer.

pytest.importorskip("lightning")
import lightning as L  # noqa: E402
from tiny_runs import IMAGES, Small, data_of, fit  # noqa: E402

from kdkernels.data import Augment, SegmentedClutterDigits  # noqa: E402
from kdkernels.distill import FRSKD  # noqa: E402
from kdkernels.models import TinyBiFPN, TinyCNN, TinyFCN, load_weights  # noqa: E402
from kdkernels.tasks import Segmentation  # noqa: E402

BLOCKS = ["block1", "block2", "block3"]


def _frskd(**options):
    return FRSKD(TinyCNN(4, num_classes=3), BLOCKS, **{"image_shape": [3, 8, 8], "width": 1, "depth": 1} | options)


def _batch(dtype=torch.float32):
    return {"image": torch.rand(4, 3, 8, 8, dtype=dtype), "label": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("variant", ["authors", "paper"])
@pytest.mark.parametrize("kind", [*FEATURE_LOSSES, None])
def test_trainer_computes_the_pure_loss(kind, variant):
    torch.manual_seed(0)
    method, batch = _frskd(feature_loss=kind, variant=variant).double(), _batch(torch.float64)
    method.eval()
    logits, outputs = method.run_branches(batch["image"])
    options = {"feature_loss": kind, "margins": outputs.margins, "variant": variant}
    want = frskd_loss(logits, outputs.logits, batch["label"], outputs.features, outputs.teacher_features, **options)
    assert sum(method.losses(batch)[1].values()).item() == pytest.approx(want.item(), rel=1e-9, abs=0)


def test_mixed_labels_change_both_cross_entropies_alone():
    method, batch = _frskd().double().eval(), _batch(torch.float64)
    mix, second = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64), torch.tensor([2, 2, 1, 1])
    logits, mixed = method.losses(batch | {"mixed_label": second, "mix": mix})
    _, plain = method.losses(batch)
    teacher_logits = method.run_branches(batch["image"])[1].logits
    for name, z in (("cross_entropy", logits), ("cross_entropy_teacher", teacher_logits)):
        first, other = (F.cross_entropy(z, label, reduction="none") for label in (batch["label"], second))
        assert mixed[name].item() == pytest.approx((mix * first + (1 - mix) * other).mean().item(), rel=1e-9, abs=0)
    assert all(torch.equal(mixed[name], plain[name]) for name in ("kl", "features"))


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_which_parameter_receives_which_gradient(kind):
    torch.manual_seed(0)
    method = _frskd(feature_loss=kind, image_shape=[3, 16, 16])  # an attention map of one position would be constant
    student, branches = method.student, method.branches
    blocks = [p for block in (student.block1, student.block2, student.block3) for p in block.parameters()]

    def gradients(*names):
        method.zero_grad()
        terms = method.losses(batch)[1]
        sum(terms[name] for name in names).backward()
        return lambda parameters: [p.grad is not None and bool(p.grad.any()) for p in parameters]

    batch = {"image": torch.rand(4, 3, 16, 16), "label": torch.tensor([0, 1, 2, 0])}
    has = gradients("kl")
    assert not any(has(branches.parameters()))
    assert all(has([*blocks, *student.fc.parameters()]))
    has = gradients("features")
    assert not any(has([*branches.self_teacher.parameters(), *student.fc.parameters()]))
    assert all(has([*blocks, *(p for adapter in branches.adapters for p in adapter[:1].parameters())]))
    has = gradients("cross_entropy_teacher")  # trains the student, but not its classifier
    assert not any(has([*student.fc.parameters(), *branches.adapters.parameters()]))
    assert all(has([*blocks, *branches.self_teacher.classifier.parameters()]))
    gradients(*method.losses(batch)[1])
    assert all(p.grad is not None for p in method.parameters())


def test_without_features_it_is_frskd_with_beta_0():
    runs = []
    for options in ({"beta": 0.0}, {"feature_loss": None}, {"beta": 0.0, "feature_loss": "fit"}):
        torch.manual_seed(0)
        method = _frskd(**options)
        _, terms = method.losses(_batch() | {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))})
        assert set(terms) == {"cross_entropy", "cross_entropy_teacher", "kl"}
        sum(terms.values()).backward()
        runs.append({name: p.grad for name, p in method.named_parameters()})
    assert all(torch.equal(value, run[name]) for run in runs[1:] for name, value in runs[0].items())
    assert runs[0].keys() == runs[2].keys()  # no adapters


class Recorder(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, module):
        self.values.append([float(trainer.callback_metrics[f"train/loss_{name}"]) for name in ("kl", "features")])


def test_training_evaluates_the_self_teacher_and_exports_the_plain_network(tmp_path):
    data, recorder = data_of(augment=Augment(mixup=0.2, cutmix=1.0)), Recorder()
    options = dict(width=1, depth=1, ramp_start=1, ramp_epochs=2, feature_loss="fit")
    method = FRSKD(TinyCNN(4, num_classes=3), BLOCKS, **options)
    assert method.branches is None  # the data module gives the shape of the images
    trainer = fit(method, data, max_epochs=2, callbacks=[recorder])
    assert recorder.values[0] == [0.0, 0.0]  # before the ramp
    assert min(recorder.values[1]) > 0
    assert {"val/accuracy", "val/accuracy_teacher"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = load_weights(TinyCNN(4, num_classes=3), tmp_path / "a.ckpt")
    assert all(torch.equal(v, method.student.state_dict()[k]) for k, v in plain.state_dict().items())
    again = FRSKD(TinyCNN(4, num_classes=3), BLOCKS, **options)
    trainer.validate(again, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(again.branches.parameters(), method.branches.parameters(), strict=True))


def test_ramp_that_begins_after_the_run_raises_before_training():
    method = FRSKD(TinyCNN(4, num_classes=3), BLOCKS, width=1, depth=1, ramp_start=2)
    with pytest.raises(ValueError, match="ramp_start must be below the number of epochs of the run, 2, got 2"):
        fit(method, data_of(), max_epochs=2)
    assert method.global_step == 0
    fit(method, data_of(), fast_dev_run=True)


def test_ignored_pixels():
    """Masked: the sum over the labelled pixels. Unmasked, as in the authors' code: over all pixels.

    Both are divided by the number of all pixels.
    """
    image, label = torch.rand(2, 3, 16, 16), torch.randint(11, (2, 16, 16))
    label[:, :5] = 255
    terms = {}
    for masked in (True, False):
        torch.manual_seed(0)
        method = FRSKD(TinyFCN(4), BLOCKS, 1.0, 50.0, 1.0, mask_ignored=masked, width=1, depth=1, image_shape=[3, 16, 16], task=Segmentation()).eval()
        terms[masked] = method.losses({"image": image, "label": label})[1]["kl"].item()
    with torch.no_grad():
        logits, outputs = method.run_branches(image)
    target = outputs.logits.softmax(1)
    kl = (target * (target.log() - logits.log_softmax(1))).sum(1)
    assert terms[False] == pytest.approx(kl.mean().item(), rel=1e-4, abs=0)
    assert terms[True] == pytest.approx((kl * (label != 255)).mean().item(), rel=1e-4, abs=0)


@pytest.mark.parametrize("feature_loss", ["att", "od"])
def test_self_teacher_continues_the_bifpn_of_the_network(feature_loss):
    """As the authors' code for segmentation: three BiFPN layers of the network, then two more."""
    torch.manual_seed(0)
    taps = ["refined1", "refined2", "refined3"]
    options = {"width": 1, "laterals": False, "feature_loss": feature_loss, "image_shape": [3, 16, 16], "task": Segmentation()}
    method = FRSKD(TinyBiFPN(4, channels=8), taps, 1.0, 50.0 if feature_loss == "att" else 1e-3, 1.0, **options)
    assert len(method.branches.self_teacher.layers) == 2
    assert not len(method.branches.self_teacher.layers[0].laterals)
    batch = {"image": torch.rand(2, 3, 16, 16), "label": torch.randint(11, (2, 16, 16))}
    losses = method.losses(batch)[1]
    losses["cross_entropy_teacher"].backward(retain_graph=True)
    assert all(p.grad is not None for p in method.student.bifpn.parameters())  # the labels train the network through the self-teacher
    assert method.student.scores.weight.grad is None
    method.zero_grad()
    (losses["kl"] + losses["features"]).backward()
    assert all(p.grad is None for p in method.branches.self_teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_training_on_label_maps():
    data = SegmentedClutterDigits(train_size=8, val_size=4, test_size=2, batch_size=4, augment=Augment(crop=2))
    method = FRSKD(TinyFCN(4), BLOCKS, 1.0, 50.0, 1.0, task=Segmentation(), width=1, depth=1, mask_ignored=False)
    metrics = fit(method, data).callback_metrics
    assert {"val/mean_iou", "val/mean_iou_teacher", "val/pixel_accuracy_teacher"} <= set(metrics)
    assert math.isfinite(metrics["train/loss"])


def test_invalid_options_raise_before_training():
    for options, message in (
        ({"feature_loss": "at"}, "feature_loss must be one of"),
        ({"variant": "code"}, "variant must be one of .*, got 'code'"),
        ({"alpha": -1.0}, "alpha must"),
        ({"temperature": 0.0}, "temperature must"),
        ({"ramp_epochs": -1}, "ramp_epochs must be a finite number >= 0, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 1.5}, "width must be an integer, got 1.5"),
        ({"width": True}, "width must be an integer, got True"),
        ({"layers": "a"}, "layers must be an integer, got 'a'"),
        ({"sla": "false"}, "sla must be True or False, got str"),
        ({"mask_ignored": "x"}, "mask_ignored must be True or False, got str"),
        ({"check_finite": "x"}, "check_finite must be True or False, got str"),
        ({"optimizer": "SGD"}, "optimizer must be a function of the parameters, .* got 'SGD'"),
        ({"image_shape": 3}, r"image_shape must be \[C, H, W\], three integers >= 1, got 3"),
        ({"image_shape": [3, 16.5, 16]}, "three integers >= 1"),
        ({"image_shape": [8, 8, 3]}, r"the student \(TinyCNN\) cannot process images of image_shape \[8, 8, 3\]"),
        ({"laterals": False, "width": 2}, "width must be 1 with laterals=False"),
        ({"teacher": Small()}, "the network is its own teacher"),
        ({"sla": True, "task": Segmentation()}, "needs the task Classification, got Segmentation"),
        ({"sla": True, "image_shape": [3, 8, 16]}, "must be square, got 8x16"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            _frskd(**options)
    with pytest.raises(ValueError, match="student_taps must name at least 2 layers"):
        FRSKD(Small(), ["features"])
    with pytest.raises(ValueError, match="'block3' has 1x1, and 'block1' behind it has 4x4"):
        fit(FRSKD(TinyCNN(4, num_classes=3), ["block3", "block1"]))
    unlabelled = torch.utils.data.DataLoader([{"image": image} for image, _ in IMAGES], batch_size=4)
    with pytest.raises(ValueError, match="labels alone, and the first training batch has none"):
        fit(_frskd(), unlabelled)
