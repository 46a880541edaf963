"""Shared fixtures. The reference's files stand beside the project in CI, and are absent for users: tests then skip."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference's fixtures and the real images."""
    if not (SHARED / "reference").is_dir():
        pytest.skip("the reference's fixtures (../shared) are not here")
    return SHARED
