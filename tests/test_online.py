"""Training of several networks together: FFL, DML, ONE and DualNet."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
import lightning as L
from tiny_runs import IMAGES, Small, data_of, fit, loader_of

from kdkernels.cli import main
from kdkernels.data import Augment, SegmentedClutterDigits
from kdkernels.distill import DML, FFL, ONE, DualNet, Supervised, online_network
from kdkernels.distill.restore import restore
from kdkernels.models import TAPS, FusionModule, TinyBiFPN, TinyCNN, TinyFCN, load_weights, resnet8, vgg8, wrn_16_1
from kdkernels.models.shared_layers import SharedLayers
from kdkernels.nn import dml_loss, ffl_loss, one_loss
from kdkernels.tasks import Lanes, Segmentation

SHAPE = [3, 8, 8]


def _tiny(width=4):
    return TinyCNN(width, num_classes=3)


def _batch(dtype=torch.float32):
    return {"image": torch.rand(4, 3, 8, 8, dtype=dtype), "label": torch.tensor([0, 1, 2, 0])}


def _ffl(**options):
    return FFL(_tiny(), [_tiny(), _tiny()], "block3", **{"split": "block2", "image_shape": SHAPE} | options)


METHODS = {
    "FFL": lambda **options: _ffl(**options),
    "DML": lambda **options: DML(_tiny(), [_tiny(6)], image_shape=SHAPE, **options),
    "ONE": lambda **options: ONE(_tiny(), [_tiny(), _tiny()], "block2", image_shape=SHAPE, **options),
    "DualNet": lambda **options: DualNet(_tiny(), [_tiny()], "block3", image_shape=SHAPE, **options),
}


# Shared layers.


@pytest.mark.parametrize(
    ("make", "split"),
    [
        (lambda: resnet8(num_classes=5), "layer3"),
        (lambda: resnet8(num_classes=5), "layer2.0.conv2"),
        (lambda: resnet8(num_classes=5), "fc"),
        (lambda: wrn_16_1(5), "block2"),
        (lambda: vgg8(5), "block3"),  # its pooling layer runs before and behind the split
    ],
)
def test_networks_with_shared_layers_are_networks_of_their_own(make, split):
    """A peer's logits are those of a plain network with the student's first layers. Shared layers
    run once, and receive the gradient of both networks.
    """
    torch.manual_seed(0)
    method = DML(make(), [make()], split=split, image_shape=[3, 32, 32]).double()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    peer = method.branches.shared.restore_layers(method.branches.peers[0], method.student)
    runs = []
    first = next(m for m in method.student.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *_: runs.append(1))
    outputs = method.run_networks(image)
    assert len(runs) == 1
    assert len(list(peer.state_dict())) == len(list(method.student.state_dict()))
    torch.testing.assert_close(peer(image), outputs.logits[1])
    gradients = []
    for k in (0, 1):
        (gradient,) = torch.autograd.grad(outputs.logits[k].square().sum(), first.weight, retain_graph=True)
        gradients.append(gradient)
    outputs = method.run_networks(image)
    (both,) = torch.autograd.grad(sum(z.square().sum() for z in outputs.logits), first.weight)
    torch.testing.assert_close(both, sum(gradients))
    assert all(gradient.any() for gradient in gradients)


class AddsInPlace(Small):
    def forward(self, x):
        x = self.features[0](x)
        x += 1
        return self.head(self.features[3](self.features[1](x)).mean((2, 3)))


class RunsTwice(Small):
    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)) + self.features(x).mean((2, 3)))


class FunctionalReLU(Small):
    def forward(self, x):
        x = F.relu(self.features[1](self.features[0](x)))
        return self.head(self.features[3](x).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "split", "message"),
    [
        (Small(), "layer9", "Small has no layer 'layer9'; its layers are"),
        (Small(), "", "has no layer ''"),
        (Small(), "features", "no layer of Small before 'features' has parameters"),
        (AddsInPlace(), "features.3", "forward changes the output of a layer in place"),
        (RunsTwice(), "features.3", r"the layer 'features\.0' of RunsTwice runs before and behind 'features\.3'"),
        (FunctionalReLU(), "features.2", r"the layer 'features\.2' of FunctionalReLU does not run"),
    ],
)
def test_networks_that_cannot_be_split_raise(network, split, message):
    with pytest.raises(ValueError, match=message):
        SharedLayers(network.eval(), split, torch.rand(2, 3, 8, 8))


def test_operations_between_shared_layers():
    torch.manual_seed(0)
    method = DML(FunctionalReLU(), [FunctionalReLU()], split="features.3", image_shape=SHAPE)
    peer = method.branches.shared.restore_layers(method.branches.peers[0], method.student)
    image = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(peer(image), method.run_networks(image).logits[1])


def test_a_shared_layer_without_its_network_raises():
    method = METHODS["FFL"]()
    with pytest.raises(RuntimeError, match="shared with another network, which must run first"):
        method.branches.peers[0](torch.rand(2, 3, 8, 8))


# The fusion module.


def test_fusion_module_computes_the_published_layers():
    torch.manual_seed(0)
    fusion = FusionModule([(4, 4, 4), (6, 8, 8), (5, 6, 6)], 3, channels=7).double()
    maps = [torch.randn(2, c, n, n, dtype=torch.float64) for c, n in ((4, 4), (6, 8), (5, 6))]

    def norm(layer, x):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    _, halved, smaller = fusion.regressors
    second = F.relu(norm(halved[1], F.conv2d(maps[1], halved[0].weight, stride=2, padding=1)))
    third = F.relu(norm(smaller[1], F.conv2d(maps[2], smaller[0].weight)))  # FitNets: kernel 1 + 6 - 4
    assert smaller[0].weight.shape[2:] == (3, 3)
    joint = torch.cat([maps[0], second, third], 1)
    depthwise, norm1, _, pointwise, norm2, _ = fusion.convs
    joint = F.relu(norm(norm1, F.conv2d(joint, depthwise.weight, padding=1, groups=15)))
    joint = F.relu(norm(norm2, F.conv2d(joint, pointwise.weight)))
    want = F.linear(joint.mean((2, 3)), fusion.classifier.weight, fusion.classifier.bias)
    torch.testing.assert_close(fusion(maps, (8, 8)), want)


def test_fusion_of_too_few_maps_raises():
    with pytest.raises(ValueError, match="maps must be one feature map of each of the 2 networks, got 1"):
        FusionModule([(4, 2, 2), (4, 2, 2)], 3)([torch.zeros(1, 4, 2, 2)], (4, 4))


def test_fusion_by_sum_and_for_label_maps():
    torch.manual_seed(0)
    fusion = FusionModule([(4, 2, 2), (4, 2, 2)], 3, label_maps=True, mode="sum").double()
    maps = [torch.randn(2, 4, 2, 2, dtype=torch.float64) for _ in range(2)]
    scores = F.conv2d(maps[0] + maps[1], fusion.classifier.weight, fusion.classifier.bias)
    torch.testing.assert_close(fusion(maps, (4, 6)), F.interpolate(scores, (4, 6), mode="bilinear", align_corners=False))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(4, 2, 2)], {}, "at least two networks must be joined, got 1"),
        ([(4, 2, 2), (5, 2, 2)], {"mode": "sum"}, "equal numbers of channels"),
        ([(4, 2, 2), (4, 2, 2)], {"channels": 0}, "channels must be at least 1"),
        ([(4, 2, 2), (4, 2, 2)], {"mode": "mean"}, "mode must be"),
    ],
)
def test_networks_that_cannot_be_fused_raise(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        FusionModule(shapes, 3, **options)


# The methods.


@pytest.mark.parametrize("split", ["block2", None])
def test_trainers_compute_the_pure_losses(split):
    torch.manual_seed(0)
    batch = _batch(torch.float64)
    cases = [
        (_ffl(split=split), lambda o: ffl_loss(o.logits, o.joint, batch["label"])),
        (
            _ffl(split=split, alpha=0.5, temperature=2.0, target_eps=0.0),
            lambda o: ffl_loss(o.logits, o.joint, batch["label"], alpha=0.5, temperature=2.0, target_eps=0.0),
        ),
        (DML(_tiny(), [_tiny(), _tiny()], split=split, image_shape=SHAPE), lambda o: dml_loss(o.logits, batch["label"])),
        (DML(_tiny(), [_tiny(), _tiny()], variant="symmetric", image_shape=SHAPE), lambda o: dml_loss(o.logits, batch["label"], variant="symmetric")),
        (ONE(_tiny(), [_tiny()], "block2", image_shape=SHAPE), lambda o: one_loss(o.logits, o.joint, batch["label"])),
    ]
    for method, loss in cases:
        method.double().eval()
        want = loss(method.run_networks(batch["image"]))
        assert sum(method.losses(batch)[1].values()).item() == pytest.approx(want.item(), rel=1e-9, abs=0)


def test_gate_weighs_the_logits_of_each_sample():
    torch.manual_seed(0)
    method = METHODS["ONE"]().double().eval()
    image = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    outputs = method.run_networks(image)
    gate, stem = method.branches.head.gate, method.student.block1(image)
    weights = F.relu(gate.norm(gate.linear(stem.mean((2, 3))))).softmax(1)
    want = sum(weights[:, k, None] * z for k, z in enumerate(outputs.logits))
    torch.testing.assert_close(outputs.joint, want)
    assert outputs.joint.shape == (4, 3)


def _with_gradient(loss, method):
    gradients = torch.autograd.grad(loss, list(method.parameters()), allow_unused=True, retain_graph=True)
    names = [name for name, _ in method.named_parameters()]
    return {name for name, g in zip(names, gradients, strict=True) if g is not None and g.abs().max() > 1e-10}


def _of(names, start):
    return {name for name in names if name.startswith(start)}


def test_which_parameter_receives_which_gradient():
    """FFL: the fused classifier's losses also train the networks, but a divergence never trains its
    target.
    """
    torch.manual_seed(0)
    method = METHODS["FFL"]()
    batch = _batch()
    outputs = method.run_networks(batch["image"])
    z1, z2, _ = outputs.logits
    fused = _with_gradient(F.cross_entropy(outputs.joint, batch["label"]), method)
    assert all(_of(fused, start) for start in ("branches.head", "student.block1", "branches.peers.0.block3"))
    assert not any(_of(fused, start) for start in ("student.fc", "branches.peers.0.fc"))
    to_fused = _with_gradient(method.divergences(([outputs.joint], [torch.stack(outputs.logits).mean(0)]), 3.0, batch), method)
    assert to_fused == fused  # the ensemble is a constant: no gradient of the classifiers fc
    to_second = _with_gradient(method.divergences(([z2], [outputs.joint]), 3.0, batch), method)
    assert not any(_of(to_second, start) for start in ("branches.head", "student.fc", "student.block3", "branches.peers.1"))
    assert all(_of(to_second, start) for start in ("branches.peers.0.fc", "student.block1"))
    kl = _with_gradient(method.losses(batch)[1]["kl"], method)
    assert all(_of(kl, start) for start in ("student.fc", "branches.head"))
    assert _with_gradient(F.cross_entropy(z1, batch["label"]), method) == _of(dict(method.named_parameters()), "student.")


def test_gate_learns_from_labels_alone():
    method = METHODS["ONE"]()
    losses = method.losses(_batch())[1]
    assert not _of(_with_gradient(losses["kl"], method), "branches.head")
    assert _of(_with_gradient(losses["cross_entropy_gated"], method), "branches.head")


def test_ignored_pixels_and_probabilities_in_stacked_rows():
    """The divergence of stacked rows is the sum of the divergences of the pairs."""
    torch.manual_seed(0)
    networks = [TinyFCN(2) for _ in range(2)]
    method = DML(networks[0], networks[1:], image_shape=[3, 16, 16], task=Segmentation())
    image, label = torch.rand(2, 3, 16, 16), torch.randint(11, (2, 16, 16))
    label[:, :5] = 255
    batch = {"image": image, "label": label}
    z1, z2 = (z.detach().double() for z in method.run_networks(image).logits)
    got = method.divergences(([z1, z2], [z2, z1]), 2.0, batch).item()
    want = sum(4 * ((b / 2).softmax(1) * ((b / 2).log_softmax(1) - (a / 2).log_softmax(1))).sum(1) for a, b in ((z1, z2), (z2, z1)))
    assert got == pytest.approx((want * (label != 255)).mean().item(), rel=1e-9, abs=0)


@pytest.mark.parametrize("name", METHODS)
def test_training_evaluates_every_network_and_exports_the_plain_one(name, tmp_path):
    method = METHODS[name]()
    trainer = fit(method, data_of(augment=Augment(mixup=0.5)))
    peers = {f"val/accuracy_peer_{i}" for i in range(1, len(method.branches.peers) + 1)}
    joint = {"FFL": {"val/accuracy_fused"}, "ONE": {"val/accuracy_gated"}, "DualNet": {"val/accuracy_fused"}, "DML": set()}[name]
    found = {key for key in trainer.callback_metrics if key.startswith("val/accuracy")}
    assert found == {"val/accuracy", "val/accuracy_ensemble"} | peers | joint
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = load_weights(_tiny(), tmp_path / "a.ckpt")
    assert all(torch.equal(value, method.student.state_dict()[key]) for key, value in plain.state_dict().items())
    copy.deepcopy(method)


def test_fusion_has_its_own_weight_decay():
    for decay, expected in ((1e-5, [5e-4, 1e-5]), (None, [5e-4])):
        method = _ffl(fusion_weight_decay=decay)
        trainer = fit(method)
        groups = trainer.optimizers[0].param_groups
        assert [group["weight_decay"] for group in groups] == expected
        assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))
        head = {id(p) for p in method.branches.head.parameters()}
        assert (decay is None) or {id(p) for p in groups[1]["params"]} == head


def test_dual_net_updates_one_network_at_a_time():
    """Not even weight decay and momentum change the other one."""
    method = METHODS["DualNet"](optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))
    method.joint_epochs = 1
    changed = []

    def parameters():
        parts = {"student": method.student, "peer": method.branches.peers[0], "head": method.branches.head}
        return {name: [p.detach().clone() for p in module.parameters()] for name, module in parts.items()}

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            self.before = parameters()

        def on_train_epoch_end(self, trainer, module):
            after = parameters()
            changed.append({n for n, values in self.before.items() if any(not torch.equal(a, b) for a, b in zip(values, after[n], strict=True))})

    fit(method, max_epochs=4, callbacks=[Watch()])
    assert changed == [{"student", "head"}, {"peer", "head"}, {"student", "head"}, {"student", "peer", "head"}]


def test_ramp_of_the_divergences():
    method, batch = _ffl(ramp_epochs=2).eval(), _batch()
    full = _ffl().eval()
    full.load_state_dict(method.state_dict())
    assert method.losses(batch)[1]["kl"].item() == pytest.approx(0.0067379470 * full.losses(batch)[1]["kl"].item(), rel=1e-5)


def test_segmentation_and_lanes():
    data = SegmentedClutterDigits(train_size=8, val_size=4, test_size=2, batch_size=4)
    method = FFL(TinyFCN(4), [TinyBiFPN(4, channels=4)], "block3", ["refined3"], task=Segmentation())
    assert {"val/mean_iou", "val/mean_iou_peer_1", "val/mean_iou_fused"} <= set(fit(method, data).callback_metrics)
    from kdkernels.data import SyntheticLanes
    from kdkernels.models import ENet

    networks = [ENet(width=0.05, image_size=(16, 32)) for _ in range(2)]
    method = FFL(networks[0], networks[1:], TAPS[ENet][-1], split="encoder3", task=Lanes())
    metrics = fit(method, SyntheticLanes(train_size=4, val_size=2, test_size=2, size=(16, 32), batch_size=4)).callback_metrics
    assert {"val/f1", "val/f1_peer_1", "val/f1_fused", "train/loss_existence_peer_1"} <= set(metrics)


def test_export_of_every_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(Path(__file__).parent.parent / "configs" / "ffl_clutter_digits.yaml")
    small = ["--data.train_size=32", "--data.val_size=8", "--data.test_size=8", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", config, *small, "--trainer.enable_progress_bar=false"]) == 0
    ckpt = "runs/ffl/last.ckpt"
    assert main(["export", "--ckpt", ckpt, "--network", "fused", "--out", "fused.pt2"]) == 0
    assert main(["export", "--ckpt", ckpt, "--network", "peer_1", "--out", "peer.safetensors"]) == 0
    image = torch.rand(3, 3, 32, 32)
    method = restore(ckpt)[0].eval()
    with torch.no_grad():
        outputs = method.run_networks(image)
        torch.testing.assert_close(torch.export.load("fused.pt2").module()(image), outputs.joint, rtol=1e-4, atol=1e-5)
        peer = load_weights(TinyCNN(8), "peer.safetensors").eval()
        torch.testing.assert_close(peer(image), outputs.logits[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(online_network(ckpt, "ensemble").eval()(image), torch.stack(outputs.logits).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(online_network(ckpt, "student").eval()(image), outputs.logits[0], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    for arguments, message in (
        (["--network", "gated"], "network must be one of student, peer_1, ensemble, fused, got 'gated'"),
        (["--network", "fused", "--exit", "1"], "cannot be given together"),
        (["--network", "fused"], "cannot contain several networks"),
    ):
        assert main(["export", "--ckpt", ckpt, "--out", "a.safetensors", *arguments]) in (1, 2)  # 2: wrong usage
        assert message in capsys.readouterr().err
    assert not Path("a.safetensors").exists()
    fit_and_save = fit(Supervised(_tiny()))
    fit_and_save.save_checkpoint("plain.ckpt")
    with pytest.raises(ValueError, match=r"does not contain the config|has one network"):
        online_network("plain.ckpt", "peer_1")


def test_invalid_options_raise_before_training():
    network = _tiny()
    for make, message in (
        (lambda: FFL(_tiny(), [], "block3"), r"peers must be a list of at least one nn\.Module"),
        (lambda: FFL(_tiny(), ["a"], "block3"), "peers must be a list of at least one"),
        (lambda: DML(network, [network]), "share"),
        (lambda: DML(_tiny(), [network, network]), "share"),
        (lambda: FFL(_tiny(), [_tiny()], "block9"), "no layer 'block9'"),
        (lambda: FFL(_tiny(), [Small()], "block3"), "Small has no layer 'block3'"),
        (lambda: FFL(_tiny(), [Small()], "block3", ["features", "head"]), "peer_taps must be the name of one layer for each of the 1 peers"),
        (lambda: FFL(_tiny(), [Small()], "block3", ["head"], image_shape=SHAPE), "output of layer 'head' must be a feature map"),
        (lambda: DML(_tiny(), [Small()], split="block2", image_shape=SHAPE), "networks of one architecture, but Small has no layer 'block1'"),
        (lambda: DML(_tiny(), [TinyCNN(4, num_classes=4)], image_shape=SHAPE), r"peer 1 \(TinyCNN\) has logits \[2, 4\], and the student \[2, 3\]"),
        (lambda: ONE(_tiny(), [_tiny()], "fc", image_shape=SHAPE), "input of layer 'fc' must be a feature map"),
        (lambda: DualNet(_tiny(), [_tiny(6)], "block3", image_shape=SHAPE), "equal numbers of channels"),
        (lambda: DualNet(_tiny(), [_tiny(), _tiny()], "block3"), "DualNet trains two networks"),
        (lambda: DualNet(_tiny(), [_tiny()], "block3", alternate_epochs=-1), "alternate_epochs must be an integer >= 0"),
        (lambda: _ffl(temperature=0.0), "temperature must be a finite number > 0, got 0.0"),
        (lambda: _ffl(alpha=-1.0), "alpha"),
        (lambda: _ffl(ramp_epochs=-1), "ramp_epochs must be a finite number >= 0, got -1"),
        (lambda: _ffl(teacher=Small()), "the network is its own teacher|has no teacher"),
        (lambda: DML(_tiny(), [_tiny()], variant="code"), "variant must be one of"),
        (lambda: fit(DualNet(_tiny(), [_tiny()], "block3", joint_epochs=3)), "joint_epochs must be at most max_epochs"),
        (lambda: fit(METHODS["FFL"](), loader_of(torch.rand(8, 3, 8, 8), torch.full((8,), 5))), "label"),
        (lambda: fit(METHODS["DML"](), torch.utils.data.DataLoader([{"image": image} for image, _ in IMAGES], batch_size=4)), "batch has none"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FFL(_tiny(), [_tiny(6)], "block3", split="block3", image_shape=SHAPE), r"the layer 'block1' of TinyCNN differs .* \(6, 3, 3, 3\)"),
        (lambda: ONE(_tiny(), [_tiny(), _tiny(6)], "block3", image_shape=SHAPE), "split needs networks of one architecture"),
        (lambda: DML(_tiny(), [TinyCNN(4, num_classes=3, depth=2)], split="block3", image_shape=SHAPE), "split needs networks of one architecture"),
        (lambda: DML(_tiny(), [_tiny(), "x"]), "peers must be a list of at least one nn.Module"),
        (lambda: ONE(_tiny(), [_tiny()], None), "split must be the name of a layer, got None"),
        (lambda: FFL(_tiny(), [_tiny()], None), "student_tap must be the name of a layer, got None"),
        (lambda: DualNet(_tiny(), [_tiny()], None), "student_tap must be the name of a layer, got None"),
        (lambda: FFL(_tiny(), [_tiny()], "block3", fusion_weight_decay=-1.0), "fusion_weight_decay must be a finite number >= 0"),
        (lambda: FFL(_tiny(), [_tiny()], "block3", target_eps=-1.0), "target_eps must be a finite number >= 0"),
    ],
)
def test_wrong_networks_and_options_raise(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_networks_that_share_tensors_raise():
    student, peer = _tiny(), _tiny()
    with pytest.raises(ValueError, match=r"student and peer 1 share .* but must be networks of their own"):
        DML(student, [student])
    with pytest.raises(ValueError, match="peer 1 and peer 2 share"):
        DML(student, [peer, peer])


@pytest.mark.parametrize("name", METHODS)
def test_lbfgs(name):
    """It has neither weight decay nor groups of parameters."""
    method = METHODS[name](optimizer=lambda p: torch.optim.LBFGS(p, lr=0.01), scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    before = [p.detach().clone() for p in method.parameters()]
    fit(method)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
