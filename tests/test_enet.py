"""ENet: sizes, taps, shared weights, and training on SyntheticLanes."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")
import lightning as L

from kdkernels.data import Augment, SyntheticLanes
from kdkernels.distill import BYOT, FRSKD, FSP, KD, SAD, SVDKD, AttentionTransfer, DeepSupervision, GradientAttentionTransfer, Supervised
from kdkernels.models import TAPS, ENet, FeatureTaps, load_weights
from kdkernels.models.enet import unpool
from kdkernels.tasks import Lanes


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors take longer with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def _expected_parameters(classes, height, width):
    """Count the parameters of the layers of table 1 of the ENet paper, with the encoder of SAD.

    Batch norm has 2 parameters per channel, and PReLU 1.
    """
    norm, norm_act = (lambda c: 2 * c), (lambda c: 3 * c)

    def bottleneck(c, middle):
        return c * c // 4 + norm_act(c // 4) + middle * (c // 4) ** 2 + norm_act(c // 4) + c // 4 * c + norm(c) + c

    def down(c, d):
        return 4 * c * c // 4 + norm_act(c // 4) + 9 * (c // 4) ** 2 + norm_act(c // 4) + c // 4 * d + norm(d) + d

    def up(c, d):
        return c * c // 4 + norm_act(c // 4) + 4 * (c // 4) ** 2 + norm_act(c // 4) + c // 4 * d + norm(d) + d + c * d + norm(d)

    asymmetric = bottleneck(128, 10) + norm_act(32) - norm_act(32)
    stage = 6 * bottleneck(128, 9) + 2 * asymmetric
    encoder = 27 * 13 + norm_act(16) + down(16, 64) + 4 * bottleneck(64, 9) + down(64, 128) + 3 * stage
    decoder = up(256, 64) + 2 * bottleneck(64, 9) + up(64, 16) + bottleneck(16, 9) + 4 * 16 * classes + classes
    existence = 128 * classes + classes + (height // 16 * (width // 16) * classes + 1) * 128 + 129 * (classes - 1)
    return encoder + decoder + existence


@pytest.mark.parametrize(("classes", "size"), [(5, (288, 800)), (5, (64, 160)), (7, (368, 640))])
def test_parameters_are_those_of_the_paper(classes, size):
    assert _parameters(ENet(classes, image_size=size)) == _expected_parameters(classes, *size)


def test_shared_stages_have_the_same_convolutions(tmp_path):
    options = {"width": 0.25, "image_size": (32, 32)}  # 32 channels at 1/8, and 8 inside the bottlenecks
    shared, separate = ENet(**options, share_weights=True), ENet(**options)
    # Two stages do not have convolutions of their own: 8 projections and expansions, 6 of 3x3 and 2
    # pairs of 5x1 and 1x5.
    assert _parameters(separate) - _parameters(shared) == 2 * (8 * 2 * 32 * 8 + 6 * 9 * 8**2 + 2 * 10 * 8**2)
    x = torch.rand(2, 32, 4, 4)
    outputs = [stage.eval()(x) for stage in (shared.encoder2, shared.encoder3, shared.encoder4)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    torch.save(shared.state_dict(), tmp_path / "shared.pt")
    loaded = load_weights(ENet(**options, share_weights=True), tmp_path / "shared.pt").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in shared.state_dict().items())


def test_unpooling_puts_values_where_the_maxima_were():
    x = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    expected = torch.where(x == F.interpolate(pooled, scale_factor=2), x, 0)
    assert torch.equal(unpool(pooled, indices), expected)


@pytest.mark.parametrize("size", [(64, 160), (8, 8), (24, 40), (16, 104)])
def test_images_may_have_any_size_of_multiples_of_8(size):
    for image_size in (size, (64, 160)):
        network = ENet(width=0.25, num_classes=4, image_size=image_size)
        output = network(torch.rand(2, 3, *size))
        assert output["logits"].shape == (2, 4, *size)
        assert output["existence"].shape == (2, 3)


def test_taps_are_the_parts_of_the_encoder():
    network = ENet(width=0.5).eval()
    for share in (False, True):
        network = ENet(width=0.5, share_weights=share).eval()
        output, features = FeatureTaps(network, TAPS[ENet])(torch.rand(1, 3, 64, 160))
        shapes = [list(feature.shape) for feature in features.values()]
        assert shapes == [[1, 32, 16, 40]] + 3 * [[1, 64, 8, 20]]
        # The decoder and the existence branch use the outputs of the taps.
        assert torch.equal(network.encoder4(features["encoder3"]), features["encoder4"])
        assert torch.equal(network.exists(features["encoder4"]), output["existence"])


def test_existence_is_pooled_by_2():
    branch = ENet(width=0.5, image_size=(32, 64)).exists
    x = torch.rand(2, 64, 4, 8)
    pooled = F.avg_pool2d(branch.scores(x).softmax(1), 2).flatten(1)
    torch.testing.assert_close(branch(x), branch.out(F.relu(branch.hidden(pooled))))


def test_dropout_depends_on_the_mode():
    network, x = ENet(width=0.25, image_size=(32, 32), dropout=0.5), torch.rand(1, 3, 32, 32)
    network.eval()
    assert torch.equal(network(x)["logits"], network(x)["logits"])
    assert ENet(width=0.25, dropout=0.2).encoder1[0].branch[2][2].p == pytest.approx(0.02)
    assert ENet(width=0.25, dropout=0.2).encoder4[7].branch[2][2].p == pytest.approx(0.2)


def test_invalid_arguments_raise():
    for options, message in (
        ({"num_classes": 1}, "num_classes must be an integer >= 2, got 1"),
        ({"num_classes": 2.0}, "num_classes must be an integer >= 2, got 2.0"),
        ({"width": 0.0}, "width must be a finite number > 0, got 0.0"),
        ({"width": "a"}, "width must be a finite number > 0, got 'a'"),
        ({"image_size": (60, 160)}, r"two multiples of 8, got \(60, 160\)"),
        ({"image_size": 64}, "two multiples of 8, got 64"),
        ({"image_size": (64.0, 160)}, r"two multiples of 8, got \(64\.0, 160\)"),
        ({"share_weights": 1}, "share_weights must be True or False, got 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ENet(**options)
    with pytest.raises(ValueError, match=r"must be multiples of 8, got \[30, 32\]"):
        ENet(width=0.25)(torch.rand(1, 3, 30, 32))


# Training on SyntheticLanes.


def _fit(method, data, **options):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(method, data)
    return trainer.callback_metrics


def _data(**options):
    return SyntheticLanes(**({"train_size": 16, "val_size": 4, "test_size": 2, "size": (32, 64), "batch_size": 8} | options))


def test_the_loss_falls():
    torch.manual_seed(0)
    optimizer = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2)}
    method = Supervised(ENet(width=0.25, image_size=(32, 64), dropout=0.0), task=Lanes(), **optimizer)
    losses = []

    class Record(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            losses.append({name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")})

    _fit(method, _data(), max_epochs=9, callbacks=[Record()], limit_val_batches=0)
    for name in ("loss", "loss_cross_entropy", "loss_existence"):
        assert losses[-1][f"train/{name}"] < 0.75 * losses[0][f"train/{name}"]


LAYERS = ["encoder2", "encoder3", "encoder4"]
METHODS = {
    "KD": lambda s, t, o: KD(s, t, **o),
    "FSP": lambda s, t, o: FSP(s, t, LAYERS, LAYERS, variant="repdistiller", **o),
    "SVDKD": lambda s, t, o: SVDKD(s, t, LAYERS, LAYERS, **o),
    "SAD": lambda s, t, o: SAD(s, LAYERS, **o),
    "BYOT": lambda s, t, o: BYOT(s, LAYERS, **o),
    "DeepSupervision": lambda s, t, o: DeepSupervision(s, LAYERS, **o),
    "FRSKD": lambda s, t, o: FRSKD(s, TAPS[ENet], width=1, depth=1, **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_lanes(name):
    """Every method adds the losses of the task on outputs other than the logits."""
    student, teacher = (ENet(width=0.1, image_size=(32, 64)) for _ in range(2))
    metrics = _fit(METHODS[name](student, teacher, {"task": Lanes()}), _data(train_size=8), max_epochs=1, limit_train_batches=1)
    assert all(value.isfinite() for value in metrics.values())
    assert {"train/loss_iou", "train/loss_existence", "train/lane_iou", "val/f1", "val/tusimple_accuracy"} <= set(metrics)
    assert "train/f1" not in metrics  # the metrics of curves are left out in training


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_methods_use_the_taps(method):
    student, teacher = (ENet(width=width, image_size=(32, 64)) for width in (0.25, 0.5))
    options = {"task": Lanes()}
    if method == "attention":
        trained = AttentionTransfer(student, teacher, TAPS[ENet], TAPS[ENet], **options)
    else:
        trained = GradientAttentionTransfer(student, teacher, **options)
    metrics = _fit(trained, _data(train_size=8, augment=Augment(crop=2)), max_epochs=1)
    assert all(value.isfinite() for value in metrics.values())
    assert {"train/loss_existence", "val/f1"} <= set(metrics)
