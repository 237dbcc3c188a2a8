"""User errors: printed as one line, without a traceback. The line names the cause, and the cure where it is known."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from .class_options import import_class, options_of

TRACEBACK = "KDKERNELS_TRACEBACK=1 shows where"
# What jsonargparse says of values that it tried, and of one that is no value of an option.
_REPORT = re.compile(r"(Parser key .*\n?\s*)?(Does not validate against any of|Problem with given class_path)")
_OPTION = re.compile(r"Expected a|Option |Key |Problem with|Not a |Unable to|Does not|Parser key|Import path|No module named|Unexpected")
_PLAIN = (ValueError, TypeError, OSError, FloatingPointError, ImportError)  # of which the message says it all, where it is this package's


def one_line(error: BaseException) -> str:
    """What to print in place of the stack."""
    error = _cause(error)
    text = str(error)
    kind = type(error).__name__
    if "not accepted" in text or "does not accept option" in text or kind == "ArgumentError" or "Parser key" in text or _REPORT.match(text):
        return _of_the_parser(text)
    if "in DataLoader worker process" in text:  # a whole stack as text; its last line is the error
        return text.strip().splitlines()[-1]
    if kind == "OutOfMemoryError" or "out of memory" in text.lower() or isinstance(error, MemoryError):
        return (
            f"out of memory: {_joined(text, 200)}. A smaller --data.batch_size, --trainer.accumulate_grad_batches 2, or "
            "--trainer.precision bf16-mixed takes less"
        )
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"{_joined(text)} (modules of your own are looked for in {os.getcwd()} and beside the config)"
    if "Error(s) in loading state_dict" in text:
        return f"the checkpoint is of another network: {_joined(text.split(':', 1)[-1])}"
    if isinstance(error, _PLAIN) or kind == "MisconfigurationException":
        return _joined(text) or kind
    return f"{kind}{': ' * bool(text)}{_joined(text)} ({TRACEBACK})"


def _joined(text: str, most: int = 500) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return text if len(text) <= most else text[:most] + " ..."


def _cause(error: BaseException) -> BaseException:
    """What a constructor raised, out of the parser's report of all that it tried; the report itself where it is about the options."""
    inner = error
    while _REPORT.match(str(inner)) or type(inner).__name__ == "ArgumentError":
        below = inner.__cause__ or inner.__context__
        if below is None:
            return error
        inner = below
    return error if _OPTION.match(str(inner)) else inner


def _of_the_parser(text: str) -> str:
    place = re.search(r'Parser key "([^"]*)"', text)
    key = f"--{place.group(1)}: " if place else ""
    option = re.search(r"(?:Option|Key|key) '([^']+)' is not (?:accepted|expected)", text)
    owner = (re.findall(r"class_path '([^']+)'", text) or [None])[-1]
    if option:
        name = option.group(1)
        return f"{key}{owner.rpartition('.')[2] if owner else 'the config'} has no option {name!r}{_near(name, owner) if owner else ''}"
    section = re.search(r"does not accept option '([^']+)'", text)
    if section:
        return f"{key}the config has no option {section.group(1)!r}{close_match(section.group(1).partition('.')[0], ['model', 'data', 'trainer'])}"
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
    if unknown and unknown.group(1) in ("optimizer", "lr_scheduler"):  # where other command lines of Lightning have them
        return f"there is no option --{unknown.group(1)}; did you mean --model.{unknown.group(1).removeprefix('lr_')}?"
    if unknown:
        return f"there is no option --{unknown.group(1)}{_near(unknown.group(1).removeprefix('trainer.'), 'lightning.pytorch.Trainer')}"
    missing = re.search(r"Expected a dot import path string: (\S+)|(No module named '[^']+')|(Import path \S+ .*)", text)
    if missing:
        what = (missing.group(1) and f"there is no class {missing.group(1)!r}") or missing.group(0)
        return f"{key}{what} (modules of your own are looked for in {os.getcwd()} and beside the config)"
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class 'NoneType'>", "Parser key", "- Expected a path but")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(noise)] or [line for line in lines if line]
    first = text.splitlines()[0] if text else ""
    if key and first.startswith("Parser key"):
        rest = first.split(":", 1)[1].strip()
        lines = [rest, *lines] if rest and not rest.startswith("Does not validate") else lines
    return key + _joined(": ".join(dict.fromkeys(line.lstrip("- ").rstrip(":") for line in lines)))


def _near(name: str, path: str) -> str:
    try:
        options = list(options_of(import_class(path)))
    except Exception:  # a class that cannot be looked at has no suggestions
        return ""
    return close_match(name, options) or (f"; it has {', '.join(options)}" if len(options) < 20 else "")


def close_match(name: str, options: Sequence[str]) -> str:
    """``; did you mean 'x'?`` where an option resembles ``name``, else nothing."""
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
