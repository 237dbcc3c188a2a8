"""The pages of the documentation site: its menu, and the API reference. MkDocs is not needed."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _read_modules():
    found = {}
    for folder, package in (("kdkernels", "kdkernels"), ("python_ref", "kdkernels.reference")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if relative.parts[0] not in ("reference", "benches"):  # links to other folders
                found[".".join([package, *relative.with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


MODULES = _read_modules()
# Not public: the command line, whose commands have --help.
PRIVATE = {"kdkernels.cli"}


@functools.cache
def _tree(module):
    return ast.parse(MODULES[module].read_text())


def _names(module):
    """Return ``__all__``."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def _origin(module, name):
    """Return the path of the object ``name`` of a module where it is defined."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.level and any((alias.asname or alias.name) == name for alias in node.names):
            package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
            source = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            return f"{source}.{name}" if f"{source}.{name}" in MODULES and node.module is None else _origin(source, name)
    return f"{module}.{name}"


def _public():
    """Return the origins of all public names, with one name of each."""
    modules = [module for module in MODULES if not any(f"{module}.".startswith(f"{private}.") for private in PRIVATE)]
    return {_origin(module, name): f"{module}.{name}" for module in reversed(modules) for name in _names(module)}


def _documented():
    """Return the page of each object of the API reference, by its origin."""
    found = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            module, _, name = path.rpartition(".")
            origin = path if path in MODULES else _origin(module, name)
            found.setdefault(origin, []).append(page.name)
    return found


def test_every_public_name_is_in_one_page_of_the_api_reference():
    public, documented = _public(), _documented()
    assert len(public) > 200
    missing = sorted(name for origin, name in public.items() if origin not in documented)
    assert missing == [], "add a line `::: NAME` to a page of docs/api/"
    assert {origin: pages for origin, pages in documented.items() if len(pages) > 1} == {}


def test_every_object_of_the_api_reference_exists():
    for origin in _documented():
        module, _, name = origin.rpartition(".")
        if origin in MODULES:
            continue
        defined = set()
        for node in _tree(module).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            defined |= {ast.unparse(target) for target in targets} | ({node.name} if hasattr(node, "name") else set())
        assert name in defined, f"{module} has no {name}"


def test_every_page_is_in_the_menu():
    text = (ROOT / "mkdocs.yml").read_text()
    menu = re.findall(r"^ +- .*?([\w/]+\.md)$", text[text.index("\nnav:\n") :], flags=re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(menu) == sorted(set(menu))
    assert set(menu) - {"getting_started.md", "contributing.md", "changelog.md"} == pages, "add the page to `nav` in mkdocs.yml"
    hooks = (DOCS / "site_hooks.py").read_text()
    assert all(f'"{page}"' in hooks for page in ("getting_started.md", "contributing.md", "changelog.md"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.relative_to(DOCS)}" for path in sorted(DOCS.rglob("*.md")))])
def test_links_to_files_exist(page):
    text = re.sub(r"^( *)```.*?^\1```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "pictures").glob("*")}
    assert {name: size for name, size in sizes.items() if size >= 120_000} == {}
    assert sum(sizes.values()) < 1_000_000
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.-]+)", page.read_text())}
    assert set(sizes) <= shown, "remove the picture, or show it in docs/gallery.md"
