"""Shared fixtures. The reference's files stand beside the project in CI, and are absent for users: tests then skip."""

from collections import Counter
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference's fixtures and the real images."""
    if not (SHARED / "reference").is_dir():
        pytest.skip("the reference's fixtures (../shared) are not here")
    return SHARED


def pytest_terminal_summary(terminalreporter):
    """What tests counted, by `record_property("kills survived", 20)`, summed up over all of them."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            counts.update(dict(report.user_properties))
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count:,}")
