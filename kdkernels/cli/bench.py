"""``kdkernels bench``: every op against its reference, its peers and the limit of the machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import benches
from ..benches.compare import compare_files
from ..benches.machine import machine
from ..benches.tables import key_of, load, rows_of
from .arguments import Parser, make_folder

OPS = ("temperature_kl", "attention_pool", "rbf_correlation", "truncated_svd", "svd_kd", "teacher_cache", "step")
NEEDS = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}  # matplotlib draws, lightning trains: without them the rest still runs


def main(arguments: list[str]) -> int:
    parser = Parser("bench", __doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="one op, its sweeps too; may be given several times (default: all)")
    parser.add_argument("--select", metavar="TEXT", action="append", help="rows whose 'op: cell, direction' holds this text; several: any of them")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_const", dest="mode", const="quick", help="the main rows, a second each")
    mode.add_argument("--smoke", action="store_const", dest="mode", const="smoke", help="all of it on tiny inputs: shows that it runs, not how fast")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: the GPU, if there is one)")
    parser.add_argument("--out", type=Path, help="folder of bench.json, pictures and report (default: runs/bench, with _quick or _smoke)")
    parser.add_argument("--report", action="store_true", help="write report.html too")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="run nothing: pictures and report of these results")
    parser.add_argument("--compare", nargs="+", metavar="FILE.json", help="run nothing: compare two files of results, or one with the committed ones")
    options = parser.parse_args(arguments)
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"kdkernels bench: needs {', '.join(missing)}: pip install --no-build-isolation '.[train,bench]' in the source folder", file=sys.stderr)
        return 1
    if options.compare:
        lines, _ = compare_files(options.compare)
        print("\n".join(lines))
        return 0
    options.mode = options.mode or "full"
    out = options.out or (
        options.results.parent if options.results else Path("runs") / f"bench{'' if options.mode == 'full' else '_' + options.mode}"
    )
    make_folder(parser, out)
    if options.results is not None:
        try:
            result = load(options.results)
        except (OSError, ValueError) as error:
            parser.error(f"--results: {error}")
        _show(out, result, report=True)
        return 0
    return _run(parser, options, out)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, out: Path) -> int:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kept = out / "bench.json"
    earlier = _earlier(parser, kept, options.mode, machine(device))

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # a run of tests that calls this is not ours
    environment |= {"KDKERNELS_BENCH": options.mode, "KDKERNELS_BENCH_DEVICE": device}
    environment |= {"KDKERNELS_BENCH_OPS": "\n".join(options.op or ()), "KDKERNELS_BENCH_SELECT": "\n".join(options.select or ())}
    with tempfile.TemporaryDirectory(prefix=".bench", dir=out) as folder:  # on the disk where the results go
        fresh = Path(folder) / "bench.json"
        suite = str(Path(benches.__file__).resolve().parent)
        command = [sys.executable, "-m", "pytest", suite, "-q", "-rs", "-p", "no:cacheprovider", "--benchmark-quiet"]
        command += [f"--benchmark-storage=file://{folder}", f"--benchmark-json={fresh}"]
        try:
            code = subprocess.run(command, env=environment).returncode
        except KeyboardInterrupt:
            code = 130
        result = json.loads(fresh.read_text()) if fresh.exists() and fresh.stat().st_size else {"benchmarks": []}
        if not result["benchmarks"]:
            print(
                "kdkernels bench: no row was measured" + ("; no row's name holds what --select and --op ask for" if code == 5 else ""),
                file=sys.stderr,
            )
            return code or 1
        whole = code == 0 and not options.op and not options.select
        if earlier is not None and not whole:
            result = merged(earlier, result)
        fresh.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(fresh, kept)
    _show(out, result, options.report)
    if code:
        print("kdkernels bench: some rows failed, or the run was stopped; those that were measured are kept", file=sys.stderr)
    return code


def _earlier(parser: argparse.ArgumentParser, kept: Path, mode: str, here: str) -> dict | None:
    """Results that are in the folder already, which rows are added to."""
    if not kept.exists():
        return None
    try:
        earlier = load(kept)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}; move it away, or name another folder")
    first = rows_of(earlier)[0]
    if (first["mode"], first["machine"]) != (mode, here):
        parser.error(
            f"--out: {kept} holds results of a {first['mode']} run on {first['machine']}, this is a {mode} run on {here}: name another folder"
        )
    return earlier


def merged(earlier: dict, fresh: dict) -> dict:
    """Fresh rows in the place of earlier ones of the same name, new ones behind them."""
    new = {key_of(b["extra_info"]): b for b in fresh["benchmarks"]}
    old = {key_of(b["extra_info"]): b for b in earlier["benchmarks"]}
    return fresh | {"benchmarks": list((old | new).values())}


def _show(out: Path, result: dict, report: bool) -> None:
    written = [out / "bench.json"] if (out / "bench.json").exists() else []
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no pictures and no report without matplotlib; where it is installed: kdkernels bench --results {out / 'bench.json'}", file=sys.stderr)
    else:
        from ..benches.page import write_page
        from ..benches.pictures import write_pictures

        written += write_pictures(result, out)
        if report:
            written.append(write_page(out / "report.html", result))
    print("wrote " + ", ".join(map(str, written)))
