"""The command line: configurations, reports, export, plots, and error messages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("lightning")
import lightning as L

from kdkernels.cli import main
from kdkernels.cli.configs import load_config, merged, with_bases
from kdkernels.data import Digits
from kdkernels.distill import Supervised
from kdkernels.distill.engine import AtomicCheckpointIO
from kdkernels.distill.export import export_student
from kdkernels.models import FeatureTaps, TinyCNN, from_checkpoint, load_weights
from kdkernels.models.weights import CHECKPOINT_KEY, describe

ROOT = Path(__file__).parent.parent
SMALL = ["--data.train_size=64", "--data.val_size=32", "--data.test_size=32", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
TEACHER = ["fit", "--config", str(ROOT / "configs/teacher_clutter_digits.yaml"), *SMALL, "--model.student.width=4", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder with runs/teacher, which the command line has trained."""
    folder = tmp_path_factory.mktemp("run")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(TEACHER) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def cwd(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


def test_run_writes_checkpoints_logs_and_its_config(run):
    folder = run / "runs" / "teacher"
    logs = folder / "version_0"
    assert {p.name for p in folder.iterdir()} >= {"best.ckpt", "last.ckpt", "version_0"}
    written = yaml.safe_load((logs / "config.yaml").read_text())  # the merged config, its bases and the command line's options
    student = {"class_path": "kdkernels.models.TinyCNN", "init_args": {"width": 4, "depth": 1, "num_classes": 10}}
    assert written["model"]["init_args"]["student"] == student
    assert written["data"]["class_path"] == "kdkernels.data.ClutterDigits"
    assert "base" not in written
    header = (logs / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/cross_entropy", "train/accuracy", "val/accuracy", "epoch", "step"} <= set(header)
    assert list(logs.glob("events.out.tfevents*"))


def test_last_and_best_checkpoints_are_reported(cwd, capsys):
    assert main([*TEACHER, "--ckpt_path", "last", "--trainer.max_epochs=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last, best = (next(line for line in lines if line.startswith(kind)) for kind in ("last", "best"))
    assert last.endswith("runs/teacher/last.ckpt")
    assert best.endswith("runs/teacher/best.ckpt")
    last, best = (float(line.split()[2]) for line in (last, best))
    assert best >= last
    for kind, value in {"last": last, "best": best}.items():
        command = ["validate", *TEACHER[1:], "--ckpt_path", kind]
        assert main(command) == 0
        assert f"{value:.4f}"[:5] in capsys.readouterr().out


def test_printed_config_is_short_and_reproduces_the_run(cwd, capsys):
    with pytest.raises(SystemExit):
        main([*TEACHER, "--print_config"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 80
    assert "null" not in text
    (cwd / "printed.yaml").write_text(text)
    assert main(["fit", "--config", "printed.yaml", "--trainer.default_root_dir=runs/printed"]) == 0
    assert main([*TEACHER, "--trainer.default_root_dir=runs/given"]) == 0
    first, second = (torch.load(f"runs/{name}/last.ckpt", weights_only=True)["state_dict"] for name in ("given", "printed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_stored_config_handles_callbacks_with_enum_defaults(cwd):
    """The config that is stored with the run contains the default, and can be used to resume the
    run.
    """
    (cwd / "timer.yaml").write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:01:00:00'}}]}")
    assert main([*TEACHER, "--config=timer.yaml", "--trainer.default_root_dir=runs/timed"]) == 0
    written = "runs/timed/version_0/config.yaml"
    (timer,) = yaml.safe_load(Path(written).read_text())["trainer"]["callbacks"]
    assert timer["init_args"]["interval"] == "step"
    assert main(["fit", "--config", written, "--ckpt_path=last"]) == 0


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid(config, monkeypatch, tmp_path, capsys):
    """Networks are built and options are known.

    If the data or the teacher is missing, the message says so.
    """
    monkeypatch.chdir(tmp_path)
    kind = load_config(config).get("data", {}).get("class_path", "").rpartition(".")[2]
    few = ["--data.train_size=32", "--data.val_size=16", "--data.test_size=16"] if kind in ("ClutterDigits", "SegmentedClutterDigits") else []
    flags = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    status = main(["fit", "--config", str(config), *few, *flags])
    message = capsys.readouterr().err
    markers = {"teacher": "from_checkpoint", "lanes": "CULane", "images": "CIFAR"}
    needs = [name for name, text in markers.items() if text in yaml.safe_dump(load_config(config))]
    if not needs:
        assert status == 0
    elif "teacher" in needs:
        assert (status, "there is no file 'runs/" in message) == (1, True)
    elif "lanes" in needs:
        assert (status, "there is no folder 'data/CULane'" in message) == (1, True)
    else:
        assert (status, "Download cifar-10" in message) == (1, True)


def test_config_with_bases_is_merged(tmp_path):
    """A base is relative to the file that names it.

    Values of the file override those of the base, and another class discards the base's arguments.
    """
    (tmp_path / "deep").mkdir()
    first = "seed_everything: 3\nmodel: {class_path: A, init_args: {x: 1, y: [1, 2], net: {class_path: N, init_args: {w: 1}}}}\n"
    (tmp_path / "deep" / "first.yaml").write_text(first)
    (tmp_path / "deep" / "second.yaml").write_text("base: first.yaml\nmodel: {init_args: {y: [3], net: {class_path: M}}}\n")
    (tmp_path / "third.yaml").write_text("base: deep/second.yaml\nmodel: {class_path: A, init_args: {x: null}}\n")
    expected = {"seed_everything": 3, "model": {"class_path": "A", "init_args": {"x": None, "y": [3], "net": {"class_path": "M"}}}}
    assert load_config(tmp_path / "third.yaml") == expected
    assert merged({"model": {"init_args": {"x": 1}}}, {"model": {"class_path": "B"}}) == {"model": {"class_path": "B", "init_args": {"x": 1}}}
    assert merged({"model": {"class_path": "A", "init_args": {"x": 1}}}, {"model": {"class_path": "B"}}) == {"model": {"class_path": "B"}}
    whole, third = str(tmp_path / "deep" / "first.yaml"), str(tmp_path / "third.yaml")
    others = ["--config", whole, "--config", "absent.yaml"]  # files without a base: unchanged, for the parser
    command, option, text, joined, *rest = with_bases(["fit", "-c", third, f"--config={third}", *others])
    assert (command, option, rest) == ("fit", "-c", others)
    assert yaml.safe_load(text) == yaml.safe_load(joined.removeprefix("--config=")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: absent.yaml", "config: there is no file '{folder}/absent.yaml' (base of '{folder}/c.yaml')"),
        ("base: .", "config: '{folder}' (base of '{folder}/c.yaml') is a folder, expected a file"),
        ("base: ''", "config: base of '{folder}/c.yaml' must be the name of a file, got ''"),
        ("base: [a.yaml]", "config: base of '{folder}/c.yaml' must be the name of a file, got ['a.yaml']"),
        ("base: c.yaml", "config: '{folder}/c.yaml' extends itself: c.yaml -> c.yaml"),
        ("base: list.yaml", "config: '{folder}/list.yaml' must be a mapping with sections such as model, data and trainer, got list"),
        ("base: broken.yaml", "config: '{folder}/broken.yaml' is not valid YAML: "),
    ],
)
def test_invalid_base_config_is_an_error(tmp_path, capsys, text, message):
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "c.yaml").write_text(text)
    for command in (["fit", "--config", str(tmp_path / "c.yaml")], ["fit", "--help", "--config", str(tmp_path / "c.yaml")]):
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("kdkernels fit: " + message.format(folder=tmp_path))


def test_config_follows_the_published_recipe():
    """RepDistiller's recipe: resnet56 to resnet20, T = 4, 0.1 CE + 0.9 KL, 240 epochs, steps at
    150, 180 and 210.
    """
    config = load_config(ROOT / "configs/kd_cifar100_resnet56_resnet20.yaml")
    method, data = config["model"]["init_args"], config["data"]["init_args"]
    assert method["student"]["class_path"].endswith("resnet20")
    assert (method["temperature"], method["gamma"], method["alpha"]) == (4.0, 0.1, 0.9)
    assert method["optimizer"]["init_args"] == {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": False}
    assert method["scheduler"]["init_args"]["milestones"] == [150, 180, 210]
    assert (data["batch_size"], data["augment"]["init_args"], config["trainer"]["max_epochs"]) == (64, {"crop": 4, "flip": True}, 240)


def test_two_processes_from_the_command_line(tmp_path):
    """Lightning starts the second process with the arguments of the first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kdkernels", *TEACHER, "--trainer.devices=2", "--trainer.strategy=ddp"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Starting with 2 processes" in run.stderr + run.stdout
    assert run.stdout.count("runs/teacher/last.ckpt") == 1  # only one process reports


# Export.


def test_export(cwd, capsys):
    """Each exported file is read back by the library for its format."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from safetensors.torch import load_file

    files = ["out/s.onnx", "out/s.pt2", "out/s.safetensors"]
    assert main(["export", "--ckpt", "runs/teacher/best.ckpt", "--out", *files]) == 0
    assert capsys.readouterr().out.count("the logits differ by at most") == 3
    student = from_checkpoint("runs/teacher/best.ckpt").eval()
    image = torch.randn(5, 3, 32, 32)  # another batch size than the exported one
    with torch.no_grad():
        expected = student(image)
        torch.testing.assert_close(torch.export.load("out/s.pt2").module()(image), expected)
    onnx = onnxruntime.InferenceSession("out/s.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(onnx.run(None, {"image": image.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)
    weights = load_file("out/s.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in student.state_dict().items())
    assert {p.name for p in Path("out").iterdir()} == {"s.onnx", "s.pt2", "s.safetensors"}


def test_checkpoint_stores_the_configuration_of_its_student(cwd):
    description = describe("runs/teacher/best.ckpt")
    assert description["student"] == {
        "class_path": "kdkernels.models.TinyCNN",
        "init_args": {"width": 4, "depth": 1, "num_classes": 10},
    }
    assert description["image_shape"] == [3, 32, 32]


class Wrong(TinyCNN):
    """Returns other logits while it is exported: an example of a silently wrong export."""

    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


def test_export_with_differing_logits_raises_and_leaves_no_file(cwd):
    spec = {"class_path": "test_cli.Wrong", "init_args": {"width": 4}}
    with pytest.raises(ValueError, match=r"wrong.pt2 is not written: its logits differ from the student's by 1.0e\+00 of the largest"):
        export_student("runs/teacher/best.ckpt", {"torch_export": "wrong.pt2"}, spec)
    assert not list(cwd.glob("*wrong*"))


def test_export_of_a_checkpoint_trained_in_python(tmp_path, capsys):
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Supervised(TinyCNN(3)), Digits())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    command = ["export", "--ckpt", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "x.safetensors")]
    assert main(command) == 1
    assert "give --student CLASS --student.ARGUMENT" in capsys.readouterr().err
    assert main([*command, "--student", "kdkernels.models.TinyCNN", "--student.width", "3"]) == 0
    assert main([*command, "--student", "kdkernels.models.TinyCNN", "--student.width", "5"]) == 1
    assert "does not fit TinyCNN" in capsys.readouterr().err


class Tied(nn.Module):
    """Has two layers that share one weight, and a buffer that is a view of another buffer."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv, self.a, self.b, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, num_classes)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.arange(1.0, 9.0))
        self.register_buffer("first", self.scale[:1])

    def forward(self, x):
        return self.head(self.b(self.a(self.conv(x).mean((2, 3)) * self.scale)) * self.first)


def test_export_of_tied_weights(tmp_path):
    network = Tied()
    spec = {"class_path": "test_cli.Tied", "init_args": {"num_classes": 3}}
    state = {f"student.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: {"student": spec, "image_shape": [3, 8, 8]}}, tmp_path / "t.ckpt")
    targets = {"safetensors": str(tmp_path / "t.safetensors"), "torch_export": str(tmp_path / "t.pt2")}
    assert max(export_student(tmp_path / "t.ckpt", targets).values()) <= 1e-6
    loaded = load_weights(Tied(), tmp_path / "t.safetensors")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.a.weight is loaded.b.weight


def test_invalid_export_options_are_one_line_errors(tmp_path, capsys):
    assert main(["export", "--ckpt", str(tmp_path / "x.ckpt"), "--out", "x.onnx"]) == 1
    assert "there is no file" in capsys.readouterr().err
    for out, message in {
        "": "kdkernels export: missing required options: --out",
        "--out x.bin": "kdkernels export: --out: files must end in .onnx, .pt2, .safetensors, got 'x.bin'",
        "--out x.onnx y.onnx": "kdkernels export: --out: give at most one file per format, got 'x.onnx' and 'y.onnx'",
        "--out x.onnx --image_shap [1,2,3]": "kdkernels export: there is no option --image_shap; did you mean '--image_shape'?",
        "--out x.onnx --image_shape three": "kdkernels export: --image_shape: ",
    }.items():
        assert main(["export", "--ckpt", "x.ckpt", *out.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


# User errors.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.student.num_classes=7"], "kdkernels fit: the data have 10 classes, but the student (TinyCNN) has 7"),
        (["--model.student.width=0"], "kdkernels fit: width, depth and num_classes must be at least 1, got 0, 1 and 10"),
        (["--data.batch_size=0"], "kdkernels fit: batch_size must be at least 1, got 0"),
        (["--model.student_weights=nowhere.pt"], "kdkernels fit: weights: there is no file 'nowhere.pt'"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_user_errors_are_one_line(cwd, capsys, more, message):
    assert main([*TEACHER, "--restart=true", *more]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdkernels fit:")]
    assert message in line


def test_existing_run_is_not_overwritten(cwd, capsys):
    before = Path("runs/teacher/best.ckpt").read_bytes()
    assert main(TEACHER) == 1
    assert "runs/teacher already contains a run: resume it with --ckpt_path last, start a new run with --restart true" in capsys.readouterr().err
    assert Path("runs/teacher/best.ckpt").read_bytes() == before


def test_checkpoints_are_saved_between_epochs(tmp_path, monkeypatch):
    """A checkpoint is saved every seven steps, and at the end of each epoch."""
    monkeypatch.chdir(tmp_path)
    seen, save = [], AtomicCheckpointIO.save_checkpoint

    def record_and_save(self, checkpoint, path, storage_options=None):
        seen.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record_and_save)
    assert main([*TEACHER, "--data.batch_size=4", "--checkpoint_every=7"]) == 0
    assert sorted(set(seen)) == [7, 14, 16, 21, 28, 32]


def test_validate_without_a_run_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", *TEACHER[1:], "--ckpt_path", "best"]) == 1
    assert "there is no file 'runs/teacher/best.ckpt'" in capsys.readouterr().err


def test_network_defined_in_the_current_folder(tmp_path, monkeypatch):
    """The network is imported from the current folder, trained, and restored from a checkpoint."""
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self, width: int):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    command = [*TEACHER[:-2], "--trainer.accelerator=cpu", "--model.student=nets_of_mine.Net", "--model.student.width=6"]
    assert main(command) == 0
    network = from_checkpoint("runs/teacher/last.ckpt")
    assert isinstance(network, nn.Sequential)
    assert network[1].out_features == 6


# Plots.


def test_plot_attention(cwd, capsys):
    """Plot a method with a teacher, and a run without one. An error leaves no file behind."""
    at = ["fit", "--config", str(ROOT / "configs/at_clutter_digits.yaml"), *SMALL, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main([*at, "--model.teacher.path=runs/teacher/best.ckpt"]) == 0
    assert main(["plot", "attention", "--ckpt", "runs/at/best.ckpt", "--out", "pictures/a.png", "--images", "3"]) == 0
    assert main(["plot", "attention", "--ckpt", "runs/teacher/best.ckpt", "--out", "pictures/t.svg", "--layers", "[block2,block1.0]"]) == 0
    assert {p.name for p in Path("pictures").iterdir()} == {"a.png", "t.svg"}
    assert Path("pictures/a.png").read_bytes().startswith(b"\x89PNG")
    text = Path("pictures/t.svg").read_text()
    assert "</svg>" in text
    capsys.readouterr()
    for more, message in {
        "--out=a.gif": "out must end in .png, .svg or .pdf, got 'a.gif'",
        "--layers=[blok1]": "no layer 'blok1'; did you mean",
        "--layers=[block1]": "must have the same length",
        "--images=0": "images must be at least 1",
    }.items():
        assert main(["plot", "attention", "--ckpt", "runs/at/best.ckpt", more]) == 1
        assert message in capsys.readouterr().err
    assert not list(cwd.glob("attention*"))


def test_plot_attention_shows_the_maps_of_the_network(cwd):
    """The drawn map is attention_pool of the trained student at the requested layer."""
    from kdkernels import attention_pool
    from kdkernels.distill.restore import restore
    from kdkernels.plots import attention
    from kdkernels.plots.checkpoints import batch_of

    method, data = restore("runs/teacher/best.ckpt")
    raw, batch = batch_of(data, [0, 30])
    with torch.no_grad():
        found = {"student": FeatureTaps(method.student.eval(), ["block1"])(batch["image"])}
    figure = attention._draw(raw, batch, found, 2.0, data)
    drawn = torch.from_numpy(figure.axes[1].images[1].get_array().data)
    expected = attention_pool(found["student"][1]["block1"], 2.0)[0]
    torch.testing.assert_close(drawn[::2, ::2], expected / expected.max())
    assert "block1" in figure.axes[1].get_title()


def test_plot_dfv(cwd, capsys):
    """Plot two checkpoints, one per row. An error leaves no file behind."""
    teacher = [*TEACHER, "--model.student.width=8", "--trainer.default_root_dir=runs/deep_teacher"]
    assert main(teacher) == 0
    method = ["fit", "--config", str(ROOT / "configs/svd_kd_clutter_digits.yaml"), *SMALL, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(method) == 0
    ckpt = "runs/svd_kd/last.ckpt"
    assert main(["plot", "dfv", "--ckpt", ckpt, ckpt, "--out", "pictures/d.png", "--vector", "2", "--image", "3"]) == 0
    assert Path("pictures/d.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for more, message in {
        "--out=d.gif": "out must end in .png, .svg or .pdf, got 'd.gif'",
        "--layers=[block1]": "must have the same length",
        "--vector=9": "vector must be at most 8 at layer 'block1'",
        "--vector=0": "vector must be at least 1",
        "--image=-1": "image must be in [0, ",
    }.items():
        assert main(["plot", "dfv", "--ckpt", ckpt, more]) == 1
        assert message in capsys.readouterr().err
    assert main(["plot", "dfv", "--ckpt", "runs/deep_teacher/last.ckpt"]) == 1
    assert "trained without a teacher" in capsys.readouterr().err
    assert main(["plot", "spectra"]) == 2
    assert "{attention,confusion,curves,dfnd,dfv,exits,lanes,robustness}" in capsys.readouterr().err
    assert not list(cwd.glob("dfv*"))


def test_plot_dfv_shows_the_differences_in_the_loss(cwd):
    """The drawn difference is the one in the loss with one singular vector, for the drawn image."""
    from kdkernels.nn import svd_kd_loss
    from kdkernels.plots import dfv

    torch.manual_seed(0)
    nets = [{f"l{i}": torch.randn(2, c, n, n).relu() for i, (c, n) in enumerate([(6, 8), (10, 4), (12, 2)])} for _ in range(2)]
    found = dfv.compare_layers(*nets)
    pairs = dfv._correlations(found)
    total = sum(0.5 * (s - t).square().sum() for s, t in pairs)
    expected = svd_kd_loss(*([x[:1] for x in net.values()] for net in nets), 1)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)
    spectrum = torch.linalg.svdvals(nets[0]["l1"][0].flatten(1))
    torch.testing.assert_close(found[1].spectra[0], spectrum / spectrum[0], rtol=1e-4, atol=1e-6)
    figure = dfv._draw([("a", found), ("b", found)], 1)
    shown = torch.from_numpy(figure.axes[1 + 3 + 2].images[0].get_array().data)
    torch.testing.assert_close(shown, pairs[0][0] - pairs[0][1])
