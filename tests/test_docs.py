"""README, docs/ and what lies beside them: links lead somewhere, commands parse, Python finds what it imports."""

import ast
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from benches import openmmlab_table, timm_models
from rtmdet_fast import cli
from rtmdet_fast.cli.output import Outcome
from rtmdet_fast.models.checkpoint import PRETRAINED

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benches/README.md")]
PAGES += DOCS
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path):
    return path.relative_to(ROOT).as_posix()


def prose(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Those of GitHub, as far as mkdocs makes the same of the heading."""
    titles = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.+)$", prose(page), re.M)]
    return {re.sub(r"\s", "-", title) for title in titles} & {re.sub(r"[-\s]+", "-", title) for title in titles}


def blocks(language):
    return [
        pytest.param(code, id=f"{name(page)}:{i}")
        for page in PAGES
        for i, (kind, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def command_lines():
    """Lines of blocks without a language, and what stands in backticks of make and python."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line for kind, code in BLOCK.findall(text) if not kind for line in code.replace("\\\n", " ").split("\n")
        ]
        spans = [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if re.match("(make|python) ", span)]
        for i, line in enumerate([*lines, *spans]):
            if re.match(r"(rtmdet-fast|torchrun|make|python) ", line):
                found.append(pytest.param(line, id=f"{name(page)}:{i}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{name(page)} links to {target}, which is no file"
        assert ROOT in linked.parents, f"{name(page)} links out of the project: {target}"
        assert not anchor or anchor in anchors(linked), f"{name(page)} links to {target}, which is no heading"


def test_navigation_has_every_page_and_no_other():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^  - [^:]+: (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(name(page).removeprefix("docs/") for page in PAGES)


def test_tests_and_places_that_pages_name_are_there():
    defined = {
        test
        for path in (ROOT / "tests").rglob("*.py")
        for test in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    named = {test for page in PAGES for test in re.findall(r"`(test_\w+)`", prose(page))}
    assert named and named <= defined
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where things are")
    rows = [row for row in table.partition("\n## ")[0].split("\n") if row.startswith("| ")]
    places = {place.replace("<op>", "assign") for row in rows for place in re.findall(r"`([\w/<>]+(?:/|\.\w+))`", row)}
    assert len(places) > len(rows)
    missing = {place for place in places if not ((ROOT / place).exists() or (ROOT / "rtmdet_fast" / place).exists())}
    assert not missing


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(line, monkeypatch):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = {word for word in words[1:] if "=" not in word}
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        missing = {target for target in targets if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)}
        assert not missing, f"the Makefile has no {missing}"
        return
    if words[0] == "rtmdet-fast":
        arguments = words[1:]
    elif "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        assert importlib.util.find_spec(module), f"{module} is no module"
        if module not in ("rtmdet_fast", "rtmdet_fast.cli") or not arguments:
            return
    else:
        assert (ROOT / words[1]).is_file(), f"{words[1]} is no script of the project"
        return
    ran = []
    for command in (
        "data",
        "train",
        "eval",
        "compare",
        "predict",
        "merge",
        "export",
        "benchmark",
        "split",
        "demo",
        "info",
    ):
        monkeypatch.setattr(cli, f"run_{command}", lambda config: ran.append(config) or Outcome({}, []))
    monkeypatch.setattr(Outcome, "publish", lambda self, json: None)
    try:
        assert cli.main(arguments) == 0
    except SystemExit as stopped:  # --help
        assert stopped.code == 0, f"{line!r} is refused"
    assert ran or {"--help", "--version"} & set(arguments)
    for option, value in pairwise(arguments):
        if option in ("--weights", "--init") and "." not in value:
            assert value in PRETRAINED, f"{value} is no published name"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_its_imports_are_there(code):
    tree = ast.parse(code)
    compile(tree, "block", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for module in node.names:
                there = importlib.util.find_spec(module.name) or module.name == "ray"  # an extra that few have
                assert there, f"{module.name} is no module"
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("rtmdet_fast"):
            for imported in node.names:
                assert imported.name in names_of(node.module), f"{node.module} has no {imported.name}"


def names_of(module):
    spec = importlib.util.find_spec(module)
    assert spec, f"{module} is no module"
    if module == "rtmdet_fast.compat.mmdet":  # whose import needs mmdet
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    submodules = {path.stem for path in Path(spec.origin).parent.glob("*") if Path(spec.origin).stem == "__init__"}
    return {*dir(importlib.import_module(module)), *submodules}


def test_architecture_has_the_floors_that_imports_are_held_to():
    floors = runpy.run_path(str(ROOT / "tests/test_imports.py"))["FLOORS"]
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (drawn,) = (code for kind, code in BLOCK.findall(page) if kind == "text")
    assert drawn.splitlines() == list(reversed(floors))


def test_drawings_are_those_of_the_script(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/drawings/draw.py"))
    made = {drawing.__name__ for drawing in script["DRAWINGS"]}
    assert made == {path.stem for path in (ROOT / "docs/drawings").glob("*.svg")}
    for drawing in script["DRAWINGS"]:
        drawing().save(tmp_path / "made.svg")
        kept = ROOT / f"docs/drawings/{drawing.__name__}.svg"
        assert (tmp_path / "made.svg").read_bytes() == kept.read_bytes(), f"run docs/drawings/draw.py: {kept.name}"


def test_long_description_leads_nowhere_outside_of_it(monkeypatch):
    """PyPI shows README.md without the files it links to."""
    given = {}
    monkeypatch.setitem(
        sys.modules, "setuptools", SimpleNamespace(setup=given.update, find_packages=lambda include: include)
    )
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["long_description"].startswith("# rtmdet_fast")
    assert all(target.startswith("https://") for target in LINK.findall(given["long_description"]))


def test_the_tables_of_openmmlabs_tests_are_those_of_the_results():
    results = json.loads(openmmlab_table.RESULTS.read_text(encoding="utf-8"))
    page = openmmlab_table.PAGE.read_text(encoding="utf-8")
    assert page == openmmlab_table.page(page, results)
    assert [op for op in openmmlab_table.OPS if f"\n| `{op}` |" not in page] == []


def test_the_page_of_timms_models_is_that_of_the_results():
    results = json.loads(timm_models.RESULTS.read_text(encoding="utf-8"))
    assert timm_models.PAGE.read_text(encoding="utf-8") == timm_models.page(results)
