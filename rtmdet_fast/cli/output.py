"""What commands hand back, and what several of them print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rtmdet_fast.files import write_json


class Outcome(NamedTuple):
    """What a command found, for --json, and how it is told; `files` are JSON to be written beside, by path."""

    found: dict[str, Any]
    lines: list[str]
    files: dict[Path, Any] = {}  # noqa: RUF012  # a field of a NamedTuple, which nothing changes

    def publish(self, json: Path | None) -> None:
        """Writes, then prints: neither a console without letters or readers nor a full disk takes away the other."""
        try:
            for path, content in (({json: self.found} if json else {}) | self.files).items():
                write_json(path, content)
        finally:
            print("\n".join(self.lines), flush=True)


def skipped_lines(skipped: dict[str, int], noticed: dict[str, int]) -> list[str]:
    """A line for each reason."""
    told = (("left out", skipped), ("noticed", noticed))
    return [f"{what}: {count} x {reason}" for what, counts in told for reason, count in counts.items()]


def thresholds_told(class_names: Sequence[str], thresholds: Sequence[float], most: int = 8) -> str:
    """The score threshold of each class, in words."""
    told = [f"{name} {threshold:.2f}" for name, threshold in zip(class_names, thresholds, strict=True)]
    more = f" and {len(told) - most} more" if len(told) > most else ""
    return f"{', '.join(told[:most])}{more}"


def figure(value: float) -> str:
    """A figure in [0, 1] in six places; a dash for -1, where nothing was measured."""
    return f"{value:6.3f}" if value >= 0 else "     -"


def one_line(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(line.strip() for line in text.splitlines()).strip()
