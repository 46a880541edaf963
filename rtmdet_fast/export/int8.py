"""int8 of an OpenVINO model by NNCF: weights, and activations in ranges that images of the user's show."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.export.openvino import signal_stack_kept
from rtmdet_fast.geometry.windows import crop, windows
from rtmdet_fast.images import IMAGE_SUFFIXES, read_image
from rtmdet_fast.models.detector import Detector

CALIBRATION_IMAGES = 128
"""By default."""


def calibration_canvases(model: Detector, folder: Path, image_size: int, count: int) -> list[np.ndarray]:
    """Up to `count` network inputs [S, S, 3] uint8, of images evenly spread over a folder and its sub-folders.

    Images larger than the model's `patch_size` give the window in their middle. Unreadable ones are told in a warning.
    Raises UserError where there is no image, or none that can be read.
    """
    from tqdm import tqdm

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one of images like those that the model will see")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no image")
    canvases = []
    unreadable = []
    for i in tqdm(range(min(count, len(paths))), desc="calibration images", unit="img", leave=False):
        try:
            image = read_image(paths[i * len(paths) // min(count, len(paths))])
        except UserError as error:
            unreadable.append(str(error))
            continue
        if model.patch_size and max(image.shape[:2]) > model.patch_size:
            places = windows(image.shape[1], image.shape[0], model.patch_size, model.patch_size // 4)
            image = crop(image, *places[len(places) // 2], model.patch_size)
        canvases.append(model.to_canvas(image, image_size)[0])
    if not canvases:
        raise UserError(f"none of the images of {folder} can be read, the first: {unreadable[0]}")
    if unreadable:
        warnings.warn(f"{len(unreadable)} calibration images are unreadable, the first: {unreadable[0]}", stacklevel=2)
    return canvases


def network_inputs(model: Detector, canvases: Sequence[np.ndarray]) -> np.ndarray:
    """Normalised [B, 3, S, S] float32 of canvases [S, S, 3] uint8."""
    batch = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2)
    return model.normalize(batch).contiguous().numpy()


def quantize(network: Any, model: Detector, canvases: Sequence[np.ndarray], batch_size: int) -> Any:
    """An openvino.Model in int8, but for the last convolutions and all that follows them, as `stays_float` says.

    batch_size: of a call of `network`.
    """
    try:
        import nncf
    except ImportError as error:
        raise UserError("nncf is not installed: pip install 'rtmdet-fast[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    batches = [[canvases[(i + j) % len(canvases)] for j in range(batch_size)] for i in range(len(canvases))]
    with contextlib.redirect_stdout(sys.stderr), signal_stack_kept():  # its progress
        network = network.clone()  # without what no output needs, over which nncf stumbles
        return nncf.quantize(
            network,
            nncf.Dataset(batches, lambda batch: network_inputs(model, batch)),
            preset=nncf.QuantizationPreset.MIXED,  # SiLU is not symmetric
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=stays_float(network), validate=False),
        )


def stays_float(network: Any) -> list[str]:
    """Names of the convolutions that none follows, which make scores, distances and masks, and of all after them.

    A scale of 256 steps for distances of 0 to 640 pixels, or for scores that a threshold of 0.001 cuts, costs AP.
    """
    order = network.get_ordered_ops()
    known = {node.get_name() for node in order}  # what no output needs is not among them
    followers = {
        node.get_name(): [
            target.get_node()
            for output in node.outputs()
            for target in output.get_target_inputs()
            if target.get_node().get_name() in known
        ]
        for node in order
    }
    is_convolution = {node.get_name(): "Convolution" in node.get_type_name() for node in order}
    followed: set[str] = set()  # by a convolution
    for node in reversed(order):
        names = [follower.get_name() for follower in followers[node.get_name()]]
        if any(is_convolution[name] or name in followed for name in names):
            followed.add(node.get_name())
    found: dict[str, str] = {}
    for node in order:
        name = node.get_name()
        if name in found or (is_convolution[name] and name not in followed):
            found[name] = node.get_friendly_name()
            found |= {follower.get_name(): follower.get_friendly_name() for follower in followers[name]}
    return list(found.values())
