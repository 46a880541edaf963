"""rtmdet-fast info."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rtmdet_fast.cli.output import Outcome
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what is installed, which device and kernels run, and which published weights are known; or what weights are
    of."""

    weights: str | None = None
    """Weights file, or a published name such as rtdetr-r18: say what model it is of."""
    check: Path | None = None
    """COCO's image val2017/000000039769.jpg: see that official weights of rtdetr give here what is published of
    them."""
    json: Path | None = None
    """Write it to this file too."""


def run_info(config: InfoConfig) -> Outcome:
    if config.weights is not None:
        return _of_weights(config.weights, config.check)
    if config.check is not None:
        raise UserError(f"--check {config.check} is for weights of rtdetr: give them as --weights")
    import torch

    from rtmdet_fast.kernels._dispatch import AVAILABLE, BACKEND
    from rtmdet_fast.models.checkpoint import PRETRAINED

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("rtmdet-fast", "torch", "triton", "numpy", "opencv-python", "pycocotools", "mmdet")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    triton_runs = BACKEND == "triton" or (BACKEND == "auto" and AVAILABLE and torch.cuda.is_available())
    found = {
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "device": device,
        "kernels": "triton" if triton_runs else "torch",
        "weights": sorted(PRETRAINED),
    }
    lines = [
        f"{name:14} {', '.join(value) if isinstance(value, list) else value or 'not installed'}"
        for name, value in found.items()
    ]
    return Outcome(found, lines)


def _of_weights(weights: str, image: Path | None) -> Outcome:
    from rtmdet_fast.images import read_image
    from rtmdet_fast.models.families import load_model
    from rtmdet_fast.models.rtdetr.model import RTDETR
    from rtmdet_fast.models.rtdetr.published import IMAGE, TOLERANCE, difference_from_published

    model = load_model(weights)
    found = {
        "model": model.title,
        "task": model.task,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": model.image_size,
        "classes": list(model.class_names),
    }
    lines = [f"{name:14} {', '.join(value) if isinstance(value, list) else value}" for name, value in found.items()]
    if image is None:
        return Outcome(found, lines)
    if not isinstance(model, RTDETR):
        raise UserError(f"--check is for weights of rtdetr, and {weights} are of {model.title}")
    difference = difference_from_published(model, read_image(image))
    told = f"logits {difference.logits:.1e}, boxes {difference.boxes:.1e}"
    if not max(difference.logits, difference.boxes) < TOLERANCE:
        raise UserError(
            f"{weights} does not give what is published of {difference.name} for COCO's {IMAGE} ({told} away): it is "
            f"no official file, or {image} is another image"
        )
    return Outcome(
        {**found, **difference._asdict()}, [*lines, f"gives what is published of {difference.name}: {told} away"]
    )
