"""RT-DETR (arXiv:2304.08069) and RT-DETRv2 (arXiv:2407.17140), whose function is the same but for the sampling."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.class_names import COCO_CLASSES
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.inference.detections import Detections, DetectSettings, PaddedDetections
from rtmdet_fast.inference.preprocess import squash
from rtmdet_fast.kernels.letterbox import letterbox_normalize, letterbox_scales
from rtmdet_fast.models.checkpoint import Checkpoint
from rtmdet_fast.models.detector import Detector, Inspected, Targets, resolve_class_names
from rtmdet_fast.models.rtdetr.boxes import cxcywh_to_xyxy, relative_targets
from rtmdet_fast.models.rtdetr.decoder import HEADS, STRIDES, Decoder, Sampling, anchors
from rtmdet_fast.models.rtdetr.denoising import denoising_queries
from rtmdet_fast.models.rtdetr.encoder import HybridEncoder
from rtmdet_fast.models.rtdetr.hgnet import HGNetv2, Stage
from rtmdet_fast.models.rtdetr.losses import detr_losses
from rtmdet_fast.models.rtdetr.resnet import PResNet
from rtmdet_fast.models.rtdetr.weights import from_hugging_face, from_paddle, points_of, points_of_scale


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Backbone, widths and depths of a published model.

    channels, feedforward: of the encoder. expansion: of its convolutional blocks. inference_layers: of the decoder's,
    those that published figures were measured with.
    """

    backbone: Callable[[], PResNet | HGNetv2]
    channels: int = 256
    feedforward: int = 1024
    expansion: float = 1.0
    encoder_layers: int = 1
    decoder_layers: int = 6
    inference_layers: int = 6


def presnet18() -> PResNet:
    return PResNet((2, 2, 2, 2), bottleneck=False, frozen=False)


def presnet34() -> PResNet:
    return PResNet((3, 4, 6, 3), bottleneck=False, frozen=False)


def presnet50() -> PResNet:
    return PResNet((3, 4, 6, 3), bottleneck=True, frozen=True)


def presnet101() -> PResNet:
    return PResNet((3, 4, 23, 3), bottleneck=True, frozen=True)


def hgnetv2_l() -> HGNetv2:
    stages = (
        Stage(48, 48, 128, 1),
        Stage(128, 96, 512, 1),
        Stage(512, 192, 1024, 3, True),
        Stage(1024, 384, 2048, 1, True),
    )
    return HGNetv2((32, 48), stages)


def hgnetv2_x() -> HGNetv2:
    stages = (
        Stage(64, 64, 128, 1),
        Stage(128, 128, 512, 2),
        Stage(512, 256, 1024, 5, True),
        Stage(1024, 512, 2048, 2, True),
    )
    return HGNetv2((32, 64), stages)


def hgnetv2_h() -> HGNetv2:
    stages = (
        Stage(96, 96, 192, 2),
        Stage(192, 192, 512, 3),
        Stage(512, 384, 1024, 6, True),
        Stage(1024, 768, 2048, 3, True),
    )
    return HGNetv2((48, 96), stages)


def rtdetr_r18() -> Architecture:
    return Architecture(backbone=presnet18, expansion=0.5, decoder_layers=3, inference_layers=3)


def rtdetr_r34() -> Architecture:
    return Architecture(backbone=presnet34, expansion=0.5, decoder_layers=4, inference_layers=4)


def rtdetr_r50m() -> Architecture:
    return Architecture(backbone=presnet50, expansion=0.5, inference_layers=3)


def rtdetr_r50() -> Architecture:
    return Architecture(backbone=presnet50)


def rtdetr_r101() -> Architecture:
    return Architecture(backbone=presnet101, channels=384, feedforward=2048)


def rtdetr_l() -> Architecture:
    return Architecture(backbone=hgnetv2_l)


def rtdetr_x() -> Architecture:
    return Architecture(backbone=hgnetv2_x, channels=384, feedforward=2048)


def rtdetr_h() -> Architecture:
    return Architecture(backbone=hgnetv2_h, channels=512, feedforward=2048, encoder_layers=2)


SIZES: dict[str, Callable[[], Architecture]] = {
    "r18": rtdetr_r18,
    "r34": rtdetr_r34,
    "r50m": rtdetr_r50m,
    "r50": rtdetr_r50,
    "r101": rtdetr_r101,
    "l": rtdetr_l,
    "x": rtdetr_x,
    "h": rtdetr_h,
}


PRESNETS = {
    (False, 2): ["r18"],
    (False, 6): ["r34"],
    (True, 6): ["r50m", "r50"],
    (True, 23): ["r101"],
}
"""Sizes by whether blocks are bottlenecks and how many the third stage has."""
HGNETS = {48: ["l"], 64: ["x"], 96: ["h"]}
"""Sizes by the channels that the stem puts out."""
STEMS = {"backbone.conv1.conv1_1.conv.weight", "backbone.stem.stem1.conv.weight"}
ENCODER_OUTPUTS = {1: "0", 2: "proj"}
CLASSIFIERS = "decoder.enc_score_head.", "decoder.dec_score_head.", "decoder.denoising_class_embed."
"""What depends on the number of classes."""


TEST_SETTINGS = DetectSettings(score_threshold=0.0, iou_threshold=0.65, nms_pre=30000, max_detections=300)
"""The published ones. There is no NMS, but where detections of overlapping windows are merged."""


class Predictions(NamedTuple):
    """Of the last decoder layer that ran: class logits [B, Q, C], boxes [B, Q, 4] cxcywh in [0, 1] of the image."""

    logits: Tensor
    boxes: Tensor


class RTDETR(Detector):
    """Backbone, hybrid encoder and decoder; state_dict keys are those of the published checkpoints of the version.

    Args:
        size: r18, r34, r50m, r50, r101, l, x (HGNetv2), or with version 2 h.
        version: 1 or 2.
        num_classes: their number, where there are no names.
        class_names: one per class; COCO's for 80 classes where not given.
        task: det, the only one.
        sampling: of deformable attention: bilinear, or (version 2) discrete, the one cell that a place lies in.
        num_points: places in the levels of strides 8, 16, 32 that a head looks at.
        num_queries: boxes that are predicted for an image.
        num_decoder_layers: how many there are; as published where not given.
        decoder_layers: how many of them run in inference, see the attribute; as published where not given.
        published_position_embedding: on inputs that are not square, as in the published code, which mixes up rows.
        published_discrete_clamp: discrete sampling on inputs wider than high as in the published code, which keeps
            columns below the number of rows.
    """

    weights_of: ClassVar = "RT-DETR, PResNet or HGNetv2"
    input_description: ClassVar = (
        "RGB, by 255; resized to the square whatever the aspect ratio, by an average where it shrinks (as Pillow does)"
    )

    def __init__(
        self,
        size: str = "r50",
        version: int = 1,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        task: str = "det",
        sampling: Sampling = "bilinear",
        num_points: Sequence[int] = (4, 4, 4),
        num_queries: int = 300,
        num_decoder_layers: int | None = None,
        decoder_layers: int | None = None,
        published_position_embedding: bool = False,
        published_discrete_clamp: bool = False,
    ):
        super().__init__()
        if size not in SIZES:
            raise UserError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
        if version not in (1, 2):
            raise UserError(f"version is {version!r}; RT-DETR has 1 and 2")
        if (size, version) == ("h", 1):
            raise UserError("size 'h' is of version 2 alone")
        if task != "det":
            raise UserError(f"task {task!r} is not one of RT-DETR's, which finds boxes: det")
        if sampling not in ("bilinear", "discrete"):
            raise UserError(f"sampling is {sampling!r}; choose bilinear or discrete")
        if len(num_points) != len(STRIDES) or min(num_points) < 1:
            raise UserError(f"num_points is {tuple(num_points)}; each of {len(STRIDES)} levels needs at least one")
        architecture = SIZES[size]()
        layers = architecture.decoder_layers if num_decoder_layers is None else num_decoder_layers
        for name, value in (("num_queries", num_queries), ("num_decoder_layers", layers)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self.size, self.version, self.task, self.image_size, self.patch_size = size, version, task, 640, None
        self.test_settings = TEST_SETTINGS
        self.class_names = resolve_class_names(num_classes, class_names, COCO_CLASSES)
        self.backbone = architecture.backbone()
        self.decoder = Decoder(
            architecture.channels,
            len(self.class_names),
            layers,
            num_queries,
            tuple(num_points),
            sampling,
            version,
            published_clamp=published_discrete_clamp,
        )
        self.encoder = HybridEncoder(
            self.backbone.out_channels,
            architecture.channels,
            architecture.feedforward,
            architecture.expansion,
            architecture.encoder_layers,
            ("0", "1") if version == 1 else ("conv", "norm"),
            published_position_embedding=published_position_embedding,
        )
        self.decoder_layers = min(architecture.inference_layers, layers) if decoder_layers is None else decoder_layers

    @property
    def decoder_layers(self) -> int:
        """How many of the decoder's layers run in eval mode: with fewer it is faster, and its boxes are coarser."""
        return self.decoder.num_layers

    @decoder_layers.setter
    def decoder_layers(self, count: int) -> None:
        built = len(self.decoder.dec_score_head)
        if not 1 <= count <= built:
            raise UserError(f"decoder_layers is {count}; this model has {built}, and needs at least 1")
        self.decoder.num_layers = count

    @property
    def title(self) -> str:
        return f"RT-DETR{'v2' if self.version == 2 else ''}-{self.size}"

    def forward(self, images: Tensor, targets: Targets | None = None) -> Predictions | dict[str, Tensor]:
        """Images [B, 3, H, W] in [0, 1] (H, W multiples of 32) → predictions, or losses where targets are given."""
        if targets is not None and self.is_folded:
            raise UserError("a folded model has no losses: it is for inference")
        memory, sizes = self.decoder.flatten(self.encoder(self.backbone(images)))
        if targets is None:
            output = self.decoder(memory, sizes)
            return Predictions(output.logits[-1], output.boxes[-1])
        targets = relative_targets(targets, (images.shape[2], images.shape[3]))
        queries = min(self.decoder.num_queries, memory.shape[1])
        most = max(self.decoder.num_queries // 3, 1)  # 100 of 300 as published
        denoising = denoising_queries(targets, len(self.class_names), queries, num_denoising=most)
        return detr_losses(self.decoder(memory, sizes, denoising), denoising, targets, version=self.version)

    def predict(self, images: Any, *, decoder_layers: int | None = None, **options: Any) -> Any:
        """See `Detector.predict`; only the first `decoder_layers` of the decoder run, by default as many as always."""
        before = self.decoder_layers
        try:
            self.decoder_layers = before if decoder_layers is None else decoder_layers
            return super().predict(images, **options)
        finally:
            self.decoder_layers = before

    @staticmethod
    def to_canvas(image: np.ndarray, image_size: int) -> tuple[np.ndarray, tuple[float, float]]:
        return squash(image, image_size)

    @staticmethod
    def normalize(canvases: Tensor) -> Tensor:
        return canvases.flip(1).float() / 255

    @staticmethod
    def to_canvases(frames: Tensor, sizes: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
        black, white = (0, 0, 0), (255, 255, 255)
        return letterbox_normalize(frames, sizes, image_size, mean=black, std=white, squash=True, rgb=True, dtype=dtype)

    @staticmethod
    def canvas_scales(sizes: Tensor, image_size: int) -> Tensor:
        return letterbox_scales(sizes, image_size, squash=True)

    def postprocess(
        self,
        output: Predictions,
        canvas_size: tuple[int, int],
        scales: Sequence[tuple[float, float]],
        shapes: Sequence[tuple[int, int]],
        settings: DetectSettings,
        *,
        clip: bool,
    ) -> list[Detections]:
        boxes, scores, labels, queries, counts, _ = self.detect_padded(output, canvas_size, settings)
        found = (
            Detections(boxes[i, :count], scores[i, :count], labels[i, :count], queries[i, :count])
            for i, count in enumerate(counts.tolist())
        )
        return [
            self.to_image(detections, scale, shape, clip=clip)
            for detections, scale, shape in zip(found, scales, shapes, strict=True)
        ]

    def detect_padded(
        self,
        output: Predictions,
        input_size: tuple[int, int],
        settings: DetectSettings,
        capacity: int = 0,
        nms: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> PaddedDetections:
        """The best pairs of query and class: there is no NMS, and so no capacity; boxes are not clipped."""
        boxes, scores = self.boxes_and_scores(output, input_size)
        classes, flat = scores.shape[2], scores.flatten(1)
        missing = max(settings.max_detections - flat.shape[1], 0)  # of few queries
        score, index = flat.topk(settings.max_detections - missing)
        score, index = F.pad(score, (0, missing)), F.pad(index, (0, missing))
        query, kept = index // classes, score > settings.score_threshold
        counts = kept.sum(1)
        return PaddedDetections(
            boxes.gather(1, query[..., None].expand(-1, -1, 4)).where(kept[..., None], 0.0),
            score.where(kept, 0.0),
            (index % classes).where(kept, -1),
            query.where(kept, 0),
            counts,
            counts,
        )

    def boxes_and_scores(self, output: Predictions, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = input_size
        boxes = cxcywh_to_xyxy(output.boxes.float())
        x, y = boxes[..., 0::2] * width, boxes[..., 1::2] * height
        return torch.stack((x, y), -1).flatten(-2), output.logits.float().sigmoid()

    @staticmethod
    def to_image(found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool) -> Detections:
        return found.in_image(scale, shape, clip=clip)

    @classmethod
    def translate(cls, checkpoint: Checkpoint) -> Checkpoint | None:
        state = checkpoint.state_dict
        if any(key.endswith("._mean") for key in state):
            return cls._translate_paddle(checkpoint)
        if any(key.startswith("model.backbone.model.embedder.") for key in state):
            state = from_hugging_face(state)
        if STEMS & {f"backbone.{key}" for key in state}:
            state = {f"backbone.{key}": value for key, value in state.items()}
        if not STEMS & state.keys():
            return None
        # what a published model for deployment keeps beside the branches that it is made of
        state = {key: value for key, value in state.items() if not re.search(r"bottlenecks\.\d+\.conv\.", key)}
        return replace(checkpoint, state_dict=state)

    @classmethod
    def _translate_paddle(cls, checkpoint: Checkpoint) -> Checkpoint | None:
        arrays = list(checkpoint.state_dict.values())
        for size in SIZES:
            if size == "h":
                continue
            with torch.device("meta"):
                keys = [key for key in cls(size).state_dict() if not key.endswith(".num_batches_tracked")]
            if len(keys) != len(arrays):
                continue
            classes = arrays[keys.index("decoder.denoising_class_embed.weight")]
            with torch.device("meta"):
                shapes = {key: value.shape for key, value in cls(size, num_classes=len(classes)).state_dict().items()}
            state = from_paddle(checkpoint.state_dict, shapes)
            if state is not None:
                return replace(checkpoint, state_dict=state)
        return None

    @classmethod
    def inspect(cls, checkpoint: Checkpoint) -> Inspected:
        """Size, number of classes and options of the weights; of a bare backbone what it tells."""
        checkpoint = cls.own(checkpoint)
        state = checkpoint.state_dict

        def width(key: str) -> int | None:
            weight = state.get(key)
            if weight is not None and not weight.ndim:
                raise UserError(f"{checkpoint.path} is damaged: {key} has shape []")
            return None if weight is None else len(weight)

        depth = sum(f"backbone.res_layers.2.blocks.{i}.branch2a.conv.weight" in state for i in range(len(state)))
        bottleneck = "backbone.res_layers.0.blocks.0.branch2c.conv.weight" in state
        stem = width("backbone.stem.stem4.conv.weight")
        sizes = HGNETS.get(stem, ()) if stem is not None else PRESNETS.get((bottleneck, depth), ())
        if not sizes:
            raise UserError(f"{checkpoint.path} has a backbone that no RT-DETR of {', '.join(SIZES)} has")
        rep_width = width("encoder.fpn_blocks.0.conv1.conv.weight")
        if len(sizes) > 1 and rep_width is not None:
            sizes = [s for s in sizes if int(SIZES[s]().channels * SIZES[s]().expansion) == rep_width] or sizes
        version = next((v for v, name in ENCODER_OUTPUTS.items() if f"decoder.enc_output.{name}.weight" in state), None)
        layers = sum(f"decoder.dec_score_head.{i}.weight" in state for i in range(len(state)))
        options = {"version": version, "num_points": points_of(state, HEADS), "num_decoder_layers": layers or None}
        classes = width("decoder.enc_score_head.weight")
        return Inspected(sizes[0] if len(sizes) == 1 else None, None, classes, options | cls._told_options(checkpoint))

    @staticmethod
    def _told_options(checkpoint: Checkpoint) -> dict[str, Any]:
        """What weights do not show, and a file of this project or Hugging Face's settings do."""
        own, config = (checkpoint.meta.get(key) for key in ("rtmdet_fast", "config"))
        told: dict[str, Any] = {}
        if isinstance(own, Mapping):
            told = {key: own[key] for key in ("sampling", "num_queries", "decoder_layers") if key in own}
        elif isinstance(config, Mapping):
            told = {"num_queries": config.get("num_queries", 300)}
            if config.get("decoder_method") == "discrete":
                told["sampling"] = "discrete"
        elif "_dsp_" in checkpoint.path.name:  # the published names of such files
            told = {"sampling": "discrete"}
        for key, value in told.items():
            if type(value) is not (str if key == "sampling" else int):
                raise UserError(f"{checkpoint.path} is damaged: its {key} is {str(value)[:40]!r}")
        return told

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over weights; layers that the file lacks or that have another class count stay, and are named."""
        checkpoint = self.own(checkpoint)
        found = self.inspect(checkpoint)
        for what, own, other in (
            ("size", self.size, found.size),
            ("version", self.version, found.options["version"]),
            ("num_points", self.decoder.num_points, points_of_scale(checkpoint.state_dict)),
        ):
            if other is not None and own != other:
                raise UserError(f"{checkpoint.path} holds a model of {what} {other!r}, not {own!r}")
        model = self.state_dict()
        state = {key: value for key, value in checkpoint.state_dict.items() if not key.endswith(".num_points_scale")}
        fitting = {key: value for key, value in state.items() if key in model and model[key].shape == value.shape}
        other_shape = [key for key in state if key in model and key not in fitting]
        missing = [key for key in model if key not in state and not key.endswith(".num_batches_tracked")]
        unfit = [key for key in other_shape if not key.startswith(CLASSIFIERS)]
        unfit += [key for key in missing if key.startswith("backbone.")]
        unfit += [key for key in state if key not in model and not key.endswith(".num_batches_tracked")]
        if unfit:
            raise UserError(f"{checkpoint.path} does not fit a {self.title} model (first: {shown(min(unfit))})")
        self.load_state_dict(fitting, strict=False)
        bare = all(key.startswith("backbone.") for key in state)
        fresh = sorted({".".join(key.split(".")[: 1 if bare else 2]) for key in [*missing, *other_shape]})
        if fresh:
            classes = f" for {len(self.class_names)} classes" if other_shape else ""
            warnings.warn(
                f"{checkpoint.path.name}: freshly initialised{classes}, to be trained: {', '.join(fresh)}", stacklevel=3
            )

    def saved_weights(self) -> dict[str, dict[str, Tensor]]:
        state = self.state_dict()
        if self.version == 2:  # whose published code has these among its weights
            sizes = tuple((self.image_size // stride,) * 2 for stride in STRIDES)
            boxes, valid = anchors(sizes, torch.device("cpu"))
            state |= {"decoder.anchors": boxes[None], "decoder.valid_mask": valid[None]}
            scale = torch.cat([torch.full((p,), 1 / p) for p in self.decoder.num_points])
            for i in range(len(self.decoder.dec_score_head)):
                state[f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"] = scale
        return {"model": state}

    def saved_options(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "sampling": self.decoder.sampling,
            "num_queries": self.decoder.num_queries,
            "decoder_layers": self.decoder_layers,
        }
