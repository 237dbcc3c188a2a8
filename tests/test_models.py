"""Networks compared with their publications, taps, and weights from files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
from kdkernels import models
from kdkernels.models import TAPS, FeatureTaps, TinyCNN, from_checkpoint, load_weights, pair_features
from kdkernels.models.weights import CHECKPOINT_KEY, read_weights

# Numbers of parameters with 100 classes. They are those in tables of the distillation literature if
# these are exact, and otherwise computed from the papers:
# a 3x3 convolution from c to d channels has 9 c d parameters, and batch norm has 2 d.
PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
    "sskd_vgg_student": 3_751_652,
    "sskd_vgg_teacher": 10_885_540,
    "sskd_mobilenet_student": 771_108,
    "sskd_mobilenet_teacher": 2_202_020,
    "sskd_resnext_student": 343_076,
    "sskd_resnext_teacher": 679_076,
}
NAMES = [*PARAMETERS, "resnet8", "resnet14", "resnet44", "wrn_16_1"]


def _parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_match_publications(name, count):
    assert _parameters(getattr(models, name)(num_classes=100)) == count


def _resnet_parameters(depth):
    """Return the parameters of He et al. 2016, table 6, with 1x1 convolutions in shortcuts that
    change the shape.
    """
    n = (depth - 2) // 6
    conv = lambda c, d: 9 * c * d + 2 * d  # noqa: E731
    stages = sum(conv(c, d) + (2 * n - 1) * conv(d, d) for c, d in ((16, 16), (16, 32), (32, 64)))
    return conv(3, 16) + stages + sum(c * d + 2 * d for c, d in ((16, 32), (32, 64))) + 65 * 100


@pytest.mark.parametrize(
    ("pair", "student", "teacher", "digits"), [("vgg", 3.8, 10.9, 0.05), ("mobilenet", 0.82, 2.3, 0.1), ("resnext", 0.34, 0.66, 0.02)]
)
def test_networks_of_svd_kd_have_the_published_size(pair, student, teacher, digits):
    """Lee et al. 2018 give millions of parameters, the layers of the VGGs and the widths at the
    taps. The depths of the other networks are chosen to match the parameters.
    """
    for published, role in ((student, "student"), (teacher, "teacher")):
        assert _parameters(getattr(models, f"sskd_{pair}_{role}")()) / 1e6 == pytest.approx(published, abs=digits)


def test_operations_of_the_vggs_of_svd_kd_match_the_paper():
    """The paper counts 121.3 and 576.3 million operations, two per multiply-add."""

    def operations(convolutions, hidden):
        total, inputs = 0, 3
        for i, (outputs, count) in enumerate(zip((64, 128, 256, 512), convolutions, strict=True)):
            total += (9 * inputs * outputs + (count - 1) * 9 * outputs**2) * (32 >> i) ** 2
            inputs = outputs
        return 2 * (total + 2048 * 1024 + (hidden - 1) * 1024**2 + 1024 * 100)

    assert operations((1, 1, 1, 1), 1) / 1e6 == pytest.approx(121.3, rel=0.01, abs=0)
    assert operations((2, 2, 3, 3), 2) / 1e6 == pytest.approx(576.3, rel=0.01, abs=0)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_resnet_parameters_match_the_formula(depth):
    assert _parameters(getattr(models, f"resnet{depth}")()) == _resnet_parameters(depth)


def test_parameters_of_resnets_with_four_stages_match_the_formula():
    conv = lambda c, d: 9 * c * d + 2 * d  # noqa: E731
    for name, blocks in (("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3))):  # He et al. 2016, table 1
        count = conv(3, 64) + 513 * 100
        for (c, d), n in zip(((64, 64), (64, 128), (128, 256), (256, 512)), blocks, strict=True):
            count += conv(c, d) + (2 * n - 1) * conv(d, d) + (c * d + 2 * d if c != d else 0)
        assert _parameters(getattr(models, name)()) == count


def test_wide_resnet_parameters_match_the_formula():
    """WRN-16-1 has two blocks per stage, batch norm before each convolution, and shortcuts without
    batch norm.
    """
    stages = 0
    for c, d in ((16, 16), (16, 32), (32, 64)):
        stages += 2 * c + 9 * c * d + 2 * d + 9 * d * d + (c * d if c != d else 0)  # first block
        stages += 2 * (2 * d + 9 * d * d)  # second block
    assert _parameters(models.wrn_16_1()) == 27 * 16 + stages + 2 * 64 + 65 * 100


@pytest.mark.parametrize("name", NAMES)
def test_networks_run_train_and_have_taps(name):
    network = getattr(models, name)(num_classes=7)
    taps = FeatureTaps(network, TAPS[type(network)])
    logits, features = taps(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert list(features) == list(TAPS[type(network)])
    sides = [feature.shape[2] for feature in features.values()]
    assert sides == sorted(sides, reverse=True)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    if isinstance(network, models.PlainVGG):  # its linear layers depend on the image size
        network = type(network)(num_classes=7, image_size=64)
    assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)  # other image sizes work too


def test_vgg_at_64_pixels_has_one_more_pooling_layer():
    """At 64 pixels there is one more max pooling, so the last map has the same size as at 32
    pixels.
    """
    taps = FeatureTaps(models.vgg8().eval(), ["relu4"])
    assert taps(torch.randn(1, 3, 32, 32))[1]["relu4"].shape == taps(torch.randn(1, 3, 64, 64))[1]["relu4"].shape == (1, 512, 4, 4)


def test_invalid_depths_raise():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2"):
        models.ResNet(21)
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4"):
        models.WideResNet(17)


# Taps.


def test_taps_return_features_in_order():
    model = TinyCNN(4)
    taps = FeatureTaps(model, ["block3.0", "block1"])
    logits, features = taps(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    shapes = [(name, tuple(feature.shape)) for name, feature in features.items()]
    assert shapes == [("block3.0", (2, 16, 8, 8)), ("block1", (2, 4, 16, 16))]  # in the requested order
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"no layer 'blok1'; did you mean one of \['block1'"):
        FeatureTaps(model, ["blok1"])
    with pytest.raises(ValueError, match=r"named once each, got \['block1'\] more than once"):
        FeatureTaps(model, ["block1", "block1"])

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="did not run"):
        FeatureTaps(Unused(), ["unused"])(torch.zeros(1, 2))


def test_tap_overwritten_in_place_raises():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match=r"the outputs of layers \['0'\] of Sequential were overwritten in place"):
        FeatureTaps(model, ["0"])(torch.randn(1, 3, 2, 2))
    assert FeatureTaps(model, ["1"])(torch.randn(1, 3, 2, 2))[1]["1"].min() >= 0


def test_pair_features_raises_for_features_that_do_not_match():
    maps = {"a": torch.zeros(2, 4, 8, 8), "b": torch.zeros(2, 8, 4, 4)}
    other = {"x": torch.zeros(2, 4, 8, 8), "y": torch.zeros(2, 6, 4, 2)}
    assert pair_features(maps, maps, channels=True, space=True) == [(v, v) for v in maps.values()]
    assert len(pair_features(maps, other)) == 2
    with pytest.raises(ValueError, match=r"student tap 'b' \[2, 8, 4, 4\] and teacher tap 'y' \[2, 6, 4, 2\] do not match: .* channels, got 8 and 6"):
        pair_features(maps, other, channels=True)
    with pytest.raises(ValueError, match=r"same spatial size, got \[4, 4\] and \[4, 2\]"):
        pair_features(maps, other, space=True)
    with pytest.raises(ValueError, match=r"must pair up, got 2 \(\['a', 'b'\]\) and 1"):
        pair_features(maps, {"x": maps["a"]})
    with pytest.raises(ValueError, match="same number of dimensions"):
        pair_features({"a": maps["a"]}, {"x": torch.zeros(2, 4)})


# Weights.


def test_weights_load_from_files(tmp_path):
    from safetensors.torch import save_file

    network = TinyCNN(4)
    state = network.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"model": state, "best_acc": 0.5}, tmp_path / "model.pth")
    torch.save({"state_dict": {f"student.{k}": v for k, v in state.items()}}, tmp_path / "run.ckpt")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("bare.pt", "model.pth", "run.ckpt", "parallel.pt", "weights.safetensors"):
        loaded = load_weights(TinyCNN(4), tmp_path / name)
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in state.items())


def test_weights_that_do_not_fit_raise(tmp_path):
    torch.save(TinyCNN(4).state_dict(), tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="weights: there is no file"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"does not fit TinyCNN: block1.0.weight is \[4, 3, 3, 3\] in the file and \[5, 3, 3, 3\] in the network"):
        load_weights(TinyCNN(5), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"only in the file: block1.0.weight, .* and 15 more; only in the network: conv1.weight, "):
        load_weights(models.resnet8(), tmp_path / "w.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "broken.pt")
    torch.save({"weights": 3}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="contains no state dict"):
        read_weights(tmp_path / "odd.pt")


class RunsCode:
    def __reduce__(self):
        return subprocess.run, ([sys.executable, "-c", "open('ran', 'w')"],)


def test_weight_files_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsCode()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could run arbitrary code"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_from_checkpoint_restores_the_network(tmp_path):
    network = TinyCNN(3, 2, num_classes=4)
    spec = {"class_path": "kdkernels.models.TinyCNN", "init_args": {"width": 3, "depth": 2, "num_classes": 4}}
    state = {f"student.{k}": v for k, v in network.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: {"student": spec}}, tmp_path / "a.ckpt")
    loaded = from_checkpoint(tmp_path / "a.ckpt")
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(image), network.eval()(image))
    torch.save({"state_dict": state, CHECKPOINT_KEY: {"student": None}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="does not contain the configuration of its student"):
        from_checkpoint(tmp_path / "b.ckpt")
    torch.save({"state_dict": state}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        from_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(FileNotFoundError):
        from_checkpoint(tmp_path / "d.ckpt")


def test_table_of_networks_is_correct():
    """The table in docs/models.md lists every network, its parameters and the maps at its taps."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == set(NAMES)
    for name, parameters, maps in rows:
        network = getattr(models, name)().eval()
        assert _parameters(network) == int(parameters.replace(",", ""))
        features = FeatureTaps(network, TAPS[type(network)])(torch.zeros(1, 3, 32, 32))[1].values()
        assert ", ".join(f"{feature.shape[1]} x {feature.shape[2]}" for feature in features) == maps
