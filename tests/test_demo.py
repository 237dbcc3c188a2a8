"""A small demo run that is interrupted, resumed and reported, and `fit` with the configs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning")
from kdkernels.cli import main

ROOT = Path(__file__).parent.parent


def _environment() -> dict:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def _restore_ctrl_c() -> None:
    """Restore SIGINT's default handler: a shell ignores SIGINT in background jobs, and child
    processes inherit this.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_demo_can_be_resumed(tmp_path):
    command = [sys.executable, "-m", "kdkernels", "demo", "--quick", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_restore_ctrl_c)
    results = tmp_path / "out" / "trainings"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(results.rglob("*.json"))) >= 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "resume with: kdkernels demo --quick" in output
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    assert 4 <= len(before) < 12

    run = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list(results.rglob("*.json"))) == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before  # finished trainings are not repeated
    rows = {line["row"]: line for line in json.loads((tmp_path / "out" / "comparison.json").read_text())["table"]}
    assert [row.partition(":")[0] for row in rows] == ["alone", "kd", "at", "fsp", "svd_kd"]
    page = (tmp_path / "out" / "report.html").read_text()
    for op in ("temperature_kl", "attention_transfer_loss", "truncated_svd", "rbf_correlation_loss"):
        assert re.search(rf"^{op} .* ms \(.*x\)", run.stdout, re.MULTILINE), run.stdout
        assert f"<td>{op} " in page
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # the page loads no external files


def test_demo_in_a_folder_that_cannot_be_created_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "sub")]) == 2
    assert "--out: cannot create the folder" in capsys.readouterr().err


def test_fit_with_the_configs_of_the_readme(tmp_path):
    """Train teacher and student with the two commands of the README, with a few batches each."""
    small = ["--data.train_size=64", "--data.val_size=32", "--data.test_size=32", "--trainer.max_epochs=1"]
    for name in ("teacher", "kd"):
        command = [sys.executable, "-m", "kdkernels", "fit", "--config", str(ROOT / f"configs/{name}_clutter_digits.yaml"), *small]
        run = subprocess.run(command, env=_environment(), capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        assert (tmp_path / "runs" / name / "last.ckpt").exists()
    command = [sys.executable, "-m", "kdkernels", "test", "--config", str(ROOT / "configs/kd_clutter_digits.yaml"), *small]
    run = subprocess.run([*command, "--ckpt_path", "runs/kd/last.ckpt"], env=_environment(), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test/accuracy" in run.stdout
