"""Extension of Griffe: converts the reStructuredText roles of docstrings to Markdown.

Docstrings contain ``:func:`name```, ``:class:`name```, ``:math:`formula```, blocks ``.. math::``
and tables. Names become links where the site has the object, and code elsewhere.
"""

from __future__ import annotations

import re

import griffe

_MATH_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|[ \t]*(?=\n\1 )))*)", re.MULTILINE)
_TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n(.*?)^\1\2\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)


# The section of the arguments, and in it an argument line with several names.
_ARGUMENTS = re.compile(r"^Args:\n(?:[ \t].*\n?|\n(?=[ \t]))*", re.MULTILINE)
_JOINT = re.compile(r"^( +)(\w+(?:, \w+)+): (.*\n?(?:\1 +.*\n?)*)", re.MULTILINE)


class RestructuredText(griffe.Extension):
    """Converts the docstring of every object of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self._convert_all(pkg)

    def _convert_all(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._convert_all(member)


def to_markdown(text: str, obj: griffe.Object) -> str:
    text = _ARGUMENTS.sub(lambda m: _JOINT.sub(_split, m.group()), text)
    text = _TABLE.sub(_table, text)
    text = _MATH_BLOCK.sub(lambda m: f"{m.group(1)}$${' '.join(m.group(2).split())}$$", text)
    text = re.sub(r":math:`([^`]*)`", lambda m: f"${' '.join(m.group(1).split())}$", text)
    return re.sub(r":(?:func|class|meth|mod|data|attr):`(~?)([^`]+)`", lambda m: _link(m.group(2), obj), text)


def _split(match: re.Match) -> str:
    """Describe each argument by itself, so that the page shows its type and default."""
    indent, names, description = match.groups()
    description = description if description.endswith("\n") else description + "\n"
    return "".join(f"{indent}{name}: {description}" for name in names.split(", "))


def _table(match: re.Match) -> str:
    """Convert a simple table. A row without a first cell continues the row before it."""
    starts = [m.start() for m in re.finditer("=+", match.group(2))]
    indent, rows = match.group(1), []
    for line in (match.group(3) + match.group(4)).splitlines():
        line = line.removeprefix(indent)
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if rows and not cells[0]:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    lines = ["| " + " | ".join(map(_without_bars, row)) + " |" for row in rows]
    return "\n".join(indent + line for line in [lines[0], "|---" * len(starts) + "|", *lines[1:]])


def _without_bars(cell: str) -> str:
    """Replace bars in formulas, which would end a cell."""
    return re.sub(r":math:`[^`]*`", lambda m: m.group().replace("\\|", "\\Vert ").replace("|", "\\vert "), cell)


def _link(name: str, obj: griffe.Object) -> str:
    shown = name.rpartition(".")[2] if name.startswith("kdkernels.") else name
    path = name
    if not name.startswith("kdkernels."):
        first, _, rest = name.partition(".")
        try:
            path = obj.resolve(first) + (f".{rest}" if rest else "")
        except griffe.NameResolutionError:
            return f"`{name}`"
    try:
        found = obj.package.modules_collection[path] if path.startswith("kdkernels") else None
        path = found.canonical_path if found is not None else path
    except (KeyError, griffe.GriffeError):
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
