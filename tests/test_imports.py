"""The parts of the package form layers: a module imports only modules of lower layers, and there
are no import cycles.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the lowest to the highest layer. A part may import the parts listed before it. "kdkernels" is
# the module kdkernels/__init__.py.
LAYERS = [
    {"options", "dtypes", "files"},
    {"reference", "triton"},
    {"ops"},
    {"testing"},
    {"nn"},
    {"compat"},
    {"kdkernels"},
    {"models", "data"},
    {"analysis"},
    {"tasks"},
    {"distill"},
    {"plots"},
    {"benches"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# config belongs to no layer: every part may import it, and it imports no part.


def _modules() -> dict[str, Path]:
    """Return the path of every module of the package, by the module's name."""
    found = {}
    for folder, package in (("kdkernels", "kdkernels"), ("python_ref", "kdkernels.reference"), ("benches", "kdkernels.benches")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "kdkernels" and relative.parts[0] in ("reference", "benches"):
                continue  # symbolic links to the other two folders
            found[".".join([package, *relative.with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


MODULES = _modules()
EXTENSIONS = {"kdkernels._C"}  # compiled modules, which import nothing from the package


def imports_of(module: str, text: str, is_package: bool, modules: set[str]) -> set[str]:
    """Return the modules of this package that a module imports, also inside functions, but not
    under TYPE_CHECKING.
    """
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


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports of a module that is not in a lower layer."""
    found = []
    for module, targets in graph.items():
        for target in targets:
            part, target_part = part_of(module), part_of(target)
            if part == target_part or target_part == "config":
                continue
            if part == "config" or RANK[target_part] >= RANK[part]:
                found.append(f"{module} imports {target}")
    return found


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or an empty list."""
    visited: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in visited:
            return []
        for target in sorted(graph[module]):
            found = search(target, [*path, module])
            if found:
                return found
        visited.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def test_every_folder_is_a_package():
    """setup.py finds packages by their __init__.py, and type checkers need py.typed to use the
    annotations.
    """
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert (ROOT / "kdkernels" / "py.typed").is_file()


def test_every_part_has_a_layer():
    assert {part_of(module) for module in MODULES} - set(RANK) - {"config"} == set(), "name the part in LAYERS, above what it imports"


def test_modules_import_lower_layers_only():
    assert upward_imports(GRAPH) == []


def test_no_import_cycle():
    assert import_cycle(GRAPH) == []


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


def test_wrong_imports_are_detected():
    assert "kdkernels.distill.kd" in GRAPH["kdkernels.distill"]
    assert upward_imports(GRAPH | {"kdkernels.models.vgg": {"kdkernels.distill.kd"}}) == ["kdkernels.models.vgg imports kdkernels.distill.kd"]
    assert import_cycle(GRAPH | {"kdkernels.ops.checks": {"kdkernels.ops.truncated_svd"}})[0].startswith("kdkernels.ops.")
