"""Build information, imports, instruction sets, the command line, and the examples in the
documents.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import _C
from kdkernels.config import HAS_CUDA_KERNELS

ROOT = Path(__file__).parent.parent


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KDKERNELS_CPU_ISA")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment)


def test_build_info_and_show_config(capsys):
    info = _C.build_info()
    assert kdkernels.CPU_ISA in info["isas"].split(",")
    kdkernels.show_config()
    printed = capsys.readouterr().out
    for word in (kdkernels.__version__, kdkernels.CPU_ISA, "temperature_kl: cpu -> C++", "cuda ->"):
        assert word in printed


def test_show_config_gives_the_reason_for_missing_cuda_kernels(capsys):
    """The build records the reason, and ops that cannot run on a GPU here state what to install."""
    kdkernels.show_config()
    printed = capsys.readouterr().out
    if not HAS_CUDA_KERNELS:
        reason = _C.build_info()["without_cuda"]
        assert "build" in reason
        assert f"not built: {reason}" in printed
    if torch.version.cuda is None and torch.version.hip is None:
        assert "cuda -> unavailable: install a build of torch with CUDA or ROCm" in printed
    assert "other devices -> reference in plain PyTorch" in printed


def test_version_matches_the_distribution():
    from importlib.metadata import version

    assert kdkernels.__version__ == version("kdkernels")
    assert f"version: {kdkernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


ISAS = _C.build_info()["isas"].split(",")
ORDER = ["avx512", "avx2", "baseline"]


@pytest.mark.parametrize("isa", [i for i in ORDER[ORDER.index(_C.build_info()["best_isa"]) :] if i in ISAS])
def test_every_instruction_set_gives_the_known_value(isa):
    code = (
        "import torch, kdkernels as k; s, t = torch.tensor([[1., 2, 3]]).double().requires_grad_(), torch.tensor([[3., 2, 1]]).double();"
        "loss = k.temperature_kl(s, t, 4.0); loss.backward();"
        "maps = torch.randn(2, 5, 7, 9); other = torch.randn(2, 5, 7, 9); a = k.temperature_kl(maps, other, 2.0, dim=1);"
        "b = k.reference.temperature_kl(maps.double(), other.double(), 2.0, dim=1);"
        "print(k.CPU_ISA, abs(loss.item() - 1.3196299122) < 5e-11, abs(s.grad[0, 0].item() + 0.6598149561) < 5e-11, abs(a / b - 1).item() < 1e-6)"
    )
    run = _python(code, KDKERNELS_CPU_ISA=isa)
    assert run.stdout.split() == [isa, "True", "True", "True"], run.stdout + run.stderr


def test_unknown_instruction_set_is_an_error():
    run = _python("import kdkernels", KDKERNELS_CPU_ISA="avx1024")
    assert run.returncode != 0
    assert "KDKERNELS_CPU_ISA must be one of" in run.stderr


def test_import_loads_neither_trainer_nor_compiler():
    run = _python("import kdkernels, sys; print([m for m in ('triton', 'lightning', 'matplotlib', 'sklearn') if m in sys.modules])")
    imported_by_torch = _python("import torch, sys; print([m for m in ('triton', 'lightning', 'matplotlib', 'sklearn') if m in sys.modules])")
    assert run.stdout == imported_by_torch.stdout, run.stderr


def test_cuda_kernels_on_cpu_tensors_outside_of_tests_raise():
    code = (
        "import torch, kdkernels as k; x = torch.ones(2, 3, 2)\n"
        "from kdkernels.testing import implementation\n"
        "for call in (lambda: k.truncated_svd(x, 1), lambda: k.truncated_svds([x], 1), lambda: k.align_singular_vectors(x, x)):\n"
        "    try: implementation('cuda')(call)()\n"
        "    except (NotImplementedError, RuntimeError) as error: print(error)"
    )
    run = _python(code)
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stdout + run.stderr
    expected = 'implementation "cuda" takes CUDA tensors' if HAS_CUDA_KERNELS else 'the implementation "cuda" was not built'
    assert all(line.startswith(expected) for line in lines)


def test_command_line(tmp_path, capsys):
    from kdkernels.cli import main

    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["distil"]) == 2
    assert main(["info"]) == 0
    printed = capsys.readouterr()
    assert "no command 'distil'" in printed.err
    assert "cpu isa" in printed.out


def test_error_without_triton_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None; import kdkernels; from kdkernels.ops import registration\n"
        "try: registration._triton_module('temperature_kl')\nexcept RuntimeError as error: print(error)"
    )
    run = _python(code)
    assert run.stdout.strip() == "temperature_kl on a GPU runs in Triton, which is not installed: pip install triton", run.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_kdkernels_cuda_1_without_cuda_is_an_error():
    environment = os.environ | {"KDKERNELS_CUDA": "1"}
    run = subprocess.run([sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode != 0
    assert "KDKERNELS_CUDA=1 needs a CUDA build of torch and nvcc" in run.stderr


def _python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.S)


# Blocks that read files: those of docs/inference.md and docs/own_model.md are written and run by
# tests/test_predict.py and tests/test_docs.py, the others need a trained network.
NEEDS_FILES = {
    ("README.md", 1),
    ("docs/byot.md", 0),
    ("docs/inference.md", 1),
    ("docs/inference.md", 2),
    ("docs/inference.md", 3),
    ("docs/models.md", 0),
    ("docs/own_model.md", 2),
    ("docs/own_model.md", 3),
}
PAGES = [path for path in ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))] if _python_blocks(path)]


@pytest.mark.parametrize("page", PAGES)
def test_examples_in_the_documents_run(page, tmp_path, monkeypatch):
    """The blocks of a page are run one after another, in one namespace."""
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for i, block in enumerate(_python_blocks(page)):
        code = compile(block, f"{page}, block {i}", "exec")
        if (page, i) not in NEEDS_FILES:
            exec(code, namespace)


def test_method_of_the_documents():
    own_method = _python_blocks("docs/kd.md")[0]
    pytest.importorskip("lightning")
    namespace = {}
    exec(own_method, namespace)
    from kdkernels.models import TinyCNN

    method = namespace["ReverseKD"](TinyCNN(2), TinyCNN(4))
    batch = {"image": torch.randn(3, 3, 32, 32), "label": torch.zeros(3, dtype=torch.long)}
    logits, losses = method.losses(batch)
    assert logits.shape == (3, 10)
    assert losses["reverse_kl"] > 0
