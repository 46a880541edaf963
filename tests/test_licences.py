"""The dependencies' licences: each is told, and none is one that users of an Apache-2.0 library could not take."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "docs/licences.py").exists():
    pytest.skip("the documentation is not beside this file", allow_module_level=True)
pytest.importorskip("packaging")

SPEC = importlib.util.spec_from_file_location("licences", ROOT / "docs/licences.py")
licences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(licences)
ROW = re.compile(r"^\| ([\w.-]+) \| ([^|]*) \| (\w+) \|$", re.M)


def is_refused(licence: str) -> bool:
    """Whether each of its alternatives asks for the source of what uses it."""
    return all(re.search(r"(?<!L)\bA?GPL|(?<!Lesser )General Public|Affero", part) for part in licence.split(" OR "))


def test_what_is_refused():
    told = "GPL-3.0-only, AGPL-3.0, GNU General Public License v2 (GPLv2), GNU Affero General Public License v3"
    assert all(map(is_refused, told.split(", ")))
    told = "MIT, LGPL-2.1, GNU Lesser General Public License v3 (LGPLv3), GPL-2.0 OR Apache-2.0, BSD License"
    assert not any(map(is_refused, told.split(", ")))


def test_every_licence_is_told_and_none_is_refused():
    page = {name: licence for name, licence, _ in ROW.findall(licences.PAGE.read_text(encoding="utf-8"))}
    installed = {name: licence for name, licence, _ in licences.rows()}
    assert len(page) > 50 and len(installed) > 20
    for name, licence in (*page.items(), *installed.items()):
        assert licence.strip(), f"{name} has no licence in its metadata: look for it, and tell it in docs/licences.py"
        assert not is_refused(licence), f"{name}: {licence}"


def test_what_is_asked_for_by_name_is_on_the_page_and_has_its_reason():
    page = {name for name, *_ in ROW.findall(licences.PAGE.read_text(encoding="utf-8"))}
    asked = {requirement.name for wanted in licences.asked_for().values() for requirement in wanted}
    assert asked <= page, f"python docs/licences.py: {asked - page}"
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies, and why each")[2]
    reasons = set(re.findall(r"[\w.-]+", " ".join(re.findall(r"^\|([^|]+)\|", table, re.M))))
    assert asked <= reasons, f"CONTRIBUTING.md does not say why: {asked - reasons}"
