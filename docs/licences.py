"""Writes docs/licences.md: every package that an installation brings, and its licence, as their metadata tell them.

In an environment with the extras: python docs/licences.py
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("licences.md")
HEAD = """# Licences of the dependencies

Every package that an installation of this one brings, and its licence, as its metadata tell it. The core comes with
`pip install rtmdet-fast`, the others with the extra that is named. The page is written from an environment that has
them, by

```
python docs/licences.py
```

and a test (`tests/test_licences.py`) sees that what `pyproject.toml` names is on it, and that nothing on it or
installed is under the AGPL or the GPL alone. Why each is there that is asked for by name stands in
[contributing](../CONTRIBUTING.md#dependencies-and-why-each).

What the metadata do not tell: on Linux, PyPI's torch for CUDA brings NVIDIA's libraries (`nvidia-*`), which have a
licence of NVIDIA's own; the builds for CPUs bring none. The wheels of opencv-python hold FFmpeg, under the LGPL 2.1,
and on Linux Qt, under the LGPL 3, as libraries of their own.

| package | licence | comes with |
|---|---|---|
"""
LEFT_OUT = ("openmmlab", "docs", "test", "bench")
"""Extras for work on the library, and OpenMMLab's, which pins packages older than the others."""


def licence(found: Distribution) -> str:
    """As the metadata tell it: its SPDX expression, its classifiers, or a line of its own."""
    told = found.metadata
    if told.get("License-Expression"):
        return str(told["License-Expression"])
    classified = [name.split(" :: ")[-1] for name in told.get_all("Classifier") or [] if name.startswith("License ::")]
    classified = [name for name in classified if name != "OSI Approved"]
    line = str(told.get("License") or "").strip()
    if classified:
        return ", ".join(sorted(classified))
    return line if len(line) < 60 and "\n" not in line else ""


def asked_for() -> dict[str, list[Requirement]]:
    """What pyproject.toml names: of the core, and of each extra but those left out."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = {"core": project["dependencies"], **project["optional-dependencies"]}
    wanted = {extra: [Requirement(text) for text in texts[extra]] for extra in texts if extra not in LEFT_OUT}
    return {extra: [r for r in found if r.name != project["name"]] for extra, found in wanted.items()}


def rows() -> list[tuple[str, str, str]]:
    """Name, licence and what it comes with, of all that is installed here."""
    found: dict[str, tuple[str, str, str]] = {}
    seen: set[tuple[str, str]] = set()
    for source, wanted in asked_for().items():
        waiting = list(wanted)
        while waiting:
            requirement = waiting.pop()
            name = canonicalize_name(requirement.name)
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                continue
            found.setdefault(name, (name, licence(installed), source))
            for extra in {"", *requirement.extras}:
                if (name, extra) not in seen:
                    seen.add((name, extra))
                    needed = map(Requirement, installed.requires or [])
                    waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    order = list(asked_for())
    return sorted(found.values(), key=lambda row: (order.index(row[2]), row[0]))


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows()), encoding="utf-8")
