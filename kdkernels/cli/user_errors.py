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
_TYPE_NAMES = {"NoneType": "null", "Sequence": "list", "Iterable": "list", "tuple": "list", "dict": "a mapping", "Mapping": "a mapping"}
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


def _split_report(text: str) -> tuple[str, list[str]]:
    """Return the option that a report of the parser is about, and the lines on its value.

    The report names the keys of the option in lines of increasing indentation. The lines below the
    last key are on the value.
    """
    keys: list[str] = []
    value_lines: list[str] = []
    indent = -1
    for line in text.splitlines():
        key, depth = re.search(r'Parser key "([^"]*)"', line), len(line) - len(line.lstrip())
        if key and depth > indent:
            keys, indent, value_lines = [*keys, key.group(1)], depth, []
        elif depth > indent or not line.strip():
            value_lines.append(line.strip(" -"))
        elif keys:
            break
    return ".".join(keys), value_lines


def _wrong_type(lines: list[str]) -> str | None:
    """Return ``expected TYPE, got VALUE`` if the value is only of a wrong type.

    If the value could be the name of a class, ``None`` is returned: it is a wrong name.
    """
    value = next((found.group(1) for line in lines if (found := re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", line))), None)
    errors = [
        line for line in lines if line and not line.startswith(("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but"))
    ]
    matches = [re.match(r"Expected a (?:<class '(?:[^']*\.)?(\w+)'>|typing\.Literal\[(.*)\]|dot import path string:)", line) for line in errors]
    if value is None or not matches or not all(matches):
        return None
    kinds = [m.group(1) or (m.group(2) or "the import path of a class").replace(", ", " or ") for m in matches if m]
    if "the import path of a class" in kinds and {"the import path of a class", "list", "NoneType"}.issuperset(kinds):
        return None
    return f"expected {' or '.join(dict.fromkeys(_TYPE_NAMES.get(kind, kind) for kind in kinds))}, got {_join_lines(value, 100)}"


def _rewrite_parser_message(text: str) -> str:
    name, value_lines = _split_report(text)
    key = f"--{name}: " if name else ""
    wrong_type = _wrong_type(value_lines)
    if wrong_type:
        return key + wrong_type
    option = re.search(r"(?:Option|Key|key) '([^']+)' is not (?:accepted|expected)", text)
    owner = (re.findall(r"class_path '([^']+)'", text) or [None])[-1]
    if option:
        unknown_name = option.group(1)
        suggestion = _suggest_option(unknown_name, owner) if owner else ""
        return f"{key}{owner.rpartition('.')[2] if owner else 'the config'} has no option {unknown_name!r}{suggestion}"
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
    lines = value_lines or [line.strip() for line in text.splitlines()]
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
