"""``kdkernels bench``: time each op against its reference, its peers and hardware limits."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ..benches import compare
from ..benches.machine import machine
from ..benches.tables import key_of, load, rows_of
from . import bench_worst
from .arguments import Parser, make_folder

OPS = ("temperature_kl", "attention_pool", "rbf_correlation", "truncated_svd", "svd_kd", "teacher_cache", "step")
# Module to package. matplotlib and lightning are optional: without them the pictures and the
# benches that train are left out.
REQUIRED_PACKAGES = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}


def main(arguments: list[str]) -> int:
    parser = Parser("bench", __doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="run one op and its sweeps; may be repeated (default: all ops)")
    parser.add_argument("--select", metavar="TEXT", action="append", help="run the rows whose 'op: cell, direction' contains TEXT; may be repeated")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_const", dest="mode", const="quick", help="run the main rows, for a second each")
    mode.add_argument("--smoke", action="store_const", dest="mode", const="smoke", help="run all rows on tiny inputs; the times mean nothing")
    mode.add_argument("--worst", action="store_true", help="find the inputs on which each op is slowest relative to its peers, on the CPU")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a --worst run (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: the GPU, if there is one)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for bench.json, pictures and report (default: runs/bench, with _quick or _smoke), or for grid.json (default: runs/bench_worst)",
    )
    parser.add_argument("--report", action="store_true", help="also write report.html")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="run nothing; write the pictures and the report of these results")
    parser.add_argument("--compare", nargs="+", metavar="FILE.json", help="run nothing; compare two files, or one with the committed results")
    options = parser.parse_args(arguments)
    bench_worst.check_options(parser, options)
    missing = [package for module, package in REQUIRED_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"kdkernels bench: missing packages: {', '.join(missing)}; install them with: pip install --no-build-isolation '.[train,bench]' "
            "in the source folder",
            file=sys.stderr,
        )
        return 1
    if options.compare:
        lines, _ = compare.compare_files(options.compare)
        print("\n".join(lines))
        return 0
    if options.worst:
        return bench_worst.run(parser, options)
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
        _write_output(out, result, report=True)
        return 0
    return _run(parser, options, out)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, out: Path) -> int:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine; use --device cpu")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results_file = out / "bench.json"
    earlier = _load_earlier(parser, results_file, options.mode, machine(device))

    # If a test calls this command, pytest's variables of that test run must not reach the benches.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"KDKERNELS_BENCH": options.mode, "KDKERNELS_BENCH_DEVICE": device}
    environment |= {"KDKERNELS_BENCH_OPS": "\n".join(options.op or ()), "KDKERNELS_BENCH_SELECT": "\n".join(options.select or ())}
    with tempfile.TemporaryDirectory(prefix=".bench", dir=out) as folder:  # in `out`, so that os.replace stays on one file system
        new_file = Path(folder) / "bench.json"
        suite = str(Path(compare.__file__).resolve().parent)
        command = [sys.executable, "-m", "pytest", suite, "-q", "-rs", "-p", "no:cacheprovider", "--benchmark-quiet"]
        command += [f"--benchmark-storage=file://{folder}", f"--benchmark-json={new_file}"]
        code = _run_until_interrupted(command, environment)
        result = json.loads(new_file.read_text()) if new_file.exists() and new_file.stat().st_size else {"benchmarks": []}
        if not result["benchmarks"]:
            print(
                "kdkernels bench: no row was measured" + ("; no row's name matches --select and --op" if code == 5 else ""),
                file=sys.stderr,
            )
            return code or 1
        complete = code == 0 and not options.op and not options.select
        if earlier is not None and not complete:
            result = merged(earlier, result)
        new_file.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(new_file, results_file)
    _write_output(out, result, options.report)
    if code:
        print("kdkernels bench: some rows failed, or the run was interrupted; the rows that were measured are saved", file=sys.stderr)
    return code


def _run_until_interrupted(command: list[str], environment: dict[str, str]) -> int:
    """Run pytest and return its exit status; or 130 after Ctrl-C, 143 after SIGTERM.

    If this process is interrupted or terminated, pytest is interrupted once, and then writes the
    rows that it has measured. It has its own session, so that Ctrl-C in a terminal reaches it only
    in this way.
    """
    received = signal.SIGINT

    def terminate(number: int, frame: object) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        return 128 + received
    finally:
        if child.poll() is None:  # interrupted again
            child.kill()
        signal.signal(signal.SIGTERM, previous)


def _load_earlier(parser: argparse.ArgumentParser, results_file: Path, mode: str, machine_name: str) -> dict | None:
    """Return the results that the folder contains already, to which the new rows are added."""
    if not results_file.exists():
        return None
    try:
        earlier = load(results_file)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}; remove the file, or give another folder")
    first = rows_of(earlier)[0]
    if (first["mode"], first["machine"]) != (mode, machine_name):
        parser.error(
            f"--out: {results_file} has results of a {first['mode']} run on {first['machine']}, but this is a {mode} run on {machine_name}: "
            "give another folder"
        )
    return earlier


def merged(earlier: dict, fresh: dict) -> dict:
    """Replace earlier rows by fresh rows of the same name, and append the other fresh rows."""
    new = {key_of(b["extra_info"]): b for b in fresh["benchmarks"]}
    old = {key_of(b["extra_info"]): b for b in earlier["benchmarks"]}
    return fresh | {"benchmarks": list((old | new).values())}


def _write_output(out: Path, result: dict, report: bool) -> None:
    written = [out / "bench.json"] if (out / "bench.json").exists() else []
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"pictures and report need matplotlib, which is not installed; install it and run: kdkernels bench --results {out / 'bench.json'}",
            file=sys.stderr,
        )
    else:
        from ..benches.page import write_page
        from ..benches.pictures import write_pictures

        written += write_pictures(result, out)
        if report:
            written.append(write_page(out / "report.html", result))
    print("wrote " + ", ".join(map(str, written)))
