"""RTMDet (arXiv:2212.07784): one model, whose task is its head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.inference.detections import Detections, DetectSettings, PaddedDetections
from rtmdet_fast.inference.preprocess import MEAN, STD, letterbox, normalize
from rtmdet_fast.kernels.letterbox import letterbox_normalize, letterbox_scales
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.models.checkpoint import Checkpoint
from rtmdet_fast.models.detector import Detector, Inspected, Targets, resolve_class_names
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
HEADS: dict[str, type[DetectionHead]] = {"det": DetectionHead, "ins": InstanceHead, "rotated": RotatedHead}


class RTMDet(Detector):
    """Backbone, neck and the head of one task; state_dict keys are those of the published checkpoints.

    Args:
        size: nano, tiny, s, m, l or x.
        task: det (boxes), ins (boxes and masks) or rotated (rotated boxes).
        num_classes: their number, where there are no names.
        class_names: one per class; COCO's for 80 classes (rotated: DOTA's for 15) where not given.
    """

    weights_of: ClassVar = "RTMDet or CSPNeXt"
    input_description: ClassVar = (
        "BGR, less MEAN, by STD; resized to fit the square, padded on the right and at the bottom with 114"
    )

    def __init__(
        self,
        size: str = "tiny",
        task: str = "det",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        image_size = default_image_size(size, task)
        architecture = SIZES[size]()
        head = HEADS[task]
        self.size, self.task, self.image_size = size, task, image_size
        self.class_names = resolve_class_names(num_classes, class_names, head.published_classes)
        self.patch_size = image_size if head.in_windows else None
        self.has_masks, self.test_settings = head.has_masks, head.test_settings
        low, mid, high = (int(width * architecture.widen) for width in (256, 512, 1024))
        separable = architecture.separable
        self.backbone = CSPNeXt(architecture.deepen, architecture.widen, separable=separable)
        self.neck = CSPNeXtPAFPN((low, mid, high), low, architecture.neck_blocks, separable=separable)
        self.bbox_head = head(low, len(self.class_names), exponential=architecture.exponential, separable=separable)

    def forward(self, images: Tensor, targets: Targets | None = None) -> HeadOutput | RotatedOutput | dict[str, Tensor]:
        """Normalised images [B, 3, H, W] (H, W multiples of 32) → head output, or losses where targets are given."""
        if targets is not None and self.is_folded:
            raise UserError("a folded model has no losses: it is for inference")
        output = self.bbox_head(self.neck(self.backbone(images)))
        return output if targets is None else self.bbox_head.loss(output, targets)

    @property
    def title(self) -> str:
        return f"RTMDet-{self.size}"

    @property
    def most_matches(self) -> int:
        return self.bbox_head.most_matches

    @staticmethod
    def to_canvas(image: np.ndarray, image_size: int) -> tuple[np.ndarray, tuple[float, float]]:
        return letterbox(image, image_size)

    @staticmethod
    def normalize(canvases: Tensor) -> Tensor:
        return normalize(canvases)

    @staticmethod
    def to_canvases(frames: Tensor, sizes: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
        return letterbox_normalize(frames, sizes, image_size, mean=MEAN, std=STD, dtype=dtype)

    @staticmethod
    def canvas_scales(sizes: Tensor, image_size: int) -> Tensor:
        return letterbox_scales(sizes, image_size)

    def postprocess(
        self,
        output: HeadOutput | RotatedOutput,
        canvas_size: tuple[int, int],
        scales: Sequence[tuple[float, float]],
        shapes: Sequence[tuple[int, int]],
        settings: DetectSettings,
        *,
        clip: bool,
    ) -> list[Detections]:
        found = self.bbox_head.detect(output, canvas_size, settings)  # type: ignore[arg-type]
        return [
            self.bbox_head.to_image(detections, scale, shape, clip=clip)
            for detections, scale, shape in zip(found, scales, shapes, strict=True)
        ]

    def detect_padded(
        self,
        output: Any,
        input_size: tuple[int, int],
        settings: DetectSettings,
        capacity: int,
        nms: Callable[..., tuple[Tensor, Tensor]] = batched_nms_padded,
    ) -> PaddedDetections:
        return self.bbox_head.detect_padded(output, input_size, settings, capacity, nms)

    def mask_logits(self, output: Any, found: PaddedDetections) -> Tensor:
        head = self.bbox_head
        assert isinstance(head, InstanceHead)
        # other runtimes have no kernel for them
        return (head.mask_logits if torch.compiler.is_compiling() else head.padded_mask_logits)(output, found)

    def boxes_and_scores(self, output: Any, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logits, boxes, _ = self.bbox_head.decode(output)
        return self.bbox_head.clip(boxes, input_size), logits.float().sigmoid()

    @staticmethod
    def to_image(found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool) -> Detections:
        task = "rotated" if found.boxes.shape[1] == 5 else "det" if found.masks is None else "ins"
        return HEADS[task].to_image(found, scale, shape, clip=clip)

    @classmethod
    def translate(cls, checkpoint: Checkpoint) -> Checkpoint | None:
        tensors = checkpoint.state_dict
        if any(key.startswith("head.rtm_") for key in tensors):  # LibreYOLO's
            tensors = {re.sub(r"^head\.", "bbox_head.", key): value for key, value in tensors.items()}
        if "stem.0.conv.weight" in tensors:
            tensors = {f"backbone.{key}": value for key, value in tensors.items()}
        if not any(key.startswith("backbone.stem.0.") for key in tensors):
            return None
        parts = ("backbone.", "neck.", "bbox_head.")
        return replace(checkpoint, state_dict={k: v for k, v in tensors.items() if k.startswith(parts)})

    @classmethod
    def inspect(cls, checkpoint: Checkpoint) -> Inspected:
        """Size, task and number of classes of the weights; task and classes are None for a bare backbone."""
        checkpoint = cls.own(checkpoint)
        state = checkpoint.state_dict
        weight = state.get("backbone.stem.0.conv.weight")
        if weight is None or weight.ndim != 4:
            raise UserError(
                f"{checkpoint.path} holds no weights of RTMDet: backbone.stem.0.conv.weight is missing, or odd"
            )
        stem = weight.shape[0]
        by_stem = {int(64 * architecture().widen // 2): size for size, architecture in SIZES.items()}
        if stem not in by_stem:
            raise UserError(
                f"{checkpoint.path} has a stem of {stem} channels, which no RTMDet of {', '.join(SIZES)} has"
            )
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
        return Inspected(by_stem[stem], task, None if weight is None else weight.shape[0], {})

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over weights; layers that the file lacks or that have another class count stay, and are named.

        Of a model with masks for one without, and the reverse, backbone and neck are taken.
        """
        checkpoint = self.own(checkpoint)
        own, state = self.state_dict(), checkpoint.state_dict
        task = self.inspect(checkpoint).task
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
            raise UserError(f"{checkpoint.path} does not fit a {self.size} {self.task} model (first: {shown(keys[0])})")
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
    if task not in HEADS:
        raise UserError(f"task {task!r} is unknown; choose one of {', '.join(HEADS)}")
    return HEADS[task].image_size or SIZES[size]().image_size
