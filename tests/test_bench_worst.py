"""``kdkernels bench --worst``: which peers count, the cells, the file, tables and the command."""

import contextlib
import hashlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, sum_error

from kdkernels import cli

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
from kdkernels.benches import grid, grid_cells, grid_results, performance
from kdkernels.benches.tables import aligned, markdown

from kdkernels.cli import bench_worst

SMOKE_CELLS = [cell for op in grid_cells.GRIDS for cell in grid_cells.cells_of(op, smoke=True)]


@pytest.fixture
def not_compiled():
    """Run the contender "Inductor" without compiling it, which would take most of the time."""
    with torch._dynamo.config.patch(disable=True):
        yield


# The rule.


@pytest.mark.parametrize(
    ("fused", "peer", "counts"),
    [
        ({"value": 0.1, "gradient": 0.1}, {"value": 1.0, "gradient": 0.9}, True),  # passes the tests
        ({"value": 0.1, "gradient": 0.1}, {"value": 1.1, "gradient": 0.1}, False),
        ({"value": 0.5, "gradient": 0.1}, {"value": 1.1, "gradient": 0.3}, True),  # three times the errors of the fused op
        ({"value": 0.5, "gradient": 0.1}, {"value": 1.1, "gradient": 0.4}, False),  # both errors must obey one of the two rules
        ({"value": 0.0}, {"value": 0.0}, True),
        ({"value": 0.1}, {"value": math.nan}, False),
        ({"value": math.nan}, {"value": math.inf}, False),
        ({"value": math.nan}, {"value": 1.0}, True),
    ],
)
def test_peer_counts_if_it_is_as_accurate(fused, peer, counts):
    assert grid.peers_that_count({"fused": fused, "peer": peer}) == ["peer"] * counts


def _measured(monkeypatch, times, errors, **contenders):
    """Measure a cell whose contenders have these times and errors."""
    monkeypatch.setattr(grid, "time_interleaved", lambda calls, **options: {name: times[name] for name in calls})
    functions = {name: (lambda x, name=name: name) for name in times} | contenders
    comparison = grid_cells.Comparison(functions, (torch.ones(1),), lambda function, direction: {"value": errors[function(None)]})
    cell = grid_cells.GridCell("temperature_kl", "a cell", lambda: comparison)
    return grid.measure(cell, comparison, "forward", 1.0)


TIMES = {"fused": [2.0, 4.0, 6.0], "slow": [8.0, 16.0, 24.0], "fast": [1.0, 2.0, 3.0]}


def test_ratio_is_that_of_the_fastest_peer_that_counts(monkeypatch):
    row = _measured(monkeypatch, TIMES, {"fused": 0.1, "slow": 0.2, "fast": 0.3})
    assert (row["peer"], row["ratio"], row["counted"]) == ("fast", 0.5, ["slow", "fast"])
    assert row["seconds"] == {"fused": 4.0, "slow": 16.0, "fast": 2.0}
    assert grid_results.is_lost(row)
    row = _measured(monkeypatch, TIMES, {"fused": 0.1, "slow": 0.2, "fast": 5.0})
    assert (row["peer"], row["ratio"], row["counted"]) == ("slow", 4.0, ["slow"])
    assert not grid_results.is_lost(row)


def test_ratio_is_the_median_over_the_rounds(monkeypatch):
    times = {"fused": [1.0, 2.0, 10.0], "peer": [5.0, 4.0, 30.0]}  # the quotient of the medians is 5 / 2
    assert _measured(monkeypatch, times, {"fused": 0.1, "peer": 0.1})["ratio"] == 3.0


def test_first_peer_is_compared_if_none_counts(monkeypatch):
    row = _measured(monkeypatch, TIMES, {"fused": 0.1, "slow": math.nan, "fast": 5.0})
    assert (row["peer"], row["ratio"], row["counted"]) == ("slow", 4.0, [])
    assert row["errors"]["slow"] == {"value": None}
    json.dumps(row, allow_nan=False)


def test_failed_peer_is_recorded_and_the_fused_op_must_not_fail(monkeypatch):
    def broken(x):
        raise RuntimeError("cannot\nand a second line")

    row = _measured(monkeypatch, TIMES, {"fused": 0.1, "slow": 0.1}, fast=broken)
    assert row["failed"] == {"fast": "RuntimeError: cannot"}
    assert (row["peer"], set(row["seconds"])) == ("slow", {"fused", "slow"})
    with pytest.raises(RuntimeError, match="temperature_kl: a cell, forward: RuntimeError: cannot"):
        _measured(monkeypatch, TIMES, {"slow": 0.1, "fast": 0.1}, fused=broken)


@pytest.mark.parametrize(("ratio", "lost"), [(0.9, True), (1 / 1.1, False), (1.0, False)])
def test_lost_means_slower_by_more_than_a_tenth(ratio, lost):
    assert grid_results.is_lost({"ratio": ratio}) == lost


# The bounds and the cells.


@given(st.floats(-2, 2), st.floats(0, 3), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 99))
def test_error_of_1_is_what_the_tests_allow(size, scale, dtype, seed):
    expected = size * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rtol = sum_error(dtype, 100)
    bound = grid_cells.Bound(expected, rtol, scale, 1e-15)
    actual = (expected * (1 + rtol * (1.5 + torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)))).to(dtype)
    error = bound.error(actual)
    if abs(error - 1) > 1e-6:
        with contextlib.nullcontext() if error < 1 else pytest.raises(AssertionError, match="off by"):
            assert_close("actual", actual, expected, rtol=rtol, scale=scale, atol=1e-15)


def test_sum_error_is_that_of_the_tests():
    for dtype, length in ((torch.float32, 1000), (torch.float64, 3)):
        assert grid_cells.sum_error(dtype, length, 40) == sum_error(dtype, length, 40)


def test_names_are_unique_and_the_cells_are_always_the_same():
    grids = {op: grid_cells.cells_of(op) for op in grid_cells.GRIDS}
    for op, cells in grids.items():
        assert {cell.op for cell in cells} == {op}
        assert len({cell.name for cell in cells}) == len(cells)
        assert [cell.name for cell in cells] == [cell.name for cell in grid_cells.cells_of(op)]
    assert [len(cells) for cells in grids.values()] == [54, 49, 48, 466]
    # These results are compared with those of earlier versions, so the points must not change.
    names = [cell.name for cell in grids["truncated_svd"]]
    assert (names[0], names[-1]) == ("1 x 2 x 2, k = 1, orthogonal, float64", "256 x 1024 x 16, k = 16, random, float64")
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "04ff10bb5db619e6"
    assert sum(cell.group is not None for cell in grids["truncated_svd"]) == 144
    assert {"1 x 2, float32", "1 x 2, bfloat16"} < {cell.name for cell in grids["temperature_kl"]}
    assert "1 x 1 x 1 x 1, float64" in {cell.name for cell in grids["attention_pool"]}
    assert tuple(grids) == bench_worst.OPS


@pytest.mark.parametrize("cell", SMOKE_CELLS, ids=lambda cell: f"{cell.op}: {cell.name}")
def test_errors_are_measured(cell, not_compiled):
    """The fused op and the float64 reference are within the bounds, and a wrong result is not."""
    comparison = cell.make()
    for direction in cell.directions:
        errors, failed = grid._errors(comparison, direction)
        assert not failed
        assert set(errors) == set(comparison.contenders)
        assert all(error <= 1 for error in errors["fused"].values())

        def wrong(*inputs):
            results = comparison.contenders["fused"](*inputs)
            return tuple(1.01 * x + 1e-3 for x in results) if isinstance(results, tuple) else 1.01 * results + 1e-3

        found = comparison.errors(wrong, direction)
        assert found["s" if "s" in found else "value"] > 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "every other"])
def test_layouts_have_the_same_values_and_other_strides(layout):
    x = torch.randn(2, 3, 4, 5)
    y = grid_cells.with_layout(x, layout)
    assert torch.equal(x, y)
    assert (y.stride() == x.stride()) == (layout == "contiguous")


# The file and the tables.


def _row(cell="a", ratio=2.0, **changes):
    return {
        "op": "truncated_svd",
        "cell": cell,
        "direction": "forward",
        "seconds": {"fused": 1e-3, "linalg.svd": 1e-3 * ratio, "eigh": 0.5e-3},
        "ratio": ratio,
        "counted": ["linalg.svd"],
        "errors": {"fused": {"s": 0.1}},
        "failed": {},
        "commit": "abc",
    } | changes


def test_new_rows_replace_those_of_the_same_name():
    earlier = [_row("a", 1.0), _row("b", 2.0), _row("a", 3.0, direction="forward + backward"), _row("a", 4.0, op="attention_pool")]
    merged = grid_results.merged(earlier, [_row("c", 5.0), _row("a", 6.0)])
    assert [(row["op"], row["cell"], row["ratio"]) for row in merged] == [
        ("truncated_svd", "a", 6.0),
        ("truncated_svd", "b", 2.0),
        ("truncated_svd", "a", 3.0),
        ("attention_pool", "a", 4.0),
        ("truncated_svd", "c", 5.0),
    ]


def test_table_has_the_ten_worst_rows_and_the_times_of_all_contenders():
    rows = [_row(f"cell {i}", ratio) for i, ratio in enumerate([3.0, 0.5, *[4.0] * 9, 1.0])]
    rows[1] |= {"counted": [], "failed": {"power iteration": "RuntimeError: no"}}
    table = grid_results.worst_table(rows)
    assert table.columns == ["input", "direction", "fused, ms", "linalg.svd, ms", "eigh of the Gram matrix, ms", "power iteration, ms", "ratio"]
    texts = [[entry.text for entry in line] for line in table.rows]
    assert texts[0] == ["cell 1", "forward", "1", "(0.5)", "(0.5)", "failed: RuntimeError", "(0.50x)"]
    assert texts[1] == ["cell 11", "forward", "1", "1", "(0.5)", "-", "1.00x"]
    assert [line[0] for line in texts] == ["cell 1", "cell 11", "cell 0", *(f"cell {i}" for i in range(2, 9))]
    assert len(aligned(table)) == 11
    assert len(markdown(table)) == 12


def test_summary_counts_lost_rows_rows_below_the_target_and_inaccurate_rows():
    rows = [_row("a", 0.8, group="batch >= 16"), _row("b", 1.9, group="batch >= 16"), _row("c", 2.0, group="batch >= 16"), _row("d", 0.9)]
    rows.append(_row("d", 1.0, direction="forward + backward", errors={"fused": {"s": 1.5}}))
    assert grid_results.summary(rows) == [
        "4 cells, 5 rows, 2 lost (ratio below 0.91).",
        "Of the 3 rows with batch >= 16, 2 have a ratio below 2.",
        "In 1 rows, the fused op is less accurate than the tests allow.",
    ]


def test_performance_page_shows_the_worst_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    before = performance.page()
    assert "worst cells" not in before
    about = {"machine": "some-cpu", "processor": "Some CPU", "mode": "full", "threads": 1, "torch": "2.13", "date": "2026-01-02"}
    rows = [_row("a cell", 0.75), _row("another cell", commit="def"), _row("a map", op="attention_pool")]
    folder = tmp_path / "benches" / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "grid.json").write_text(json.dumps({"environment": about, "rows": rows}))
    page = performance.page()
    assert page.startswith(before)
    assert "\n## some-cpu: worst cells\n" in page
    assert "Some CPU, 1 thread, torch 2.13, commit `abc` and `def`, 2026-01-02.\n" in page
    parts = page.split("### Worst cells of ")[1:]
    assert [part.split("\n", 1)[0] for part in parts] == ["attention_transfer_loss", "truncated_svd"]
    assert "2 cells, 2 rows, 1 lost (ratio below 0.91)." in parts[1]
    assert "| a cell | forward | 1 | 0.75 | (0.5) | 0.75x |\n| another cell |" in parts[1]


# The command.


@pytest.fixture
def smoke(monkeypatch, not_compiled):
    monkeypatch.setenv("KDKERNELS_BENCH", "smoke")


def _rows(out):
    return grid_results.load(out / "grid.json")["rows"]


def test_command_measures_prints_and_adds_rows(smoke, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert cli.main(["bench", "--worst", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    rows = _rows(tmp_path)
    assert [(row["op"], row["cell"], row["direction"]) for row in rows] == [(c.op, c.name, d) for c in SMOKE_CELLS for d in c.directions]
    for row in rows:
        assert row["ratio"] > 0
        assert set(row["seconds"]) == set(row["errors"]) > set(row["counted"])
        assert not row["failed"]
        assert row["commit"]
    for cell in SMOKE_CELLS:
        assert f"\n{cell.name}  " in printed
    assert "temperature_kl: measuring 2 cells\n2 cells, 4 rows, " in printed
    assert "truncated_svd: measuring 2 cells\n2 cells, 2 rows, " in printed
    about = grid_results.load(tmp_path / "grid.json")["environment"]
    assert about.keys() == {"machine", "processor", "torch", "threads", "device", "mode", "commit", "date"}
    assert (about["threads"], about["mode"]) == (1, "smoke")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]

    # Selected rows replace those of the same name, and the others stay. If all cells of an op are
    # measured, its other rows are dropped.
    first = rows[0]["cell"]
    stale = rows[0] | {"cell": "an input of an earlier version"}
    (tmp_path / "grid.json").write_text(json.dumps({"environment": about, "rows": [row | {"ratio": -1.0} for row in (*rows, stale)]}))
    assert cli.main(["bench", "--worst", "--out", str(tmp_path), "--select", f"temperature_kl: {first}, forward + backward"]) == 0
    again = _rows(tmp_path)
    assert [(row["cell"], row["direction"]) for row in again if row["ratio"] > 0] == [(first, "forward + backward")]
    assert len(again) == len(rows) + 1
    assert cli.main(["bench", "--worst", "--out", str(tmp_path), "--op", "temperature_kl"]) == 0
    assert [(row["op"], row["ratio"] > 0) for row in _rows(tmp_path)] == [(row["op"], False) for row in rows[4:]] + [("temperature_kl", True)] * 4


@pytest.mark.parametrize("save_every", [-1.0, 1e9])
def test_interrupted_run_keeps_the_measured_rows(save_every, smoke, tmp_path, capsys, monkeypatch):
    measured = []

    def measure(cell, directions, seconds):
        if save_every < 0 and measured:  # the file is also written between two cells
            assert _rows(tmp_path)[-1]["cell"] == measured[-1]
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return [_row(cell.name, op=cell.op, direction=d) for d in directions]

    monkeypatch.setattr(grid, "rows_of_cell", measure)
    monkeypatch.setattr(grid, "SAVE_EVERY", save_every)
    assert cli.main(["bench", "--worst", "--op", "truncated_svd", "--op", "attention_pool", "--out", str(tmp_path)]) == 130
    assert "interrupted; the rows that were measured are saved" in capsys.readouterr().err
    assert [row["cell"] for row in _rows(tmp_path)] == [*measured, measured[-1]]  # the last one in two directions


ERRORS = [
    (["--worst", "--quick"], "not allowed with argument"),
    (["--worst", "--smoke"], "not allowed with argument"),
    (["--worst", "--report"], "--worst cannot be combined with --report"),
    (["--worst", "--compare", "a.json"], "--worst cannot be combined with --compare"),
    (["--worst", "--results", "a.json"], "--worst cannot be combined with --results"),
    (["--worst", "--device", "cuda"], "--worst measures on the CPU, got --device cuda"),
    (["--worst", "--threads", "0"], "--threads must be at least 1, got 0"),
    (["--worst", "--op", "truncated_svd", "--op", "step"], "--worst has no grid of inputs for step; the ops with a grid are temperature_kl, "),
    (["--worst", "--select", "no such row"], "no row's name matches --select and --op"),
    (["--worst", "--out", "file.txt"], "--out: cannot create the folder file.txt"),
    (["--worst", "--out", "other"], "have threads 1, but this run has threads 2: give another folder"),
    (["--worst", "--out", "broken"], "is not a file of worst cells"),
    (["--threads", "2"], "--threads needs --worst"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors_of_the_command(arguments, message, smoke, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.txt").write_text("mine")
    other = json.dumps({"environment": grid.environment(1, smoke=True), "rows": [_row()]})
    for name, content in (("other", other), ("broken", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, "--threads", "2"] if "other" in arguments else arguments
    assert cli.main(["bench", *arguments]) != 0
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert (tmp_path / "other" / "grid.json").read_text() == other
