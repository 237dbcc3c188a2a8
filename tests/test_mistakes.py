"""The command line prints one line with cause and remedy for user errors.

Also its output without errors.
"""

import logging
import re
import textwrap

import numpy as np
import pytest
from torch import nn

pytest.importorskip("lightning")
from PIL import Image

from kdkernels.cli import main
from kdkernels.cli.user_errors import one_line

NETS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, width: int = 4, num_classes: int = 3, fail: str = ""):
        super().__init__()
        self.conv, self.head, self.fail = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes), fail

    def forward(self, x):
        if self.fail and len(x) > 2:
            raise {"key": KeyError, "runtime": RuntimeError, "attribute": AttributeError, "memory": torch.OutOfMemoryError}[self.fail]("of mine")
        return self.head(self.conv(x).mean((2, 3)))
"""
CONFIG = """
model:
  class_path: kdkernels.distill.KD
  init_args:
    student: {{class_path: its_nets.Small}}
    teacher: {{class_path: its_nets.Small, init_args: {{width: 6}}}}
data:
  class_path: kdkernels.data.ImageFolder
  init_args: {{root: {root}, size: 8, batch_size: 4}}
trainer: {{max_epochs: 2, accelerator: cpu, devices: 1, enable_progress_bar: false, logger: false, default_root_dir: {run}}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a config with its networks in the same folder, and images.

    The current folder is a different one.
    """
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "its_nets.py").write_text(NETS)
    for k, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((8, 8, 3), 80 * k + i, np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (folder / "c.yaml").write_text(textwrap.dedent(CONFIG.format(root=tmp_path / "photos", run=tmp_path / "run")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    __import__("sys").modules.pop("its_nets", None)
    yield folder / "c.yaml"
    __import__("sys").modules.pop("its_nets", None)


def _error_line(capfd, *arguments):
    logging.getLogger("lightning.pytorch").handlers.clear()
    assert main([str(a) for a in arguments]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kdkernels") or "Traceback" in line]
    assert len(lines) == 1, lines
    return lines[0]


USER_ERRORS = {
    "--model.temprature 3": "kdkernels fit: --model: KD has no option 'temprature'; did you mean 'temperature'?",
    "--data.batch_sise 3": "ImageFolder has no option 'batch_sise'; did you mean 'batch_size'?",
    "--model.student.wdth 3": "Small has no option 'wdth'; did you mean 'width'?",
    "--trainer.max_epohs 3": "kdkernels fit: there is no option --trainer.max_epohs; did you mean 'max_epochs'?",
    "--optimizer torch.optim.Adam": "kdkernels fit: there is no option --optimizer; did you mean --model.optimizer?",
    "--foo 3": "kdkernels fit: there is no option --foo",
    "--trainer.max_epochs three": "kdkernels fit: --trainer.max_epochs: expected int or null, got three",
    "--model.student.width wide": "kdkernels fit: --model.student.width: expected int, got wide",
    "--model.combine_weights 1": "kdkernels fit: --model.combine_weights: expected list or null, got 1",
    "--model.optimizer.lr fast": "kdkernels fit: --model.optimizer.lr: expected float or the import path of a class, got fast",
    "--data.batch_size 1.5": "kdkernels fit: --data.batch_size: expected int, got 1.5",
    "--seed_everything abc": "kdkernels fit: --seed_everything: expected bool or int, got abc",
    "--data.batch_size null": "kdkernels fit: --data.batch_size must be int, got null",
    "--model.temperature cold": "kdkernels fit: --model.temperature: expected float, got cold",
    "--model no.Such": "kdkernels fit: --model: No module named 'no' (modules are searched in ",
    "--model.student its_nests.Small": "No module named 'its_nests' (modules are searched in ",
    "--trainer.callbacks EarlyStoping": "kdkernels fit: --trainer.callbacks: there is no class 'EarlyStoping'",
    "--model.teacher_weights no.pth": "kdkernels fit: weights: there is no file 'no.pth'",
    "--data.root /no/where": "kdkernels fit: root: there is no folder '/no/where'",
    "--data.size 0": "kdkernels fit: size must be at least 1, got 0",
    "--model.student.num_classes 4": "kdkernels fit: the data have 3 classes, but the student (Small) has 4",
    "--model.student.fail key": "kdkernels fit: KeyError: 'of mine' (set KDKERNELS_TRACEBACK=1 to see the traceback)",
    "--model.student.fail runtime": "kdkernels fit: RuntimeError: of mine (set KDKERNELS_TRACEBACK=1 to see the traceback)",
    "--model.student.fail attribute": "kdkernels fit: AttributeError: of mine (set KDKERNELS_TRACEBACK=1 to see the traceback)",
    "--model.student.fail memory": "kdkernels fit: out of memory: of mine. Use a smaller --data.batch_size, ",
    "--ckpt_path no.ckpt": "no.ckpt",
}


@pytest.mark.parametrize("options", USER_ERRORS)
def test_user_errors_are_one_line(config, capfd, options):
    assert USER_ERRORS[options] in _error_line(capfd, "fit", "--config", config, *options.split())


def test_invalid_config_is_an_error(config, capfd):
    assert "File does not exist" in _error_line(capfd, "fit", "--config", "none.yaml")
    text = config.read_text()
    config.write_text("model: [")
    _error_line(capfd, "fit", "--config", config)
    for empty in ("{width: 3}", "{}", ""):
        config.write_text(text + f"modle: {empty}\n")
        assert "c.yaml' has an unknown section 'modle'; did you mean 'model'?" in _error_line(capfd, "fit", "--config", config)


def test_traceback_is_shown_on_request(config, monkeypatch):
    monkeypatch.setenv("KDKERNELS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="of mine"):
        main(["fit", "--config", str(config), "--model.student.fail", "key"])


def test_networks_next_to_the_config_and_one_line_per_epoch(config, capfd):
    assert main(["fit", "--config", str(config)]) == 0
    out = capfd.readouterr().out.splitlines()
    epochs = [line for line in out if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    assert all("train/loss " in line and "val/accuracy " in line for line in epochs)
    assert any(line.startswith("last  val/accuracy") for line in out)


def test_resuming_with_another_network_is_an_error(config, capfd):
    assert main(["fit", "--config", str(config)]) == 0
    line = _error_line(capfd, "fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", 3, "--model.student.width", 5)
    assert "kdkernels fit: the checkpoint belongs to a different network: " in line
    assert "student.conv.weight" in line


def test_best_checkpoint_can_be_resumed_and_validating_untrained_weights_warns(config, capfd):
    assert main(["fit", "--config", str(config)]) == 0
    capfd.readouterr()
    with pytest.warns(UserWarning, match="the student is evaluated with its initial weights, not with those trained in .*--ckpt_path best"):
        assert main(["validate", "--config", str(config)]) == 0
    for subcommand in ("validate", "fit"):
        assert main([subcommand, "--config", str(config), "--ckpt_path", "best", "--trainer.max_epochs", "3"]) == 0


def test_student_from_a_checkpoint_can_be_exported_without_it(config, capfd, tmp_path):
    assert main(["fit", "--config", str(config)]) == 0
    student = ["--model.student", "kdkernels.models.from_checkpoint", "--model.student.path", str(tmp_path / "run" / "best.ckpt")]
    assert main(["fit", "--config", str(config), *student, "--trainer.default_root_dir", str(tmp_path / "second")]) == 0
    (tmp_path / "run" / "best.ckpt").unlink()
    (tmp_path / "elsewhere" / "its_nets.py").write_text(NETS)
    target = str(tmp_path / "s.safetensors")
    assert main(["export", "--ckpt", str(tmp_path / "second" / "best.ckpt"), "--out", target]) == 0, capfd.readouterr().err


def test_help_is_short_and_specific_to_the_config(config, capfd):
    assert main(["fit", "--config", str(config), "--help"]) == 0
    text = capfd.readouterr().out
    assert len(text.splitlines()) < 70
    for option in (
        "--model.temperature (4.0)",
        "--model.teacher_weights (None)",
        "--data.val_fraction",
        "--data.batch_size (64)",
        "--trainer.max_epochs",
    ):
        assert option in text
    assert "--data.batch_size (64) images per batch and process" in " ".join(text.split())  # from the docstring of the base class
    assert ":class:" not in text
    assert main(["fit", "-h"]) == 0
    text = capfd.readouterr().out
    assert all(name in text for name in ("KD", "FSP", "SVDKD", "Supervised", "ImageFolder", "CIFAR100"))
    assert len(text.splitlines()) < 50
    with pytest.raises(SystemExit):
        main(["fit", "--help_all"])
    assert len(capfd.readouterr().out.splitlines()) > 200


def test_messages_of_one_line():
    assert one_line(ValueError("student must\n be small")) == "student must be small"
    assert one_line(KeyError("step")).startswith("KeyError: 'step' (")
    assert one_line(ZeroDivisionError()).startswith("ZeroDivisionError (")
    in_worker = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\nValueError: sample 3 is odd\n"
    )
    assert one_line(ValueError(in_worker)) == "ValueError: sample 3 is odd"
    assert one_line(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")).startswith("out of memory: CUDA out of memory.")
    assert "\x1b" not in one_line(RuntimeError("\x1b[31mred\x1b[0m"))
    assert one_line(ModuleNotFoundError("No module named 'x'", name="x")).startswith("No module named 'x' (modules are searched in")
    assert one_line(ModuleNotFoundError("this needs y")) == "this needs y"
    try:
        nn.Linear(2, 2).load_state_dict(nn.Linear(3, 2).state_dict())
    except RuntimeError as error:
        line = one_line(error)
    assert line.startswith("the checkpoint belongs to a different network: size mismatch for weight")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("trainer", "3", "section trainer of .* must be a mapping, got 3"),
        ("trainer", "", "section trainer of .* must be a mapping, got None"),
        ("model", "", "section model of .* must be a mapping, or the import path of a class, got None"),
        ("data", "[1]", r"section data of .* must be a mapping, or the import path of a class, got \[1\]"),
        ("model", "{class_path: kdkernels.distill.KD, init_args: }", "init_args of section model of .* must be a mapping, got None"),
        ("base", "", "base of .* must be the name of a file, got None"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--print_config",)], ids=["fit", "print_config"])
def test_sections_that_are_not_mappings_are_errors(config, capfd, section, value, message, options):
    lines = config.read_text().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{section}:")), len(lines))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    config.write_text("\n".join([*lines[:start], f"{section}: {value}", *lines[end:]]))
    assert re.search(message, _error_line(capfd, "fit", "--config", config, *options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping"),
        (b"- a: b", "must be a mapping"),
        (b"a: [", "is not valid YAML"),
        (b"\xff", "is not UTF-8 text"),
        (b"model: KD\nmodel: KD", "is not valid YAML: the key 'model' occurs twice in a mapping"),
    ],
)
def test_errors_of_a_config_file_name_it(config, capfd, content, message):
    config.write_bytes(content)
    assert f"config: {str(config)!r} {message}" in _error_line(capfd, "fit", "--config", config, "--print_config")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{width: 6}", "{width: }", "model.teacher.width must be int, got null"),
        ("{class_path: its_nets.Small}", "null", "model.student must be torch.nn.modules.module.Module, got null"),
        ("size: 8", "size: 8, zzz: {}", "data (ImageFolder) has no option 'zzz'"),
        ("{width: 6}", "{width: 6, head: {}}", "model.teacher (Small) has no option 'head'"),
        ("max_epochs: 2", "max_epochs: 2, max_epoch: {}", "trainer (Trainer) has no option 'max_epoch'; did you mean 'max_epochs'?"),
    ],
)
def test_null_and_unknown_empty_arguments_of_a_config_are_errors(config, capfd, old, new, message):
    """The parser itself accepts them."""
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    for options in ((), ("--print_config",)):
        line = _error_line(capfd, "fit", "--config", config, *options)
        assert line.startswith(f"kdkernels fit: config: {message}")
        assert line.endswith(f"(in {str(config)!r})")


def test_options_do_not_change_a_list_of_teachers(config, capfd):
    text = config.read_text()
    config.write_text(text.replace("teacher: {class", "teacher: [{class").replace("{width: 6}}", "{width: 6}}, {class_path: its_nets.Small}]"))
    line = _error_line(capfd, "fit", "--config", config, "--model.teacher.width", "5", "--print_config")
    assert "--model.teacher.width: the config has a list of 2 teachers, so this option is ambiguous: change the list in the config" in line
    overlay = config.parent / "overlay.yaml"
    overlay.write_text(f"base: {config.name}\nmodel: {{init_args: {{teacher: {{init_args: {{width: 3}}}}}}}}\n")
    line = _error_line(capfd, "fit", "--config", overlay, "--print_config")
    assert "changes model.init_args.teacher by a mapping, but its base has a list there: give the whole list" in line
