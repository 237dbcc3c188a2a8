"""Hooks of MkDocs: the pages outside of docs/, links to files of the repository, and formulas.

The pages are written for the code host. Three things differ on the site: README.md and its
neighbours become pages, files of the repository to which a page links are copied into the site, and
formulas are converted to MathML, which browsers show without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
import shutil
from pathlib import Path

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Files outside of docs/ that are pages of the site, and the names of these pages.
PAGES = {"README.md": "getting_started.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config):
    """Build the folder from which the API reference reads the package.

    It contains ``kdkernels`` with the two packages that setup.py takes from other folders.
    """
    package = ROOT / "build" / "docs" / "kdkernels"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "reference", "benches")
    shutil.copytree(ROOT / "kdkernels", package, ignore=ignored)
    shutil.copytree(ROOT / "python_ref", package / "reference", ignore=ignored)
    return config


def on_files(files, config):
    """Add the pages of :data:`PAGES` and the files to which pages link."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for target in _targets(file):
            name = f"files/{target}"
            if target not in PAGES and not target.startswith("docs/") and files.get_file_from_path(name) is None:
                if not (ROOT / target).is_file():
                    raise PluginError(f"{_source(file)} links to {target!r}, which is not a file of the repository")
                files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links to files outside of docs/, and what only the code host understands."""
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match) -> str:
        target = _resolve(page.file, match.group(2))
        site = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}")
        return f"{match.group(1)}{posixpath.relpath(site, here or '.')}{match.group(3) or ''}{match.group(4)}"

    markdown = _outside_of_code(markdown, lambda text: _indent_lists(_LINK.sub(link, text)))
    return re.sub(r"^```python notest$", "```python", markdown, flags=re.MULTILINE)


def on_page_content(content, page, config, files):
    """Convert formulas to MathML."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m.group(1), "inline"), content, flags=re.DOTALL)
    content = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _mathml(m.group(1), "block"), content, flags=re.DOTALL)
    if 'class="arithmatex"' in content:
        raise PluginError(f"{page.file.src_uri} contains a formula that could not be converted")
    return content


def _mathml(formula: str, display: str) -> str:
    formula = html.unescape(formula).strip()
    for unknown, known in (("\\tfrac", "\\frac"), ("\\!", ""), ("\\_", "_"), ("\\arg", "\\operatorname{arg}")):
        formula = formula.replace(unknown, known)
    result = latex2mathml.converter.convert(formula, display=display)
    # Space between a function and its argument, as in "log x".
    result = re.sub(r"(<mi[^>]*>(?:arg|cos|exp|log|max|min|sign|sin|softmax)</mi>)(?=<m(?:i|n|sub|sup|frac))", r'\1<mspace width="0.17em"/>', result)
    return f'<div class="formula">{result}</div>' if display == "block" else result


def _source(file: File) -> str:
    """Return the path of the source of a page in the repository."""
    names = {page: source for source, page in PAGES.items()}
    return names.get(file.src_uri, f"docs/{file.src_uri}")


def _resolve(file: File, link: str) -> str:
    """Return the path in the repository to which a link of a page leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_source(file)), link))


def _targets(file: File) -> set[str]:
    found = _LINK.findall(_FENCE.sub("", file.content_string))
    return {_resolve(file, link) for _, link, _, _ in found}


def _outside_of_code(markdown: str, change) -> str:
    parts, position = [], 0
    for match in _FENCE.finditer(markdown):
        parts += [change(markdown[position : match.start()]), match.group()]
        position = match.end()
    return "".join([*parts, change(markdown[position:])])


def _indent_lists(text: str) -> str:
    """Indent the further paragraphs of list items by four spaces, as Python-Markdown expects."""
    return re.sub(r"(?<=\n\n)((?: {2,3}\S.*\n?)+)", lambda m: re.sub(r"^ {2,3}(?=\S)", "    ", m.group(), flags=re.MULTILINE), text)
