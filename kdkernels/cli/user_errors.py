"""User errors: printed as one line, without a traceback.

The line names the cause and, if it is known, what to do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from .class_options import import_class, options_of

TRACEBACK = "set KDKERNELS_TRACEBACK=1 to see the traceback"
# Beginnings of jsonargparse's messages: of reports on all types that it tried for a value, and of
# errors in an option or its value.
_REPORT = re.compile(r"(Parser key .*\n?\s*)?(Does not validate against any of|Problem with given class_path)")
_OPTION_ERROR = re.compile(r"Expected a|Option |Key |Problem with|Not a |Unable to|Does not|Parser key|Import path|No module named|Unexpected")
# Exceptions whose message is printed without the name of the exception. This package raises them.
_PLAIN = (ValueError, TypeError, OSError, FloatingPointError, ImportError)


def one_line(error: BaseException) -> str:
    """Return the line that is printed instead of the traceback of an error."""
    error = _find_cause(error)
    text = str(error)
    kind = type(error).__name__
    if "not accepted" in text or "does not accept option" in text or kind == "ArgumentError" or "Parser key" in text or _REPORT.match(text):
        return _rewrite_parser_message(text)
    if "in DataLoader worker process" in text:  # the text contains a traceback; its last line is the error
        return text.strip().splitlines()[-1]
    if kind == "OutOfMemoryError" or "out of memory" in text.lower() or isinstance(error, MemoryError):
        return (
            f"out of memory: {_join_lines(text, 200)}. Use a smaller --data.batch_size, --trainer.accumulate_grad_batches 2, or "
            "--trainer.precision bf16-mixed"
        )
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"{_join_lines(text)} (modules are searched in {os.getcwd()} and in the folder of the config)"
    if "Error(s) in loading state_dict" in text:
        return f"the checkpoint belongs to a different network: {_join_lines(text.split(':', 1)[-1])}"
    if isinstance(error, _PLAIN) or kind == "MisconfigurationException":
        return _join_lines(text) or kind
    return f"{kind}{': ' * bool(text)}{_join_lines(text)} ({TRACEBACK})"


def _join_lines(text: str, max_length: int = 500) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return text if len(text) <= max_length else text[:max_length] + " ..."


def _find_cause(error: BaseException) -> BaseException:
    """Return the error that a constructor raised, which jsonargparse wraps in a report of all
    attempts.

    If the report is about an option or its value, and not about an error of a constructor, it is
    returned itself.
    """
    inner = error
    while _REPORT.match(str(inner)) or type(inner).__name__ == "ArgumentError":
        wrapped = inner.__cause__ or inner.__context__
        if wrapped is None:
            return error
        inner = wrapped
    return error if _OPTION_ERROR.match(str(inner)) else inner


def _rewrite_parser_message(text: str) -> str:
    parser_key = re.search(r'Parser key "([^"]*)"', text)
    key = f"--{parser_key.group(1)}: " if parser_key else ""
    option = re.search(r"(?:Option|Key|key) '([^']+)' is not (?:accepted|expected)", text)
    owner = (re.findall(r"class_path '([^']+)'", text) or [None])[-1]
    if option:
        name = option.group(1)
        return f"{key}{owner.rpartition('.')[2] if owner else 'the config'} has no option {name!r}{_suggest_option(name, owner) if owner else ''}"
    section = re.search(r"does not accept option '([^']+)'", text)
    if section:
        return f"{key}the config has no option {section.group(1)!r}{close_match(section.group(1).partition('.')[0], ['model', 'data', 'trainer'])}"
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
    if unknown and unknown.group(1) in ("optimizer", "lr_scheduler"):  # other Lightning command lines have these options
        return f"there is no option --{unknown.group(1)}; did you mean --model.{unknown.group(1).removeprefix('lr_')}?"
    if unknown:
        return f"there is no option --{unknown.group(1)}{_suggest_option(unknown.group(1).removeprefix('trainer.'), 'lightning.pytorch.Trainer')}"
    missing = re.search(r"Expected a dot import path string: (\S+)|(No module named '[^']+')|(Import path \S+ .*)", text)
    if missing:
        problem = (missing.group(1) and f"there is no class {missing.group(1)!r}") or missing.group(0)
        return f"{key}{problem} (modules are searched in {os.getcwd()} and in the folder of the config)"
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class 'NoneType'>", "Parser key", "- Expected a path but")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(noise)] or [line for line in lines if line]
    first = text.splitlines()[0] if text else ""
    if key and first.startswith("Parser key"):
        rest = first.split(":", 1)[1].strip()
        lines = [rest, *lines] if rest and not rest.startswith("Does not validate") else lines
    return key + _join_lines(": ".join(dict.fromkeys(line.lstrip("- ").rstrip(":") for line in lines)))


def _suggest_option(name: str, path: str) -> str:
    try:
        options = list(options_of(import_class(path)))
    except Exception:  # no suggestions for a class that cannot be imported or inspected
        return ""
    return close_match(name, options) or (f"; it has {', '.join(options)}" if 0 < len(options) < 20 else "")


def close_match(name: str, options: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?`` if an option resembles ``name``, else an empty string."""
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
