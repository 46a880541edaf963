from __future__ import annotations

import pytest
from toy_cases import clock

from benches import gpu, harness, run, sweep


@pytest.fixture(autouse=True)
def no_test_waits_for_a_real_clock(monkeypatch):
    for module in (harness, run, gpu, sweep):
        monkeypatch.setattr(module, "time", clock)
