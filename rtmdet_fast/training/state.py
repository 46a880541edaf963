"""The training state in last.pth, from which a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rtmdet_fast.distributed import process_count
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import check_tensors, damage_told
from rtmdet_fast.models.torch_file import load_archive
from rtmdet_fast.tasks import TASKS
from rtmdet_fast.training.checkpoints import numbered
from rtmdet_fast.training.config import Settings, TrainConfig

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
RESUMABLE |= {"cache", "loggers", "save_every", "keep", "graph"}
OF_PROCESSES = {"batch_size", "accumulate", "lr"}
"""What may differ too where the number of processes does: images of a step, and the rate they go with."""


def read_training_state(last: Path, settings: Settings) -> dict[str, Any]:
    """The state to continue from. Raises UserError where there is none, or where it is another run's."""
    if not last.is_file():
        raise UserError(
            f"there is nothing to resume: {last}, written after each epoch and every --save-every, does not exist"
        )
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
    if len(state["samplers"]) != process_count():
        may_differ = may_differ | OF_PROCESSES
    for key, value in settings.as_json().items():
        before = state["config"].get(key, getattr(TrainConfig, key))  # of a run older than the setting
        if key not in may_differ and before != value:
            raise UserError(f"--{key.replace('_', '-')} is {value}, but the run in {last.parent} has {before!s:.80}")
    # steps of an epoch that was broken off: all of them before its validation; 0 after it, as always in runs of before
    step = state.setdefault("step", 0)
    known = type(step) is int and 0 <= step <= state["iteration"] and (step or state["epoch"])
    if not (known and 0 <= state["epoch"] <= settings.epochs and 0 < state["iteration"] < 2**53):
        raise UserError(f"{last} is damaged: it tells of epoch {state['epoch']}, step {state['iteration']}"[:400])
    plan = state.setdefault("horizon", [settings.epochs, settings.stage2_epochs, None])
    if not (isinstance(plan, list) and len(plan) == 3 and type(plan[0]) is type(plan[1]) is int):
        raise UserError(f"{last} is damaged: its training state lacks 'horizon', or holds something else there")
    # of each process; of a run of before, of the first alone
    state.setdefault("epoch_losses", [state.get("epoch_loss", 0.0)] * len(state["samplers"]))
    state.setdefault("meters", [state.get("meter", {})] * len(state["samplers"]))
    return state


def shared_anew(state: dict[str, Any], settings: Settings, steps_per_epoch: int) -> dict[str, Any]:
    """The state as one of the number of processes that there are now: in mid-epoch it goes on at the step up to which
    as many images have been shown."""
    saved, processes = state["config"], len(state["samplers"])
    shown = state["step"] * saved["accumulate"] * saved["batch_size"] * processes
    step = min(shown // (settings.accumulate * settings.batch_size * process_count()), steps_per_epoch)
    epoch_loss = sum(state["epoch_losses"]) / processes if step else 0.0
    return {**state, "step": step, "epoch_losses": [epoch_loss], "meters": [{}]}


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


def refuse_other_run(out: Path, resume: bool | str) -> None:
    """UserError where the folder holds a run; best weights alone, of which `resume` "auto" knows no run, are moved."""
    last, best = out / "last.pth", out / "best.pth"
    if last.exists():
        raise UserError(f"{out} holds a run already; continue it with --resume, or start anew with --overwrite")
    if best.exists():
        if resume != "auto":
            raise UserError(f"{out} holds the weights of a run already; start anew with --overwrite")
        best.replace(out / "best-before.pth")
        warnings.warn(f"{best} is no part of a run to continue, and is best-before.pth now", stacklevel=5)


def remove_run(out: Path) -> None:
    """Delete what a run wrote into its folder.

    The state that a run goes on from is the first to go: whatever comes between, no later `--resume` meets a mixture.
    """
    files = ("last.pth", "best.pth", "metrics.csv", "metrics.json", "detections.json", "report.html", "nan_batch.pt")
    named = (out / name for name in (*files, "config.json", "loggers.json"))
    for path in (*named, *numbered(out).values(), *out.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
