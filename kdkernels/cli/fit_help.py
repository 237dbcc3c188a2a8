"""``kdkernels fit --help``: the options of the method and the data at hand, each in a line."""

from __future__ import annotations

import inspect
import re

import lightning as L

from .. import data, distill
from .class_options import import_class, options_of
from .configs import load_config, options_in

_COMMON = """\
usage: kdkernels {command} --config FILE [--SECTION.OPTION VALUE ...]

  --config FILE             a YAML file with the sections model, data and trainer; configs/ has one for each method
  --print_config            writes the whole config, with all that can be set, and ends
  --ckpt_path last          {ckpt}
  --restart true            starts anew in a folder that holds a run (fit)
  --checkpoint_every N      keeps last.ckpt every N steps too (fit)
  --seed_everything N       of all random numbers; 0 by default
  --model.help CLASS        all about one method, likewise --data.help
  --help_all                everything, also of the trainer

"""
_TRAINER = """\
The trainer is Lightning's (--trainer.OPTION VALUE); the most used of its options:

  --trainer.max_epochs N                  --trainer.devices 2 --trainer.strategy ddp
  --trainer.default_root_dir FOLDER       --trainer.precision bf16-mixed
  --trainer.accelerator cpu|gpu|auto      --trainer.accumulate_grad_batches N
  --trainer.fast_dev_run true             --trainer.enable_progress_bar false
"""


def brief_help(arguments: list[str]) -> str:
    """With ``--config`` the options of that method and that data, else which methods and data there are."""
    command = arguments[0]
    ckpt = "goes on where a run stopped" if command == "fit" else "which weights: best, last, or a file"
    text = _COMMON.format(command=command, ckpt=ckpt)
    chosen = _chosen(arguments)
    for section, package, base in (("model", distill, distill.Distiller), ("data", data, L.LightningDataModule)):
        if section in chosen:
            cls = import_class(chosen[section])
            text += f"{cls.__name__} (--{section}.OPTION VALUE): {_first_sentence(cls)}\n\n{_options(cls, section)}\n"
            continue
        found = [c for c in (getattr(package, name) for name in package.__all__) if inspect.isclass(c) and issubclass(c, base) and c is not base]
        text += f"--{section} CLASS, one of {package.__name__} or by import path; with it, or with --config, --help lists its options:\n\n"
        text += "".join(f"  {c.__name__:28}{_first_sentence(c)}\n" for c in found) + "\n"
    return text + _TRAINER


def _chosen(arguments: list[str]) -> dict[str, str]:
    """The classes that the arguments and their configs name, by section."""
    chosen: dict[str, str] = {}
    for name, value in options_in(arguments):
        if name in ("-c", "--config"):
            sections = load_config(value)
            chosen |= {s: sections[s]["class_path"] for s in ("model", "data") if isinstance(sections.get(s), dict) and "class_path" in sections[s]}
        elif name in ("--model", "--data"):
            chosen[name[2:]] = value
    return chosen


def _options(cls: type, section: str) -> str:
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        said |= _documented(base)  # the nearest class last
    text = ""
    for name, parameter in options_of(cls).items():
        default = "" if parameter.default is parameter.empty else f" ({_shown(parameter.default)})"
        text += f"  --{section}.{name + default:34}{said.get(name, '')}\n"
    return text


def _shown(default: object) -> str:
    return "a function" if callable(default) else str(default)


def _documented(cls: type) -> dict[str, str]:
    """What the docstring says of each argument, its first sentence."""
    block = re.search(r"\n\s*Args:\n(.*?)(\n\s*\n|\n\s*(Returns|Raises|References):|\Z)", cls.__doc__ or "", re.S)
    if block is None:
        return {}
    said: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\S)", "\n" + block.group(1)):
        names, _, text = entry.strip().partition(": ")
        text = re.split(r"(?<=[.;]) ", " ".join(text.replace("``", "").split()))[0].rstrip(".;")
        text = re.sub(r":\w+:`[.~]*([^`]*)`", lambda m: m.group(1).rpartition(".")[2], text)
        said |= {name.strip(): text for name in names.split(",") if not text.startswith("see ")}  # its base says it
    return said


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").replace("``", "").split())
    text = re.sub(r":\w+:`[.~]*([^`]*)`", r"\1", text)
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":")
