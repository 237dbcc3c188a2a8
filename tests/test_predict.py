"""Metadata of exported students, the documented inference code, and predictions for a folder."""

import csv
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("onnxruntime")
import lightning as L
from PIL import Image

from kdkernels.cli import main
from kdkernels.data import ImageFolder
from kdkernels.distill import Supervised
from kdkernels.distill import predict as predict_module
from kdkernels.distill.export import export_student
from kdkernels.distill.predict import load_model, predict_images
from kdkernels.models import TinyCNN, TinyFCN
from kdkernels.models.weights import CHECKPOINT_KEY

ROOT = Path(__file__).parent.parent
CLASSES = ["cat", "dog", "owl"]
SPEC = {"class_path": "kdkernels.models.TinyCNN", "init_args": {"width": 4, "num_classes": 3}}
FORMATS = {"onnx": "student.onnx", "torch_export": "student.pt2", "safetensors": "student.safetensors"}


def _photo(path, seed):
    """Save a JPEG that is wider than high, with smooth colours."""
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    small.resize((40 + seed, 30), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a folder with photos and a trained student in every format, and the logits of the
    validation images by path.
    """
    folder = tmp_path_factory.mktemp("there")
    for label, name in enumerate(CLASSES):
        for i in range(3):
            _photo(folder / "photos" / name / f"{i}.jpg", 3 * label + i)
    data = ImageFolder(folder / "photos", size=16, batch_size=4, val_fraction=0.3)
    method = Supervised(TinyCNN(4, num_classes=3))
    method.student_spec = SPEC
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(method, data)
    trainer.save_checkpoint(folder / "student.ckpt")
    export_student(folder / "student.ckpt", {name: str(folder / file) for name, file in FORMATS.items()})
    logits = torch.cat([found["logits"] for found in trainer.predict(method, data)])
    train, val = data._hold_out([(folder / "photos" / name / f"{i}.jpg", label) for label, name in enumerate(CLASSES) for i in range(3)])
    assert len(val) == len(logits) == 3
    assert len(train) == 6
    return folder, dict(zip([path for path, _ in val], logits, strict=True))


def test_every_format_contains_the_metadata(exported):
    folder, _ = exported
    expected = {"task": "classification", "classes": CLASSES, "image_shape": [3, 16, 16], "resize": "center_square_bilinear", "student": SPEC}
    for file in (*FORMATS.values(), "student.ckpt"):
        _, metadata = load_model(folder / file)
        assert {name: metadata[name] for name in expected} == expected
        assert (metadata["mean"], metadata["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("script", ["use_onnx.py", "use_torch_export.py", "use_safetensors.py"])
def test_documented_inference_reproduces_the_validation_logits(exported, script, monkeypatch, capsys):
    folder, logits = exported
    blocks = {name: text for name, text in re.findall(r"^```python\n# (\S+)\n(.*?)^```$", (ROOT / "docs/inference.md").read_text(), re.M | re.S)}
    assert set(blocks) == {"prepare.py", "use_onnx.py", "use_torch_export.py", "use_safetensors.py"}
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "prepare", raising=False)
    for name in ("prepare.py", script):
        (folder / name).write_text(blocks[name])
    for path, expected in logits.items():
        (folder / "photo.jpg").write_bytes(path.read_bytes())
        found = torch.as_tensor(runpy.run_path(script)["logits"])
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
        assert capsys.readouterr().out.strip() == CLASSES[expected.argmax()]


@pytest.mark.parametrize("file", [*FORMATS.values(), "student.ckpt"])
def test_predictions_for_a_folder(exported, tmp_path, file, capsys):
    folder, logits = exported
    out = tmp_path / "new" / "classes.csv"
    command = ["predict", "--model", str(folder / file), "--images", str(folder / "photos"), "--out", str(out), "--top_k=2", "--batch_size=4"]
    assert main(command) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == f"{out}: 9 images"
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    assert [row["file"] for row in rows] == [f"{name}/{i}.jpg" for name in CLASSES for i in range(3)]
    by_file = {row["file"]: row for row in rows}
    for path, values in logits.items():
        row = by_file[path.relative_to(folder / "photos").as_posix()]
        probability, index = values.softmax(0).topk(2)
        assert [row["class"], row["class_2"]] == [CLASSES[i] for i in index]
        assert [float(row["probability"]), float(row["probability_2"])] == pytest.approx(probability.tolist(), abs=1e-4)
    assert [p.name for p in out.parent.iterdir()] == ["classes.csv"]


def test_predictions_are_written_whole_or_not_at_all(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    images = tmp_path / "images"
    for i in range(4):
        _photo(images / f"{i}.jpg", i)
    (images / "2.jpg").write_bytes(b"no image")
    out = tmp_path / "out.csv"
    out.write_text("before")
    with pytest.raises(ValueError, match=r"cannot read the image .*2\.jpg"):
        predict_images(folder / "student.ckpt", images, out, batch_size=1)
    assert out.read_text() == "before"
    assert predict_images(folder / "student.ckpt", images, out, on_error="skip") == 3
    assert "2.jpg" in capsys.readouterr().err
    content = out.read_text()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        predict_images(folder / "student.ckpt", images, out, on_error="skip")
    assert out.read_text() == content
    assert {p.name for p in tmp_path.iterdir()} == {"images", "out.csv"}


def test_file_names_that_are_not_utf8(exported, tmp_path):
    """The name in the CSV file has the same bytes as the name of the image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    _photo(folder / "a.jpg", 0)
    try:
        os.rename(folder / "a.jpg", os.fsencode(folder) + b"/bad\xff.jpg")
    except OSError:
        pytest.skip("this file system allows only names in UTF-8")
    assert predict_images(exported[0] / "student.ckpt", folder, tmp_path / "out.csv") == 1
    assert b"bad\xff.jpg," in (tmp_path / "out.csv").read_bytes()


def test_predict_checks_its_output_before_any_work(exported, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("not an image")
    model, images = exported[0] / "student.ckpt", tmp_path / "broken"
    with pytest.raises(ValueError, match=r"out must be a file, but .* is a folder"):
        predict_images(model, images, images)
    with pytest.raises(ValueError, match="out must be the name of a file, got ''"):
        predict_images(model, images, "")
    with pytest.raises(ValueError, match=r"out must be in a folder, but .*file' is a file"):
        predict_images(model, images, tmp_path / "file" / "out.csv")
    with pytest.raises(ValueError, match=r"images: no file in .* can be read as an image"):
        predict_images(model, images, tmp_path / "out.csv", on_error="skip")
    assert not (tmp_path / "out.csv").exists()


def test_predict_raises_for_invalid_arguments(exported, tmp_path):
    folder, _ = exported
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    photos = folder / "photos"
    for arguments, options, message in (
        ((tmp_path / "none.onnx", photos), {}, r"model: there is no file '.*none\.onnx'"),
        ((tmp_path / "x.bin", photos), {}, r"must end in one of \.onnx, \.pt2, \.safetensors, \.ckpt"),
        ((tmp_path / "plain.ckpt", photos), {}, "is not a checkpoint of this package"),
        ((folder / "student.ckpt", tmp_path / "none"), {}, "there is no folder"),
        ((folder / "student.ckpt", tmp_path / "empty"), {}, "contains no image"),
        ((folder / "student.ckpt", photos), {"top_k": 4}, "top_k must be at most 3, the number of classes, got 4"),
        ((folder / "student.ckpt", photos), {"top_k": 0}, "top_k must be at least 1, got 0"),
        ((folder / "student.ckpt", photos), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((folder / "student.ckpt", photos), {"on_error": "stop"}, 'on_error must be "fail" or "skip"'),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            predict_images(*arguments, tmp_path / "out.csv", **options)
    assert not (tmp_path / "out.csv").exists()


class DictFCN(TinyFCN):
    def forward(self, x):
        return {"out": super().forward(x)}


def test_student_that_returns_a_dict_can_be_exported(tmp_path):
    """The exported files return only the logits. load_model raises for a segmentation, which has no
    class per image.
    """
    network = DictFCN(2).eval()
    spec = {"class_path": "test_predict.DictFCN", "init_args": {"width": 2}}
    state = {f"student.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: {"student": spec, "image_shape": [3, 16, 16], "task": "segmentation"}}, tmp_path / "t.ckpt")
    targets = {"torch_export": str(tmp_path / "t.pt2"), "safetensors": str(tmp_path / "t.safetensors")}
    assert max(export_student(tmp_path / "t.ckpt", targets).values()) < 1e-5
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "t.pt2").module()(image), network(image)["out"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be a student for classification, but its task is segmentation"):
        predict_module.load_model(tmp_path / "t.pt2")


@pytest.mark.parametrize("file", [*FORMATS.values(), "student.ckpt"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_damaged_models_are_named(exported, tmp_path, file, kept, capfd):
    content = (exported[0] / file).read_bytes()
    damaged = tmp_path / file
    damaged.write_bytes(content[: int(kept * len(content))])
    _check_unreadable(damaged, exported[0] / "photos", tmp_path / "out.csv", capfd)


def test_checkpoint_named_like_an_exported_program_is_one_line(exported, tmp_path, capfd):
    renamed = tmp_path / "student.pt2"
    renamed.write_bytes((exported[0] / "student.ckpt").read_bytes())
    _check_unreadable(renamed, exported[0] / "photos", tmp_path / "out.csv", capfd)


def _check_unreadable(model, images, out, capfd):
    assert main(["predict", "--model", str(model), "--images", str(images), "--out", str(out)]) != 0
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert str(model) in errors[0]
    assert "cannot be read" in errors[0]
    assert "damaged or incomplete" in errors[0]
    assert not out.exists()
