"""Evaluation of a model on a data set with the published test settings: COCO's or DOTA's figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.workers import init_worker
from rtmdet_fast.distributed import gather, gather_to_first, process_count
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.coco import Evaluation, score_detections
from rtmdet_fast.evaluation.dota import dota_figures
from rtmdet_fast.evaluation.overlaps import rotated_overlaps
from rtmdet_fast.inference.results import Results
from rtmdet_fast.models.detector import Detector, check_image_size


class _Images(Dataset):
    """Images of a data set: [H, W, 3] uint8 BGR and their index; None for one that is left out."""

    def __init__(self, dataset: CocoDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int] | None:
        try:
            return self.dataset.load(index).image, index
        except UserError:
            if not self.dataset.skip_bad:
                raise
            return None


class _Canvases(_Images):
    """Network inputs of a data set: canvas [S, S, 3] uint8, scale (x, y), (height, width), index."""

    def __init__(self, dataset: CocoDataset, to_canvas: Callable[..., Any], image_size: int):
        super().__init__(dataset)
        self.to_canvas, self.image_size = to_canvas, image_size

    def __getitem__(  # type: ignore[override]
        self, index: int
    ) -> tuple[Tensor, tuple[float, float], tuple[int, int], int] | None:
        loaded = super().__getitem__(index)
        if loaded is None:
            return None
        image, _ = loaded
        canvas, scale = self.to_canvas(image, self.image_size)
        return torch.from_numpy(canvas), scale, image.shape[:2], index


def evaluate(
    model: Detector,
    dataset: CocoDataset,
    *,
    image_size: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
    together: bool = False,
) -> Evaluation:
    """Detect on every image of `dataset` with the task's published test settings, and compare with its ground truth.

    Images larger than the `patch_size` of a model of rotated boxes are cut into windows. For a model with masks the
    data set is one made with masks=True, and masks are compared too. The data set's classes are matched with the
    model's by name; raises UserError where they cannot be.

    With `together` all processes that torchrun started call this, and each detects on batches of its own. The first
    then has what it would have found alone, to the bit; the others have the figures, without detections and overlaps.
    """
    size = check_image_size(model.image_size if image_size is None else image_size)
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch size {batch_size} and {num_workers} workers: at least 1 and 0 are needed")
    if model.has_masks and not dataset.has_masks:
        raise UserError(f"{dataset.annotation_path} was read without its masks: make the data set with masks=True")
    rotated = isinstance(dataset, DotaDataset)
    if rotated != (model.task == "rotated"):
        kind = "rotated" if rotated else "upright"
        raise UserError(f"{dataset.annotation_path} was read for {kind} boxes, but the model's task is {model.task!r}")
    category_ids = match_categories(model, dataset)
    shared = together and process_count() > 1
    # Whole batches are shared out: the company of an image in its batch can change the last bits of what is found.
    batches = list(BatchSampler(range(len(dataset)), batch_size, drop_last=False))
    if shared:
        batches = batches[torch.distributed.get_rank() :: process_count()]
    images = _Images(dataset) if rotated else _Canvases(dataset, model.to_canvas, size)
    loader: DataLoader = DataLoader(
        images, batch_sampler=batches, num_workers=num_workers, collate_fn=list, worker_init_fn=init_worker
    )
    found: dict[int, _Found] = {}
    total = sum(map(len, batches))
    with tqdm(total=total, desc="evaluate", unit="img", disable=not progress, leave=False) as bar:
        for items in loader:
            bar.update(len(items))
            items = [item for item in items if item is not None]
            if not items:
                continue
            if rotated:
                detected = model.detect_images([image for image, _ in items], size, batch_size=batch_size)
            else:
                canvases, scales, shapes, _ = zip(*items, strict=True)
                detected = model.detect(torch.stack(canvases).permute(0, 3, 1, 2), scales, shapes)
            for (*_, index), detections in zip(items, detected, strict=True):
                boxes, scores, labels = (field.cpu() for field in detections[:3])
                results = Results(
                    None, boxes.float(), scores.float(), labels, model.class_names, predicted_masks=detections.masks
                )
                found[index] = _Found(
                    results.to_coco(dataset.image_ids[index], category_ids),
                    (results.boxes.numpy(), results.scores.numpy(), labels.numpy()) if rotated else None,
                )
    if not shared:
        return _score(model, dataset, found, category_ids)
    every = gather_to_first((found, dataset.real_sizes))
    figures = None
    if every is not None:
        for theirs, real_sizes in every:
            found |= theirs
            dataset.real_sizes.copy_(torch.maximum(dataset.real_sizes, real_sizes))
        evaluation = _score(model, dataset, dict(sorted(found.items())), category_ids)
        figures = replace(evaluation, detections=[], overlaps=None, image_ids=())
    figures = gather(figures, process_count())[0]
    return figures if every is None else evaluation  # type: ignore[return-value]


class _Found(NamedTuple):
    """In an image: COCO results entries, and of rotated boxes these [n, 5] with their scores [n] and labels [n]."""

    entries: list[dict[str, Any]]
    rotated: tuple[np.ndarray, np.ndarray, np.ndarray] | None


def _score(model: Detector, dataset: CocoDataset, found: dict[int, _Found], category_ids: list[int]) -> Evaluation:
    """The figures of what was found in images, by their index in `dataset`; those missing could not be read."""
    image_ids = tuple(dataset.image_ids[index] for index in found)
    detections = [entry for of_image in found.values() for entry in of_image.entries]
    skipped = len(dataset) - len(found)
    if isinstance(dataset, DotaDataset):
        label_of = np.array([dataset.category_ids.index(category) for category in category_ids])
        boxes = [(b, s, label_of[k]) for b, s, k in (f.rotated for f in found.values() if f.rotated is not None)]
        overlaps = rotated_overlaps([dataset.ground_truth(index) for index in found], boxes)
        figures = dota_figures(overlaps, dataset.class_names)
        metrics = {key.removeprefix("m"): value for key, value in figures.metrics.items()}
        return Evaluation(metrics, figures.per_class, figures.pr_curves, detections, skipped, overlaps, image_ids)
    evaluation = score_detections(dataset, detections, image_ids, skipped)
    if not model.has_masks:
        return evaluation
    of_masks = score_detections(dataset, detections, image_ids, skipped, iou_type="segm")
    for name, of_class in of_masks.per_class.items():
        evaluation.per_class[name].update((f"segm_{key}", value) for key, value in of_class.items())
    evaluation.metrics.update((f"segm_{key}", value) for key, value in of_masks.metrics.items())
    return replace(evaluation, overlaps=of_masks.overlaps)


def match_categories(model: Detector, dataset: CocoDataset) -> list[int]:
    """The data set's category id of each class of the model; UserError where it lacks a class, or all images."""
    if not len(dataset):
        raise UserError(f"{dataset.annotation_path}: has no image to evaluate on")
    by_name = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    if all(name in by_name for name in model.class_names):
        ids = [by_name[name] for name in model.class_names]
        missing = next((name for name, ident in zip(model.class_names, ids, strict=True) if ident < 0), None)
    elif len(model.class_names) == len(dataset.class_names) and not set(by_name) & set(model.class_names):
        # Names may differ ("class 0", another language) where the classes are the same ones in the same order.
        warnings.warn(
            f"the classes of {dataset.annotation_path} ({', '.join(dataset.class_names[:8])}, …) have other names than "
            f"the model's ({', '.join(model.class_names[:8])}, …) and are taken for the same ones in that order",
            stacklevel=3,
        )
        return list(dataset.category_ids)
    else:
        missing = next(name for name in model.class_names if name not in by_name)
    if missing is None:
        return ids
    named = [name for name, ident in by_name.items() if ident >= 0]
    raise UserError(
        f"the model's class {missing!r} is not in {dataset.annotation_path}, whose classes are "
        f"{', '.join(named[:8])}{', …' if len(named) > 8 else ''}"
    )
