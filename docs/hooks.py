"""What mkdocs and griffe have to be told: pages that lie outside docs/, and where the kernels are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benches/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in [*map(ROOT.joinpath, PAGES), *sorted(ROOT.glob("benches/pictures/*.png"))]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Pages of docs/ stand at the top of the site, beside README.md."""
    top = "](" + "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)?(?:docs/|(?=benches/|CONTRIBUTING|CHANGELOG|SECURITY|README))", top, markdown)


class Package(griffe.Extension):
    """Puts `kernels/` into the package, as griffe passes over folders without __init__.py inside of one."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.name == "rtmdet_fast":
            pkg.set_member("kernels", loader.load("kernels"))
            parse_docstrings(pkg)


def parse_docstrings(parent: griffe.Module | griffe.Class) -> None:
    """So that griffe warns of what does not render, also where no page shows it."""
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            if member.docstring:
                member.docstring.parse("google")
            if isinstance(member, griffe.Module | griffe.Class):
                parse_docstrings(member)
