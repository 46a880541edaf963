"""A checkout without links, as git makes on Windows: rtmdet_fast/kernels is a text file. It runs and packs as any."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "rtmdet_fast").exists():
    pytest.skip("there is no checkout beside this file", allow_module_level=True)

BUILD = """
import sys
from setuptools import build_meta
(_, folder) = sys.argv  # which setuptools sets to its own
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        shutil.copy(ROOT / name, folder)
    leave_out = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "rtmdet_fast", folder / "rtmdet_fast", ignore=leave_out)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=leave_out)
    (folder / "rtmdet_fast/kernels").write_text("../kernels")
    return folder


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs(checkout):
    code = "import rtmdet_fast.kernels.nms as nms, rtmdet_fast.ops; print(nms.__file__, rtmdet_fast.kernels.nms is nms)"
    assert run(checkout, "-c", code).split() == [str(checkout / "kernels/nms.py"), "True"]


def test_wheel_and_sdist_need_no_link(checkout):
    pytest.importorskip("setuptools", "77", reason="builds as pyproject.toml says")
    run(checkout, "-c", BUILD, "dist")
    modules = {path.name for path in (ROOT / "kernels").glob("*.py")}
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"rtmdet_fast/kernels/{name}" for name in modules} <= names and "rtmdet_fast/kernels" not in names
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {Path(*Path(member.name).parts[1:]).as_posix(): member for member in archive}
    assert {f"kernels/{name}" for name in modules} <= members.keys()
    assert not any(member.issym() or member.islnk() for member in members.values())
