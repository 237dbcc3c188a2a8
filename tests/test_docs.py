"""Code and tables in the documents: the code runs unchanged, and the tables match the results."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
ROOT = Path(__file__).parent.parent


def _blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_own_model_page_runs(tmp_path):
    """Run docs/own_model.md in an empty folder: write its files and run its commands."""
    pytest.importorskip("onnxruntime")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    num_commands = 0
    for language, text in _blocks(ROOT / "docs" / "own_model.md"):
        if language == "bash":
            run = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
            num_commands += 1
            if "--config kd.yaml\n" in text:
                best = float(re.search(r"best  val/accuracy ([\d.]+)", run.stdout).group(1))
                assert best > 0.5  # chance is 1 / 5
        else:
            name = re.match(r"# (\S+)\n", text).group(1)
            (tmp_path / name).write_text(text)
    assert num_commands == 8
    assert {p.name for p in tmp_path.glob("student.*")} == {"student.onnx", "student.pt2", "student.safetensors"}


def test_table_of_accuracies_matches_the_results():
    results = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/accuracy.json").read_text())
    rows = re.findall(r"^\| ([^|`]+) \| ([\d.]+) ± ([\d.]+) \|$", (ROOT / "docs/training.md").read_text(), flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {key.split("/")[0] for key in results}
    for name, mean, spread in rows:
        values = [value for key, value in results.items() if key.split("/")[0] == name]
        assert len(values) == 3
        assert (f"{statistics.mean(values):.2f}", f"{statistics.stdev(values):.2f}") == (mean, spread)
    for page in ("byot.md", "dfnd.md", "frskd.md", "online.md", "sad.md"):
        rows = re.findall(r"^\| ([^|`]+) \| ([\d.]+) ± ([\d.]+) \| ([-+\d.]+) ± ([\d.]+) \|$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
        assert len(rows) >= 5
        for name, *numbers in rows:
            values = [results[f"{name}/{seed}"] for seed in range(3)]
            differences = [value - results[f"student alone/{seed}"] for seed, value in enumerate(values)]
            expected = [f"{statistics.mean(values):.2f}", f"{statistics.stdev(values):.2f}"]
            assert numbers == [*expected, f"{statistics.mean(differences):+.2f}", f"{statistics.stdev(differences):.2f}"]


def test_shares_of_selected_images_match_the_results():
    stored = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/dfnd_selection.json").read_text()).values()
    page = " ".join((ROOT / "docs/dfnd.md").read_text().split())
    for text, share in (
        ("{} % of the pool", lambda v: v["one digit, in the pool"]),
        ("{} % of the selected images, have one digit", lambda v: v["one digit"]),
        ("right for only {} % of the selected images", lambda v: v["teacher right"]),
        ("({} % of those with a digit)", lambda v: v["teacher right, of those with one digit"]),
        ("{} % of the selected images are ones", lambda v: v["by the teacher's class"][1]),
    ):
        assert text.format(round(100 * statistics.mean(map(share, stored)))) in page


def test_table_of_concepts_matches_the_results():
    results = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/knowledge.json").read_text())
    pattern = r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([-+\d.]+) ± ([\d.]+) \| (\d?) ?\|$"
    rows = re.findall(pattern, (ROOT / "docs/analysis.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 3 * 7
    for name, quantity, *shown in rows:
        found = [next(row for row in results[f"{name}/{seed}"]["rows"] if row["quantity"] == quantity) for seed in range(3)]
        means = [f"{statistics.mean(row[key] for row in found):.2f}" for key in ("student", "baseline")]
        differences = [row["difference"] for row in found]
        intervals = [row["interval"] for row in found]
        sure = "" if intervals[0] is None else str(sum(low > 0 or high < 0 for low, high in intervals))
        assert shown == [*means, f"{statistics.mean(differences):+.2f}", f"{statistics.stdev(differences):.2f}", sure]


def test_table_of_the_protocol_matches_the_results():
    runs = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/knowledge_protocol.json").read_text())
    pattern = r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([-+\d.]+) \| ([-+\d.]+) \| ([-+\d.]+) \| (\d?) ?\|$"
    shown = re.findall(pattern, (ROOT / "docs/analysis.md").read_text(), flags=re.MULTILINE)
    assert len(shown) == 7
    for quantity, *numbers in shown:
        rows = [next(row for row in runs[seed]["table"] if row["quantity"] == quantity) for seed in "012"]
        intervals = [row["interval"] for row in rows]
        sure = "" if intervals[0] is None else str(sum(low > 0 or high < 0 for low, high in intervals))
        means = [f"{statistics.mean(row[name] for row in rows):.2f}" for name in ("student", "baseline")]
        assert numbers == [*means, *(f"{row['difference']:+.2f}" for row in rows), sure]


def test_table_of_lanes_matches_the_results():
    results = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/lane_accuracy.json").read_text())
    pattern = r"^\| ([^|]+) \| ([\d.]+) ± ([\d.]+) \| (?:([-+\d.]+) ± ([\d.]+) )?\| ([\d.]+) ± ([\d.]+) \|$"
    rows = re.findall(pattern, (ROOT / "docs/sad.md").read_text(), flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {key.split("/")[0] for key in results}
    for name, *numbers in rows:
        values = [results[f"{name}/{seed}"] for seed in range(3)]
        f1, iou = ([value[metric] for value in values] for metric in ("f1", "lane_iou"))
        differences = [value - results[f"network alone/{seed}"]["f1"] for seed, value in enumerate(f1)]
        expected = [f"{statistics.mean(f1):.2f}", f"{statistics.stdev(f1):.2f}"]
        expected += ["", ""] if name == "network alone" else [f"{statistics.mean(differences):+.2f}", f"{statistics.stdev(differences):.2f}"]
        assert numbers == [*expected, f"{statistics.mean(iou):.2f}", f"{statistics.stdev(iou):.2f}"]


def _table_rows(text, columns):
    """Return the cells of all rows of tables with this number of columns, without heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == columns]


def test_ratios_of_the_readme_match_the_results():
    # The README names the machine: "2 cores of an AMD EPYC with AVX-512".
    page = (ROOT / "docs/performance.md").read_text()
    performance = re.search(r"^## amd-epyc-avx512-2-cores$.*?(?=^## )", page, re.MULTILINE | re.DOTALL).group()
    rows = [row for row in _table_rows((ROOT / "README.md").read_text(), 4) if re.fullmatch(r"[\d.]+x", row[2])]
    assert len(rows) == 4
    for op, shape, eager, other in rows:
        section = re.search(rf"^### {re.match('`([a-z_]+)`', op).group(1)}.*?(?=^###)", performance, re.MULTILINE | re.DOTALL).group()
        head = next(line for line in section.splitlines() if line.startswith("| input"))
        line = next(line for line in section.splitlines() if line.startswith(f"| {shape} | forward + backward |"))
        found = dict(zip(head.split(" | "), line.split(" | "), strict=True))
        name, _, ratio = other.partition(": ")
        assert found["eager"].split()[0] == eager
        assert found[{"torch.compile": "Inductor"}.get(name, name)].split()[0] == ratio


def test_tables_of_the_comparisons_match_the_results():
    from kdkernels.benches.comparison import markdown

    stored = json.loads((ROOT / "benches/results/amd-epyc-avx2-2-cores/comparison.json").read_text())
    page, overview = ((ROOT / "docs" / name).read_text() for name in ("compare.md", "which_method.md"))
    for comparison in stored.values():
        assert markdown(comparison) in page
    few, many, wide = ({line["title"]: line for line in comparison["table"]} for comparison in list(stored.values())[:3])
    shown = [row for row in _table_rows(overview, 4) if re.match(r"\d+\.\d\d", row[2] or row[1])]
    names = {
        "student alone": "student alone",
        "`KD`": "KD",
        "`AttentionTransfer`": "AT",
        "`AttentionTransfer` with KD": "AT + KD",
        "`FSP`": "FSP",
        '`SVDKD`, `loss="mean"`': "SVD-KD, loss=mean",
    }
    assert [row[0] for row in shown] == list(names)
    for row in shown:
        title = names[row[0]]
        for cell, lines in zip(row[1:], (few, wide, many), strict=True):
            if title not in lines:
                assert cell == ""
                continue
            expected = f"{lines[title]['mean']:.2f}"
            if lines[title]["difference"]:
                expected += f", {lines[title]['difference']['mean']:+.2f} ({lines[title]['chosen'].split(':')[-1]})"
            assert cell == expected
