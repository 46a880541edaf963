"""`Detector.fit`: a run that starts from a model in memory, and gives that the best weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.families import FAMILIES, load_model
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig, TrainResult
from rtmdet_fast.training.train import train

OF_THE_MODEL = ("model", "size", "version", "queries", "sampling", "task", "init")
"""Settings that a model has already."""


def fit(model: Detector, *, callbacks: Sequence[Callback] = (), **options: Any) -> TrainResult:
    """See `Detector.fit`; `options` are those of TrainConfig."""
    result = train(config_for(model, options), model=model, callbacks=callbacks)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process alone writes weights
    if result.best.is_file():  # not of a run that ended before its first epoch
        parameter = next(model.parameters())
        best = load_model(result.best).to(parameter.device, parameter.dtype)
        vars(model).update(vars(best))
    return result


def config_for(model: Detector, options: dict[str, Any]) -> TrainConfig:
    """The settings of a run that trains `model`. UserError for options that there are not, or that it has already."""
    family = next((name for name, kind in FAMILIES.items() if isinstance(model, kind)), None)
    if family is None or model.is_folded:
        raise UserError(f"{type(model).__name__}: a model made ready to run cannot be trained: train the one it is of")
    known = {field.name: str(field.type) for field in fields(TrainConfig)}
    for name in options:
        if name in OF_THE_MODEL:
            raise UserError(f"fit trains the model as it is: {name} cannot be set")
        if name not in known:
            near = difflib.get_close_matches(name, known.keys() - {*OF_THE_MODEL}, 1)
            raise UserError(f"fit has no option {name!r}{f'; the nearest is {near[0]!r}' if near else ''}")
    place = next(model.parameters()).device
    own: dict[str, Any] = {
        "model": family,
        "size": model.size,
        "task": model.task,
        "version": getattr(model, "version", None),
        "queries": model.saved_options().get("num_queries"),
        "image_size": model.image_size,
        "device": "auto" if place.type == "cpu" else str(place),
    }
    return TrainConfig(**own | {name: _as_typed(value, known[name]) for name, value in options.items()})


def _as_typed(value: Any, kind: str) -> Any:
    """A setting as the command line hands it on: paths from text, several from one."""
    if kind.startswith("tuple"):
        value = [value] if isinstance(value, (str, Path)) else value
        return tuple(map(Path, value) if "Path" in kind else value)
    return Path(value) if kind.startswith("Path") and value is not None else value
