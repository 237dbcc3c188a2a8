"""Prints the class of this machine, the name of its folder of results: its GPU, else its CPU and the number of cores in use."""

import os
import re


def machine() -> str:
    try:
        import torch

        if torch.cuda.is_available():
            return _slug(torch.cuda.get_device_name())
    except ImportError:
        pass
    model = "cpu"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found = re.search(r"model name\s*:\s*(.*)", file.read())
        model = found.group(1) if found else model
    return f"{_slug(model)}-{len(os.sched_getaffinity(0))}-cores"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(machine())
