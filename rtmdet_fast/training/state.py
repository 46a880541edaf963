"""The training state in last.pth, from which a run goes on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.training.config import Settings
from rtmdet_fast.training.distributed import process_count

STATE = frozenset(
    {
        "config",
        "model",
        "ema",
        "optimizer",
        "scaler",
        "samplers",
        "torch_rng",
        "epoch",
        "iteration",
        "best_epoch",
        "best_metrics",
    }
)
"""What a training state holds."""


# What may differ between a run and its continuation.
RESUMABLE = {"out", "resume", "overwrite", "device", "val_interval", "report", "progress", "val", "val_images"}


def read_training_state(last: Path, settings: Settings) -> dict[str, Any]:
    """The state to continue from. Raises UserError where there is none, or where it is another run's."""
    if not last.exists():
        raise UserError(f"there is nothing to resume: {last}, written after each epoch, does not exist")
    try:
        state = torch.load(last, map_location="cpu", weights_only=True).get("training")
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{last} cannot be read: it is damaged, or of something else") from error
    if state is None:
        raise UserError(f"{last} holds weights but no training state to resume from")
    if not state.keys() >= STATE:
        raise UserError(f"{last}: its training state lacks {sorted(STATE - state.keys())[0]!r}")
    for key, value in settings.as_json().items():
        before = state["config"].get(key)
        if key not in RESUMABLE and before != value:
            raise UserError(f"--{key.replace('_', '-')} is {value}, but the run in {last.parent} has {before}")
    processes = process_count()
    if len(state["samplers"]) != processes:
        raise UserError(
            f"the run in {last.parent} had {len(state['samplers'])} processes, and now there are {processes}"
        )
    return state


def remove_run(out: Path) -> None:
    """Delete what a run wrote into its folder.

    The state that a run goes on from is the first to go: whatever comes between, no later `--resume` meets a mixture.
    """
    files = ("last.pth", "best.pth", "metrics.csv", "metrics.json", "detections.json", "report.html", "nan_batch.pt")
    for path in (*(out / name for name in (*files, "config.json")), *out.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
