"""Inference by the exits of a network, their export, and the plots of exits and robustness."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("lightning")
from kdkernels.cli import main
from kdkernels.distill import ExitNetwork, exit_network
from kdkernels.distill.exit_curve import exit_curve
from kdkernels.distill.restore import restore
from kdkernels.models import Exits, TinyCNN
from kdkernels.plots.robustness import gradient_sizes, noisy_accuracies, with_noise

BLOCKS = ["block1", "block2", "block3"]


class Skipping(nn.Module):
    """A network whose last layer reads the image again, so that images cannot be left out."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(7, 3)

    def forward(self, x):
        return self.fc(torch.cat([self.last(self.first(x)).mean((2, 3)), x.mean((2, 3))], 1))


def _exit_network(exit=None):
    torch.manual_seed(0)
    backbone = TinyCNN(4, num_classes=3)
    exits = Exits({"block1": (4, 4, 4), "block2": (8, 2, 2), "block3": (16, 1, 1)}, 3)
    for module in (backbone, exits):  # larger weights, so that the exits differ in their confidence
        for parameter in module.parameters():
            parameter.data *= 2
    return ExitNetwork(backbone, BLOCKS, exits, exit).eval()


@torch.no_grad()
def test_logits_of_each_exit():
    image = torch.randn(5, 3, 8, 8)
    last, exits = _exit_network().all_logits(image)
    assert torch.equal(_exit_network()(image), last)
    for i in (1, 2):
        assert torch.equal(_exit_network(i)(image), exits[i - 1])
    torch.testing.assert_close(_exit_network("ensemble")(image), (exits[0] + exits[1] + last) / 3)
    for bad in (0, 3, True, "mean", 1.0):
        with pytest.raises(ValueError, match=r"exit must be a number in \[1, 2\], 'ensemble' or None"):
            _exit_network(bad)


def test_exit_stops_the_backbone():
    network = _exit_network(1)
    ran = []
    network.backbone.block2.register_forward_hook(lambda *_: ran.append(2))
    network(torch.randn(2, 3, 8, 8))
    assert not ran


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), threshold=st.floats(0, 1))
def test_adaptive_depth_takes_the_first_confident_exit(seed, threshold):
    network = _exit_network()
    image = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        last, exits = network.all_logits(image)
        logits, number = network.adaptive(image, threshold)
    for row in range(6):
        confidences = [z[row].double().softmax(0).max().item() for z in exits]
        expected = next((i for i, c in enumerate(confidences, 1) if c >= threshold), 3)
        if all(abs(c - threshold) > 1e-5 for c in confidences):
            assert number[row] == expected
            torch.testing.assert_close(logits[row], [*exits, last][expected - 1][row], rtol=1e-4, atol=1e-5)


def test_adaptive_depth_computes_only_the_remaining_images():
    network = _exit_network()
    sizes = {}
    for name in BLOCKS:
        network.backbone.get_submodule(name).register_forward_hook(lambda _, inputs, out, name=name: sizes.update({name: len(inputs[0])}))
    image = torch.randn(16, 3, 8, 8)
    _, number = network.adaptive(image, 0.6)
    left = [int((number > i).sum()) for i in range(3)]
    assert [sizes.get(name, 0) for name in BLOCKS] == left
    assert left[0] == 16
    assert 0 < left[1] < 16
    assert network.adaptive(image, 0.0)[1].tolist() == [1] * 16
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\]"):
            network.adaptive(image, bad)


def test_adaptive_depth_needs_networks_in_which_images_can_be_left_out():
    exits = Exits({"first": (4, 4, 4), "last": (4, 2, 2)}, 3)
    network = ExitNetwork(Skipping(), ["first", "last"], exits).eval()
    image = torch.cat([torch.zeros(3, 3, 8, 8), 9 * torch.randn(3, 3, 8, 8)])
    confidence = network.all_logits(image)[1][0].double().softmax(1).amax(1)
    with pytest.raises(RuntimeError, match="Skipping reads more than the output of the tapped layers"):
        network.adaptive(image, ((confidence.min() + confidence.max()) / 2).item())


def test_operations_counted_by_hand():
    """Two operations for each multiplication with an addition."""
    backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    exits = Exits({"0": (2, 4, 4), "1": (4, 4, 4)}, 5)
    branch = 2 * 16 * (2 * 1 + 1 * 1 + 1 * 4) + 2 * 4 * 5  # 1x1 convolutions to 1, 1 and 4 channels, and the classifier
    first = 2 * 16 * 3 * 2
    whole = first + 2 * 16 * 2 * 4 + 2 * 4 * 5
    alone, adaptive = ExitNetwork(backbone, ["0", "1"], exits).eval().operations(torch.zeros(1, 3, 4, 4))
    assert alone == [first + branch, whole]
    assert adaptive == [first + branch, whole + branch]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder with runs/byot, which the command line has trained."""
    folder = tmp_path_factory.mktemp("run")
    config = Path(__file__).parent.parent / "configs" / "byot_clutter_digits.yaml"
    small = ["--model.student.width=4", "--data.train_size=64", "--data.val_size=32", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["fit", "--config", str(config), *small, "--trainer.enable_progress_bar=false"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(("file", "exit"), [("a.pt2", "1"), ("a.onnx", "1"), ("a.pt2", "ensemble"), ("a.onnx", "ensemble")])
def test_export_of_exits(run, monkeypatch, file, exit):
    monkeypatch.chdir(run)
    network = exit_network("runs/byot/last.ckpt").eval()
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        last, exits = network.all_logits(image)
    expected = exits[0] if exit == "1" else (last + exits[0] + exits[1]) / 3
    assert main(["export", "--ckpt", "runs/byot/last.ckpt", "--out", file, "--exit", exit]) == 0
    if file == "a.pt2":
        logits = torch.export.load(file).module()(image).detach()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        assert (Path(file).stat().st_size < 30_000) == (exit == "1")  # without the layers behind the exit
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_invalid_exits_are_errors_of_one_line(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    for option, message in (
        (["--out", "b.onnx", "--exit", "3"], "exit must be a number in [1, 2], 'ensemble' or None, got 3"),
        (["--out", "b.onnx", "--exit", "first"], "--exit must be a number from 1, or ensemble, got 'first'"),
        (["--out", "b.safetensors", "--exit", "1"], "'b.safetensors' cannot contain an exit"),
    ):
        assert main(["export", "--ckpt", "runs/byot/last.ckpt", *option]) in (1, 2)
        assert message in capsys.readouterr().err
    assert not list(run.glob("b.*"))


def test_plots(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    assert main(["plot", "exits", "--ckpt", "runs/byot/last.ckpt", "--out", "e.png", "--thresholds", "[0, 0.5]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == [
        "inference",
        "exit 1",
        "exit 2",
        "whole network",
        "ensemble",
        "threshold 0",
        "threshold 0.5",
        "e.png",
    ]
    assert lines[1].split()[2:4] == lines[5].split()[2:4]  # threshold 0 stops every image at exit 1
    assert main(["plot", "robustness", "--ckpt", "runs/byot/last.ckpt", "--out", "r.svg", "--noise", "[0, 0.5]", "--repeats", "2"]) == 0
    assert "byot (BYOT)" in capsys.readouterr().out
    assert "</svg>" in Path("r.svg").read_text()
    for arguments, message in (
        (["exits", "--thresholds", "[0.5, 2]"], "thresholds must lie in [0, 1], got 2"),
        (["exits", "--out", "e.gif"], "out must end in .png, .svg or .pdf"),
        (["robustness", "--noise", "[-1]"], "noise must be a list of numbers >= 0, got [-1"),
        (["robustness", "--repeats", "0"], "repeats must be at least 1, got 0"),
    ):
        assert main(["plot", *arguments, "--ckpt", "runs/byot/last.ckpt"]) == 1
        assert message in capsys.readouterr().err
    method, data = restore("runs/byot/last.ckpt")
    accuracy = noisy_accuracies(method, data, [0.0, 0.2], 2)
    assert [len(values) for values in accuracy] == [1, 2]
    assert torch.equal(with_noise(method.student, 0.2, 1).fc.weight, with_noise(method.student, 0.2, 1).fc.weight)
    noise = with_noise(method.student, 0.2, 1).block2[0].weight - method.student.block2[0].weight
    assert noise.std().item() == pytest.approx(0.2 * method.student.block2[0].weight.std().item(), rel=0.1)
    assert list(gradient_sizes(method, data)) == ["block1.0.weight", "block2.0.weight", "block3.0.weight", "fc.weight"]


def test_curve_counted_by_hand():
    """Three images: exit 1 is right and confident, right and unsure, wrong and confident."""
    network = _exit_network()
    last = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    first = torch.tensor([[9.0, 0, 0], [0, 1, 0], [9, 0, 0]])
    unsure = torch.zeros(3, 3)
    network.all_logits = lambda image: (last, [first, unsure])
    batch = {"image": torch.randn(3, 3, 8, 8), "label": torch.tensor([0, 1, 2])}
    points = {p.name: p for p in exit_curve(network, [batch], [0.0, 0.9, 1.0])}
    assert [points[name].accuracy for name in ("exit 1", "exit 2", "whole network")] == pytest.approx([2 / 3, 1 / 3, 1])
    assert points["threshold 0.9"].accuracy == pytest.approx(2 / 3)
    assert points["threshold 0.9"].shares == pytest.approx([2 / 3, 0, 1 / 3])
    assert points["threshold 0"].shares == [1, 0, 0]
    assert points["threshold 1"].accuracy == 1
    alone, costs = network.operations(batch["image"][:1])
    assert points["threshold 0.9"].operations == pytest.approx((2 * costs[0] + costs[2]) / 3)
    assert [points[name].operations for name in ("exit 1", "exit 2", "whole network")] == alone
    assert alone[0] == costs[0]
    assert alone[1] < costs[1]  # without exit 1
    with pytest.raises(ValueError, match="at least one image"):
        exit_curve(network, [])
    with pytest.raises(ValueError, match="needs labels"):
        exit_curve(network, [{"image": batch["image"]}])


def test_checkpoint_without_exits_raises(tmp_path, monkeypatch, capsys):
    config = Path(__file__).parent.parent / "configs" / "teacher_clutter_digits.yaml"
    monkeypatch.chdir(tmp_path)
    small = ["--model.student.width=2", "--data.train_size=16", "--data.val_size=16", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", str(config), *small, "--trainer.enable_progress_bar=false"]) == 0
    capsys.readouterr()
    assert main(["plot", "exits", "--ckpt", "runs/teacher/last.ckpt"]) == 1
    assert "'runs/teacher/last.ckpt' has no exits: it was trained with Supervised" in capsys.readouterr().err
