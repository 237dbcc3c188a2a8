"""Imports run downward: the parts of the package form layers, and no module imports one that needs it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom to the top. A part may import the parts in the lines above its own. "kdkernels" is what `import kdkernels` gives.
LAYERS = [
    {"options", "dtypes"},
    {"reference", "triton"},
    {"ops"},
    {"testing"},
    {"nn"},
    {"kdkernels"},
    {"models", "data"},
    {"tasks"},
    {"distill"},
    {"plots"},
    {"benches"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# config is in no layer: every part may import it, and it imports no part.


def _modules() -> dict[str, Path]:
    """Every module of the package by its name, where it lies in the repository."""
    found = {}
    for folder, package in (("kdkernels", "kdkernels"), ("python_ref", "kdkernels.reference"), ("benches", "kdkernels.benches")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "kdkernels" and relative.parts[0] in ("reference", "benches"):
                continue  # links to the other two folders
            found[".".join([package, *relative.with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


MODULES = _modules()
EXTENSIONS = {"kdkernels._C"}  # compiled; they import nothing of the package


def imports_of(module: str, text: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of this package that a module imports, also inside functions; not those for type checkers alone."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            names = [alias for alias in node.names if f"{source}.{alias.name}" not in EXTENSIONS]
            found |= {f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source for alias in names}
    return {name for name in found if name in modules and name != module}


GRAPH = {name: imports_of(name, path.read_text(), path.name == "__init__.py", set(MODULES)) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that do not run downward."""
    found = []
    for module, targets in graph.items():
        for target in targets:
            own, other = part_of(module), part_of(target)
            if own == other or other == "config":
                continue
            if own == "config" or RANK[other] >= RANK[own]:
                found.append(f"{module} imports {target}")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, if there is one."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(graph[module]):
            found = search(target, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def test_every_folder_is_a_package():
    """setup.py finds the packages by their __init__.py; users' type checkers find the annotations by py.typed."""
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert (ROOT / "kdkernels" / "py.typed").is_file()


def test_every_part_has_a_layer():
    assert {part_of(module) for module in MODULES} - set(RANK) - {"config"} == set(), "name the part in LAYERS, above what it imports"


def test_imports_run_downward():
    assert upward(GRAPH) == []


def test_no_import_circle():
    assert circle(GRAPH) == []


IMPORTS = {
    "from ..triton import math": {"kdkernels.triton.math"},
    "from ..triton.math import join": {"kdkernels.triton.math"},
    "from . import checks": {"kdkernels.ops.checks"},
    "from .. import __version__, nn": {"kdkernels", "kdkernels.nn"},
    "def f():\n    import kdkernels.data.base": {"kdkernels.data.base"},
    "from .. import _C": set(),
    "import torch": set(),
    "if TYPE_CHECKING:\n    from ..distill import KD": set(),
}


@pytest.mark.parametrize("text", IMPORTS)
def test_imports_are_found(text):
    assert imports_of("kdkernels.ops.truncated_svd", text, False, set(MODULES)) == IMPORTS[text]


def test_wrong_imports_are_found():
    assert "kdkernels.distill.kd" in GRAPH["kdkernels.distill"]
    assert upward(GRAPH | {"kdkernels.models.vgg": {"kdkernels.distill.kd"}}) == ["kdkernels.models.vgg imports kdkernels.distill.kd"]
    assert circle(GRAPH | {"kdkernels.ops.checks": {"kdkernels.ops.truncated_svd"}})[0].startswith("kdkernels.ops.")
