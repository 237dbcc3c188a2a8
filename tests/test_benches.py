"""The benchmark suite: its measurements are correct, and its files and reports can be read."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels import cli

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
pytest.importorskip("lightning")
ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from benches import bench_step, performance, suite  # noqa: E402
from benches.compare import compare  # noqa: E402
from benches.compare import main as compare_files  # noqa: E402
from benches.limits import RATES, peak_memory, seconds_for  # noqa: E402
from benches.machine import instruction_set, machine  # noqa: E402
from benches.suite import Cell, Measured, Problem, copies_of  # noqa: E402
from benches.tables import load, markdown, plain, rows_of, share_of_limit, tables  # noqa: E402
from benches.timing import Prepared, ratio_interval, time_interleaved  # noqa: E402

MB = 1 << 20


@pytest.fixture(autouse=True)
def _run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(suite, "DEVICE", "cpu")
    monkeypatch.setattr(bench_step, "DEVICE", "cpu")


# Timing.


def test_every_round_runs_every_contender_once_in_varying_order():
    calls = []
    contenders = {name: partial(calls.append, name) for name in "abc"}
    times = time_interleaved(contenders, rounds=40, warmup=2, device="cpu")
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 40)
    assert all(t > 0 for name in times for t in times[name])
    assert calls[:6] == list("aabbcc")
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # all orders


def test_prepared_values_are_passed_on_and_preparation_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    seen = []

    def prepare():
        now[0] += 100
        return len(seen)

    def run(prepared):
        now[0] += 1
        seen.append(prepared)

    times = time_interleaved({"x": Prepared(prepare, run)}, rounds=5, warmup=0, device="cpu")
    assert times == {"x": [1.0] * 5}
    assert seen == [0, 1, 2, 3, 4]


def test_interval_of_equal_ratios_is_a_point():
    times = {"slow": [2.0, 4.0, 6.0], "fast": [1.0, 2.0, 3.0]}
    assert ratio_interval(times, "slow", "fast") == (2, 2, 2)


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=60))
def test_interval_contains_the_median_and_lies_within_the_ratios(ratios):
    times = {"slow": ratios, "fast": [1.0] * len(ratios)}
    median, low, high = ratio_interval(times, "slow", "fast")
    assert min(ratios) <= low <= median <= high <= max(ratios)


def test_interval_covers_the_true_median():
    """The intervals of 200 samples of 41 ratios contain the distribution's median in at least 85 %
    of the cases; 95 % is the nominal rate.
    """
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        ratios = torch.randn(41, generator=generator, dtype=torch.float64).exp().tolist()  # log-normal: its median is 1
        _, low, high = ratio_interval({"slow": ratios, "fast": [1.0] * 41}, "slow", "fast")
        covered += low <= 1 <= high
    assert covered >= 170


# Limits and memory.


@pytest.mark.parametrize("rate", RATES)
def test_rates_are_measured(rate):
    assert 0 < seconds_for(rate, 1e6, "cpu") < math.inf


def test_more_work_takes_longer_at_the_same_rate():
    assert seconds_for("GEMM", 2e9, "cpu") == pytest.approx(2 * seconds_for("GEMM", 1e9, "cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told on Linux")
@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_memory_is_that_of_the_call(megabytes):
    def allocate_two_tensors():
        a = torch.ones(megabytes * MB // 4)
        return (a + a).sum()

    allocate_two_tensors()
    for _ in range(2):  # the second time after a call whose memory was freed but may still be cached
        assert abs(peak_memory(allocate_two_tensors, "cpu") - 2 * megabytes * MB) <= 0.1 * megabytes * MB + 2 * MB
    assert peak_memory(lambda: None, "cpu") <= 2 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told on Linux")
def test_peak_memory_counts_a_gradient_in_reused_memory():
    student, teacher = torch.randn(128, MB // 16, requires_grad=True), torch.randn(128, MB // 16)
    assert student.nbytes == 32 * MB

    def step():
        kdkernels.temperature_kl(student, teacher).backward()
        student.grad = None

    step()  # the memory of this gradient is reused for the next one
    threads_rows = torch.get_num_threads() * 2 * MB // 4  # each thread keeps two rows of 256 KiB
    assert abs(peak_memory(step, "cpu") - (32 * MB + threads_rows)) <= 2 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told on Linux")
def test_gradient_takes_no_more_than_its_memory():
    """Kept memory is on huge pages of 2 MiB; the last part of a gradient is not."""
    student, teacher = torch.randn(9 * 64, MB // 256, requires_grad=True), torch.randn(9 * 64, MB // 256)
    assert student.nbytes == 9 * MB

    def step():
        kdkernels.temperature_kl(student, teacher).backward()
        student.grad = None

    step()
    assert abs(peak_memory(step, "cpu") - 9 * MB) <= MB // 2


# Rows.


def _problem(**functions) -> Problem:
    x = torch.randn(6, 5, requires_grad=True)
    exact = lambda x: x.square().sum()  # noqa: E731
    fused = lambda x: (x * x).sum()  # noqa: E731
    return Problem({"fused": fused, "eager": exact, **functions}, (x,), exact, tolerance={"value": 1e-6, "gradient": 1e-6}, moved={"forward": 120})


def _measured(problem: Problem) -> Measured:
    return Measured(Cell("temperature_kl", "a cell", lambda: problem, seconds=0.01))


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no backward here\nand a second line")


def test_row_holds_times_ratios_errors_limits_and_memory():
    row = _measured(_problem()).row("forward")
    assert row["op"] == "temperature_kl"
    assert row["rounds"] == len(row["times"]) >= 5
    assert set(row["seconds"]) == {"fused", "eager"}
    median, low, high = row["ratios"]["eager"]
    assert low <= median <= high
    assert row["errors"]["fused"]["error"] <= 1e-6
    assert set(row["memory"]) == {"fused", "eager"}
    assert row["inputs"] == 120
    assert share_of_limit(row) == ("copy", row["limits"]["copy"] / row["seconds"]["fused"])
    assert not row["failed"]


def test_errors_are_those_of_the_measured_direction():
    wrong = lambda x: x.square().sum() * 1.01 - 0.01 * x.detach().square().sum()  # noqa: E731  the gradient is wrong by 1 %
    measured = _measured(_problem(wrong=wrong))
    errors = {d: measured.row(d)["errors"]["wrong"]["error"] for d in suite.DIRECTIONS}
    assert errors["forward"] < 1e-6
    assert errors["backward"] == pytest.approx(0.01, rel=1e-3, abs=0)
    assert errors["forward + backward"] == errors["backward"]


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
def test_failing_contender_is_reported_and_the_others_are_measured(direction):
    def broken(x):
        raise RuntimeError("cannot")

    measured = _measured(_problem(broken=broken, once=_NoBackward.apply))
    row = measured.row(direction)
    assert row["failed"] == {"broken": "RuntimeError: cannot", "once": "NotImplementedError: no backward here"}
    assert set(row["ratios"]) == {"eager"}
    (table,) = tables([row | {"device": "cpu"}])
    texts = [cell.text for cell in table.rows[0]]
    assert "failed: RuntimeError" in texts
    assert "failed: NotImplementedError" in texts


def test_op_with_wrong_results_raises_instead_of_being_timed():
    with pytest.raises(AssertionError, match="a cell: the error of the value is"):
        _measured(_problem(fused=lambda x: x.abs().sum()))
    with pytest.raises(AssertionError, match="the error of the gradient is"):
        _measured(_problem(fused=lambda x: x.square().sum() * 2 - x.detach().square().sum()))

    for nan_value in (True, False):  # a NaN is an error, both in the value and in the gradient

        def spoiled(x, nan_value=nan_value):
            return x.square().sum() * (math.nan if nan_value else 1) + (0 if nan_value else (x - x.detach()).abs().sqrt().sum())

        with pytest.raises(AssertionError, match="is nan, must be at most"):
            _measured(_problem(fused=spoiled))

    def broken(x):
        raise RuntimeError("the op itself")

    with pytest.raises(RuntimeError, match="the op itself"):
        _measured(_problem(fused=broken))


def test_calls_cycle_through_the_copies_of_the_inputs():
    """Calls use the copies of the inputs in turn, so that on a GPU each call reads its inputs from
    memory and not from the cache.
    """
    seen = []
    x = torch.randn(3, 8, requires_grad=True)[:, ::2].detach().requires_grad_()
    fused = lambda x, y: (seen.append(x.data_ptr()), (x * y).sum())[1]  # noqa: E731
    y = torch.randn(3, 4)
    measured = _measured(Problem({"fused": fused}, (x, y), fused))
    measured.input_sets = copies_of(measured.problem.inputs, 3)
    assert [[t.requires_grad for t in s] for s in measured.input_sets] == [[True, False]] * 3
    assert {s[0].stride() for s in measured.input_sets} <= {x.stride(), (4, 1)}
    assert all(torch.equal(s[0], x) for s in measured.input_sets)
    for direction in ("forward", "forward + backward"):
        seen.clear()
        call = measured.call("fused", direction)
        for _ in range(6):
            call()
        assert seen == [s[0].data_ptr() for s in measured.input_sets] * 2
        assert all(t.grad is None for s in measured.input_sets for t in s)


# Training steps.


def _steps():
    from kdkernels import distill, models

    maps = ["layer1", "layer2", "layer3"]
    torch.manual_seed(0)
    nets = lambda: (models.resnet8(num_classes=7), models.resnet8(num_classes=7))  # noqa: E731
    return {
        "KD": distill.KD(*nets()),
        "AT": distill.AttentionTransfer(*nets(), maps, maps, alpha=0.5),
        "FSP": distill.FSP(*nets(), maps, maps),
        "gradient AT": distill.GradientAttentionTransfer(*nets()),
        "SVD-KD": distill.SVDKD(*nets(), maps, maps, k=2),
    }


@pytest.mark.parametrize("name", ["KD", "AT", "FSP", "gradient AT", "SVD-KD"])
def test_step_split_into_parts_has_the_gradients_of_the_whole_step(name):
    """A step whose backward pass is split at the features computes the same gradients as the whole
    step, also with the references in place of the ops.
    """
    method = _steps()[name].double()
    method.student.eval()  # keep the statistics of batch norm fixed
    batch = {"image": torch.randn(4, 3, 16, 16, dtype=torch.float64), "label": torch.randint(7, (4,))}
    parameters = list(method.student.parameters())
    losses = method.losses(batch)[1]
    transfer = losses.pop("svd", None)
    expected = list(torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True))
    if transfer is not None:
        second = torch.autograd.grad(transfer, parameters, allow_unused=True)
        for i, g in enumerate(second):
            if g is not None:
                expected[i] = expected[i] + bench_step.clip_transfer([expected[i]], [g], 0)[0]
    for context in (bench_step.references, lambda: pytest.MonkeyPatch.context()):
        step = bench_step.Step(method, batch)
        found = []
        step.optimizer.step = lambda: found.extend(p.grad.clone() for p in parameters)  # noqa: B023
        with context():
            seconds = step()
        assert all(seconds[part] > 0 for part in bench_step.PARTS)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_references_replace_the_ops_temporarily():
    from kdkernels.tasks import base

    with bench_step.references():
        assert base.temperature_kl is kdkernels.reference.temperature_kl
        assert kdkernels.nn.attention.attention_transfer_loss is kdkernels.reference.attention_transfer_loss
        assert kdkernels.temperature_kl is not kdkernels.reference.temperature_kl
    assert base.temperature_kl is kdkernels.temperature_kl
    assert kdkernels.nn.attention.attention_transfer_loss is kdkernels.attention_transfer_loss


# Result files.


def _result(**ratios) -> dict:
    rows = []
    for cell, ratio in ratios.items():
        row = {
            "op": "temperature_kl",
            "cell": cell,
            "direction": "forward",
            "seconds": {"fused": 1e-3},
            "ratios": {"eager": ratio},
            "failed": {},
            "errors": {},
        }
        rows.append({"extra_info": row | {"machine": "none", "mode": "full", "device": "cpu"}})
    return {"benchmarks": rows}


def test_compare_reports_rows_slower_by_more_than_a_quarter():
    old = _result(steady=[4, 3.9, 4.1], lost=[4, 3.9, 4.1], noisy=[4, 2, 6], gained=[1, 0.9, 1.1], gone=[2, 2, 2])
    new = _result(steady=[3.2, 3.1, 3.3], lost=[2.9, 2.8, 3.0], noisy=[2.5, 1.5, 3.5], gained=[2, 1.9, 2.1], fresh=[1, 1, 1])
    changes = compare(old, new)
    assert [c.cell for c in changes] == ["noisy", "lost", "steady", "gained"]
    assert [c.cell for c in changes if c.regressed] == ["lost"]
    assert changes[1].factor == pytest.approx(2.9 / 4)


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(_result(a=[4, 3.9, 4.1], b=[2, 2, 2])))
    new.write_text(json.dumps(_result(a=[1, 0.9, 1.1])))
    assert compare_files([str(old), str(new)]) == 0  # differences are reported, and are not a failure
    shown = capsys.readouterr().out
    assert "1 ratios of 1 cells compared; 1 cells of the older file were not measured; ratios that fell by more than 25 %: 1" in shown
    assert "4.00x ->     1.00x  temperature_kl: a, forward, against eager" in shown
    assert compare_files([str(old), str(new), "--fail"]) == 1
    assert compare_files([str(new)]) == 0
    assert "there are no committed results of none to compare with" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text('{"benchmarks": [{}]}')
    for files, message in (
        (["broken.json", "new.json"], "not a file of results"),
        (["absent.json", "new.json"], "No such file"),
        (["new.json"] * 3, "one or two"),
    ):
        with pytest.raises(SystemExit):
            compare_files([str(tmp_path / f) for f in files])
        assert message in capsys.readouterr().err


def test_performance_page_matches_the_results():
    run = subprocess.run([sys.executable, "-m", "benches.performance", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_gpu_rows_have_a_separate_section(smoke_run, tmp_path, monkeypatch):
    """Invented results in the form of a GPU's: replayed CUDA graphs, one of which cannot be
    captured, and the versions of CUDA and Triton.
    """
    result = load(smoke_run[0] / "bench.json")
    (tmp_path / "docs").mkdir()
    for device in ("cpu", "cuda"):
        for row in rows_of(result):
            row |= {"device": device, "machine": f"some-{device}"}
            if device == "cuda":
                row |= {
                    "gpu": "Some GPU",
                    "cuda": "13.0",
                    "triton": "3.6.0",
                    "replayed": {"fused": 1e-5, "eager": 4e-5, "Inductor": "RuntimeError: no"},
                }
        folder = tmp_path / "benches" / "results" / f"some-{device}"
        folder.mkdir(parents=True)
        (folder / "bench.json").write_text(json.dumps(result))
        monkeypatch.setattr(performance, "ROOT", tmp_path)
        page = performance.page()
        assert ("## some-cuda\n\nSome GPU, torch" in page) == (device == "cuda")
    line = next(x for x in page.split("## some-cuda")[1].splitlines() if x.startswith("| 128 x 100 | forward |"))
    assert "| 0.01 | 4.00x | failed: RuntimeError |" in line


# The command.


def _bench(*arguments, settings=(), **options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(settings)
    return subprocess.run(
        [sys.executable, "-m", "kdkernels", "bench", *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """Run the benchmarks of a few rows: an op in all directions, points of sweeps, and a training
    step. The contender "Inductor" runs without being compiled, which would take most of the time;
    `make bench-smoke` compiles it.
    """
    out = tmp_path_factory.mktemp("bench")
    settings = {"TORCHDYNAMO_DISABLE": "1"}
    run = _bench(
        "--smoke",
        "--device",
        "cpu",
        "--report",
        "--out",
        out,
        "--select",
        "128 x 100,",
        "--select",
        "rows of 1000",
        "--select",
        "FSP",
        cwd=out,
        settings=settings,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out, run


def test_command_writes_results_figures_and_report(smoke_run):
    out, run = smoke_run
    assert {p.name for p in out.iterdir()} >= {"bench.json", "report.html", "temperature_kl_sweeps.svg", "temperature_kl_sweeps.png"}
    assert not list(out.glob(".bench*")) + list(out.glob("*.tmp"))
    result = load(out / "bench.json")
    rows = rows_of(result)
    assert {row["direction"] for row in rows} == {*suite.DIRECTIONS, "step"}
    for benchmark in result["benchmarks"]:  # pytest-benchmark computes its statistics from the rounds of this suite
        row = benchmark["extra_info"]
        assert benchmark["stats"]["median"] == pytest.approx(row["seconds"]["fused"], rel=1e-6, abs=0)
        assert benchmark["stats"]["rounds"] == row["rounds"]
        assert {"machine", "commit", "torch", "threads", "device"} <= row.keys()
    assert "smoke run: no timing means anything" in run.stdout
    assert "128 x 100" in run.stdout
    assert (out / "temperature_kl_sweeps.svg").read_text().count("limit") >= 1


def test_tables_have_one_line_per_row(smoke_run):
    rows = rows_of(load(smoke_run[0] / "bench.json"))
    by_title = {t.title: t for t in tables(rows)}
    kl = by_title["temperature_kl of logits [rows, classes]"]
    assert len(kl.rows) == sum(row["op"] == "temperature_kl" and "sweep" not in row for row in rows)
    assert len(markdown(kl)) == len(kl.rows) + 2
    assert all(len(line) == len(kl.columns) for line in kl.rows)
    assert any(line.startswith("temperature_kl of logits") for line in plain(rows))


def test_new_rows_are_added_to_the_result_file(smoke_run, tmp_path):
    shutil.copy(smoke_run[0] / "bench.json", tmp_path)
    before = rows_of(load(tmp_path / "bench.json"))
    run = _bench("--smoke", "--device", "cpu", "--out", tmp_path, "--op", "temperature_kl", "--select", "jsd, backward")
    assert run.returncode == 0, run.stdout + run.stderr
    after = rows_of(load(tmp_path / "bench.json"))
    assert [r["cell"] for r in after] == [*(r["cell"] for r in before), "1024 x 1000, jsd"]


ERRORS = [
    (["--op", "softmax"], "invalid choice: 'softmax'"),
    (["--results", "absent.json"], "--results: "),
    (["--smoke", "--quick"], "not allowed with argument"),
    (["--smoke", "--select", "no such row", "--out", "empty"], "no row's name matches --select and --op"),
    (["--quick", "--select", "no such row", "--out", "empty"], "no row's name matches --select and --op"),
    (["--out", "file.txt"], "--out: cannot create the folder file.txt"),
    (["--out", "other"], "has results of a smoke run"),
    (["--out", "broken"], "is not a file of results"),
]
if not torch.cuda.is_available():
    ERRORS.append((["--device", "cuda"], "--device cuda: torch finds no GPU on this machine"))


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors_of_the_command(arguments, message, smoke_run, tmp_path, monkeypatch, capfd):
    (tmp_path / "file.txt").write_text("mine")
    for name, content in (("other", (smoke_run[0] / "bench.json").read_text()), ("broken", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments]) != 0
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert (tmp_path / "other" / "bench.json").read_text() == (smoke_run[0] / "bench.json").read_text()
    assert not list(tmp_path.glob("*/.bench*"))


# The report in a browser.


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


def test_report_sorts_tables_and_loads_nothing_from_the_network(smoke_run, browser):
    page = browser.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((smoke_run[0] / "report.html").as_uri())
    assert [r for r in requests if not r.startswith(("file:", "data:"))] == []
    heading = page.locator("h2", has_text="temperature_kl of logits")
    table = heading.locator("xpath=following-sibling::table[1]")
    head = table.locator("th", has_text="ms").first
    column = [h.inner_text().strip() for h in table.locator("th").all()].index("ms")

    def numbers():
        return [float(c.get_attribute("data-value")) for c in table.locator(f"tbody tr td:nth-child({column + 1})").all()]

    before = numbers()
    assert len(before) == 3
    head.locator("button").click()
    assert numbers() == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert numbers() == sorted(before)
    table.locator("th button").first.click()  # columns of words can be sorted too
    words = [c.inner_text() for c in table.locator("tbody tr td:first-child").all()]
    assert words == sorted(words, reverse=True)
    page.fill("#filter", "128 x 100 backward")
    assert table.locator("tbody tr:visible").count() == 2
    for image in page.locator("img").all():
        assert image.evaluate("i => i.complete && i.naturalWidth > 0")
    assert page.locator("img").count() == 1
    assert problems == []
    page.close()


def test_report_fits_a_phone(smoke_run, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True)
    page.goto((smoke_run[0] / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # wide tables have their own scroll bar
    assert float(re.match(r"[\d.]+", page.locator("p").first.evaluate("e => getComputedStyle(e).fontSize")).group()) >= 14
    page.close()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_keeps_the_measured_rows(sent, tmp_path):
    """Only the command receives the signal, as from `timeout` or a job scheduler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "kdkernels", "bench", "--smoke", "--device", "cpu", "--op", "temperature_kl", "--out", str(tmp_path)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.read(1) == "."  # a row is measured
    run.send_signal(sent)
    _, errors = run.communicate()
    assert run.returncode == 128 + sent
    assert "the rows that were measured are saved" in errors
    assert len(rows_of(load(tmp_path / "bench.json"))) >= 1


def test_class_of_a_machine_names_the_instruction_set_of_the_kernels():
    """The package finds the best one in C++, `benches.machine` in /proc/cpuinfo."""
    best = kdkernels._C.build_info()["best_isa"]
    assert instruction_set() == ([] if best == "baseline" else [best])
    assert all(f"-{isa}-" in machine("cpu") for isa in instruction_set())
