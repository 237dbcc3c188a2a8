"""Decides whether the CUDA kernels can be built, with which toolkit, and for which GPUs.

setup.py calls `plan`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob

# The architectures that are built by default, if nvcc supports them; the newest one also as PTX.
# Together they run on every GPU of compute capability 8.0 or later: a cubin runs on later minor
# versions of its major version, and the driver compiles PTX for any later GPU.
# tests/cuda_budget.json lists the number of registers for each of them.
ARCHITECTURES = ("8.0", "9.0", "10.0")
MIN_CAPABILITY = (8, 0)  # the kernels copy to shared memory with cp.async

# The names of GPU generations that torch accepts in TORCH_CUDA_ARCH_LIST.
GENERATIONS = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Rubin": "10.7+PTX",
}


@dataclass(frozen=True)
class Toolkit:
    home: str  # the folder that has bin/nvcc and include/cuda_runtime.h
    version: str  # of nvcc, for example "13.0"
    targets: tuple[str, ...]  # the output of nvcc --list-gpu-arch: "compute_80", ...

    def supports(self, architecture: str) -> bool:
        """Whether nvcc compiles for an architecture such as "9.0", "9.0a" or "10.0f".

        Some releases of nvcc list "compute_90a" in addition to "compute_90", others do not.
        """
        number, suffix = re.fullmatch(r"([\d.]+)([af]?)", architecture).groups()
        target = f"compute_{number.replace('.', '')}"
        has_suffix = {"": True, "a": _numbers(number) >= (9, 0), "f": _numbers(number) >= (10, 0) and _numbers(self.version) >= (12, 9)}[suffix]
        return target + suffix in self.targets or (target in self.targets and has_suffix)


@dataclass(frozen=True)
class Plan:
    architectures: tuple[str, ...] = ()  # "8.0", "9.0a", "10.0+PTX"; empty if the CUDA kernels are not built
    home: str = ""  # the folder of the toolkit
    reason: str = ""  # one sentence: why the CUDA kernels are not built, and what to do
    notes: tuple[str, ...] = ()  # lines to print

    def nvcc_flags(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def plan(
    torch_version: str,
    torch_cuda: str | None,  # torch.version.cuda
    environment: Mapping[str, str],
    visible_gpus: Callable[[], list[tuple[int, int]]] = list,  # returns compute capabilities; called only for TORCH_CUDA_ARCH_LIST=native
    folder: str = "/usr/local",  # is searched for toolkits that neither the environment nor PATH names
) -> Plan:
    """Decide what to build. Raises ValueError if an environment variable has an invalid value."""
    cuda_switch = environment.get("KDKERNELS_CUDA", "")
    if cuda_switch not in ("", "0", "1"):
        raise ValueError(f"KDKERNELS_CUDA must be 0 (build without CUDA kernels), 1 (fail if they cannot be built) or unset, got {cuda_switch!r}")
    if cuda_switch == "0":
        return Plan(reason="KDKERNELS_CUDA=0 was set when kdkernels was built: to get the CUDA kernels, unset it and build kdkernels again")
    if "rocm" in torch_version:
        return Plan(reason=f"torch {torch_version} is a build for ROCm, where every op runs in Triton: pip install triton if it is missing")
    if torch_cuda is None:
        return Plan(reason=f"torch {torch_version} has no CUDA: install a CUDA build of torch, then build kdkernels again")
    toolkit, faults = find_toolkit(environment, _numbers(torch_cuda)[0], folder)
    if toolkit is None:
        return Plan(reason=_no_toolkit_reason(torch_version, torch_cuda, faults, folder))
    notes = [f"the CUDA toolkit is {toolkit.home} (CUDA {toolkit.version}; torch {torch_version} has {torch_cuda})", *faults]
    architectures, dropped = choose_architectures(environment.get("TORCH_CUDA_ARCH_LIST", ""), toolkit, visible_gpus)
    if not architectures:
        default = ";".join(_default_architectures(toolkit))
        remedy = f"with TORCH_CUDA_ARCH_LIST='{default}'" if default else "with a newer CUDA toolkit"
        return Plan(reason=f"none of the requested GPU architectures can be built ({'; '.join(dropped)}): build kdkernels again {remedy}")
    return Plan(architectures, toolkit.home, notes=(*notes, *dropped, f"CUDA kernels are built for {';'.join(architectures)}"))


def find_toolkit(environment: Mapping[str, str], major: int | None = None, folder: str = "/usr/local") -> tuple[Toolkit | None, list[str]]:
    """Find the first complete toolkit, of major version `major` if it is given.

    Returns the toolkit, or None, and a list of what is wrong with the toolkits found before it.
    """
    faults: list[str] = []
    for nvcc, origin in _nvcc_candidates(environment, major, folder):
        found = _inspect(nvcc, environment)
        if isinstance(found, str):
            fault = f"{found} (found through {origin})"
        elif major is not None and _numbers(found.version)[0] != major:
            fault = f"{found.home} (found through {origin}) is CUDA {found.version}, not CUDA {major}"
        else:
            return found, faults
        if fault not in faults:
            faults.append(fault)
    return None, faults


def _nvcc_candidates(environment: Mapping[str, str], major: int | None, folder: str) -> Iterator[tuple[str, str]]:
    """Yield paths of nvcc and how each was found.

    First the paths in the order in which torch looks for them, then the other releases in `folder`.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield os.path.join(environment[name], "bin", "nvcc"), name
    if on_path := shutil.which("nvcc", path=environment.get("PATH", "")):
        yield on_path, "PATH"
    for home in (f"{folder}/cuda", *sorted(glob(f"{folder}/cuda-{'*' if major is None else major}*"), reverse=True)):
        if os.path.exists(f"{home}/bin/nvcc"):
            yield f"{home}/bin/nvcc", folder


def _inspect(nvcc: str, environment: Mapping[str, str]) -> Toolkit | str:
    """Return the toolkit that an nvcc belongs to, or a description of what is wrong with it.

    nvcc may be a script outside its toolkit, so `nvcc --dryrun` is asked for the folder of the
    toolkit.
    """
    if not os.path.exists(nvcc):
        return f"{nvcc} does not exist"
    try:
        version = _run(environment, nvcc, "--version")
        dryrun_output = _run(environment, nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
        targets = _run(environment, nvcc, "--list-gpu-arch")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        return f"{nvcc} --version prints no release number"
    toolkit_line = re.search(r"^#\$ TOP=(.+)$", dryrun_output, re.M)
    homes = [*([toolkit_line.group(1).strip()] if toolkit_line else []), os.path.dirname(os.path.dirname(nvcc))]
    homes = [os.path.realpath(home) for home in homes if os.path.exists(os.path.join(home, "bin", "nvcc"))]
    for home in homes:
        if os.path.exists(os.path.join(home, "include", "cuda_runtime.h")):
            return Toolkit(home, release.group(1), tuple(re.findall(r"compute_\d+[af]?", targets)))
    return f"{homes[0] if homes else nvcc} has no include/cuda_runtime.h"


def _run(environment: Mapping[str, str], *command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", env=dict(environment), timeout=60)
    return run.stdout + run.stderr


def _no_toolkit_reason(torch_version: str, torch_cuda: str, faults: list[str], folder: str) -> str:
    major = _numbers(torch_cuda)[0]
    found = "; ".join(faults) or f"no nvcc was found through CUDA_HOME, CUDA_PATH, PATH or in {folder}/cuda*"
    return (
        f"torch {torch_version} needs a CUDA {major} toolkit with bin/nvcc and include/cuda_runtime.h, but {found}: "
        "install one or set CUDA_HOME to it, then build kdkernels again"
    )


def choose_architectures(
    requested: str,  # TORCH_CUDA_ARCH_LIST
    toolkit: Toolkit,
    visible_gpus: Callable[[], list[tuple[int, int]]] = list,
) -> tuple[tuple[str, ...], list[str]]:
    """Return the architectures to build for, and a note for each requested one that is left out."""
    dropped = []
    if requested.strip() == "native":
        requested = ";".join(f"{major}.{minor}" for major, minor in sorted(set(visible_gpus())))
        if not requested:
            dropped.append("TORCH_CUDA_ARCH_LIST=native, but no GPU is visible: the default architectures are built")
    entries = _parse_architectures(requested)
    if not entries:
        return _default_architectures(toolkit), dropped
    chosen: dict[str, bool] = {}
    for architecture, ptx in entries:
        if _numbers(architecture) < MIN_CAPABILITY:
            dropped.append(f"{architecture} is left out, because the CUDA kernels need compute capability 8.0 or later")
        elif not toolkit.supports(architecture):
            dropped.append(f"{architecture} is left out, because nvcc {toolkit.version} in {toolkit.home} does not support it")
        else:
            chosen[architecture] = chosen.get(architecture, False) or ptx
    return tuple(architecture + "+PTX" * ptx for architecture, ptx in chosen.items()), list(dict.fromkeys(dropped))


def _default_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    known = [a for a in ARCHITECTURES if toolkit.supports(a)]
    return (*known[:-1], f"{known[-1]}+PTX") if known else ()


def _parse_architectures(requested: str) -> list[tuple[str, bool]]:
    """Parse TORCH_CUDA_ARCH_LIST into (architecture, with PTX).

    Names of generations are replaced by their architectures.
    """
    parsed = []
    for entry in re.split(r"[;,\s]+", requested):
        for part in filter(None, GENERATIONS.get(entry, GENERATIONS.get(entry.removesuffix("+PTX"), entry)).split(";")):
            match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", part)
            if match is None:
                raise ValueError(f"TORCH_CUDA_ARCH_LIST has {part!r}, expected entries such as 8.6, 9.0a, 10.0+PTX or Ampere, separated by ';'")
            parsed.append((match.group(1), match.group(2) is not None))
    return parsed


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
