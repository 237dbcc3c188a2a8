"""The profile of the ops on a CPU: what takes the time of a call."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benches import bench_attention_pool, bench_temperature_kl, bench_truncated_svd, cpu_profile, performance
from benches.suite import Cell

CELLS = [
    Cell("temperature_kl", "20 x 30", partial(bench_temperature_kl.problem, (20, 30))),
    Cell("attention_pool", "3 x 8 x 5 x 5, channels_last", partial(bench_attention_pool.problem, (3, 8, 5, 5), channels_last=True)),
    Cell("truncated_svd", "16 x 8", partial(bench_truncated_svd.problem, 4, 8, 2)),
]


def test_measured_file_and_its_table(tmp_path, monkeypatch):
    folder = tmp_path / "benches" / "results" / "some-machine"
    monkeypatch.setattr(cpu_profile, "CELLS", CELLS)
    monkeypatch.setattr(cpu_profile, "SMOKE", True)
    monkeypatch.setattr(cpu_profile, "DEVICE", "cpu")
    monkeypatch.setattr("sys.argv", ["cpu_profile", "--out", str(folder / "cpu_profile.json")])
    threads = torch.get_num_threads()
    cpu_profile.main()
    assert torch.get_num_threads() == threads
    result = json.loads((folder / "cpu_profile.json").read_text())
    for cell, row in zip(CELLS, result["rows"], strict=True):
        assert (row["op"], row["cell"]) == (cell.op, cell.name)
        assert set(row["seconds"]) == {"all threads", "one thread", "few numbers"}
        assert all(0 < seconds < 60 for seconds in [*row["seconds"].values(), row["copy"]])
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    page = performance.page()
    assert "## some-machine: what binds" in page
    assert all(f"| {cell.op} | {cell.name} | " in page for cell in CELLS)


@pytest.mark.parametrize(
    ("few_numbers", "copy", "expected"), [(0.5, 0.9, "dispatch"), (0.1, 0.7, "bytes"), (0.1, 0.3, "arithmetic"), (0.1, None, "arithmetic")]
)
def test_what_binds(few_numbers, copy, expected):
    seconds = {"all threads": 1.0, "one thread": 2.0, "few numbers": few_numbers}
    assert performance.binds({"seconds": seconds, "copy": copy}) == expected


def test_few_numbers_have_the_layout_of_all():
    x = torch.randn(8, 6, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    part = cpu_profile.few(x)
    assert part.shape == (4, 4, 4, 4)
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert part.requires_grad
    torch.testing.assert_close(part, x[:4, :4, :4, :4])


def test_profile_of_a_gpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_profile, "DEVICE", "cuda")
    monkeypatch.setattr("sys.argv", ["cpu_profile", "--out", str(Path(tmp_path) / "x.json")])
    with pytest.raises(SystemExit):
        cpu_profile.main()
    assert "KDKERNELS_BENCH_DEVICE=cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
