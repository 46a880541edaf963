"""rtmdet-fast train."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtmdet_fast.cli.output import figure, print_skipped


def run_train(config: Any) -> dict[str, Any]:
    from rtmdet_fast.training.train import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts one speaks
        for name, value in result.metrics.items():
            print(f"{name:10} {figure(value)}")
        print_skipped(result.skipped, result.noticed)
        print(f"{result.seconds:.0f} s, {result.seconds_per_iteration:.3f} s an iteration")
        report = f", report {result.report}" if result.report else ""
        print(f"best weights {result.best}, last {result.last}{report}")
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
