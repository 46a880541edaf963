"""rtmdet-fast info."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rtmdet_fast.cli.output import Outcome


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what is installed, which device and kernels run, and which published weights are known."""

    json: Path | None = None
    """Write it to this file too."""


def run_info(config: InfoConfig) -> Outcome:
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
