"""What several commands print."""

from __future__ import annotations


def print_skipped(skipped: dict[str, int], noticed: dict[str, int] | None = None) -> None:
    for what, counts in (("left out", skipped), ("noticed", noticed or {})):
        for reason, count in counts.items():
            print(f"{what}: {count} x {reason}")


def figure(value: float) -> str:
    """A figure in [0, 1] in six places; a dash for -1, where nothing was measured."""
    return f"{value:6.3f}" if value >= 0 else "     -"
