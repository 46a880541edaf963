"""The reason with which everything here is skipped where OpenMMLab is absent."""

import pytest


def openmmlab(package: str):
    return pytest.importorskip(
        package, reason=f"{package} is not installed: `make test-openmmlab` builds an environment and runs these tests"
    )
