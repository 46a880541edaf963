"""What several commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_skipped(skipped: dict[str, int]) -> None:
    for reason, count in skipped.items():
        print(f"{'noticed' if '(kept' in reason else 'left out'}: {count} x {reason}")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
