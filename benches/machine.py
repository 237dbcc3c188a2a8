"""Print the class of this machine: its GPU or, without one, its CPU and the number of usable cores.

The class is the name of the folder of its results.
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
    return f"{slug(processor())}-{len(os.sched_getaffinity(0))}-cores"


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found = re.search(r"model name\s*:\s*(.*)", file.read())
        if found:
            return found.group(1).strip()
    return "cpu"


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
