"""Print the class of this machine: its GPU or, without one, its CPU, the widest instruction set
that the kernels use on it, and the number of usable cores.

The class is the name of the folder of its results. Virtual machines often give the same name to
several generations of CPUs, which the instruction set tells apart.
"""

import os
import re
import subprocess
from pathlib import Path


def machine(device: str | None = None) -> str:
    """Return the class of the machine for ``device``, by default the GPU if there is one."""
    try:
        import torch

        if device != "cpu" and torch.cuda.is_available():
            return slug(torch.cuda.get_device_name())
    except ImportError:
        pass
    return "-".join([slug(processor()), *instruction_set(), str(len(os.sched_getaffinity(0))), "cores"])


def processor() -> str:
    return _cpu_info("model name") or "cpu"


def instruction_set() -> list[str]:
    """Return the widest instruction set of an x86-64 CPU for which there are kernels, if any."""
    flags = _cpu_info("flags").split()
    return [isa for isa, flag in (("avx512", "avx512vl"), ("avx2", "avx2")) if flag in flags][:1]


def _cpu_info(name: str) -> str:
    """Return an entry of /proc/cpuinfo, or an empty string."""
    if not os.path.exists("/proc/cpuinfo"):
        return ""
    with open("/proc/cpuinfo") as file:
        found = re.search(rf"^{name}\s*:\s*(.*)", file.read(), re.MULTILINE)
    return found.group(1).strip() if found else ""


def commit() -> str:
    """Return the commit of the source tree, with "-dirty" if there are uncommitted changes.

    Outside a git clone, return the version of the installed package.
    """
    here = Path(__file__).resolve().parent
    if (here.parent / ".git").exists():
        # Results and docs are not checked, because making new results changes them.
        changed = ["git", "status", "--porcelain", "--", "csrc", "kdkernels", "python_ref", "benches/*.py", "setup.py"]
        commands = [["git", "rev-parse", "--short=7", "HEAD"], changed]
        outputs = [subprocess.run(c, capture_output=True, text=True, cwd=here.parent).stdout.strip() for c in commands]
        if outputs[0]:
            return outputs[0] + ("-dirty" if outputs[1] else "")
    from kdkernels import __version__

    return f"version {__version__}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


if __name__ == "__main__":
    print(machine())
