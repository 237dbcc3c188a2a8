"""kdkernels plot curves and kdkernels plot confusion."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
from tiny_runs import data_of

from kdkernels.cli import main
from kdkernels.distill import Supervised
from kdkernels.plots import confusion as plot_of_confusion
from kdkernels.plots.confusion import Confusion, most_frequent, plot_confusion
from kdkernels.plots.curves import plot_curves, table

HEADER = "epoch,lr,step,train/loss,val/accuracy"


def _write(folder, version, *lines):
    path = folder / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def test_versions_of_a_resumed_run_are_joined(tmp_path):
    run = tmp_path / "kd"
    _write(run, 0, HEADER, "0,,4,,0.1", "0,,9,2.0,", "1,,14,,0.2", "1,,19,1.5,0.3", ",0.1,25,,", "2,,29,9.0,0.9")
    _write(run, 2, "epoch,step,val/accuracy,train/loss", "2,29,0.4,", "2,29,,1.0", "3,34,0.5,")
    _write(run, 10, "epoch,step,test/accuracy", "0,0,0.7")  # of kdkernels test
    _write(run, 9, HEADER, "3,,34,,0.6", "3,,39,0.5,nan")
    out, metric, (curves,) = plot_curves([run], tmp_path / "c.svg")
    assert out.read_text().endswith("</svg>\n")
    assert (metric, curves.name) == ("val/accuracy", "kd")
    assert curves.loss == [(1, 2.0), (2, 1.5), (3, 1.0), (4, 0.5)]
    assert curves.metric[:5] == [(0.5, 0.1), (1.5, 0.2), (2, 0.3), (3, 0.4), (3.5, 0.6)]
    assert table([curves], metric).splitlines()[2].split() == ["kd", "4", "nan", "0.6000", "3.5", "0.1000", "0.5"]


def test_a_restarted_run_replaces_the_old_one(tmp_path):
    _write(tmp_path / "a", 0, HEADER, "0,,4,2.0,0.1", "1,,9,1.0,0.2", "2,,14,0.5,0.3")
    _write(tmp_path / "a", 1, HEADER, "0,,9,1.5,0.4")
    _write(tmp_path / "b" / "a", 0, HEADER, "0,,4,2.0,0.1", "1,,7,,0.2")
    _, _, (first, second) = plot_curves([tmp_path / "a", tmp_path / "b" / "a"], tmp_path / "c.pdf", "val/accuracy")
    assert first.metric == [(1, 0.4)]
    assert second.metric == [(1, 0.1), (1.6, 0.2)]  # the epoch that is not finished has as many steps as the one before
    assert [first.name, second.name] == [str(tmp_path / "a"), str(tmp_path / "b" / "a")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "contains no log; kdkernels fit writes one"),
        (["epoch,step,val/accuracy", "0,0,0.5"], "contains only logs without a training"),
        ([HEADER, "0,,4,2.0,0.1", "1,,9,1.0"], "is damaged: line 3 has 4 columns, the first line 5"),
        ([HEADER, "0,,4,2.0,0.1", "1,,9,x,0.1"], "is damaged: line 3: could not convert string to float: 'x'"),
        ([HEADER, "0,,,2.0,0.1"], "is damaged: line 2 has no number of its step or epoch"),
        (["1,2,3"], "its first line must name the columns"),
        ([HEADER, '0,,"4'], "is damaged: unexpected end of data"),
        (["epoch,step,train/loss", "0,4,2.0"], "has no 'val/accuracy'; it has train/loss"),
    ],
)
def test_errors_of_logs_are_one_line(lines, message, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    if lines:
        _write(run, 0, *lines)
    assert main(["plot", "curves", "--runs", str(run), "--out", str(tmp_path / "c.png")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


def test_errors_of_arguments(tmp_path, capsys):
    run = tmp_path / "run"
    _write(run, 0, HEADER, "0,,4,2.0,0.1")
    out = ["--out", str(tmp_path / "c.png")]
    for arguments, message in (
        (["--runs", str(tmp_path / "absent"), *out], "there is no folder"),
        (["--runs", str(run), str(run), *out], "is given twice"),
        (["--runs", str(run), "--metric", "val/f1", *out], "has no 'val/f1'; it has train/loss, val/accuracy"),
        (["--runs", str(run), "--out", "c.gif"], "out must end in .png, .svg or .pdf"),
    ):
        assert main(["plot", "curves", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["plot", "curves"]) == 2
    assert "missing required options: --runs" in capsys.readouterr().err
    assert main(["plot", "curves", "--runs", str(run), *out]) == 0
    assert "0.1000" in capsys.readouterr().out


class Constant(nn.Module):
    """Predicts the number in the first pixel of an image, and has a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()


def _images(predictions, labels):
    return [(torch.full((3, 2, 2), float(p)), label) for p, label in zip(predictions, labels, strict=True)]


def test_confusion_matrix_of_known_predictions(tmp_path, monkeypatch):
    labels = [0, 0, 0, 0, 1, 1, 1]
    runs = {"a/best.ckpt": [0, 0, 1, 1, 1, 1, 2], "b/best.ckpt": [0, 0, 0, 1, 1, 1, 1]}

    def restored(ckpt):
        data = data_of(_images(runs[ckpt], labels))
        data.setup()
        data.splits = {"val": data.splits["train"], "test": data.splits["val"]}
        data.val_dataloader = lambda: data._loader("val", shuffle=False)
        return Supervised(Constant()), data

    monkeypatch.setattr(plot_of_confusion, "restore_with_images", restored)
    out, results = plot_confusion(list(runs), tmp_path / "c.svg")
    assert out.exists()
    assert results[0].counts.tolist() == [[2, 2, 0], [0, 2, 1], [0, 0, 0]]
    assert results[1].counts.tolist() == [[3, 1, 0], [0, 3, 0], [0, 0, 0]]
    assert results[0].shares[0].tolist() == [0.5, 0.5, 0]
    assert results[0].shares[2].isnan().all()
    assert [r.accuracy for r in results] == [4 / 7, 6 / 7]
    figure = plot_of_confusion.draw(results)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == [
        "a/best\naccuracy 57.14 %, 7 images",
        "b/best\naccuracy 85.71 %, 7 images",
        "second minus first\naccuracy +28.57 percentage points",
    ]
    assert [text.get_text() for text in figure.axes[2].texts][:3] == ["+25", "-25", ""]
    assert [text.get_text() for text in figure.axes[0].texts][:3] == ["50\n(2)", "50\n(2)", ""]
    assert most_frequent(results[0]).splitlines()[1:] == [
        "  2 of 4 images of '0' (50.0%) are predicted as '1'",
        "  1 of 3 images of '1' (33.3%) are predicted as '2'",
    ]


def test_many_classes_have_no_numbers():
    names = [f"class {i}" for i in range(100)]
    result = Confusion("run/best", names, torch.eye(100, dtype=torch.int64))
    figure = plot_of_confusion.draw([result])
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_yticklabels()) == 100
    assert most_frequent(result).endswith("no confusions")


FIT = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.default_root_dir=runs/a", "--data.batch_size=16"]
FIT += ["--data.train_size=32", "--data.val_size=16", "--data.test_size=8", "--model.student.width=2"]


def test_both_plots_of_a_run_of_kdkernels_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ["fit", "--config", str(Path(__file__).parent.parent / "configs" / "teacher_clutter_digits.yaml"), *FIT]
    assert main([*config, "--trainer.max_epochs=2"]) == 0
    assert main(["plot", "curves", "--runs", "runs/a", "--metric", "val/cross_entropy"]) == 0
    assert Path("curves.png").exists()
    _, _, (curves,) = plot_curves(["runs/a"], "c.svg")
    assert [epoch for epoch, _ in curves.metric] == [epoch for epoch, _ in curves.loss] == [1, 2]
    capsys.readouterr()
    assert main(["plot", "confusion", "--ckpt", "runs/a/last.ckpt", "--split", "test"]) == 0
    assert "a/last: accuracy" in capsys.readouterr().out
    assert Path("confusion.png").exists()
    result = plot_of_confusion.confusion("runs/a/last.ckpt")
    assert result.classes == list("0123456789")
    assert result.accuracy == pytest.approx(curves.metric[-1][1])
    assert main(["plot", "confusion", "--ckpt", "runs/a/last.ckpt", "--split", "train"]) == 2
    assert main(["plot", "confusion", "--ckpt", "absent.ckpt"]) == 1
    assert "absent.ckpt" in capsys.readouterr().err


def test_confusion_refuses_other_tasks(monkeypatch):
    from kdkernels.tasks import Segmentation

    method = Supervised(nn.Conv2d(3, 2, 1), task=Segmentation())
    monkeypatch.setattr(plot_of_confusion, "restore_with_images", lambda ckpt: (method, data_of()))
    with pytest.raises(ValueError, match="must be a run of a classification, its task is Segmentation"):
        plot_of_confusion.confusion("a.ckpt")
