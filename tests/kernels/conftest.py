"""What tests of kernels ask for by `pytest.mark.usefixtures`."""

import pytest
import torch


@pytest.fixture
def poison():
    """Fills torch.empty with NaN and the greatest integer, so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def slow_ones_wait(request):
    """Slow tests are for `-m slow`, also where a command has a `-m` of its own."""
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("one of the dozens of configurations that `pytest -m slow` compiles")
