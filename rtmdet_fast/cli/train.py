"""rtmdet-fast train."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtmdet_fast.cli.output import Outcome, figure, skipped_lines, thresholds_told


def run_train(config: Any) -> Outcome:
    if config.preview:
        return _preview(config)
    from rtmdet_fast.models.checkpoint import read_checkpoint, trained_thresholds
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
    best = read_checkpoint(result.best)
    names = best.class_names or ()
    if (thresholds := trained_thresholds(best, len(names))) is not None:
        found["score_thresholds"] = dict(zip(names, thresholds, strict=True))
        lines.append(f"best score thresholds, which predict takes: {thresholds_told(names, thresholds)}")
    return Outcome(found, lines)


def _preview(config: Any) -> Outcome:
    from rtmdet_fast.training.preview import write_previews

    made = write_previews(config)
    lines = [
        f"{p.path}: stage {p.stage}, {p.images} images of {p.side} px, {p.objects / p.images:.1f} objects an image"
        for p in made
    ]
    return Outcome({"previews": [{**p._asdict(), "path": str(p.path)} for p in made]}, lines)
