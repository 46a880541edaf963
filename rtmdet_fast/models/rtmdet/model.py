"""RTMDet (arXiv:2212.07784): one model, whose task is its head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from rtmdet_fast.class_names import COCO_CLASSES, DOTA_CLASSES
from rtmdet_fast.errors import UserError
from rtmdet_fast.inference.detections import Detections, DetectSettings
from rtmdet_fast.inference.preprocess import letterbox, normalize
from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.tiling import predict_tiled
from rtmdet_fast.models.checkpoint import Checkpoint, read_checkpoint, resolve_weights, save_atomically, trained_sizes
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.backbone import CSPNeXt
from rtmdet_fast.models.rtmdet.detection_head import DetectionHead, HeadOutput
from rtmdet_fast.models.rtmdet.instance_head import InstanceHead
from rtmdet_fast.models.rtmdet.neck import CSPNeXtPAFPN
from rtmdet_fast.models.rtmdet.rotated_head import RotatedHead, RotatedOutput


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Depth and width of a published model. `separable` builds 3×3 convolutions depth-wise separable (nano)."""

    deepen: float
    widen: float
    neck_blocks: int
    exponential: bool = False
    separable: bool = False
    image_size: int = 640


def rtmdet_nano() -> Architecture:
    return Architecture(deepen=0.33, widen=0.25, neck_blocks=1, separable=True, image_size=320)


def rtmdet_tiny() -> Architecture:
    return Architecture(deepen=0.167, widen=0.375, neck_blocks=1)


def rtmdet_s() -> Architecture:
    return Architecture(deepen=0.33, widen=0.5, neck_blocks=1)


def rtmdet_m() -> Architecture:
    return Architecture(deepen=0.67, widen=0.75, neck_blocks=2, exponential=True)


def rtmdet_l() -> Architecture:
    return Architecture(deepen=1.0, widen=1.0, neck_blocks=3, exponential=True)


def rtmdet_x() -> Architecture:
    return Architecture(deepen=1.33, widen=1.25, neck_blocks=4, exponential=True)


SIZES: dict[str, Callable[[], Architecture]] = {
    "nano": rtmdet_nano,
    "tiny": rtmdet_tiny,
    "s": rtmdet_s,
    "m": rtmdet_m,
    "l": rtmdet_l,
    "x": rtmdet_x,
}
MAX_IMAGE_SIZE = 16384
TASKS: dict[str, type[DetectionHead]] = {"det": DetectionHead, "ins": InstanceHead, "rotated": RotatedHead}


class RTMDet(nn.Module):
    """Backbone, neck and the head of one task; state_dict keys are those of the published checkpoints.

    size: nano, tiny, s, m, l or x. task: det (boxes), ins (boxes and masks) or rotated (rotated boxes).
    class_names: one per class; COCO's for 80 classes (rotated: DOTA's for 15) where not given.
    """

    def __init__(
        self,
        size: str = "tiny",
        task: str = "det",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        image_size = default_image_size(size, task)
        if isinstance(class_names, str):
            raise UserError(f"class_names is {class_names!r}; a list of names is expected")
        published = DOTA_CLASSES if task == "rotated" else COCO_CLASSES
        if num_classes is None:
            num_classes = len(class_names) if class_names is not None else len(published)
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
        if class_names is None:
            known = num_classes == len(published)
            class_names = published if known else [f"class {i}" for i in range(num_classes)]
        if len(class_names) != num_classes:
            raise UserError(f"{len(class_names)} class names were given for num_classes={num_classes}")
        architecture = SIZES[size]()
        self.size, self.task, self.class_names = size, task, tuple(class_names)
        self.image_size = image_size
        self.patch_size = image_size if task == "rotated" else None
        """Side in image pixels of what a training image showed; `predict` cuts larger images into windows of it."""
        low, mid, high = (int(width * architecture.widen) for width in (256, 512, 1024))
        separable = architecture.separable
        self.backbone = CSPNeXt(architecture.deepen, architecture.widen, separable=separable)
        self.neck = CSPNeXtPAFPN((low, mid, high), low, architecture.neck_blocks, separable=separable)
        self.bbox_head = TASKS[task](low, num_classes, exponential=architecture.exponential, separable=separable)

    def forward(self, images: Tensor, targets: Targets | None = None) -> HeadOutput | RotatedOutput | dict[str, Tensor]:
        """Normalised images [B, 3, H, W] (H, W multiples of 32) → head output, or losses where targets are given."""
        output = self.bbox_head(self.neck(self.backbone(images)))
        return output if targets is None else self.bbox_head.loss(output, targets)

    @torch.no_grad()
    def detect(
        self,
        canvases: Tensor,
        scales: Sequence[tuple[float, float]],
        shapes: Sequence[tuple[int, int]],
        *,
        settings: DetectSettings | None = None,
        clip_to_image: bool = False,
    ) -> list[Detections]:
        """Detections in pixels of the original images, from letterboxed canvases [B, 3, S, S] uint8 BGR.

        scales: canvas pixels per image pixel (x, y); shapes: original (height, width). The default settings are the
        published ones, which let boxes reach into the padding of the canvas: figures compare with published ones only
        so (on real images `clip_to_image`, which `predict` uses, gains some 0.002 AP).
        """
        parameter = next(self.parameters())
        images = normalize(canvases.to(parameter.device)).to(parameter.dtype)
        training = [module for module in self.modules() if module.training]  # parts may be frozen
        self.eval()
        try:
            output = self(images)
        finally:
            for module in training:
                module.training = True
        head = self.bbox_head
        found = head.detect(output, (canvases.shape[2], canvases.shape[3]), settings or head.test_settings)
        return [
            head.to_image(detections, scale, shape, clip=clip_to_image)
            for detections, scale, shape in zip(found, scales, shapes, strict=True)
        ]

    @overload
    def predict(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        score_threshold: float = ...,
        iou_threshold: float | None = ...,
        max_detections: int | None = ...,
        image_size: int | None = ...,
        patch_size: int | None = ...,
        batch_size: int = ...,
    ) -> list[Results]: ...

    @overload
    def predict(
        self,
        images: Any,
        *,
        score_threshold: float = ...,
        iou_threshold: float | None = ...,
        max_detections: int | None = ...,
        image_size: int | None = ...,
        patch_size: int | None = ...,
        batch_size: int = ...,
    ) -> Results: ...

    def predict(
        self,
        images: Any,
        *,
        score_threshold: float = 0.3,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        batch_size: int = 8,
    ) -> Results | list[Results]:
        """Detect objects in one image (→ Results) or in a list of images (→ list of Results).

        An image is a path, a BGR uint8 array [H, W, 3] (also [H, W] or [H, W, 4]) or a PIL image.
        iou_threshold (of NMS) and max_detections are the published ones of the task where not given.
        image_size: side in pixels of the square network input, a multiple of 32; the model's own where not given.
        patch_size: images with a longer side in pixels are cut into windows of that side, a quarter of which overlaps,
            and what is found in them is merged; the model's own (rotated boxes only) where not given, 0 for never.
        """
        from rtmdet_fast.images import as_bgr, read_image

        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold is {score_threshold}; it must lie in [0, 1]")
        published = self.bbox_head.test_settings
        settings = replace(
            published,
            score_threshold=score_threshold,
            iou_threshold=published.iou_threshold if iou_threshold is None else iou_threshold,
            max_detections=published.max_detections if max_detections is None else max_detections,
        )
        if not 0 <= settings.iou_threshold <= 1:
            raise UserError(f"iou_threshold is {iou_threshold}; it must lie in [0, 1]")
        if patch_size and self.task == "ins":
            raise UserError(f"patch_size is {patch_size}, but masks cannot be merged over windows: leave it out")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if max_detections is not None and max_detections < 0:
            raise UserError(f"max_detections is {max_detections}; it must be at least 0")
        if patch_size and patch_size < 32:
            raise UserError(f"patch_size is {patch_size}; windows have 32 pixels or more, 0 is for none")
        size = check_image_size(self.image_size if image_size is None else image_size)
        single = not isinstance(images, (list, tuple))
        sources = [images] if single else list(images)
        results: list[Results] = []
        for start in range(0, len(sources), batch_size):
            chunk = sources[start : start + batch_size]
            arrays = [read_image(s) if isinstance(s, (str, Path)) else as_bgr(s) for s in chunk]
            found = self.detect_images(arrays, size, patch_size, settings=settings, batch_size=batch_size)
            for source, array, detections in zip(chunk, arrays, found, strict=True):
                results.append(
                    Results(
                        image=array,
                        boxes=detections.boxes.float().cpu(),
                        scores=detections.scores.float().cpu(),
                        labels=detections.labels.cpu(),
                        names=self.class_names,
                        path=str(source) if isinstance(source, (str, Path)) else None,
                        shape=array.shape[:2],
                        predicted_masks=None if detections.masks is None else detections.masks.cpu(),
                    )
                )
        return results[0] if single else results

    def detect_images(
        self,
        images: Sequence[np.ndarray],
        image_size: int,
        patch_size: int | None = None,
        *,
        settings: DetectSettings | None = None,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detections in BGR images [H, W, 3] uint8 of any size, in their pixels; see `predict` for the sizes."""
        patch = self.patch_size if patch_size is None else patch_size
        small = [image for image in images if not patch or max(image.shape[:2]) <= patch]
        whole = iter(self._detect_whole(small, image_size, settings) if small else [])
        return [
            next(whole)
            if not patch or max(image.shape[:2]) <= patch
            else self._detect_tiled(image, image_size, patch, settings or self.bbox_head.test_settings, batch_size)
            for image in images
        ]

    def _detect_whole(
        self, images: Sequence[np.ndarray], image_size: int, settings: DetectSettings | None
    ) -> list[Detections]:
        canvases, scales = zip(*(letterbox(image, image_size) for image in images), strict=True)
        return self.detect(
            torch.stack([torch.from_numpy(canvas).permute(2, 0, 1) for canvas in canvases]),
            scales,
            [(image.shape[0], image.shape[1]) for image in images],
            settings=settings,
            clip_to_image=True,
        )

    def _detect_tiled(
        self, image: np.ndarray, image_size: int, patch_size: int, settings: DetectSettings, batch_size: int
    ) -> Detections:
        boxes, scores, labels = predict_tiled(
            lambda patches: self._detect_whole(patches, image_size, settings),
            image,
            patch_size=patch_size,
            overlap=patch_size // 4,
            batch_size=batch_size,
            iou_threshold=settings.iou_threshold,
            max_detections=settings.max_detections,
        )
        return Detections(boxes, scores, labels, torch.full_like(labels, -1))

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write weights that `from_pretrained` and mmdet load; `extra` adds entries beside `state_dict` and `meta`."""
        meta = {
            "dataset_meta": {"classes": self.class_names},
            "rtmdet_fast": {
                "size": self.size,
                "task": self.task,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
            },
        }
        save_atomically({"meta": meta, "state_dict": self.state_dict(), **extra}, path)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        size: str | None = None,
        task: str | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> RTMDet:
        """A model in eval mode with the weights of a file, or of a published model by name ("rtmdet-tiny").

        Size, task, classes and names are found in the file where they are not given. Other classes than the file's,
        or a backbone-only file, leave the affected layers freshly initialised and say so in a warning.
        """
        checkpoint = read_checkpoint(resolve_weights(path_or_name))
        found_size, found_task, found_classes = _inspect(checkpoint)
        for what, told, found in (("size", size, found_size), ("task", task, found_task)):
            if told is not None and found is not None and told != found:
                raise UserError(f"{checkpoint.path} holds a model of {what} {found!r}, not {told!r}")
        if class_names is None and num_classes in (None, found_classes):
            class_names = checkpoint.class_names
            if class_names is not None and found_classes is not None and len(class_names) != found_classes:
                class_names = None
        if num_classes is None and class_names is None:
            num_classes = found_classes
        model = cls(found_size, task or found_task or "det", num_classes, class_names)
        model.load_weights(checkpoint)
        for name, size_in_pixels in trained_sizes(checkpoint, check_image_size).items():
            setattr(model, name, size_in_pixels)
        return model.eval()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over weights; layers that the file lacks or that have another class count stay, and are named.

        Of a model with masks for one without, and the reverse, backbone and neck are taken.
        """
        own, state = self.state_dict(), checkpoint.state_dict
        task = _inspect(checkpoint)[1]
        # The heads of boxes and of rotated boxes differ by the angle alone; that of masks is another one.
        other_head = task is not None and (task == "ins") != (self.task == "ins")
        if other_head:
            state = {key: value for key, value in state.items() if not key.startswith("bbox_head.")}
        if task == "rotated" and self.task == "det":
            state = {key: value for key, value in state.items() if not key.startswith("bbox_head.rtm_ang.")}
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        other_shape = {k for k, v in state.items() if k in own and own[k].shape != v.shape}
        unfit = [key for key in other_shape if not key.startswith("bbox_head.rtm_cls.")]
        # files of before PyTorch 0.4 do not count batches, and nothing here asks for the count
        given = {own[key].data_ptr() for key in fitting}  # a tensor that several names share counts by any of them
        missing = [
            k
            for k in own
            if k not in state and not k.endswith(".num_batches_tracked") and own[k].data_ptr() not in given
        ]
        unfit += [k for k in missing if k.startswith("backbone.")]
        unknown = [k for k in state if k not in own]
        if unfit or (unknown and not checkpoint_is_backbone(checkpoint)):
            keys = sorted(unfit or unknown)
            raise UserError(f"{checkpoint.path} does not fit a {self.size} {self.task} model (first: {keys[0]})")
        self.load_state_dict(fitting, strict=False)
        fresh = sorted({".".join(k.split(".")[: 1 if other_head else 2]) for k in [*missing, *other_shape]})
        if fresh:
            classes = f" for {len(self.class_names)} classes" if other_shape else ""
            warnings.warn(
                f"{checkpoint.path.name}: freshly initialised{classes}, to be trained: {', '.join(fresh)}", stacklevel=3
            )


def checkpoint_is_backbone(checkpoint: Checkpoint) -> bool:
    """True for an ImageNet-pretrained backbone without neck and head."""
    return all(key.startswith("backbone.") for key in checkpoint.state_dict)


def default_image_size(size: str, task: str) -> int:
    """Side of the network input in pixels that a published model has. UserError where there is none such."""
    if size not in SIZES:
        raise UserError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[task].image_size or SIZES[size]().image_size


def check_image_size(size: int) -> int:
    """`size` itself where the network can take it."""
    if size < 32 or size % 32:
        raise UserError(f"image size {size} is not a positive multiple of 32")
    if size > MAX_IMAGE_SIZE:
        raise UserError(f"image size {size} is above {MAX_IMAGE_SIZE}, where a single image takes tens of gigabytes")
    return size


def _inspect(checkpoint: Checkpoint) -> tuple[str, str | None, int | None]:
    """Size, task and number of classes of the weights; task and classes are None for a bare backbone."""
    state = checkpoint.state_dict
    weight = state.get("backbone.stem.0.conv.weight")
    if weight is None or weight.ndim != 4:
        raise UserError(f"{checkpoint.path} holds no weights of RTMDet: backbone.stem.0.conv.weight is missing, or odd")
    stem = weight.shape[0]
    by_stem = {int(64 * architecture().widen // 2): size for size, architecture in SIZES.items()}
    if stem not in by_stem:
        raise UserError(f"{checkpoint.path} has a stem of {stem} channels, which no RTMDet of {', '.join(SIZES)} has")
    task = None
    if "bbox_head.rtm_reg.0.weight" in state:
        task = "det"
        if "bbox_head.rtm_ang.0.weight" in state:
            task = "rotated"
        elif any(key.startswith("bbox_head.rtm_kernel") or "kernel" in key for key in state):
            task = "ins"
    weight = state.get("bbox_head.rtm_cls.0.weight")
    if weight is not None and (weight.ndim != 4 or not len(weight)):
        raise UserError(f"{checkpoint.path} is damaged: bbox_head.rtm_cls.0.weight has shape {list(weight.shape)}")
    return by_stem[stem], task, None if weight is None else weight.shape[0]
