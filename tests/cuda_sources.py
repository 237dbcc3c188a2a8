"""Checks of the CUDA sources that need no GPU.

python cuda_sources.py syntax      checks csrc/<op>/cuda.cpp against torch's headers
python cuda_sources.py table       prints the budget as a table
python cuda_sources.py resources   compiles csrc/<op>/kernels.cu for every target and prints the
                                   resources that ptxas reports; with --write, writes the budget
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from cuda_toolkit import ARCHITECTURES, find_toolkit

SOURCES = Path(__file__).parent.parent / "csrc"
BUDGET = Path(__file__).parent / "cuda_budget.json"
TARGETS = tuple(f"sm_{architecture.replace('.', '')}" for architecture in ARCHITECTURES)
TYPES = {"f": "float", "d": "double"}


def nvcc() -> str | None:
    toolkit, _ = find_toolkit(os.environ)
    return toolkit and os.path.join(toolkit.home, "bin", "nvcc")


def include_folder() -> str | None:
    """Return the folder of the CUDA runtime's headers."""
    toolkit, _ = find_toolkit(os.environ)
    return toolkit and os.path.join(toolkit.home, "include")


def binary_tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm, which Triton and the CUDA toolkit contain."""
    triton = importlib.util.find_spec("triton")
    shipped = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin" / name
    found = str(shipped) if shipped.exists() else shutil.which(name)
    assert found, f"{name} ships with triton and with the CUDA toolkit; neither is here"
    return found


def check_syntax() -> int:
    from torch.utils import cpp_extension

    folder = include_folder()
    if folder is None:
        print("csrc/*/cuda.cpp: not checked, for there is no nvcc and no CUDA header")
        return 0
    headers = [f for path in cpp_extension.include_paths() for f in ("-isystem", path)]
    sources = sorted(str(p) for p in SOURCES.glob("*/cuda.cpp"))
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi", f"-I{SOURCES / 'testing' / 'stubs'}"]
    result = subprocess.run([*command, *headers, "-isystem", folder, *sources])
    if result.returncode == 0:
        print(f"{', '.join(str(Path(s).relative_to(SOURCES.parent)) for s in sources)}: compile against torch's headers")
    return result.returncode


def resources(targets: Sequence[str] = TARGETS, ops: str = "*") -> dict[str, dict[str, dict[str, int]]]:
    """Compile every kernel in csrc/<ops>/kernels.cu for the targets.

    Return its resources by target and kernel.

    The keys are registers, and in bytes stack, spill_stores, spill_loads and shared.
    """
    architectures = [f for t in targets for f in ("-gencode", f"arch=compute_{t.removeprefix('sm_')},code={t}")]
    result: dict[str, dict[str, dict[str, int]]] = {target: {} for target in targets}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob(f"{ops}/kernels.cu")):
            command = [nvcc(), "-std=c++17", "-t", "2", *architectures, "-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/out.o"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(run.stderr)
            for entry in re.split(r"(?=Compiling entry function)", run.stderr)[1:]:
                name, target = re.search(r"entry function '(\S+)' for '(\S+)'", entry).groups()
                stack, stores, loads = map(
                    int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
                )
                shared = re.search(r"(\d+) bytes smem", entry)
                result[target][kernel_name(name)] = {
                    "registers": int(re.search(r"Used (\d+) registers", entry).group(1)),
                    "stack": stack,
                    "spill_stores": stores,
                    "spill_loads": loads,
                    "shared": int(shared.group(1)) if shared else 0,
                }
    return {target: dict(sorted(kernels.items())) for target, kernels in result.items()}


def table() -> str:
    """Return the budget as the table of docs/truncated_svd.md: registers, bytes of stack, and bytes
    of spill stores.
    """
    budget = json.loads(BUDGET.read_text())
    lines = [f"| kernel | {' | '.join(budget)} |", "|---|" + "---|" * len(budget)]
    for kernel in budget[TARGETS[0]]:
        cells = (" / ".join(str(budget[t][kernel][key]) for key in ("registers", "stack", "spill_stores")) for t in budget)
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_name(mangled: str) -> str:
    """Return a kernel's name with its template arguments, for example forward_kernel<float, 256>.

    The arguments are the compute type and the threads per matrix.
    """
    name, arguments = re.search(r"\d+([a-z_]+_kernel)I(.+?)EEv", mangled).groups()
    named = re.match(r"N\w*?\d([A-Z]\w*?)E", arguments)  # a type of this project, such as BFloat16
    rest = [{"b0": "forward", "b1": "backward"}.get(kind + value, value) for kind, value in re.findall(r"L([ib])(\d+)", arguments)]
    return f"{name}<{', '.join([named.group(1) if named else TYPES[arguments[0]], *rest])}>"


def main() -> int:
    if sys.argv[1] == "syntax":
        return check_syntax()
    if sys.argv[1] == "table":
        print(table())
        return 0
    found = resources()
    if "--write" in sys.argv:
        BUDGET.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
