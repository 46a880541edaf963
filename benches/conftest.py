"""Options of `pytest benches`, as those of `python -m benches.run`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-out", type=Path, help="JSON to write instead of results/<device>.json; README.md stays")
    parser.addoption("--bench-quick", action="store_true", help="few rounds, not to be quoted")
