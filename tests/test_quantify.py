"""``kdkernels quantify``: the protocol, recorded runs of the user, and wrong input."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
from kdkernels.analysis import KnowledgeRecord, PixelEntropy, Training, block_mask, knowledge_of_trainings, visual_concepts
from kdkernels.cli import main
from kdkernels.cli.quantify import check_comparable
from kdkernels.models import TinyCNN


def test_protocol(tmp_path, capsys):
    out = tmp_path / "q"
    assert main(["quantify", "--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((out / "knowledge.json").read_text())
    assert set(stored["accuracies"]) == {"teacher", "student", "baseline"}
    student = stored["trainings"]["student"]
    assert student["epochs"] == [0, 1, 2]
    assert student["weight_distance"][0] == 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http://" not in page
    assert "https://" not in page
    for row in stored["table"]:
        assert row["quantity"] in printed
        assert row["difference"] == pytest.approx(row["student"] - row["baseline"], abs=1e-9)
    # The stored entropies give the stored numbers again.
    kept = torch.tensor(stored["kept_images"])
    entropy = torch.stack([PixelEntropy.load(out / "entropies" / f"student_epoch_{e}.npz").entropy for e in (0, 1, 2)])[:, kept]
    from kdkernels.data import ClutterDigits

    data = ClutterDigits(train_size=128, val_size=64, test_size=64)
    data.setup()
    mask = block_mask(data.splits["val"][list(range(0, 64, 4))]["mask"].float(), 8)[kept]
    assert visual_concepts(entropy, mask).foreground.tolist() == student["foreground"]
    # Nothing is trained or computed again.
    before = {p: p.stat().st_mtime_ns for p in (out / "entropies").iterdir()}
    assert main(["quantify", "--quick", "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "entropies").iterdir()} == before
    assert json.loads((out / "knowledge.json").read_text())["table"] == stored["table"]
    assert "layer block3, network TinyCNN, images 16, grid 8," in page
    # The trainings are not taken for those of another seed.
    for options, message in ((["--quick", "--seed=1"], "made with seed 0, now 1"), (["--epochs=2"], "made with quick True, now False")):
        capsys.readouterr()
        assert main(["quantify", *options, "--out", str(out)]) != 0
        assert message in capsys.readouterr().err


def test_trainings_that_cannot_be_compared(tmp_path):
    def training(layer="block2", epochs=(0, 1), width=4):
        epochs = list(epochs)
        zeros = [0.0] * len(epochs)
        return Training(KnowledgeRecord(tmp_path, layer, epochs, zeros, zeros, epochs), TinyCNN(width))

    check_comparable(training(), training())
    for other, message in (
        (training(layer="block3"), "must have the same recorded layer, got block2 and block3"),
        (training(epochs=(0, 1, 2)), r"must have the same recorded epochs, got \[0, 1\] and \[0, 1, 2\]"),
        (training(width=8), r"must have the same network, got block1.0.weight \(4, 3, 3, 3\) and block1.0.weight \(8, 3, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_comparable(training(), other)


def _fit(folder, *options, width=4):
    data = ["--data=kdkernels.data.ClutterDigits", "--data.train_size=64", "--data.val_size=32", "--data.test_size=8", "--data.batch_size=16"]
    callback = [
        "--trainer.callbacks+=kdkernels.analysis.KnowledgeRecorder",
        f"--trainer.callbacks.folder={folder}/knowledge",
        "--trainer.callbacks.layer=block2",
    ]
    student = ["--model.student=kdkernels.models.TinyCNN", f"--model.student.width={width}"]
    flags = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    return main(["fit", *options, *student, *data, *callback, *flags])


def test_runs_of_the_user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    teacher = ["--model=kdkernels.distill.KD", "--model.teacher=kdkernels.models.TinyCNN", "--model.teacher.width=4"]
    assert _fit("kd", *teacher) == 0
    assert _fit("alone", "--model=kdkernels.distill.Supervised") == 0
    options = ["--images=3", "--grid=8", "--by=step", "--foreground=center"]
    assert main(["quantify", "--student=kd", "--baseline=alone", "--out=q", *options]) == 0
    stored = json.loads(Path("q/knowledge.json").read_text())
    record = KnowledgeRecord.load("kd/knowledge")
    assert stored["trainings"]["student"]["weight_distance"] == pytest.approx(record.by_step)
    capsys.readouterr()
    for arguments, message in (
        (["--student=kd"], "--student and --baseline must be given together"),
        (["--student=kd", "--baseline=none"], "none"),
        (["--images=0"], "--images must be at least 1, got 0"),
        (
            ["--student=kd", "--baseline=alone", "--out=q", "--grid=16", "--foreground=center", "--images=3"],
            "was made with another grid (grid 8, now 16)",
        ),
    ):
        assert main(["quantify", *arguments]) != 0
        assert message in capsys.readouterr().err


def test_wrong_masks_and_weights_raise(tmp_path):
    record = tmp_path / "record"
    record.mkdir()
    torch.save(TinyCNN(4).state_dict(), record / "epoch_0.pt")
    values = {"version": 1, "layer": "block1", "epochs": [0], "by_epoch": [0.0], "by_step": [0.0], "checkpoints": [0]}
    (record / "knowledge.json").write_text(json.dumps(values))
    images, mask = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8)
    mask[:, 2:4] = 1
    options = {"grid": 4, "copies": 2, "steps": 21, "progress": False}

    def run(network, masks, **more):
        trainings = {"a": Training(KnowledgeRecord.load(record), network)}
        return knowledge_of_trainings(trainings, images, masks, tmp_path / "e", **options | more)

    with pytest.raises(ValueError, match=r"the weights of epoch 0 in .*record' are not those of this network \(TinyCNN\)"):
        run(TinyCNN(6), mask)
    with pytest.raises(ValueError, match=r"mask must have the shape \[2, 8, 8\] of the images, got \[2, 4, 4\]"):
        run(TinyCNN(4), mask[:, :4, :4])
    with pytest.raises(ValueError, match="mask: the images 0, 1 have no block of the foreground"):
        run(TinyCNN(4), 0 * mask)
    with pytest.raises(ValueError, match="filter_from must lie in"):
        run(TinyCNN(4), mask, filter_from=2.0)
    # Of a mask and its complement, the foreground of at most one has the larger mean entropy.
    kept = 0
    for masks in (mask, 1 - mask):
        try:
            kept += run(TinyCNN(4), masks, filter_from=0.0)[1].sum()
        except ValueError as error:
            message = str(error)
            kept += 0 if "none of the 2 images is suitable" in message else 100
    assert kept == 2
