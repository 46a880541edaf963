"""What the published recipes do to a training image; plain settings, which plans and augmenters both read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """The training augmentation; the defaults are those of m, l and x."""

    image_size: int
    """Side of the square output in pixels; the mosaic canvas has twice that."""
    resize_range: tuple[float, float] = (0.1, 2.0)
    """Uniform scale, relative to the mosaic canvas in stage 1 and to `image_size` in stage 2."""
    mosaic_cache: int = 40
    """Images a loader worker draws mosaic tiles from."""
    mixup_cache: int = 20
    """Augmented images a loader worker draws mixup partners from."""
    random_pop: bool = True
    """A full cache loses a random element, else its oldest."""
    mixup_prob: float = 1.0
    mosaic_center_range: tuple[float, float] = (0.5, 1.5)
    """Where the four tiles meet, in units of `image_size`."""
    hsv_gains: tuple[int, int, int] = (5, 30, 30)
    """Greatest shift of hue (of 180), saturation and value (of 255)."""
    flip_prob: float = 0.5
    pad_value: int = 114
    negative_crops: bool = False
    """Keep a crop without any object, which is otherwise drawn again from another image."""


def recipe_for(size: str, image_size: int, *, masks: bool = False) -> AugmentRecipe:
    """The published recipe of a model size ("nano", "tiny", "s", "m", "l", "x") at `image_size` pixels."""
    if image_size < 32:
        raise UserError(f"image size {image_size} is below 32 pixels, the stride of the coarsest level")
    if size in ("nano", "tiny"):
        return AugmentRecipe(
            image_size=image_size,
            resize_range=(0.5, 2.0),
            mosaic_cache=20,
            mixup_cache=10,
            random_pop=False,
            mixup_prob=0.5,
        )
    if size == "s":
        return AugmentRecipe(image_size=image_size, resize_range=(0.5, 2.0), negative_crops=masks)
    if size in ("m", "l", "x"):
        return AugmentRecipe(image_size=image_size, negative_crops=masks)
    raise UserError(f"no such model size: {size!r}; choose nano, tiny, s, m, l or x")


# Round from above, so that their boxes are upright by convention: the published recipe keeps them so.
UPRIGHT_CLASSES = ("storage-tank", "roundabout")


@dataclass(frozen=True, kw_only=True)
class RotatedRecipe:
    """The training augmentation for rotated boxes; the defaults are the published ones."""

    image_size: int
    """Side of the square output in pixels, which the image is resized to fit."""
    flip_prob: float = 0.75
    """Of a flip: left to right, upside down or both, equally likely."""
    rotate_prob: float = 0.5
    """Of a rotation about the centre of the image, by any angle."""
    upright_labels: tuple[int, ...] = ()
    """An image with one of these is rotated by 90, 180 or 270 degrees only (180 as often as the other two together)."""
    border_value: int = 0
    """Grey level of the corners that a rotation lays open; beyond the image it is `pad_value`."""
    pad_value: int = 114


def rotated_recipe(image_size: int, class_names: Sequence[str]) -> RotatedRecipe:
    """The published recipe at `image_size` pixels; its upright classes are found by their names in DOTA."""
    upright = tuple(i for i, name in enumerate(class_names) if name in UPRIGHT_CLASSES)
    return RotatedRecipe(image_size=image_size, upright_labels=upright)


@dataclass(frozen=True, kw_only=True)
class DetrRecipe:
    """The training augmentation of RT-DETR; the defaults are the published ones.

    Distortion of colours, zooming out and cropping are for all epochs but the last.
    """

    image_size: int
    """Side of the square output in pixels, which the image is resized to whatever its aspect ratio."""
    distort_prob: float = 0.5
    """Of each of the five changes of colour by itself: the following four, and a permutation of the channels."""
    brightness_range: tuple[float, float] = (0.875, 1.125)
    contrast_range: tuple[float, float] = (0.5, 1.5)
    """About the mean grey level; before the next two or after them, equally likely."""
    saturation_range: tuple[float, float] = (0.5, 1.5)
    hue_range: tuple[float, float] = (-0.05, 0.05)
    """A shift, in turns of the circle of hues."""
    zoom_out_prob: float = 0.5
    zoom_out_range: tuple[float, float] = (1.0, 4.0)
    """Sides of the black canvas that the image is placed on at random, in units of its own."""
    crop_prob: float = 0.8
    crop_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    """One of them, each equally likely, is the least IoU of the crop with some box in it; 1 leaves the image whole."""
    crop_range: tuple[float, float] = (0.3, 1.0)
    """Sides of the crop, in units of the image's."""
    crop_aspect_range: tuple[float, float] = (0.5, 2.0)
    crop_trials: int = 40
    """For one of `crop_ious`, before another is drawn."""
    flip_prob: float = 0.5
    min_box_size: float = 1.0
    """Boxes with a shorter side, in pixels before the resize or after it, are dropped."""


def multi_scale_sizes(image_size: int) -> tuple[int, ...]:
    """The sides in pixels that RT-DETR's training draws one of for every batch, each entry equally likely.

    The multiples of 32 within a quarter of `image_size`, itself thrice; of 640, the published list.
    """
    if image_size < 32 or image_size % 32:
        raise UserError(f"image size {image_size} is no multiple of 32 pixels, the stride of the coarsest level")
    least, most = -(-image_size * 3 // 128) * 32, image_size * 5 // 128 * 32
    return tuple(sorted([*range(least, most + 1, 32), image_size, image_size]))
