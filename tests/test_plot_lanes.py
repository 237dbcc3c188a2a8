"""kdkernels plot lanes, and self attention distillation of a lane detector."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
from kdkernels.cli import main
from kdkernels.distill.restore import restore
from kdkernels.plots import lanes as plot
from kdkernels.tasks.lane_curves import culane_rows

ROOT = Path(__file__).parent.parent
SMALL = [
    "--model.student.width=0.05",
    "--data.train_size=8",
    "--data.val_size=4",
    "--data.test_size=2",
    "--data.size=[32,64]",
    "--model.student.image_size=[32,64]",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
]


def test_plot_lanes_before_and_after_sad(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(ROOT / "configs" / "sad_lanes.yaml"), *SMALL, "--model.start_step=1"]) == 0
    capsys.readouterr()
    ckpts = ["--ckpt", "runs/sad_lanes/best.ckpt", "runs/sad_lanes/last.ckpt"]
    assert main(["plot", "lanes", *ckpts, "--images", "2", "--out", "l.svg"]) == 0
    text = Path("l.svg").read_text()
    assert "</svg>" in text
    assert all(f"<!-- {layer} -->" in text for layer in ("encoder2", "encoder4", "labelled lanes"))  # names in the SVG's comments
    assert main(["export", "--ckpt", ckpts[2], "--out", "student.pt2"]) == 0
    image = torch.rand(3, 3, 32, 64)
    method = restore(ckpts[2])[0].eval()
    with torch.no_grad():
        expected = method.student(image)
        found = torch.export.load("student.pt2").module()(image)
    assert found.keys() == expected.keys() == {"logits", "existence"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    for arguments, message in (
        (["--images", "0"], "images must be at least 1"),
        (["--layers", "[encoder9]"], "no layer 'encoder9'; did you mean"),
        (["--out", "l.gif"], "out must end in .png, .svg or .pdf"),
    ):
        assert main(["plot", "lanes", *ckpts, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not Path("lanes.png").exists()
    assert main(["fit", "--config", str(ROOT / "configs" / "sad_lanes.yaml"), *SMALL, "--restart=true"]) == 1
    assert "start_step must be below the number of steps of the run, 2, got 1500" in capsys.readouterr().err


def test_drawn_curves_are_those_of_the_labels():
    labelled = torch.full((1, 4, len(culane_rows(32))), float("nan"))
    labelled[0, 1] = torch.arange(len(culane_rows(32)))
    features = {"a": torch.rand(1, 3, 4, 8)}
    figure = plot._draw(torch.rand(1, 3, 32, 64), [("run", labelled.flip(1), labelled, features)], culane_rows(32))
    left, right, attention = figure.axes[:3]
    assert left.lines[1].get_xdata().tolist() == list(range(len(culane_rows(32))))
    assert left.lines[1].get_ydata().tolist() == culane_rows(32)
    assert right.lines[2].get_xdata().tolist() == left.lines[1].get_xdata().tolist()
    drawn = torch.from_numpy(attention.images[1].get_array().data)
    energy = features["a"].square().sum(1)[0]
    torch.testing.assert_close(drawn[::8, ::8], energy / energy.max())
