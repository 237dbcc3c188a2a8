"""``kdkernels fit --help``: the options of the method and the data in use, one per line."""

from __future__ import annotations

import inspect
import re

from .. import data, distill
from .class_options import import_class, options_of
from .configs import load_config, options_in

_COMMON = """\
usage: kdkernels {command} --config FILE [--SECTION.OPTION VALUE ...]

  --config FILE             YAML file with the sections model, data and trainer; configs/ has one for each method
  --print_config            print the merged config with all settings, and exit
  --ckpt_path last          {ckpt}
  --restart true            start a new run in a folder that contains one (fit)
  --checkpoint_every N      also write last.ckpt every N steps (fit)
  --seed_everything N       seed of all random numbers; 0 by default
  --model.help CLASS        show all options of a method; --data.help CLASS: of a data module
  --help_all                show all options, also those of the trainer

"""
_TRAINER = """\
The options of the Lightning trainer (--trainer.OPTION VALUE) that are used most:
  --trainer.max_epochs N                  --trainer.devices 2 --trainer.strategy ddp
  --trainer.default_root_dir FOLDER       --trainer.precision bf16-mixed
  --trainer.accelerator cpu|gpu|auto      --trainer.accumulate_grad_batches N
  --trainer.fast_dev_run true             --trainer.enable_progress_bar false
"""


def brief_help(arguments: list[str]) -> str:
    """Return the help text.

    With ``--config``, it lists the options of the method and the data of the config; otherwise it
    lists the methods and the data modules.
    """
    command = arguments[0]
    ckpt = "resume a run from its last checkpoint" if command == "fit" else "weights to evaluate: best, last, or a file"
    text = _COMMON.format(command=command, ckpt=ckpt)
    chosen = _chosen_classes(arguments)
    for section, package, base in (("model", distill, distill.Distiller), ("data", data, data.ImageData)):
        if section in chosen:
            cls = import_class(chosen[section])
            text += f"{cls.__name__} (--{section}.OPTION VALUE): {_first_sentence(cls)}\n\n{_options(cls, section)}\n"
            continue
        classes = [c for c in (getattr(package, name) for name in package.__all__) if inspect.isclass(c) and issubclass(c, base) and c is not base]
        text += f"--{section} CLASS: a class of {package.__name__}, or any import path. Add --config or --{section} to see its options.\n"
        text += "".join(f"  {c.__name__:28}{_first_sentence(c)}\n" for c in classes) + "\n"
    return text + _TRAINER


def _chosen_classes(arguments: list[str]) -> dict[str, str]:
    """Return the class names that the arguments and their configs give, by section."""
    chosen: dict[str, str] = {}
    for name, value in options_in(arguments):
        if name in ("-c", "--config"):
            sections = load_config(value)
            chosen |= {s: sections[s]["class_path"] for s in ("model", "data") if isinstance(sections.get(s), dict) and "class_path" in sections[s]}
        elif name in ("--model", "--data"):
            chosen[name[2:]] = value
    return chosen


def _options(cls: type, section: str) -> str:
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # a subclass overrides the descriptions of its bases
        descriptions |= _describe_arguments(base)
    text = ""
    for name, parameter in options_of(cls).items():
        default = "" if parameter.default is parameter.empty else f" ({_format_default(parameter.default)})"
        text += f"  --{section}.{name + default:34}{descriptions.get(name, '')}\n"
    return text


def _format_default(default: object) -> str:
    return "a function" if callable(default) else str(default)


def _describe_arguments(cls: type) -> dict[str, str]:
    """Return the first sentence of the docstring on each argument."""
    block = re.search(r"\n\s*Args:\n(.*?)(\n\s*\n|\n\s*(Returns|Raises|References):|\Z)", cls.__doc__ or "", re.S)
    if block is None:
        return {}
    descriptions: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\S)", "\n" + block.group(1)):
        names, _, text = entry.strip().partition(": ")
        text = re.split(r"(?<=[.;]) ", " ".join(text.replace("``", "").split()))[0].rstrip(".;")
        text = re.sub(r":\w+:`[.~]*([^`]*)`", lambda m: m.group(1).rpartition(".")[2], text)
        # "see :class:`Base`": the description is in the docstring of the base class.
        descriptions |= {name.strip(): text for name in names.split(",") if not text.startswith("see ")}
    return descriptions


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").replace("``", "").split())
    text = re.sub(r":\w+:`[.~]*([^`]*)`", r"\1", text)
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":")
