"""Check an installed kdkernels, without pytest: ``python tests/smoke_wheel.py``.

The script checks the files of the package, compares every op with its reference (forward and
backward, with each instruction set that this CPU supports), compiles an op, and runs
``kdkernels info``. If Lightning and scikit-learn are installed, it also trains a student with KD
for one epoch. The wheel workflow runs it on every wheel.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import kdkernels
from kdkernels import _C, reference

ROOT = Path(__file__).resolve().parent.parent
CHILD = "KDKERNELS_SMOKE_OPS_ONLY"  # set in the processes that test another instruction set


def check(condition: bool, message: str) -> None:
    """Unlike the assert statement, this also checks under python -O."""
    if not condition:
        raise SystemExit(f"smoke test failed: {message}")


def check_files() -> None:
    folder = Path(kdkernels.__file__).resolve().parent
    check(folder != ROOT / "kdkernels", f"kdkernels was imported from the source tree {folder}, not from an installed package")
    check(kdkernels.__version__ == version("kdkernels"), f"kdkernels.__version__ is {kdkernels.__version__}, but {version('kdkernels')} is installed")
    built = sorted(path.name.split(".")[0] for path in folder.iterdir() if path.suffix in (".so", ".pyd"))
    expected = {"_C", *(f"_cpu_{isa}" for isa in _C.build_info()["isas"].split(","))}
    check(set(built) - {"_cuda"} == expected, f"expected the extension modules {sorted(expected)}, found {built}")
    for name in ("py.typed", "_C.pyi", "reference/__init__.py", "benches/__init__.py"):
        check((folder / name).exists(), f"{folder} has no {name}")


def compare(name: str, op, reference_op, inputs: list[Tensor], tolerance: float = 1e-4) -> None:
    """Compare the outputs of an op, and the gradients of a weighted sum of them, with those of the
    reference in float64.
    """
    results = []
    for function, dtype in ((op, None), (reference_op, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None]
        weights = [torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view_as(out) for out in outputs]
        sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
        results.append([x.detach().double() for x in (*outputs, *(leaf.grad for leaf in leaves))])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        check(error <= tolerance, f"{name}: result {i} (outputs, then gradients) differs from the reference by {error:.1e} of its largest value")


def check_ops() -> None:
    torch.manual_seed(0)
    randn = torch.randn
    # The first two are large enough to be split over threads.
    compare(
        "temperature_kl",
        lambda s, t: kdkernels.temperature_kl(s, t, 4.0),
        lambda s, t: reference.temperature_kl(s, t, 4.0),
        [randn(512, 1000), randn(512, 1000)],
    )
    maps = [randn(8, 64, 32, 32), randn(8, 32, 32, 32)]
    compare("attention_transfer_loss", kdkernels.attention_transfer_loss, reference.attention_transfer_loss, maps)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    compare("attention_transfer_loss (channels_last)", kdkernels.attention_transfer_loss, reference.attention_transfer_loss, channels_last)
    for direction in ("reverse", "jsd"):
        compare(
            f"temperature_kl ({direction})",
            lambda s, t, direction=direction: kdkernels.temperature_kl(s, t, 2.0, dim=1, direction=direction),
            lambda s, t, direction=direction: reference.temperature_kl(s, t, 2.0, dim=1, direction=direction),
            [randn(3, 21, 9, 7), randn(3, 21, 9, 7)],
        )
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        compare("temperature_kl", kdkernels.temperature_kl, reference.temperature_kl, [randn(5, 37).to(dtype) for _ in range(2)], tolerance)
        compare("attention_pool", kdkernels.attention_pool, reference.attention_pool, [randn(2, 19, 5, 7).to(dtype)], tolerance)
    orthogonal = [torch.linalg.qr(randn(4, n, 8))[0] for n in (40, 12)]
    matrices = orthogonal[0] * torch.tensor([9.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1]) @ orthogonal[1].mT  # with distinct singular values
    compare(
        "truncated_svd", lambda x: kdkernels.truncated_svd(x, 3, return_u=True), lambda x: reference.truncated_svd(x, 3, return_u=True), [matrices]
    )
    vectors = [torch.nn.functional.normalize(randn(4, n, 3), dim=1) for n in (20, 20, 30, 20, 30)]
    compare("align_singular_vectors", kdkernels.align_singular_vectors, reference.align_singular_vectors, [vectors[0], vectors[1]])
    compare("rbf_correlation", kdkernels.rbf_correlation, reference.rbf_correlation, [vectors[1], vectors[2]])
    compare("rbf_correlation_loss", kdkernels.rbf_correlation_loss, reference.rbf_correlation_loss, vectors[1:])
    print(f"ops: forward and backward agree with the reference ({kdkernels.CPU_ISA})", flush=True)


def check_other_instruction_sets() -> None:
    order = ["avx512", "avx2", "baseline"]
    info = _C.build_info()
    supported = order[order.index(info["best_isa"]) :]
    for isa in info["isas"].split(","):
        if isa in supported and isa != kdkernels.CPU_ISA:
            subprocess.run([sys.executable, __file__], env=os.environ | {CHILD: "1", "KDKERNELS_CPU_ISA": isa}, check=True)


def check_compile() -> None:
    """With Inductor if there is a C++ compiler, otherwise without code generation."""
    compiler = os.environ.get("CXX") or shutil.which("clang++" if sys.platform == "darwin" else "g++")
    backend = "inductor" if compiler and sys.platform != "darwin" else "aot_eager"  # Inductor on macOS needs more than a compiler
    torch.manual_seed(1)
    x, y = torch.randn(16, 50, requires_grad=True), torch.randn(16, 50)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return kdkernels.temperature_kl(x * 2, y, 3.0).sqrt()

    expected = loss(x, y)
    (expected_grad,) = torch.autograd.grad(expected, x)
    actual = torch.compile(loss, fullgraph=True, backend=backend)(x, y)
    (actual_grad,) = torch.autograd.grad(actual, x)
    check(bool(torch.isclose(actual, expected)), f"torch.compile gives {actual.item()}, without it the result is {expected.item()}")
    check(torch.allclose(actual_grad, expected_grad, rtol=1e-4, atol=1e-7), "torch.compile changes the gradient")
    print(f"torch.compile: fullgraph with {backend}", flush=True)


def check_command_line() -> None:
    script = shutil.which("kdkernels", path=sysconfig.get_path("scripts"))
    check(script is not None, f"there is no command kdkernels in {sysconfig.get_path('scripts')}")
    for command in ([script], [sys.executable, "-m", "kdkernels"]):
        printed = subprocess.run([*command, "info"], capture_output=True, text=True)
        check(printed.returncode == 0, f"{command} info failed: {printed.stderr}")
        check(kdkernels.CPU_ISA in printed.stdout and "temperature_kl: cpu -> C++" in printed.stdout, f"{command} info printed {printed.stdout}")
    print("kdkernels info: as a command and as a module", flush=True)


def check_training() -> None:
    missing = [name for name in ("lightning", "sklearn", "jsonargparse") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"training: not tested, because {', '.join(missing)} is not installed")
        return
    import lightning as L

    from kdkernels.data import Digits
    from kdkernels.distill import KD
    from kdkernels.models import TinyCNN

    L.seed_everything(0, verbose=False)
    method = KD(TinyCNN(4, num_classes=10), TinyCNN(8, num_classes=10))
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(**options, enable_model_summary=False)
    before = [p.detach().clone() for p in method.student.parameters()]
    trainer.fit(method, Digits(batch_size=128))
    check(any(bool((p != b).any()) for p, b in zip(method.student.parameters(), before, strict=True)), "training did not change the student")
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    check(0 <= accuracy <= 100, f"the accuracy is {accuracy}")
    print(f"training: one epoch of KD with lightning {version('lightning')}", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    if os.environ.get(CHILD):
        check_ops()
        return
    check_files()
    print(f"kdkernels {kdkernels.__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}")
    kdkernels.show_config()
    check_ops()
    check_other_instruction_sets()
    check_compile()
    check_command_line()
    check_training()
    print("the smoke test passed")


if __name__ == "__main__":
    main()
