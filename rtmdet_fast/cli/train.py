"""rtmdet-fast train."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtmdet_fast.cli.output import Outcome, figure, skipped_lines


def run_train(config: Any) -> Outcome:
    from rtmdet_fast.training.train import train

    result = train(config)
    found = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
    report = f", report {result.report}" if result.report else ""
    lines = [f"{name:10} {figure(value)}" for name, value in result.metrics.items()]
    lines += skipped_lines(result.skipped, result.noticed)
    if result.ended_by is not None:
        lines.append(f"ended by {'--' if result.ended_by != 'callback' else 'a '}{result.ended_by}")
    lines.append(f"{result.seconds:.0f} s, {result.seconds_per_iteration:.3f} s an iteration")
    lines.append(f"best weights {result.best}, last {result.last}{report}")
    return Outcome(found, lines)
