"""Predicted times of the inputs of gpu_inputs.py, and their comparison with measured times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

from .gpu_device import DEVICES, Device, Kernel, PartFacts, Prediction, Work, predict
from .gpu_inputs import CASES, Case
from .gpu_work import WORK
from .tables import rows_of

FACTS = Path(__file__).resolve().parent / "gpu_kernels.json"
MEASURED = Path(__file__).resolve().parent / "results" / "nvidia-h100-80gb-hbm3" / "profile.json"
H100 = DEVICES["H100 SXM"]


class Launch(NamedTuple):
    """A launch of a kernel on a device, and its prediction."""

    kernel: Kernel
    work: Work
    prediction: Prediction


@lru_cache
def facts() -> dict:
    """Return the contents of gpu_kernels.json."""
    return json.loads(FACTS.read_text())


def kernel_of(target: str, key: str) -> Kernel:
    f = facts()["targets"][target]["kernels"][key]
    parts = {name: PartFacts(**part) for name, part in f["parts"].items()}
    return Kernel(f["name"], f["threads"], f["registers"], f["stack"], f["shared"], parts)


def launches(case: Case, device: Device) -> list[Launch]:
    """Return the launches of a case in order: forward pass, gradient, backward pass."""
    plan: Mapping[str, int] = {}
    if case.kind == "kl" and case.implementation == "cuda":
        if device.target == "sm_80":  # has no clusters
            return launches(replace(case, implementation="triton"), device)
        plan = facts()["plans"][f"rows of {case.shape[-1]} classes of {case.number_size} bytes"]
        key = f"long_rows_kernel<{'float' if case.dtype == 'float32' else 'BFloat16'}, {plan['threads']}>"
        resident = kernel_of(device.target, key).resident_blocks(device, plan["shared"])
        clusters = min(case.numbers // case.shape[-1], device.multiprocessors * resident // plan["ranks"])
        made = [(key, clusters * plan["ranks"])]
    elif case.implementation == "triton":
        made = [(launch["kernel"], launch["blocks"]) for launch in facts()["targets"][device.target]["launches"][case.name]]
    elif case.kind == "align":
        batch, _, students, k = case.shape
        made = [("align_kernel<float, forward>", ceil(batch * k / 4)), ("align_kernel<float, backward>", ceil(batch * (students + k) / 4))]
    else:
        batch, rows, columns, k = case.shape
        p, q = min(rows, columns), max(rows, columns)
        plan = facts()["plans"][f"p {p}, k {k}, limit {device.largest_shared}"]
        matrices = ceil(batch / plan["matrices_per_block"])
        made = [(f"{name}_kernel<float, {plan['threads']}>", matrices) for name in ("forward", "solve")]
        made.append(("update_kernel<float>", batch * ceil(q / plan["update_columns"])))
    result = []
    for key, blocks in made:
        kernel = kernel_of(device.target, key)
        work = WORK[kernel.name.partition("<")[0]](case, kernel, blocks, device, plan)
        result.append(Launch(kernel, work, predict(kernel, work, device)))
    return result


def total(case: Case, device: Device, direction: str = "forward + backward") -> float:
    """Return the predicted seconds of all kernels of an op."""
    found = launches(case, device)
    if direction == "forward" and case.kind == "svd":
        forward = (
            1
            if case.implementation == "cuda"
            else 1 + max(i for i, x in enumerate(found) if x.kernel.name in ("_decompose_kernel", "_finish_kernel"))
        )
        found = found[:forward]
    return sum(launch.prediction.seconds for launch in found)


# ------------------------------------------------------------------- comparison with measurements


class Comparison(NamedTuple):
    """A time that was measured, and its prediction, in microseconds."""

    op: str
    input: str
    kernel: str
    measured: float
    predicted: float
    binds: str


def _case(op: str, name: str, implementation: str = "triton") -> Case | None:
    return next((c for c in CASES if (c.op, c.input, c.implementation) == (op, name, implementation)), None)


REWRITTEN = ("update_kernel",)  # kernels whose code is no longer that of the measurement


def measured_kernels(rewritten: bool = False) -> list[Comparison]:
    """Return the measured times of results/nvidia-h100-80gb-hbm3/profile.json with predictions.

    A kernel that a case launches several times has one row, for all of these launches. Kernels that
    were rewritten since are left out, unless ``rewritten``: their predictions are those of the new
    code.
    """
    result = []
    for row in json.loads(MEASURED.read_text())["rows"]:
        case = next(c for c in CASES if c.name == row["name"])
        if any(kernel.startswith("long_rows_kernel") for kernel in row["kernels"]):  # the op chose it
            case = replace(case, implementation="cuda")
        found = [x for x in launches(case, H100) if not x.work.idle]
        for kernel in dict.fromkeys(x.kernel.name for x in found):
            if kernel in row["kernels"] and (rewritten or not kernel.startswith(REWRITTEN)):
                same = [x.prediction for x in found if x.kernel.name == kernel]
                slowest = max(same, key=lambda prediction: prediction.seconds)
                seconds = sum(prediction.seconds for prediction in same)
                result.append(Comparison(case.op, case.input, kernel, row["kernels"][kernel], seconds * 1e6, slowest.binds))
    return result


def device_named(name: str) -> Device | None:
    """Return the device of the model for the name that CUDA gives a GPU."""
    for part, device in (("H200", "H200"), ("H100", "H100 SXM"), ("A100", "A100 80GB"), ("B200", "B200")):
        if part in name:
            return DEVICES[device]
    return None


def measured_beside_predicted(result: Mapping) -> str:
    """Return a table of the times of a bench.json beside the predictions.

    Times between CUDA events include Python and launches; the replay of a CUDA graph does not.
    A row has a prediction if the op and the input are among CASES.
    """
    rows = rows_of(dict(result))
    name = next((row["gpu"] for row in rows if row.get("gpu")), "")
    device = device_named(name)
    lines = []
    if device is None:
        device = H100
        reason = f"{name} is not among the devices of the model." if name else "This result has no GPU."
        lines.append(f"{reason} The predictions are those for the {device.name}.")
    lines += [f"Times are in microseconds. Predicted times are those of the kernels on the {device.name}; docs/gpu_model.md explains the model.", ""]
    table = [("op", "input", "direction", "measured", "replayed", "predicted", "measured / predicted", "slowest kernel", "limit")]
    for row in rows:
        if row.get("sweep") or row["direction"] == "backward":
            continue
        case = _case(row["op"], row["cell"], "cuda") or _case(row["op"], row["cell"])
        if case is None or (row["direction"] == "forward" and case.kind != "svd"):
            continue  # the cases compute the gradient too
        seconds = row["seconds"]["fused"]
        replayed = row.get("replayed", {}).get("fused")
        replayed = replayed if isinstance(replayed, int | float) else None
        predicted = total(case, device, row["direction"])
        slowest = max(launches(case, device), key=lambda launch: launch.prediction.seconds)
        ratio = (replayed or seconds) / predicted
        times = [f"{seconds * 1e6:.1f}", "-" if replayed is None else f"{replayed * 1e6:.1f}", f"{predicted * 1e6:.1f}", f"{ratio:.2f}"]
        table.append((row["op"], row["cell"], row["direction"], *times, slowest.kernel.name, slowest.prediction.binds))
    if len(table) == 1:
        return "\n".join([*lines, "No row of this result has a prediction."])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join([*lines, *("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table)])
