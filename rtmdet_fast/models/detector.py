"""What every detector shares: images in, detections out; weights from a file and into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn

from rtmdet_fast.class_names import class_name
from rtmdet_fast.errors import UserError
from rtmdet_fast.images import as_bgr, read_image
from rtmdet_fast.inference.detections import Detections, DetectSettings, PaddedDetections, unpack
from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.tiling import predict_tiled
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.models.checkpoint import (
    Checkpoint,
    read_checkpoint,
    resolve_weights,
    save_atomically,
    trained_sizes,
    trained_thresholds,
)
from rtmdet_fast.models.fold import folded_copy

Color = Literal["bgr", "rgb"]
MAX_IMAGE_SIZE = 16384
SCORE_THRESHOLD = 0.3
"""Of `predict`, for models without `score_thresholds` of their own."""


class Targets(NamedTuple):
    """Ground truth of a batch, padded: boxes [B, M, 4] xyxy pixels, labels [B, M] int64, counts [B] int64.

    For masks also centers [B, M, 2], their centres of mass (x, y) in pixels, and masks [B, M, H/4, W/4] uint8, the
    full-size masks sampled at [2::4, 2::4].

    `room` is the number of matched predictions that a loss has room for, for losses whose tensors are all of a fixed
    size. Where it is None they are counted, for which the host waits.
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    centers: Tensor | None = None
    masks: Tensor | None = None
    room: int | None = None


D = TypeVar("D", bound="Detector")


class Inspected(NamedTuple):
    """What a weights file tells of its model; None for what it does not, which a bare backbone's may.

    options: further arguments of the family's constructor.
    """

    size: str | None
    task: str | None
    num_classes: int | None
    options: dict[str, Any]


class Detector(nn.Module):
    """The base of a family, which adds the network and what stands below as not implemented.

    Attributes:
        size: by which, with `task`, the family builds the model
        task: what it finds
        class_names: of the labels 0, 1, …
        image_size: side in pixels of the square network input
        patch_size: side in image pixels of what a training image showed; `predict` cuts larger images into windows of
            it
        max_candidates: of an image, above the score threshold, that take part on a GPU without the host waiting for it;
            where there are more, the host asks for their number, and finds the same as ever
        score_thresholds: of each class, with the best F1 on the validation images of its training, where it had any;
            `predict` takes them where no other is given
    """

    size: str
    task: str
    class_names: tuple[str, ...]
    image_size: int
    patch_size: int | None
    max_candidates: int = 1000
    score_thresholds: tuple[float, ...] | None = None
    weights_of: ClassVar[str]
    """Which models' weights the family loads, for messages."""
    has_masks = False
    is_folded = False
    """Whether `fold` made it."""
    test_settings: DetectSettings
    """Those that published figures were measured with."""
    input_description: ClassVar[str]
    """What `to_canvas` and `normalize` make of an image, for those who write a client of an exported file."""

    @property
    def title(self) -> str:
        """The model's published name."""
        raise NotImplementedError

    @property
    def most_matches(self) -> int | None:
        """Predictions that training matches with a ground truth, at most; None where its losses make the host wait."""
        return None

    @property
    def least_score(self) -> float:
        """Of a detection of `predict`, of whatever class, where no score threshold is given."""
        own = SCORE_THRESHOLD if self.score_thresholds is None else min(self.score_thresholds)
        return max(own, self.test_settings.score_threshold)

    @staticmethod
    def to_canvas(image: np.ndarray, image_size: int) -> tuple[np.ndarray, tuple[float, float]]:
        """The network input [S, S, 3] uint8 of a BGR image, and its pixels per pixel of the image (x, y)."""
        raise NotImplementedError

    @staticmethod
    def normalize(canvases: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 BGR as the network takes it, float32."""
        raise NotImplementedError

    @staticmethod
    def to_canvases(frames: Tensor, sizes: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
        """The network's input [B, 3, S, S] of frames as `letterbox_normalize` takes them, where they lie."""
        raise NotImplementedError

    @staticmethod
    def canvas_scales(sizes: Tensor, image_size: int) -> Tensor:
        """Of it, canvas pixels per pixel of the frame (x, y) [B, 2], for sizes [B, 2] (height, width)."""
        raise NotImplementedError

    def postprocess(
        self,
        output: Any,
        canvas_size: tuple[int, int],
        scales: Sequence[tuple[float, float]],
        shapes: Sequence[tuple[int, int]],
        settings: DetectSettings,
        *,
        clip: bool,
    ) -> list[Detections]:
        """Detections of each image in its own pixels, from the network's output; see `detect`."""
        raise NotImplementedError

    def detect_padded(
        self,
        output: Any,
        input_size: tuple[int, int],
        settings: DetectSettings,
        capacity: int,
        nms: Callable[..., tuple[Tensor, Tensor]] = batched_nms_padded,
    ) -> PaddedDetections:
        """Detections of all images in pixels of the network's input, from its output, without waiting for the device.

        Args:
            output: of the network, from inputs of (height, width) `input_size`.
            input_size: to which boxes are clipped.
            settings: thresholds and limits.
            capacity: candidates of an image.
            nms: `batched_nms_padded`, or what does the same; a family without NMS leaves it alone.
        """
        raise NotImplementedError

    def mask_logits(self, output: Any, found: PaddedDetections) -> Tensor:
        """Of a model with masks: their logits [B, D, H/8, W/8] for what `detect_padded` found."""
        raise NotImplementedError

    def boxes_and_scores(self, output: Any, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What detections are chosen from: boxes [B, N, 4 or 5] in pixels of the network's input, scores [B, N, C]."""
        raise NotImplementedError

    @staticmethod
    def to_image(found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool) -> Detections:
        """Detections in pixels of the original image, whose (height, width) is `shape`, from those of the input.

        scale: network pixels per image pixel (x, y); `clip` cuts boxes to the image and drops those outside it.
        """
        raise NotImplementedError

    @classmethod
    def translate(cls, checkpoint: Checkpoint) -> Checkpoint | None:
        """The checkpoint by the keys of the published models; None where it holds no weights of this family."""
        raise NotImplementedError

    @classmethod
    def own(cls, checkpoint: Checkpoint) -> Checkpoint:
        """`translate`; UserError in place of None."""
        own = cls.translate(checkpoint)
        if own is None:
            first = next(iter(checkpoint.state_dict))
            raise UserError(f"{checkpoint.path} holds no {cls.weights_of} weights (its first key is {first[:60]!r})")
        return own

    @classmethod
    def inspect(cls, checkpoint: Checkpoint) -> Inspected:
        """What the weights are of. UserError where they are none of this family."""
        raise NotImplementedError

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over weights; layers that the file lacks or that have another class count stay, and are named."""
        raise NotImplementedError

    def enable_sync_bn(self) -> None:
        """Let every batch norm take its batch statistics over all distributed processes."""
        for child in self.modules():
            if hasattr(child, "process_group"):
                child.process_group = torch.distributed.group.WORLD  # type: ignore[assignment]

    def fold(self: D) -> D:
        """A copy for inference, which leaves this model as it is: plain convolutions with a bias, in channels_last.

        Its outputs are this model's in eval mode, but for rounding. It cannot be trained or saved.
        """
        folded = folded_copy(self)
        folded.is_folded = True
        return folded

    def train(self: D, mode: bool = True) -> D:
        if mode and self.is_folded:
            raise UserError("a folded model cannot be trained: train the one it was folded from")
        return super().train(mode)

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

        The default settings are the published ones, which let boxes reach into the padding of the canvas: figures
        compare with published ones only so (on real images `clip_to_image`, which `predict` uses, gains some 0.002 AP).

        Args:
            canvases: as `to_canvas` makes them.
            scales: of each, canvas pixels per image pixel (x, y).
            shapes: of each, the original (height, width).
            settings: thresholds and limits.
            clip_to_image: at the image's edges, not the canvas's.
        """
        parameter = next(self.parameters())
        images = self.normalize(canvases.to(parameter.device)).to(parameter.dtype)
        # on a CPU convolutions are faster in channels_last whatever the layout of their weights
        last = self.is_folded or images.device.type == "cpu"
        images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        # parts may be frozen; a folded model never trains, and the search takes a tenth of the smallest network
        training = [] if self.is_folded else [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            output = self(images)
        finally:
            for module in training:
                module.training = True
        canvas_size = canvases.shape[2], canvases.shape[3]
        settings = settings or self.test_settings
        found = None
        if images.device.type != "cpu":  # where nothing waits, and what fixed sizes need takes longer
            found = self.unpack(self.pack(output, canvas_size, settings).cpu(), canvas_size, settings)
        if found is None:
            return self.postprocess(output, canvas_size, scales, shapes, settings, clip=clip_to_image)
        return [
            self.to_image(detections, scale, shape, clip=clip_to_image)
            for detections, scale, shape in zip(found, scales, shapes, strict=True)
        ]

    def pack(self, output: Any, input_size: tuple[int, int], settings: DetectSettings) -> Tensor:
        """All that is found [B, L] float32, for `unpack`, from the network's output; the host waits for nothing."""
        found = self.detect_padded(output, input_size, settings, self._capacity(settings))
        return found.pack(self.mask_logits(output, found) if self.has_masks else None)

    def unpack(self, packed: Tensor, input_size: tuple[int, int], settings: DetectSettings) -> list[Detections] | None:
        """Detections of each image, in pixels of the network's input, from what `pack` made, on the host.

        None where an image has more candidates than took part, so that only `postprocess` finds all.
        """
        mask_shape = (input_size[0] // 8, input_size[1] // 8) if self.has_masks else None
        box_size = 5 if self.task == "rotated" else 4
        found, candidates = unpack(packed, settings.max_detections, box_size, mask_shape)
        return None if max(candidates) > self._capacity(settings) else found

    def _capacity(self, settings: DetectSettings) -> int:
        # with `nms_pre` candidates or fewer on all levels together, it cuts none off
        return min(self.max_candidates, settings.nms_pre)

    @overload
    def predict(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
        max_detections: int | None = ...,
        image_size: int | None = ...,
        patch_size: int | None = ...,
        batch_size: int = ...,
        color: Color = ...,
    ) -> list[Results]: ...

    @overload
    def predict(
        self,
        images: Any,
        *,
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
        max_detections: int | None = ...,
        image_size: int | None = ...,
        patch_size: int | None = ...,
        batch_size: int = ...,
        color: Color = ...,
    ) -> Results: ...

    def predict(
        self,
        images: Any,
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        batch_size: int = 8,
        color: Color = "bgr",
    ) -> Results | list[Results]:
        """Detect objects in one image (→ Results) or in a list of images (→ list of Results).

        An image is a path, a BGR uint8 array [H, W, 3] (also [H, W] or [H, W, 4]) or a PIL image. The results' own
        images are BGR in any case.

        Args:
            images: an image, or a list of them.
            score_threshold: least score of a detection; where not given the model's own of each class, which a training
                found to be the best (`score_thresholds`), or 0.3.
            iou_threshold: of NMS; the published one of the task where not given.
            max_detections: of an image; the published number where not given.
            image_size: side in pixels of the square network input, a multiple of 32; the model's own where not given.
            patch_size: images with a longer side in pixels are cut into windows of that side, a quarter of which
                overlaps, and what is found in them is merged; the model's own (rotated boxes only) where not given, 0
                for never.
            batch_size: images, or windows, in a pass.
            color: of arrays: bgr, as OpenCV reads them, or rgb, as most others do. Paths and PIL images need none.
        """
        published = self.test_settings
        thresholds = None
        if score_threshold is None:
            thresholds = self.score_thresholds
            score_threshold = self.least_score
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold is {score_threshold}; it must lie in [0, 1]")
        settings = replace(
            published,
            score_threshold=score_threshold,
            iou_threshold=published.iou_threshold if iou_threshold is None else iou_threshold,
            max_detections=published.max_detections if max_detections is None else max_detections,
        )
        if not 0 <= settings.iou_threshold <= 1:
            raise UserError(f"iou_threshold is {iou_threshold}; it must lie in [0, 1]")
        if patch_size and self.has_masks:
            raise UserError(f"patch_size is {patch_size}, but masks cannot be merged over windows: leave it out")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if max_detections is not None and max_detections < 0:
            raise UserError(f"max_detections is {max_detections}; it must be at least 0")
        if color not in get_args(Color):
            raise UserError(f"color {color!r} is unknown; choose one of {', '.join(get_args(Color))}")
        if patch_size and patch_size < 32:
            raise UserError(f"patch_size is {patch_size}; windows have 32 pixels or more, 0 is for none")
        size = check_image_size(self.image_size if image_size is None else image_size)
        single = not isinstance(images, (list, tuple))
        sources = [images] if single else list(images)
        results: list[Results] = []
        for start in range(0, len(sources), batch_size):
            chunk = sources[start : start + batch_size]
            arrays = [read_image(s) if isinstance(s, (str, Path)) else as_bgr(s, color) for s in chunk]
            found = self.detect_images(arrays, size, patch_size, settings=settings, batch_size=batch_size)
            for source, array, detections in zip(chunk, arrays, found, strict=True):
                if thresholds is not None:
                    detections = detections.above(thresholds)
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

    def predictor(self, **options: Any) -> Any:
        """A `Predictor` of this model as it is now: `predict` made ready for many images, streams and pools.

        Its `options` are those of `rtmdet_fast.predictor.predictor.Predictor`.
        """
        from rtmdet_fast.predictor.predictor import Predictor  # which stands above

        return Predictor(self, **options)

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
        whole = iter(self.detect_whole(small, image_size, settings) if small else [])
        return [
            next(whole)
            if not patch or max(image.shape[:2]) <= patch
            else self._detect_tiled(image, image_size, patch, settings or self.test_settings, batch_size)
            for image in images
        ]

    def detect_whole(
        self, images: Sequence[np.ndarray], image_size: int, settings: DetectSettings | None
    ) -> list[Detections]:
        """Detections in BGR images [H, W, 3] uint8, none of which is cut into windows, in their pixels, clipped."""
        canvases, scales = zip(*(self.to_canvas(image, image_size) for image in images), strict=True)
        return self.detect(
            torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2),
            scales,
            [(image.shape[0], image.shape[1]) for image in images],
            settings=settings,
            clip_to_image=True,
        )

    def _detect_tiled(
        self, image: np.ndarray, image_size: int, patch_size: int, settings: DetectSettings, batch_size: int
    ) -> Detections:
        boxes, scores, labels = predict_tiled(
            lambda patches: self.detect_whole(patches, image_size, settings),
            image,
            patch_size=patch_size,
            overlap=patch_size // 4,
            batch_size=batch_size,
            iou_threshold=settings.iou_threshold,
            max_detections=settings.max_detections,
            device=next((parameter.device for parameter in self.parameters()), None),
        )
        return Detections(boxes, scores, labels, torch.full_like(labels, -1))

    def fit(self, data: Any = None, **options: Any) -> Any:
        """Train this model from the weights that it has; afterwards it holds the best ones, in eval mode.

        The best are those of best.pth: averaged, of the epoch with the best AP (with masks, mask AP; of rotated boxes,
        AP50), without validation data of the last one. The model's tensors are new ones then: an optimiser or a
        predictor made before has the old.

        Classes are those of the training data: `class_names` becomes theirs. Where they are as many as before, all
        weights are kept, in the order of the classes (with a warning where names differ); otherwise the layers that
        tell classes apart begin anew, and a warning names them.

        Args:
            data: folder of a data set, or several; see `rtmdet-fast train --data`.
            callbacks: of `rtmdet_fast.training.callbacks.Callback`, told of steps, epochs and the end; each can end the
                run.
            options: settings of `rtmdet-fast train`, as `rtmdet_fast.training.config.TrainConfig` has them (`--lr 1e-3`
                is lr=1e-3), but for those that the model has itself: model, size, version, queries, sampling, task
                and init. image_size is the model's own where not given, and device is where the model is, or, for one
                on the CPU, the first GPU.

        Returns:
            The run's `TrainResult`. Raises UserError for bad input; the model is then as it was.
        """
        from rtmdet_fast.training.fit import fit  # which stands above

        if data is not None:
            options["data"] = data
        return fit(self, **options)

    def evaluate(
        self,
        data: Any = None,
        *,
        ann: str | Path | None = None,
        images: str | Path | None = None,
        split: str = "val",
        image_size: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        match_by_position: bool = False,
        skip_bad: bool = False,
        progress: bool = True,
    ) -> Any:
        """Detect on every image of a data set with the task's published test settings, and compare with the truth.

        Args:
            data: folder of a data set, or several; see `rtmdet-fast eval --data`.
            ann: in its place the annotations, and with `images` the folder of the images.
            images: see `ann`.
            split: of `data`.
            image_size: side in pixels of the square network input; the model's own where not given.
            batch_size: images in a pass.
            num_workers: processes that load images; 0 for none beside this one.
            match_by_position: takes classes none of whose names is the model's for the same ones in the same order.
            skip_bad: goes on over unreadable images and invalid annotations, and counts them.
            progress: shows a bar.

        Returns:
            An `Evaluation`: `metrics` as the command prints them, `per_class`, `pr_curves`, `detections`. Raises
            UserError where the data cannot be read or has other classes.
        """
        from rtmdet_fast.data.layout import find_sources, source_of
        from rtmdet_fast.evaluation.evaluate import evaluate
        from rtmdet_fast.tasks import TASKS

        if (data is None) == (ann is None) or (ann is None) != (images is None):
            raise UserError("give the folder of a data set, or both ann and images")
        if split not in (splits := ("train", "val", "test")):
            raise UserError(f"split {split!r} is unknown; choose one of {', '.join(splits)}")
        dataset = TASKS[self.task].open_dataset(
            (source_of(Path(ann), Path(images)),) if ann and images else find_sources(data, split),
            skip_bad=skip_bad,
            class_names=self.class_names,
            match_by_position=match_by_position,
        )
        return evaluate(
            self, dataset, image_size=image_size, batch_size=batch_size, num_workers=num_workers, progress=progress
        )

    def export(self, path: str | Path, **options: Any) -> Any:
        """Write the model with its post-processing to an .onnx, .xml (OpenVINO) or .pt2 file for another runtime.

        The options are those of `rtmdet_fast.export.export.export`, and so is the Agreement that comes back.
        """
        from rtmdet_fast.export.export import export

        return export(self, path, **options)

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write weights that `from_pretrained` and mmdet load; `extra` adds entries beside `state_dict` and `meta`."""
        if self.is_folded:
            raise UserError(f"{path}: a folded model cannot be saved: save the one it was folded from")
        meta = {
            "dataset_meta": {"classes": self.class_names},
            "rtmdet_fast": {
                "size": self.size,
                "task": self.task,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "score_thresholds": self.score_thresholds,
                **self.saved_options(),
            },
        }
        save_atomically({"meta": meta, **self.saved_weights(), **extra}, path)

    def saved_weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights as the published code looks for them in a file."""
        return {"state_dict": self.state_dict()}

    def saved_options(self) -> dict[str, Any]:
        """Further arguments of the constructor that a file is to tell."""
        return {}

    @classmethod
    def from_pretrained(
        cls: type[D],
        path_or_name: str | Path,
        size: str | None = None,
        task: str | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> D:
        """A model in eval mode with the weights of a file, or of a published model by name ("rtmdet-tiny").

        Size, task, classes and names are found in the file where they are not given, and so are the family's further
        `options`. Other classes than the file's, or a backbone-only file, leave the affected layers freshly initialised
        and say so in a warning.
        """
        checkpoint = read_checkpoint(resolve_weights(path_or_name))
        return cls.from_checkpoint(checkpoint, size, task, num_classes, class_names, **options)

    @classmethod
    def from_checkpoint(
        cls: type[D],
        checkpoint: Checkpoint,
        size: str | None = None,
        task: str | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> D:
        """`from_pretrained` of what was read. UserError for options that the family lacks."""
        if unknown := sorted(options.keys() - signature(cls).parameters.keys()):
            raise UserError(f"{checkpoint.path} holds weights of {cls.__name__}, which has no option {unknown[0]!r}")
        checkpoint = cls.own(checkpoint)
        found_size, found_task, found_classes, found_options = cls.inspect(checkpoint)
        for what, told, found in (("size", size, found_size), ("task", task, found_task)):
            if told is not None and found is not None and told != found:
                raise UserError(f"{checkpoint.path} holds a model of {what} {found!r}, not {told!r}")
        if class_names is None and num_classes in (None, found_classes):
            class_names = checkpoint.class_names
            if class_names is not None and found_classes is not None and len(class_names) != found_classes:
                class_names = None
        if num_classes is None and class_names is None:
            num_classes = found_classes
        arguments = {"size": size or found_size, "task": task or found_task, **found_options, **options}
        given = {name: value for name, value in arguments.items() if value is not None}
        model = cls(num_classes=num_classes, class_names=class_names, **given)  # type: ignore[call-arg]
        model.load_weights(checkpoint)
        for name, size_in_pixels in trained_sizes(checkpoint, check_image_size).items():
            setattr(model, name, size_in_pixels)
        same = model.class_names == checkpoint.class_names
        model.score_thresholds = trained_thresholds(checkpoint, len(model.class_names)) if same else None
        return model.eval()


def check_image_size(size: int) -> int:
    """`size` itself where the network can take it."""
    if size < 32 or size % 32:
        raise UserError(f"image size {size} is not a positive multiple of 32")
    if size > MAX_IMAGE_SIZE:
        raise UserError(f"image size {size} is above {MAX_IMAGE_SIZE}, where a single image takes tens of gigabytes")
    return size


def resolve_class_names(
    num_classes: int | None, class_names: Sequence[str] | None, published: Sequence[str]
) -> tuple[str, ...]:
    """The names of a model's classes: those given, the published ones where their number fits, or "class 0", …"""
    if isinstance(class_names, str):
        raise UserError(f"class_names is {class_names!r}; a list of names is expected")
    if num_classes is None:
        num_classes = len(published if class_names is None else class_names)
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
    if class_names is None:
        class_names = published if num_classes == len(published) else [f"class {i}" for i in range(num_classes)]
    if len(class_names) != num_classes:
        raise UserError(f"{len(class_names)} class names were given for num_classes={num_classes}")
    names = tuple(class_name(str(name)) for name in class_names)
    if "" in names:
        raise UserError(f"class_names[{names.index('')}] is {class_names[names.index('')]!r}; each class needs a name")
    return names
