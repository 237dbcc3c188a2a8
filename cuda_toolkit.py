"""Decides whether the CUDA kernels can be built, with which toolkit and for which GPU architectures. setup.py calls `plan`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob

# Built by default as far as nvcc knows them, the newest also as PTX. Together they run on every GPU from compute capability 8.0 on: a cubin runs on
# later minor versions of its major version, PTX is compiled by the driver for any later GPU. tests/cuda_budget.json holds the registers of each.
ARCHITECTURES = ("8.0", "9.0", "10.0")
OLDEST = (8, 0)  # the kernels copy to shared memory with cp.async

# The names of generations that torch accepts in TORCH_CUDA_ARCH_LIST.
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
    version: str  # of nvcc, as "13.0"
    targets: tuple[str, ...]  # what nvcc --list-gpu-arch prints: "compute_80", ...

    def knows(self, architecture: str) -> bool:
        """Whether nvcc compiles for "9.0", "9.0a" or "10.0f". Some releases list "compute_90a" beside "compute_90", others only the latter."""
        number, suffix = re.fullmatch(r"([\d.]+)([af]?)", architecture).groups()
        target = f"compute_{number.replace('.', '')}"
        has_suffix = {"": True, "a": _numbers(number) >= (9, 0), "f": _numbers(number) >= (10, 0) and _numbers(self.version) >= (12, 9)}[suffix]
        return target + suffix in self.targets or (target in self.targets and has_suffix)


@dataclass(frozen=True)
class Plan:
    architectures: tuple[str, ...] = ()  # "8.0", "9.0a", "10.0+PTX"; empty where the CUDA kernels are not built
    home: str = ""  # of the toolkit
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
    visible_gpus: Callable[[], list[tuple[int, int]]] = list,  # their compute capabilities, asked for by TORCH_CUDA_ARCH_LIST=native only
    folder: str = "/usr/local",  # where toolkits are that neither the environment nor PATH names
) -> Plan:
    """What to build. Raises ValueError where an environment variable has a value that means nothing."""
    choice = environment.get("KDKERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"KDKERNELS_CUDA must be 0 (build without CUDA kernels), 1 (insist on them) or unset, got {choice!r}")
    if choice == "0":
        return Plan(reason="KDKERNELS_CUDA=0 was set when kdkernels was built: to get them, build it again without KDKERNELS_CUDA")
    if "rocm" in torch_version:
        return Plan(reason=f"torch {torch_version} is a build for ROCm, where every op runs in Triton: pip install triton if it is missing")
    if torch_cuda is None:
        return Plan(reason=f"torch {torch_version} has no CUDA: install a CUDA build of torch, then build kdkernels again")
    toolkit, faults = find_toolkit(environment, _numbers(torch_cuda)[0], folder)
    if toolkit is None:
        return Plan(reason=_no_toolkit(torch_version, torch_cuda, faults, folder))
    notes = [f"the CUDA toolkit is {toolkit.home} (CUDA {toolkit.version}; torch {torch_version} has {torch_cuda})", *faults]
    architectures, dropped = choose_architectures(environment.get("TORCH_CUDA_ARCH_LIST", ""), toolkit, visible_gpus)
    if not architectures:
        default = ";".join(_default(toolkit))
        cure = f"with TORCH_CUDA_ARCH_LIST='{default}'" if default else "with a newer CUDA toolkit"
        return Plan(reason=f"no GPU architecture is left to build for ({'; '.join(dropped)}): build kdkernels again {cure}")
    return Plan(architectures, toolkit.home, notes=(*notes, *dropped, f"CUDA kernels are built for {';'.join(architectures)}"))


def find_toolkit(environment: Mapping[str, str], major: int | None = None, folder: str = "/usr/local") -> tuple[Toolkit | None, list[str]]:
    """The first toolkit that is complete and, where `major` is given, has that major version; and what is wrong with those before it."""
    faults: list[str] = []
    for nvcc, origin in _candidates(environment, major, folder):
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


def _candidates(environment: Mapping[str, str], major: int | None, folder: str) -> Iterator[tuple[str, str]]:
    """Paths of nvcc in the order in which torch looks for them, then the other releases that are installed beside the default one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield os.path.join(environment[name], "bin", "nvcc"), name
    if on_path := shutil.which("nvcc", path=environment.get("PATH", "")):
        yield on_path, "PATH"
    for home in (f"{folder}/cuda", *sorted(glob(f"{folder}/cuda-{'*' if major is None else major}*"), reverse=True)):
        if os.path.exists(f"{home}/bin/nvcc"):
            yield f"{home}/bin/nvcc", folder


def _inspect(nvcc: str, environment: Mapping[str, str]) -> Toolkit | str:
    """The toolkit of an nvcc, which may be a script outside its toolkit; or what is wrong with it."""
    if not os.path.exists(nvcc):
        return f"{nvcc} does not exist"
    try:
        version = _run(environment, nvcc, "--version")
        dry = _run(environment, nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
        targets = _run(environment, nvcc, "--list-gpu-arch")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        return f"{nvcc} --version names no release"
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.M)
    homes = [*([top.group(1).strip()] if top else []), os.path.dirname(os.path.dirname(nvcc))]
    homes = [os.path.realpath(home) for home in homes if os.path.exists(os.path.join(home, "bin", "nvcc"))]
    for home in homes:
        if os.path.exists(os.path.join(home, "include", "cuda_runtime.h")):
            return Toolkit(home, release.group(1), tuple(re.findall(r"compute_\d+[af]?", targets)))
    return f"{homes[0] if homes else nvcc} has no include/cuda_runtime.h"


def _run(environment: Mapping[str, str], *command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", env=dict(environment), timeout=60)
    return run.stdout + run.stderr


def _no_toolkit(torch_version: str, torch_cuda: str, faults: list[str], folder: str) -> str:
    major = _numbers(torch_cuda)[0]
    found = "; ".join(faults) or f"no nvcc was found through CUDA_HOME, CUDA_PATH, PATH or in {folder}/cuda*"
    return (
        f"torch {torch_version} needs a CUDA {major} toolkit with bin/nvcc and include/cuda_runtime.h, but {found}: "
        "install one or set CUDA_HOME to it, then build kdkernels again"
    )


def choose_architectures(
    asked: str,  # TORCH_CUDA_ARCH_LIST
    toolkit: Toolkit,
    visible_gpus: Callable[[], list[tuple[int, int]]] = list,
) -> tuple[tuple[str, ...], list[str]]:
    """The architectures to build for, and a line for each that was asked for and is left out."""
    dropped = []
    if asked.strip() == "native":
        asked = ";".join(f"{major}.{minor}" for major, minor in sorted(set(visible_gpus())))
        if not asked:
            dropped.append("TORCH_CUDA_ARCH_LIST=native, but no GPU is visible: the default architectures are built")
    entries = _parse(asked)
    if not entries:
        return _default(toolkit), dropped
    chosen: dict[str, bool] = {}
    for architecture, ptx in entries:
        if _numbers(architecture) < OLDEST:
            dropped.append(f"{architecture} is left out, because the CUDA kernels need compute capability 8.0 or later")
        elif not toolkit.knows(architecture):
            dropped.append(f"{architecture} is left out, because nvcc {toolkit.version} in {toolkit.home} does not know it")
        else:
            chosen[architecture] = chosen.get(architecture, False) or ptx
    return tuple(architecture + "+PTX" * ptx for architecture, ptx in chosen.items()), list(dict.fromkeys(dropped))


def _default(toolkit: Toolkit) -> tuple[str, ...]:
    known = [a for a in ARCHITECTURES if toolkit.knows(a)]
    return (*known[:-1], f"{known[-1]}+PTX") if known else ()


def _parse(asked: str) -> list[tuple[str, bool]]:
    """(architecture, with PTX) of each entry of TORCH_CUDA_ARCH_LIST; generations become their architectures."""
    parsed = []
    for entry in re.split(r"[;,\s]+", asked):
        for part in filter(None, GENERATIONS.get(entry, GENERATIONS.get(entry.removesuffix("+PTX"), entry)).split(";")):
            match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", part)
            if match is None:
                raise ValueError(f"TORCH_CUDA_ARCH_LIST has {part!r}, expected entries such as 8.6, 9.0a, 10.0+PTX or Ampere with semicolons between")
            parsed.append((match.group(1), match.group(2) is not None))
    return parsed


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
