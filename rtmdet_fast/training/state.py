"""The training state in last.pth, from which a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import check_tensors, damage_told
from rtmdet_fast.models.torch_file import load_archive
from rtmdet_fast.tasks import TASKS
from rtmdet_fast.training.config import Settings, TrainConfig
from rtmdet_fast.training.distributed import process_count

STATE: dict[str, type | tuple[type, ...]] = {
    "config": Mapping,
    "model": Mapping,
    "ema": Mapping,
    "optimizer": Mapping,
    "scaler": Mapping,
    "samplers": list,
    "random_states": list,
    "epoch": int,
    "iteration": int,
    "best_epoch": (int, type(None)),
    "best_metrics": Mapping,
}
"""What a training state holds."""


# What may differ between a run and its continuation; validation only where it does not decide on the end.
RESUMABLE = {"out", "resume", "overwrite", "device", "val_interval", "report", "progress", "val", "val_images"}
RESUMABLE |= {"cache", "loggers"}


def read_training_state(last: Path, settings: Settings) -> dict[str, Any]:
    """The state to continue from. Raises UserError where there is none, or where it is another run's."""
    if not last.is_file():
        raise UserError(f"there is nothing to resume: {last}, written after each epoch, does not exist")
    with damage_told(last):
        state = load_archive(last).get("training")
        if state is None:
            raise UserError(f"{last} holds weights but no training state to resume from")
        if "torch_rng" in state:  # of a run of before there was one of each process
            state["random_states"] = [[state["torch_rng"]]] * len(state.get("samplers", ()))
        for name, kind in STATE.items():
            if not isinstance(state.get(name), kind):
                raise UserError(f"{last} is damaged: its training state lacks {name!r}, or holds something else there")
        check_tensors(last, dict(_tensors(state)))
        figures = state["best_metrics"]
        complete = state["best_epoch"] is None or TASKS[settings.task].criterion in figures
        if not (complete and all(isinstance(value, float) for value in figures.values())):
            raise UserError(f"{last} is damaged: its best figures are missing, or no numbers")
    may_differ = RESUMABLE if settings.patience is None else RESUMABLE - {"val_interval", "val", "val_images"}
    for key, value in settings.as_json().items():
        before = state["config"].get(key, getattr(TrainConfig, key))  # of a run older than the setting
        if key not in may_differ and before != value:
            raise UserError(f"--{key.replace('_', '-')} is {value}, but the run in {last.parent} has {before!s:.80}")
    # the step of an epoch that was broken off; at the end of one, as runs of before had it always, 0
    step = state.setdefault("step", 0)
    known = type(step) is int and 0 <= step <= state["iteration"] and (step or state["epoch"])
    if not (known and 0 <= state["epoch"] <= settings.epochs and 0 < state["iteration"] < 2**53):
        raise UserError(f"{last} is damaged: it tells of epoch {state['epoch']}, step {state['iteration']}"[:400])
    plan = state.setdefault("horizon", [settings.epochs, settings.stage2_epochs, None])
    if not (isinstance(plan, list) and len(plan) == 3 and type(plan[0]) is type(plan[1]) is int):
        raise UserError(f"{last} is damaged: its training state lacks 'horizon', or holds something else there")
    processes = process_count()
    if len(state["samplers"]) != processes:
        raise UserError(
            f"the run in {last.parent} had {len(state['samplers'])} processes, and now there are {processes}"
        )
    return state


def _tensors(content: Any, name: str = "training") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested mappings and lists, by the path to it."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from _tensors(value, f"{name}.{i}")


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """The moments of a saved state; the settings stay those of `optimizer`. ValueError where moments do not fit."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        shapes = {name: tuple(value.shape) for name, value in moments.items()}
        if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise ValueError(f"moments of shapes {shapes} for a parameter of shape {tuple(parameter.shape)}")


def remove_run(out: Path) -> None:
    """Delete what a run wrote into its folder.

    The state that a run goes on from is the first to go: whatever comes between, no later `--resume` meets a mixture.
    """
    files = ("last.pth", "best.pth", "metrics.csv", "metrics.json", "detections.json", "report.html", "nan_batch.pt")
    for path in (*(out / name for name in (*files, "config.json", "loggers.json")), *out.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
