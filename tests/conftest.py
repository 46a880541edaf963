"""Shared fixtures. The reference's files stand beside the project in CI, and are absent for users: tests then skip."""

import os
import shutil
import tempfile
from collections import Counter
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference's fixtures and the real images."""
    if not (SHARED / "reference").is_dir():
        pytest.skip("the reference's fixtures (../shared) are not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """What lies in the system's folder for temporary files goes with the session: MLflow, W&B, OpenVINO and torchrun
    leave things there, and so does any loader that is killed."""
    tmp_path_factory.getbasetemp()  # which stays in the system's
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "rtmdet_fast_inductor"))
    folder = tempfile.mkdtemp(prefix="rf-")  # sockets lie in it, whose names may not be long
    # after multiprocessing's own, which takes its folder in here away at -100
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", inductor)  # compiled once, for all sessions
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


def pytest_terminal_summary(terminalreporter):
    """What tests counted, by `record_property("kills survived", 20)`, summed up over all of them."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            counts.update(dict(report.user_properties))
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count:,}")
