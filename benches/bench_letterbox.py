"""From frames on the device to the network's normalised input at 640 px, beside OpenCV or Pillow on the host.

The peers resize on the host, where they get the frame, and copy the canvas to the device, if there is one; ours starts
from a frame that is on the device already. The reference is for tests: on a CPU prediction takes the peers' way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Case, Contender, Parity, compiled, own
from rtmdet_fast.inference import preprocess
from rtmdet_fast.kernels.letterbox import letterbox_normalize, letterbox_normalize_reference

SIDE = 640
PAD = 114
ZERO_TO_ONE = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0), "squash": True, "rgb": True}
LETTERBOX = {"mean": preprocess.MEAN, "std": preprocess.STD}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, 1, 600, 800, False), _case(device, 1, 600, 800, True)]
    shapes = [(1, 600, 800), (1, 1080, 1920), (8, 1080, 1920)]
    return [_case(device, *shape, squash) for squash in (False, True) for shape in shapes]


def _case(device: torch.device, batch: int, height: int, width: int, squash: bool) -> Case:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {**(ZERO_TO_ONE if squash else LETTERBOX), "dtype": dtype}

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda frames, sizes, _: function(frames, sizes, SIDE, **options)

    contenders = [
        *own(device, wrap(letterbox_normalize), wrap(letterbox_normalize_reference), graph_reference=not squash),
        Contender(name="torch.compile", build=compiled(device, wrap(letterbox_normalize_reference))),
        Contender(name="Pillow, host" if squash else "OpenCV, host", build=partial(_host, device, dtype, squash)),
    ]
    return Case(
        op="letterbox",
        name=f"{'squash' if squash else 'letterbox'}, {batch} frame{'s' * (batch > 1)} of {width} x {height}",
        shapes={"frames": [batch, 3 * height * width], "canvas": SIDE},
        inputs=partial(_inputs, batch, height, width, device),
        expected=lambda _frames, _sizes, images: _expected(images, options),
        compare=lambda found, expected: _compare(found, expected, max(options["std"])),
        contenders=contenders,
        headline=False,
    )


def _inputs(batch: int, height: int, width: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """frames and sizes on the device, and the frames [B, H, W, 3] on the host: blocks of colour with some noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, -(-height // 16), -(-width // 16), generator=g) * 200
    image = F.interpolate(coarse, scale_factor=16)[..., :height, :width].permute(0, 2, 3, 1)
    image = (image + torch.rand(batch, height, width, 3, generator=g) * 55).byte().contiguous()
    sizes = torch.tensor([[height, width]] * batch, dtype=torch.int32, device=device)
    return image.flatten(1).to(device), sizes, image


def _host(device: torch.device, dtype: torch.dtype, squash: bool) -> Callable[..., Tensor]:
    import cv2  # noqa: F401 (that it is here)

    resize = preprocess.squash if squash else preprocess.letterbox

    def call(_frames: Tensor, _sizes: Tensor, images: Tensor) -> Tensor:
        canvases = torch.stack([torch.from_numpy(resize(image, SIDE)[0]) for image in images.numpy()])
        canvases = canvases.to(device).permute(0, 3, 1, 2)
        return (canvases.flip(1).float() / 255 if squash else preprocess.normalize(canvases)).to(dtype)

    return call


def _expected(images: Tensor, options: dict[str, Any]) -> Tensor:
    """In float64, without rounding to grey levels."""
    squash = options.get("squash", False)
    height, width = images.shape[1:3]
    ratio = SIDE / max(height, width)
    new = [SIDE if squash else max(int(side * ratio + 0.5), 1) for side in (height, width)]
    resized = F.interpolate(images.permute(0, 3, 1, 2).double(), new, mode="bilinear", antialias=squash)
    canvas = F.pad(resized, (0, SIDE - new[1], 0, SIDE - new[0]), value=PAD)
    canvas = canvas.flip(1) if squash else canvas
    mean, std = (torch.tensor(options[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    return (canvas - mean) / std


def _compare(found: Tensor, expected: Tensor, std: float) -> str:
    if found.shape != expected.shape:
        raise Parity(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    apart = (found.double().cpu() - expected).abs().max().item() * std
    if not apart <= 1.1:  # a level, and what fp16 makes of the result
        raise Parity(f"{apart:.2f} grey levels apart")
    return f"{apart:.2f} grey levels apart"
