"""``kdkernels compare``: rows, statistics, trainings, and what a comparison writes."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lightning")
import lightning as L

from kdkernels.analysis import calibration_error
from kdkernels.cli import compare, main
from kdkernels.cli.comparison.methods import BASELINE, METHODS, Row, parse_rows
from kdkernels.cli.comparison.pool import Job, pool_of
from kdkernels.cli.comparison.runs import Settings, data_of, measures, optimizer_of, student_data, take
from kdkernels.cli.comparison.summary import choose, corrected, paired_difference
from kdkernels.distill import Supervised
from kdkernels.models import TinyCNN

QUICK = Settings(
    data="clutter_digits",
    size=32,
    labelled=None,
    epochs=1,
    teacher_epochs=1,
    batch_size=64,
    learning_rate=0.1,
    augment=False,
    student="TinyCNN:width=4",
    teacher="TinyCNN:width=4:depth=2",
    teacher_weights=None,
    layers=(),
    teacher_layers=(),
    quick=True,
    device="cpu",
)
FAST = ["--quick", "--student=TinyCNN:width=4", "--teacher=TinyCNN:width=4:depth=2", "--batch_size=64", "--jobs=1", "--device=cpu", "--no_cost"]


# Rows.


def test_rows_have_the_student_alone_and_the_given_arguments():
    rows = parse_rows("kd,svd_kd:loss=mean:extra=3:beta=1e-2")
    assert [str(row) for row in rows] == [BASELINE, "kd", "svd_kd:loss=mean:extra=3:beta=0.01"]
    assert rows[2].options == (("loss", "mean"), ("extra", 3), ("beta", 0.01))
    assert rows[2].grid == [rows[2]]  # its weight is given
    assert [row.weight for row in rows[1].grid] == list(METHODS["kd"].grid)
    assert rows[2].title == "SVD-KD, loss=mean, extra=3"
    assert parse_rows("kd,alone") == parse_rows("alone,kd")[::-1]
    assert [row.method for row in parse_rows("all")] == list(METHODS)
    assert parse_rows("sad:paths=[[block1,block2],[block2,block3]]")[1].options[0][1] == [["block1", "block2"], ["block2", "block3"]]


@pytest.mark.parametrize("name", METHODS)
def test_row_can_be_read_again(name):
    for row in Row(name).grid:
        assert Row.parse(str(row)) == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kdd", "there is no method 'kdd'; did you mean 'kd'?"),
        ("dfnd", "DFND has other training images"),
        ("", "give at least one method"),
        ("kd:alfa=1", "KD has no argument 'alfa'; did you mean 'alpha'?"),
        ("kd:teacher=x", "KD has no argument 'teacher'"),
        ("kd:alpha", "an argument is written name=value, got 'alpha'"),
        ("kd:alpha=", "an argument is written name=value"),
        ("kd:alpha=1:alpha=2", "the argument alpha is given twice"),
        ("kd,kd", "'kd' is given twice"),
    ],
)
def test_wrong_rows(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_rows(text)


# Statistics.


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=9))
def test_paired_difference_is_that_of_the_paired_t_test(pairs):
    from scipy.stats import ttest_rel

    values, baseline = map(list, zip(*pairs, strict=True))
    found = paired_difference(values, baseline)
    differences = [a - b for a, b in pairs]
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.better == sum(d > 0 for d in differences)
    if max(differences) == min(differences):
        assert math.isnan(found.p)
        return
    if statistics.stdev(differences) < 1e-6:  # rounding of the differences decides
        return
    expected = ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)


def test_paired_difference_known_answer():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641; 97.5 % quantile for two degrees of
    # freedom: 4.30265.
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert found.p == pytest.approx(1 - 3.4641016 / math.sqrt(2 + 12), rel=1e-6)  # closed form of Student's t with 2 degrees of freedom
    assert (found.mean, found.low, found.high, found.better, found.seeds) == pytest.approx((2.0, 2 - half, 2 + half, 3, 3))
    assert math.isnan(paired_difference([1.0], [0.0]).p)


def test_correction_of_holm():
    one = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    given_p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    found = corrected({name: one._replace(p=p) for name, p in given_p.items()})
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not be smaller than the one before.
    assert {name: found[name].p_holm for name in given_p} == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    found = corrected({"a": one._replace(p=0.01), "b": one._replace(p=0.02), "equal": one._replace(p=math.nan)})
    assert (found["a"].p_holm, found["b"].p_holm) == pytest.approx((0.03, 0.04))  # three methods were compared


def test_weight_with_the_best_mean_validation_accuracy_is_chosen():
    def runs(*values):
        return [{"error": "infinite"} if v is None else {"validation": [0.99, v], "accuracy": 1 - v} for v in values]

    assert choose({"a": runs(0.5, 0.6), "b": runs(0.7, 0.5), "c": runs(0.9, None)}) == "b"
    assert choose({"a": runs(0.6), "b": runs(0.6)}) == "a"
    assert choose({"a": runs(None)}) is None


# Trainings.


def test_measures_known_answers():
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([0, 2, 1, 1])
    found = measures(logits, labels)
    assert found["accuracy"] == 0.5
    assert found["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]  # rows: true classes
    assert found["calibration_error"] == pytest.approx(float(calibration_error(logits, labels)))
    assert found["cross_entropy"] == pytest.approx(float(-logits.double().log_softmax(1)[range(4), labels].mean()))
    counts, confidences, right = (torch.tensor(values) for values in found["reliability"])
    assert counts.sum() == 4
    assert right.sum() == 2
    assert confidences.sum() == pytest.approx(float(logits.double().softmax(1).amax(1).sum()))


def test_labelled_images_depend_on_the_seed_alone():
    from dataclasses import replace

    settings = replace(QUICK, labelled=40)
    first, again, other = (student_data(settings, seed).splits["train"].fields["image"] for seed in (0, 0, 1))
    assert len(first) == 40
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(data_of(settings).splits["train"]) == 256  # the teacher has all
    everything = data_of(settings).splits["train"].fields["image"].flatten(1)
    assert all((everything == image.flatten()).all(1).any() for image in first)


def test_taken_samples_of_a_folder_that_is_not_in_memory(tmp_path):
    from PIL import Image

    from kdkernels.data import ImageFolder

    for name, shade in (("dark", 40), ("light", 200)):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (shade + i,) * 3).save(tmp_path / name / f"{i}.png")
    data = ImageFolder(tmp_path, size=8, max_memory=0.0)
    data.setup()
    whole = data.splits["train"]
    part = take(whole, [1, 4])
    assert len(part) == 2
    assert torch.equal(part[[0, 1]]["image"], whole[[1, 4]]["image"])
    assert part[[0, 1]]["label"].tolist() == whole[[1, 4]]["label"].tolist()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison of two rows over two seeds, in this process."""
    out = tmp_path_factory.mktemp("comparison")
    assert main(["compare", *FAST, "--methods=kd,at:beta=10", "--seeds=2", "--out", str(out)]) == 0
    return out


def test_comparison_is_consistent(comparison):
    found = json.loads((comparison / "comparison.json").read_text())
    rows = {line["row"]: line for line in found["table"]}
    assert list(rows) == ["alone", "kd:alpha=0.9", "at:beta=10"]
    alone = rows["alone"]["accuracies"]
    for name, line in rows.items():
        runs = [json.loads((comparison / "trainings" / name.replace(":", ",") / f"seed_{seed}.json").read_text()) for seed in (0, 1)]
        assert line["accuracies"] == [100 * run["accuracy"] for run in runs]
        assert line["mean"] == pytest.approx(statistics.fmean(line["accuracies"]))
        assert line["fidelity"] == pytest.approx(statistics.fmean(100 * run["fidelity"] for run in runs))
        if name != "alone":
            assert line["differences"] == [a - b for a, b in zip(line["accuracies"], alone, strict=True)]
        for run in runs:
            assert sum(map(sum, run["confusion"])) == 64
            assert len(run["validation"]) == 1
    page = (comparison / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # the page loads no external files
    assert "the numbers mean nothing" in page


def test_comparisons_are_collected_for_the_docs(comparison):
    from kdkernels.benches.comparison import collect, draw, markdown

    found = collect({"two rows": comparison, "the same": comparison})
    whole = json.loads((comparison / "comparison.json").read_text())
    assert found["two rows"]["table"] == whole["table"]
    assert "runs" not in found["two rows"]
    shown = markdown(found["two rows"]).splitlines()
    assert len(shown) == 2 + 1 + 3  # head, teacher, rows
    line = whole["table"][1]
    assert shown[4].startswith(f"| KD | `alpha=0.9` | {line['mean']:.2f} ± {line['std']:.2f} | {line['difference']['mean']:+.2f} | ")
    figure = draw(found, {"KD": "KD", "AT": "attention"})
    assert [ax.get_title() for ax in figure.axes] == ["two rows", "the same"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["KD", "attention"]


def test_student_alone_is_that_of_a_plain_training(comparison):
    """The row has the accuracy that Lightning's trainer gives for the same seed and data."""
    data = data_of(QUICK)
    L.seed_everything(0, verbose=False)
    method = Supervised(TinyCNN(4), optimizer=optimizer_of(QUICK)).to(memory_format=torch.channels_last)
    L.seed_everything(0, verbose=False)
    data.order_seed = 0
    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **flags)
    trainer.fit(method, data)
    (tested,) = trainer.test(method, data, verbose=False)
    stored = json.loads((comparison / "trainings" / "alone" / "seed_0.json").read_text())
    assert stored["accuracy"] == pytest.approx(tested["test/accuracy"], abs=1e-6)
    assert stored["cross_entropy"] == pytest.approx(tested["test/cross_entropy"], rel=1e-5)


def test_comparison_continues_and_grows(comparison, capsys):
    before = {path: path.stat().st_mtime_ns for path in (comparison / "trainings").rglob("*.json")}
    assert main(["compare", *FAST, "--methods=kd,at:beta=10,sad:gamma=0.1", "--seeds=2", "--out", str(comparison)]) == 0
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is trained again
    assert re.findall(r"\] (\S+), seed", printed) == ["sad:gamma=0.1"] * 2
    assert not list((comparison / "trainings").rglob("*.ckpt"))


def test_second_comparison_in_the_same_folder_is_an_error(comparison, capsys):
    with compare.only_one(comparison):
        assert main(["compare", *FAST, "--methods=kd", "--out", str(comparison)]) == 1
    assert "--out: another comparison is running in" in capsys.readouterr().err


def test_own_folder_of_images(tmp_path, monkeypatch, capsys):
    """A folder without test images, an own network without default layers, and too few images."""
    from PIL import Image

    def write(root, count):
        for name, shade in (("dark", 40), ("light", 200)):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (9 + i, 12), shade + i).save(tmp_path / root / name / f"{i}.png")

    write("photos", 30)
    write("few", 2)
    (tmp_path / "own_compare_net.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--student=own_compare_net.net", "--size=8", "--jobs=1", "--device=cpu", "--no_cost", "--epochs=1", "--seeds=2", "--keep"]
    rows = ["--methods=kd:alpha=0.9", "--teacher=own_compare_net.net", "--batch_size=8"]
    out = tmp_path / "out"
    assert main(["compare", *flags, *rows, "--data", str(tmp_path / "photos"), "--out", str(out)]) == 0
    found = json.loads((out / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["settings"]["classes"] == ["dark", "light"]
    assert sum(map(sum, found["runs"]["alone"][0]["confusion"])) == 6  # half of the 12 validation images
    assert (out / "trainings" / "alone" / "seed_1.pt").exists()
    capsys.readouterr()
    assert main(["compare", *flags, *rows, "--data", str(tmp_path / "few"), "--out", str(tmp_path / "out2")]) == 1
    assert "--data: a comparison needs at least 2 images for training, validation and test each" in capsys.readouterr().err
    assert main(["compare", *flags, "--methods=at", "--teacher=own_compare_net.net", "--data", str(tmp_path / "photos"), "--out", str(out)]) == 1
    assert "--layers: there are no default layers for Sequential" in capsys.readouterr().err


def test_trainings_with_other_settings_are_not_continued(comparison, capsys):
    for change, message in (
        ("--batch_size=32", "made with batch_size 64, now 32"),
        ("--learning_rate=0.2", "made with learning_rate 0.1, now 0.2"),
        ("--labelled=100", "made with labelled None, now 100"),
    ):
        assert main(["compare", *FAST, change, "--methods=kd", "--out", str(comparison)]) == 1
        assert message in capsys.readouterr().err


def test_weights_are_chosen_with_other_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "plan_of", lambda options: compare.Plan([Row("alone"), Row("kd")], [3], [10_000], "alone", cost=False))
    assert main(["compare", *FAST, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    accuracies = {name: values[0] for name, values in found["tuning"]["kd"].items()}
    assert found["table"][1]["chosen"] == max(accuracies, key=accuracies.get)
    trained = {f"{path.parent.name} {path.stem}" for path in (tmp_path / "trainings").rglob("*.json")}
    chosen = found["table"][1]["chosen"].replace(":", ",")
    expected = {"teacher seed_10000", "teacher seed_3", "alone seed_3", f"{chosen} seed_3"}
    assert trained == expected | {f"kd,alpha={alpha:g} seed_10000" for alpha in METHODS["kd"].grid}


def test_training_that_fails_does_not_end_the_comparison(tmp_path, capsys):
    rows = "--methods=kd:alpha=0.9,at:beta=1e38"
    assert main(["compare", *FAST, rows, "--seeds=1", "--out", str(tmp_path)]) == 0
    assert "failed: " in capsys.readouterr().out
    line = json.loads((tmp_path / "comparison.json").read_text())["table"][2]
    assert "mean" not in line
    assert line["error"].startswith("the loss is not finite at step ")
    assert ". " not in line["error"]  # not the path of the batch, which is removed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=kdd"], "--methods: there is no method 'kdd'"),
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--labelled=some"], "--labelled must be a number of images or 'all', got 'some'"),
        (["--labelled=1"], "--labelled must be at least 2, got 1"),
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--learning_rate=nan"], "--learning_rate must be finite and > 0, got nan"),
        (["--data=/nowhere"], "--data must be clutter_digits or a folder of images, got '/nowhere'"),
        (["--baseline=att"], "--baseline: there is no method 'att'; did you mean 'at'?"),
        (["--methods=kd:alpha=x"], "--methods: 'kd:alpha=x': alpha must be a finite number >= 0, got x"),
        (["--methods=kd:alpha=null"], "alpha must be a finite number >= 0, got none"),
        (["--methods=at:beta=-1"], "beta must be a finite number >= 0, got -1"),
        (["--val_fraction=1"], "--val_fraction must lie in (0, 1), got 1.0"),
        (["--jobs=0"], "--jobs must be at least 1, got 0"),
        (["--first_seed=10000"], "--first_seed must be at least 0 and below"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys):
    assert main(["compare", "--methods=kd", *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student=TinyCNNN"], "--student: there is no network 'TinyCNNN'; did you mean 'TinyCNN'?"),
        (["--teacher=TinyCNN:widht=8"], "TinyCNN has no argument 'widht'; did you mean 'width'?"),
        (["--student=nowhere.Net"], "--student: there is no module 'nowhere'"),
        (["--layers=block9"], "--layers: TinyCNN has no layer 'block9'"),
        (["--methods=fsp:beta=1", "--teacher=TinyCNN:width=8"], "--methods: fsp:beta=1 does not fit TinyCNN:width=4 and TinyCNN:width=8"),
        (["--methods=kd:temperature=-1"], "--methods: kd:temperature=-1:alpha=0.9 does not fit"),
        (["--methods=svd_kd:loss=bad"], "does not fit TinyCNN:width=4 and TinyCNN:width=4:depth=2: loss must be one of"),
        (["--labelled=10000"], "--labelled: there are 256 training images, got 10000"),
        (["--teacher_weights=/nowhere.pt"], "--teacher_weights: weights: there is no file '/nowhere.pt'"),
        (["--student=TinyCNN:num_classes=7"], "--student: TinyCNN:num_classes=7 must return logits [2, 10] for two images, got [2, 7]"),
        (["--teacher=TinyCNN:width=0"], "--teacher: TinyCNN cannot be built with"),
    ],
)
def test_networks_and_rows_that_do_not_fit(options, message, tmp_path, capsys):
    assert main(["compare", *FAST, "--methods=kd", *options, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "trainings").exists()  # nothing was trained


# Processes.


def test_processes_end_with_a_killed_parent(tmp_path):
    program = (
        "import os, time\n"
        "from kdkernels.cli.comparison.pool import Job, pool_of\n"
        "from tests_of_pool import slow\n"
        "if __name__ == '__main__':\n"
        "    with pool_of(2) as pool:\n"
        "        pool.run([Job(slow, (i,), str(i)) for i in range(4)], str)\n"
    )
    (tmp_path / "tests_of_pool.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        f"def slow(i):\n    Path({str(tmp_path)!r}, f'pid_{{i}}').write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(tmp_path.glob("pid_*"))) < 2:
        time.sleep(0.1)
    workers = [int(path.read_text()) for path in tmp_path.glob("pid_*")]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    while time.monotonic() < deadline and any(_is_running(pid) for pid in workers):
        time.sleep(0.1)
    assert not any(_is_running(pid) for pid in workers)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_jobs_in_this_process_give_their_results(capsys):
    found = []
    with pool_of(1) as pool:
        pool.run([Job(pow, (2, i), f"2 to the {i}") for i in range(3)], lambda value: found.append(value) or str(value))
    assert found == [1, 2, 4]
    assert "[3/3] 2 to the 2  4" in capsys.readouterr().out


def test_rows_that_differ_in_their_weight_have_different_titles():
    from kdkernels.cli.comparison.summary import table

    rows = parse_rows("at:beta=1,at:beta=10,kd:alpha=1")
    runs = {seed: {"accuracy": 0.5 + seed / 10, "fidelity": 0.5, "calibration_error": 0.1} for seed in (0, 1)}
    lines = table(rows, {str(row): {"chosen": str(row), "runs": runs} for row in rows}, [0, 1], BASELINE)
    assert [line["title"] for line in lines] == ["student alone", "AT (at:beta=1)", "AT (at:beta=10)", "KD"]
