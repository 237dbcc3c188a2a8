"""Time of truncated_svd and its peers against batch, channels and k: measured with --measure, drawn from the results always.

Writes benches/results/<machine>/svd_scaling.json and docs/truncated_svd_scaling.svg.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "tests")]

SWEEPS = {
    "batch": [({"batch": b, "channels": 64, "side": 16, "k": 4}, b) for b in (1, 4, 16, 64, 256)],
    "channels, 16 x 16 places": [({"batch": 32, "channels": c, "side": 16, "k": 4}, c) for c in (16, 32, 64, 128, 256, 512)],
    "k": [({"batch": 64, "channels": 128, "side": 16, "k": k}, k) for k in (1, 2, 4, 8, 16, 32)],
}


def measure() -> dict:
    from bench_truncated_svd import eigh, svd
    from conftest import _commit
    from feature_maps import relu_maps

    from kdkernels import truncated_svd
    from kdkernels.timing import time_interleaved

    torch.manual_seed(0)
    torch.set_num_threads(2)
    peers = {"truncated_svd": lambda x, k: truncated_svd(x, k)[1:], "eigh of the Gram matrix": eigh, "linalg.svd": svd}
    curves: dict[str, dict] = {}
    for sweep, points in SWEEPS.items():
        curves[sweep] = {name: [] for name in peers}
        for shape, at in points:
            x = relu_maps(shape["batch"], shape["channels"], shape["side"]).flatten(2).mT
            contenders = {name: (lambda f=f, x=x, k=shape["k"]: f(x, k)) for name, f in peers.items()}
            for name, times in time_interleaved(contenders, seconds=1, warmup=1).items():
                curves[sweep][name].append((at, statistics.median(times)))
    return {"commit": _commit(), "torch": torch.__version__, "threads": torch.get_num_threads(), "curves": curves}


def draw(result: dict, machine: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kdkernels"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result["curves"]), figsize=(11, 3.4), layout="constrained")
    for axis, (sweep, curves) in zip(axes, result["curves"].items(), strict=True):
        for name, points in curves.items():
            axis.loglog([at for at, _ in points], [1e3 * seconds for _, seconds in points], marker="o", markersize=4, label=name)
        ticks = [at for at, _ in points]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel(sweep)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward, ms")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{machine}, {result['threads']} threads, torch {result['torch']}, commit {result['commit']}", fontsize=9)
    figure.savefig(ROOT / "docs" / "truncated_svd_scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    from machine import machine

    file = ROOT / "benches" / "results" / machine() / "svd_scaling.json"
    if "--measure" in sys.argv:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    draw(json.loads(file.read_text()), machine())
