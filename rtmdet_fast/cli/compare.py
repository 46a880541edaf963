"""rtmdet-fast compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from rtmdet_fast.cli.output import Outcome
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put training runs side by side in one page: figures, curves, and the settings in which they differ."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as train --out has them; two or more."""
    out: Path = Path("runs/compare.html")
    """The page."""
    json: Path | None = None
    """Write the figures and the settings that differ to this file."""


def run_compare(config: CompareConfig) -> Outcome:
    from rtmdet_fast.evaluation.comparison import compared, read_run, run_names, write_comparison
    from rtmdet_fast.training.run_log import read_metrics

    if len(config.runs) < 2:
        raise UserError("give two or more folders of runs to compare")
    for folder in config.runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder of a run")
    names = run_names(config.runs)
    runs = [
        read_run(folder, read_metrics(folder / "metrics.csv"), name)
        for folder, name in zip(config.runs, names, strict=True)
    ]
    write_comparison(config.out, runs)
    found = compared(runs)
    width = max(len(name) for name in names)
    keys = list(dict.fromkeys(key for figures in found["figures"].values() for key in figures))
    lines = [f"{'':{width}} " + " ".join(f"{key:>9}" for key in keys)]
    for name, figures in found["figures"].items():
        told = (f"{figures[key]:.3f}" if key in figures else "-" for key in keys)
        lines.append(
            f"{name:{width}} " + " ".join(f"{text:>{max(9, len(key))}}" for key, text in zip(keys, told, strict=True))
        )
    lines += [
        f"{key}: {', '.join(f'{name} {value}' for name, value in by_run.items())}"
        for key, by_run in found["settings"].items()
    ]
    lines.append(f"page {config.out}")
    return Outcome(found | {"page": str(config.out)}, lines)
