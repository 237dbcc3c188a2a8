"""Prints the class of this machine, the name of its folder of results: its GPU, else its CPU and the number of cores in use."""

import os
import re
import subprocess
from pathlib import Path


def machine(device: str | None = None) -> str:
    """The class of the machine as far as ``device`` ("cpu" or "cuda"; by default the GPU, if there is one) is concerned."""
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
    """Of the source tree these benches are in, with "-dirty" where something is not committed; else the version that is installed."""
    here = Path(__file__).resolve().parent
    if (here.parent / ".git").exists():
        # Results and documents change while results are made.
        changed = ["git", "status", "--porcelain", "--", "csrc", "kdkernels", "python_ref", "benches/*.py", "setup.py"]
        calls = [["git", "rev-parse", "--short=7", "HEAD"], changed]
        found = [subprocess.run(c, capture_output=True, text=True, cwd=here.parent).stdout.strip() for c in calls]
        if found[0]:
            return found[0] + ("-dirty" if found[1] else "")
    from kdkernels import __version__

    return f"version {__version__}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


if __name__ == "__main__":
    print(machine())
