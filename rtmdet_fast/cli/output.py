"""What several commands print."""

from __future__ import annotations


def print_skipped(skipped: dict[str, int]) -> None:
    for reason, count in skipped.items():
        print(f"{'noticed' if '(kept' in reason else 'left out'}: {count} x {reason}")


def figure(value: float) -> str:
    """A figure in [0, 1] in six places; a dash for -1, where nothing was measured."""
    return f"{value:6.3f}" if value >= 0 else "     -"
