"""RT-DETR (arXiv:2304.08069) and RT-DETRv2 (arXiv:2407.17140), whose function is the same but for the sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rtmdet_fast.class_names import COCO_CLASSES
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.detector import Detector, Targets, resolve_class_names
from rtmdet_fast.models.rtdetr.boxes import relative_targets
from rtmdet_fast.models.rtdetr.decoder import Decoder, Sampling
from rtmdet_fast.models.rtdetr.denoising import denoising_queries
from rtmdet_fast.models.rtdetr.encoder import HybridEncoder
from rtmdet_fast.models.rtdetr.hgnet import HGNetv2, Stage
from rtmdet_fast.models.rtdetr.losses import detr_losses
from rtmdet_fast.models.rtdetr.resnet import PResNet


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
        sampling: of deformable attention, bilinear or discrete (version 2): the cell that a place lies in, alone.
        num_points: places in the levels of strides 8, 16, 32 that a head looks at.
        num_queries: most detections before classes are told apart.
        decoder_layers: how many there are; as published where not given. See also `inference_layers`.
        published_position_embedding: as the published code lays it out on inputs that are not square, which is wrong.
    """

    def __init__(
        self,
        size: str = "r50",
        version: int = 1,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        sampling: Sampling = "bilinear",
        num_points: Sequence[int] = (4, 4, 4),
        num_queries: int = 300,
        decoder_layers: int | None = None,
        published_position_embedding: bool = False,
    ):
        super().__init__()
        if size not in SIZES:
            raise UserError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
        architecture = SIZES[size]()
        self.size, self.version, self.task, self.image_size, self.patch_size = size, version, "det", 640, None
        self.class_names = resolve_class_names(num_classes, class_names, COCO_CLASSES)
        layers = architecture.decoder_layers if decoder_layers is None else decoder_layers
        self.backbone = architecture.backbone()
        self.decoder = Decoder(
            architecture.channels,
            len(self.class_names),
            layers,
            num_queries,
            tuple(num_points),
            sampling,
            version,
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
        self.decoder.num_layers = min(architecture.inference_layers, layers)

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
        denoising = denoising_queries(targets, len(self.class_names), queries)
        return detr_losses(self.decoder(memory, sizes, denoising), denoising, targets, version=self.version)
