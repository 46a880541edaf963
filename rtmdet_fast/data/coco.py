"""Detection data sets in COCO's form, from any format, checked before anything is trained on them."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.annotation_file import FARTHEST, LEVELS, image_size, is_id, is_number, is_numbers, read_flag
from rtmdet_fast.data.formats import FORMATS
from rtmdet_fast.data.image_cache import ImageCache
from rtmdet_fast.data.masks import MaskStore, Outlines, Segmentation, read_segmentation
from rtmdet_fast.data.source import Notes, Source
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.geometry.masks import cropped_rle
from rtmdet_fast.images import read_image


@dataclass(slots=True)
class Sample:
    """An image with its ground truth."""

    image: np.ndarray
    """[H, W, 3] uint8 BGR."""
    boxes: np.ndarray
    """[n, 4] float32 xyxy pixels of `image`, inside it and not empty; no crowd regions; rotated [n, 5] (dota.py)."""
    labels: np.ndarray
    """[n] int64, indices into the dataset's class_names."""
    image_id: int
    path: str
    masks: Outlines | None = None
    """Those of the n objects, where the dataset was made with masks=True."""


class _Part(NamedTuple):
    """What was checked of a source: names by category, image entries by id, annotations."""

    image_dir: Path
    categories: dict[int, str]
    images: dict[int, dict[str, Any]]
    annotations: list[dict[str, Any]]


FEW_CORNERS = 5  # boxes over the border, from which on they may all be corners


class CocoDataset:
    """The images of an annotation file, in its order, or of several sources one after the other.

    class_names: of the labels 0, 1, …; the file's categories in its order, or those given
    category_ids: the file's id of each class, -1 for a given class that the file does not know
    image_ids: of the images by index; of several sources 1, 2, …
    files: their paths in `image_dir`
    annotation_path: the file or folder of the annotations; of several sources the folder that holds them all
    has_masks: whether it was made with masks=True
    noticed: what is odd and was used all the same, by what it is
    apart_count: annotations that are no objects to train on, or to be found: crowds, ignored and difficult ones
    """

    box_dim = 4
    real_sizes: torch.Tensor
    """[images, 2] int64, (width, height) of those loaded so far that have another than the annotated one, else 0."""
    cache: ImageCache | None = None
    """Keeps decoded images for `load`, where one was set before loader processes begin."""

    def __init__(
        self,
        annotations: str | Path | Sequence[Source],
        image_dir: str | Path | None = None,
        *,
        skip_bad: bool = False,
        training: bool = False,
        keep_empty: bool = False,
        min_size: int = 8,
        class_names: Sequence[str] | None = None,
        match_by_position: bool = False,
        masks: bool = False,
    ) -> None:
        """Reads and checks the annotations; images are decoded by `load`.

        Args:
            annotations: COCO JSON, or sources of any format (`find_sources`), whose classes are merged by name.
            image_dir: of a JSON file the folder that its `file_name`s are relative to.
            skip_bad: leave out, and count in `skipped`, what is otherwise an error: unreadable images, duplicate ids,
                annotations without a proper box or of unknown images and categories.
            training: keep only images with at least one box, whose sides are `min_size` pixels or more.
            keep_empty: in training, keep those without a box too.
            class_names: the classes and their order, of a model for instance; others of the file are left out.
            match_by_position: where the file has as many classes as `class_names` and none of their names, take them
                for the same ones in the same order, with a warning.
            masks: read the segmentations too: polygons and RLE. Polygons of fewer than three points or outside the
                image, and annotations that then have no mask (in training: no pixel of one), are left out and counted
                in `skipped`; polygons that cross themselves are filled by the even-odd rule, and counted in `noticed`.
                Other faults are errors, as above.

        Raises UserError, which names the file and the entry at fault.
        """
        self.skip_bad, self.training, self.has_masks = skip_bad, training, masks
        self._skipped: dict[str, list[str]] = {}
        self.noticed: dict[str, list[str]] = {}
        if isinstance(annotations, (str, Path)):
            if image_dir is None:
                raise TypeError("image_dir is missing: the folder of the images")
            annotations = [self._source(Path(annotations), Path(image_dir))]
        notes = Notes(
            bad=self._bad,
            skip=self._skip,
            notice=self._notice,
            skip_bad=skip_bad,
            wanted=[class_name(name) for name in class_names or ()],
        )
        parts = [self._read_source(source, notes) for source in annotations]
        _, categories, images, entries = parts[0] if len(parts) == 1 else self._merge(annotations, parts)
        self._match_classes(categories, class_names, match_by_position)
        segmentations = None
        if masks:
            entries, segmentations = self._read_masks(entries, images)
        self._index(images, entries, min_size, keep_empty, segmentations)
        # kept for to_coco; a training file's polygons would only fill the memory of every loader worker
        self._content = None
        if not training:
            self._content = {
                "images": list(images.values()),
                "annotations": entries,
                "categories": [{"id": ident, "name": name} for ident, name in categories.items()],
            }

    def __len__(self) -> int:
        return len(self.image_ids)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for shared in (self._unreadable, self.real_sizes):  # which a pickle outside of multiprocessing does not keep
            shared.share_memory_()

    def load(self, index: int) -> Sample:
        """Decodes an image. UserError where that fails; with skip_bad in training, the next one serves."""
        if not (self.skip_bad and self.training):
            return self._load(index)
        for i in range(index, index + len(self)):
            i %= len(self)
            if not self._unreadable[i]:
                try:
                    return self._load(i)
                except UserError:
                    self._unreadable[i] = True
        raise UserError(f"{self.annotation_path}: none of its images in {self.image_dir} can be read")

    @property
    def skipped(self) -> dict[str, list[str]]:
        """What was left out so far, by reason; images that loader workers found unreadable are among it."""
        unreadable = [shown(self.files[i]) for i in self._unreadable.nonzero().flatten().tolist()]
        unreadable = self._skipped.get("unreadable image", []) + unreadable
        return {**self._skipped, **({"unreadable image": unreadable} if unreadable else {})}

    @property
    def resized_count(self) -> int:
        """Images loaded so far whose size was not the annotated one."""
        return int((self.real_sizes[:, 0] > 0).sum())

    @property
    def longest_side(self) -> int:
        """Of all images, in pixels, as far as the annotations or `training` told their sizes."""
        return int(self._sizes.max(initial=0))

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of an image as the annotations tell it, None where they do not."""
        width, height = self._sizes[index].tolist()
        return (width, height) if width else None

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the samples, without decoding an image: where each one's objects start [images + 1], boxes, labels.

        The boxes, [n, 4] or [n, 5], are those annotated, not clipped at the images' borders.
        """
        return self._starts, self._boxes, self._labels

    def subset(self, indices: Sequence[int]) -> CocoDataset:
        """A data set of some of the images, in that order; not of a training=True dataset."""
        part = copy.copy(self)
        part._skipped, part.noticed = {}, {}
        part._take(indices)
        return part

    def _take(self, indices: Sequence[int]) -> None:
        by_id = {entry["id"]: entry for entry in self.content["images"]}
        images = {self.image_ids[i]: by_id[self.image_ids[i]] for i in indices}
        annotations = [a for a in self.content["annotations"] if a["image_id"] in images]
        segmentations = None
        if self.has_masks:
            annotations, segmentations = self._read_masks(annotations, images)
        self._index(images, annotations, 0, True, segmentations)
        self._content = {**self.content, "images": list(images.values()), "annotations": annotations}

    @property
    def content(self) -> dict[str, Any]:
        """The checked images, annotations and categories in COCO's form; not of a training=True dataset."""
        if self._content is None:
            raise RuntimeError("made with training=True: make one without it to evaluate or write")
        return self._content

    @property
    def decoded_bytes(self) -> int:
        """What all images take in memory, as far as their sizes are known (see `longest_side`)."""
        return int(3 * self._sizes.prod(1).sum())

    @property
    def labels_by_image(self) -> list[np.ndarray]:
        """The labels of each image's objects, without crowd regions."""
        return np.split(self._labels, self._starts[1:-1])

    def to_coco(self) -> Any:
        """The ground truth as a pycocotools COCO object, crowd regions included; not of a training=True dataset."""
        from pycocotools import mask
        from pycocotools.coco import COCO

        labels = {category for category in self.category_ids if category >= 0}
        annotations: list[dict[str, Any]] = []
        for a in self.content["annotations"]:
            if a["category_id"] in labels:
                area = a["area"] if is_number(a.get("area")) else None
                if area is None and not self.has_masks:
                    area = a["bbox"][2] * a["bbox"][3]
                # ids from 1: pycocotools takes a match with annotation 0 for no match
                ids = {"id": len(annotations) + 1, "iscrowd": int(a["iscrowd"] or a["difficult"] > 0)}
                annotations.append({**a, **ids, "area": area})
        images = self.content["images"]
        if self.has_masks:
            # masks are compared in pixels of the images as they are
            real = {
                ident: {"width": width, "height": height}
                for ident, (width, height) in zip(self.image_ids, self.real_sizes.tolist(), strict=True)
                if width
            }
            images = [{**e, **real.get(e["id"], {})} for e in images]
            for a in annotations:
                if a["image_id"] in real and isinstance(a["segmentation"], dict):
                    a["segmentation"] = cropped_rle(a["segmentation"], **real[a["image_id"]])
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [c for c in self.content["categories"] if c["id"] in labels],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        if self.has_masks:
            for a in annotations:
                if a["area"] is None:
                    a["area"] = float(mask.area(coco.annToRLE(a)))
        return coco

    def _load(self, index: int) -> Sample:
        path = self.image_dir / self.files[index]
        width, height = self._sizes[index].tolist()
        image = None if self.cache is None else self.cache.get(index)
        if image is None:
            try:
                image = read_image(path, (width, height) if width else None)
            except UserError as error:
                how = "replace it, or leave such images out with --skip-bad"
                raise UserError(f"{error} (listed in {self.annotation_path}); {how}") from None
            if self.cache is not None:
                self.cache.put(index, image)
        h, w = image.shape[:2]
        if width and (w, h) != (width, height):
            if not self.real_sizes.any():
                warnings.warn(
                    f"{shown(str(path))} has {w}x{h} pixels where {self.annotation_path} says {width}x{height}; "
                    "the real size is used, here and for any other image like it",
                    stacklevel=2,
                )
            self.real_sizes[index] = torch.tensor([w, h])
        start, stop = self._starts[index : index + 2]
        boxes, kept = self._within(self._boxes[start:stop], w, h)
        masks = None if self._masks is None else self._masks.load(start, stop, w, h).take(kept)
        return Sample(image, boxes[kept], self._labels[start:stop][kept], self.image_ids[index], str(path), masks)

    def _source(self, annotations: Path, image_dir: Path) -> Source:
        return Source(format="coco", annotations=annotations, images=image_dir)

    def _read_source(self, source: Source, notes: Notes) -> _Part:
        self.annotation_path = source.annotations
        content = FORMATS[source.format].read(source, notes)
        self.image_dir = content.image_dir
        categories = self._read_categories(content.categories, content.annotations)
        images = self._read_images(content.images)
        annotations = self._read_annotations(content.annotations, images)
        if self.box_dim == 4:
            self._warn_of_corners(annotations, images)
        return _Part(content.image_dir, categories, images, annotations)

    def _merge(self, sources: Sequence[Source], parts: list[_Part]) -> _Part:
        """All parts as one, their classes by name, under new ids."""
        self.annotation_path = _folder_of_all([source.annotations for source in sources])
        self.image_dir = _folder_of_all([part.image_dir for part in parts])
        ids: dict[str, int] = {}
        images: dict[int, dict[str, Any]] = {}
        annotations = []
        for source, part in zip(sources, parts, strict=True):
            for name in part.categories.values():
                ids.setdefault(name, len(ids) + 1)
            new_ids = {}
            for ident, entry in part.images.items():
                new_ids[ident] = len(images) + 1
                name = os.path.relpath(part.image_dir / entry["file_name"], self.image_dir)
                images[new_ids[ident]] = {**entry, "id": new_ids[ident], "file_name": name}
            annotations += [
                {
                    **a,
                    "id": f"{a.get('id')} of {source.annotations}",
                    "image_id": new_ids[a["image_id"]],
                    "category_id": ids[part.categories[a["category_id"]]],
                }
                for a in part.annotations
            ]
        return _Part(self.image_dir, {i: name for name, i in ids.items()}, images, annotations)

    def _within(self, boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """The boxes on an image of that size, and which of them [n] it shows."""
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        return boxes, np.all(boxes[:, 2:] > boxes[:, :2], axis=1)

    def leave_out(self, indices: Sequence[int]) -> None:
        """Counts images as unreadable in `skipped`; with skip_bad in training others serve in their place."""
        self._unreadable[list(indices)] = True

    def _bad(self, what: str, reason: str, detail: object) -> None:
        """An error, or with skip_bad one more thing left out."""
        if not self.skip_bad:
            text = f"{self.annotation_path}: {shown(what)}: {reason} ({shown(detail):.400})"
            raise UserError(f"{text}; correct it, or leave such entries out with --skip-bad")
        self._skip(what, reason)

    def _skip(self, what: str, reason: str) -> None:
        self._skipped.setdefault(reason, []).append(shown(what))

    def _notice(self, what: str, oddity: str) -> None:
        self.noticed.setdefault(oddity, []).append(shown(what))

    def _read_categories(self, entries: list[Any], annotations: list[Any]) -> dict[int, str]:
        """The names by id; of two of the same name the one without annotations is left out."""
        names: dict[int, str] = {}
        for entry in entries:
            name = entry.get("name") if isinstance(entry, dict) else None
            name = class_name(name if isinstance(name, str) else str(name) if is_number(name) else "")
            if not name or not is_id(entry.get("id")):
                raise UserError(
                    f"{self.annotation_path}: a category needs an integer id and a name, not {shown(entry)}"
                )
            if entry["id"] in names:
                raise UserError(f"{self.annotation_path}: category id {entry['id']} occurs twice")
            names[entry["id"]] = name
        if not names:
            raise UserError(f"{self.annotation_path}: lists no categories")
        if len(set(names.values())) < len(names):
            self._drop_namesakes(names, annotations)
        self._known_categories = set(names)
        return names

    def _drop_namesakes(self, names: dict[int, str], annotations: list[Any]) -> None:
        """Leaves one category of each name in `names`; UserError where annotations have several of one name."""
        categories = (a.get("category_id") for a in annotations if isinstance(a, dict))
        used = {ident for ident in categories if is_id(ident) and ident in names}
        # those with annotations first
        first: dict[str, int] = {}
        for ident in sorted(names, key=lambda ident: ident not in used):
            other = first.setdefault(names[ident], ident)
            if other != ident and ident in used:
                raise UserError(
                    f"{self.annotation_path}: the categories {other} and {ident} have the same name "
                    f"{names[ident]!r}, and annotations both; give one of them another name"
                )
        for ident in [ident for ident, name in names.items() if first[name] != ident]:
            self._skip(f"category {ident}", "category without annotations of the same name as another")
            del names[ident]

    def _match_classes(
        self, categories: dict[int, str], class_names: Sequence[str] | None, match_by_position: bool
    ) -> None:
        if class_names is None:
            self.class_names, self.category_ids = tuple(categories.values()), tuple(categories)
            return
        by_name = {name: category for category, name in categories.items()}
        self.class_names = tuple(map(class_name, class_names))
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.annotation_path}: cannot be matched with classes of which two are named {twice[0]!r}"
            )
        self.category_ids = tuple(by_name.get(name, -1) for name in self.class_names)
        if set(self.category_ids) <= {-1}:
            others = (
                f"{self.annotation_path}: its categories ({', '.join(list(by_name)[:8])}, …) are none of the classes "
                f"wanted ({', '.join(self.class_names[:8])}, …)"
            )
            if len(by_name) != len(self.class_names):
                raise UserError(others)
            if not match_by_position:
                raise UserError(f"{others}; with --match-by-position they are taken for the same ones in that order")
            warnings.warn(
                f"{others}; as they are as many, they are taken for the same ones in that order", stacklevel=3
            )
            self.category_ids = tuple(categories)

    def _read_images(self, entries: list[Any]) -> dict[int, dict[str, Any]]:
        """The usable entries by id; width and height are 0 where not told."""
        images: dict[int, dict[str, Any]] = {}
        self._listed: set[int] = set()
        for entry in entries:
            if not isinstance(entry, dict) or not is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
                self._bad("an image", "malformed, it needs an integer id and a file_name", entry)
                continue
            ident, name = entry["id"], entry["file_name"]
            self._listed.add(ident)
            path = os.path.normpath(name)
            if os.path.isabs(path) or path.split(os.sep)[0] == "..":  # no matter of skipping: it may be an attack
                raise UserError(f"{self.annotation_path}: file_name {name!r} leaves the image folder {self.image_dir}")
            if ident in images:
                self._bad(name, "duplicate image id", ident)
            elif not os.path.isfile(self.image_dir / path):  # false, too, for a name that no file can have
                self._bad(name, "missing image", f"{self.image_dir / path} does not exist")
            else:
                width, height = image_size(entry)
                images[ident] = {"id": ident, "file_name": path, "width": width, "height": height}
        return images

    def _read_annotations(self, entries: list[Any], images: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries that are well formed and belong to an image and a category, of their keys those used."""
        annotations: list[dict[str, Any]] = []
        seen: set[Any] = set()
        # what is not used was not checked, and may be nested a thousand deep
        keys = ["id", "image_id", "category_id", "bbox", "area", "truncated"]
        keys += ["segmentation"] if self.has_masks else ["rbox", "segmentation"] if self.box_dim == 5 else []
        for entry in entries:
            ids = [entry.get(k) for k in ("id", "image_id", "category_id")] if isinstance(entry, dict) else []
            if not ids or any(isinstance(i, (list, dict)) or (isinstance(i, int) and not is_id(i)) for i in ids):
                self._bad("an annotation", "malformed", entry)
                continue
            ident, image_id, category_id = ids
            what = f"annotation {ident}" if ident is not None else f"an annotation of image {image_id}"
            if ident is not None and ident in seen:
                self._bad(what, "duplicate annotation id", f"image_id {image_id}")
            elif image_id not in images:
                if image_id not in self._listed:  # else it goes with its image
                    self._bad(what, "of an image that is not listed", f"image_id {image_id}")
            elif category_id not in self._known_categories:
                self._bad(what, "of a category that is not listed", f"category_id {category_id}")
            elif (fault := self._box_fault(entry)) is not None:
                self._bad(what, *fault)
            else:
                try:
                    flags = self._flags(entry)
                except ValueError as error:
                    self._bad(what, str(error), entry)
                else:
                    kept = {key: entry[key] for key in keys if key in entry}
                    annotations.append({**kept, **flags})
            seen.add(ident)
        return annotations

    def _flags(self, entry: dict[str, Any]) -> dict[str, int]:
        """The flags of an annotation, 0 or 1, and `difficult`, 0 to 2. Raises ValueError where one is none of them.

        Difficult 1 is trained on, 2 (cut off by a split) is not; in an evaluation neither is to be found, nor wrong to
        find.
        """
        flags = {key: read_flag(entry, key) for key in ("iscrowd", "ignore")}
        return {**flags, "difficult": read_flag(entry, "difficult", LEVELS)}

    def _is_apart(self, flags: dict[str, Any]) -> bool:
        """Whether an annotation is no object to train on, or to be found."""
        return bool(flags["iscrowd"] or flags["ignore"] or flags["difficult"] > (1 if self.training else 0))

    def _warn_of_corners(self, annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]]) -> None:
        """Corners x, y, x, y in place of x, y, width, height make boxes that pass their image's border."""
        known = [a for a in annotations if images[a["image_id"]]["width"]]
        boxes = np.array([a["bbox"] for a in known], np.float64).reshape(-1, 4)
        sizes = np.array([image_size(images[a["image_id"]]) for a in known], np.float64).reshape(-1, 2)
        passing = int((boxes[:, :2] + boxes[:, 2:] > 1.01 * sizes + 1).any(1).sum())
        if passing >= FEW_CORNERS and 3 * passing > len(known):
            warnings.warn(
                f"{self.annotation_path}: {passing} of {len(known)} boxes pass the border of their image; are they "
                "x, y, x, y, where COCO has x, y, width, height?",
                stacklevel=3,
            )

    def _read_masks(
        self, annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Segmentation]]:
        """The annotations that have a mask, without the polygons that are none, and these masks."""
        kept, segmentations = [], []
        for a in annotations:
            what = f"annotation {a.get('id')}"
            segmentation = Segmentation([])
            if not (self.training and a.get("iscrowd")):  # which is not trained on
                width, height = image_size(images[a["image_id"]])
                if a.get("segmentation") is None:
                    self._bad(what, "has no segmentation, which masks are trained and evaluated on", a["bbox"])
                    continue
                if not width:
                    self._bad(what, "is of an image without width and height, which masks need", a["image_id"])
                    continue
                try:
                    segmentation, left_out = read_segmentation(a["segmentation"], width, height)
                except ValueError as error:
                    self._bad(what, f"segmentation {error}", a["segmentation"])
                    continue
                for reason in left_out:
                    self._skip(what, reason)
                if segmentation.is_empty():
                    self._skip(what, "annotation without a mask")
                    continue
                if left_out:
                    a = {**a, "segmentation": [ring.ravel().tolist() for ring in segmentation.rings]}
            kept.append(a)
            segmentations.append(segmentation)
        sizes = np.array([image_size(images[a["image_id"]]) for a in kept]).reshape(-1, 2)
        store = MaskStore(segmentations)
        crossing = store.self_crossing()
        empty = store.without_pixels(sizes, crossing).tolist()
        segmentations = [s._replace(crossing=c) for s, c in zip(segmentations, crossing.tolist(), strict=True)]
        for a, none in zip(kept, empty, strict=True):
            if none and self.training:
                self._skip(f"annotation {a.get('id')}", "mask without a pixel")
            elif none:
                self._notice(f"annotation {a.get('id')}", "mask without a pixel, which COCO counts as missed")
        if self.training:
            kept = [a for a, none in zip(kept, empty, strict=True) if not none]
            segmentations = [s for s, none in zip(segmentations, empty, strict=True) if not none]
        return kept, segmentations

    def _box_fault(self, entry: dict[str, Any]) -> tuple[str, object] | None:
        """Why an annotation tells no box, and what it tells."""
        box = entry.get("bbox")
        if not is_numbers(box, 4):
            return "bbox is not four finite numbers x, y, w, h", box
        return None if max(map(abs, box)) <= FARTHEST else ("bbox reaches beyond 10,000,000 pixels", box)

    def _box(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[float, ...] | str:
        """The box of a proper annotation, or the reason to leave it out; size (width, height), 0 where unknown."""
        x, y, w, h = entry["bbox"]
        width, height = size
        if w < 1 or h < 1:  # the reference's limit
            return "box below one pixel"
        if x + w <= 0 or y + h <= 0 or (width and (x >= width or y >= height)):
            return "box outside the image"
        return x, y, x + w, y + h

    def _index(
        self,
        images: dict[int, dict[str, Any]],
        annotations: list[dict[str, Any]],
        min_size: int,
        keep_empty: bool,
        segmentations: list[Segmentation] | None,
    ) -> None:
        """Lays out what `load` needs in arrays, which forked loader workers share without copying."""
        self.apart_count = 0
        label_of = {category: label for label, category in enumerate(self.category_ids) if category >= 0}
        # of each image: box, label, and which of the annotations it is
        boxes: dict[int, list[tuple[tuple[float, ...], int, int]]] = {image_id: [] for image_id in images}
        sizes = {image_id: image_size(entry) for image_id, entry in images.items()}
        for i, a in enumerate(annotations):
            what = f"annotation {a.get('id')}"
            if self._is_apart(a):
                self.apart_count += 1
                continue
            if a["category_id"] not in label_of:
                self._skip(what, "category that is not among the classes")
            elif isinstance(box := self._box(a, sizes[a["image_id"]]), str):
                self._skip(what, box)
            else:
                boxes[a["image_id"]].append((box, label_of[a["category_id"]], i))
        if self.training:
            images = self._trainable(images, boxes, sizes, min_size, keep_empty)
        self.image_ids = tuple(images)
        self.files = tuple(e["file_name"] for e in images.values())
        self._sizes = np.array([sizes[i] for i in images], np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *(len(boxes[i]) for i in images)])
        flat = [box for i in images for box in boxes[i]]
        self._boxes = np.array([box for box, _, _ in flat], np.float32).reshape(-1, self.box_dim)
        self._labels = np.array([label for _, label, _ in flat], np.int64)
        self._masks = None
        if segmentations is not None:
            self._masks = MaskStore([segmentations[i] for _, _, i in flat])
            for i in (i for _, _, i in flat if segmentations[i].crossing):
                what = f"annotation {annotations[i].get('id')}"
                self._notice(what, "polygon that crosses itself, filled by the even-odd rule")
        # in shared memory: loader workers write, the main process reads
        self._unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self.real_sizes = torch.zeros(len(images), 2, dtype=torch.int64).share_memory_()

    def _trainable(
        self,
        images: dict[int, dict[str, Any]],
        boxes: dict[int, list[Any]],
        sizes: dict[int, Any],
        min_size: int,
        keep_empty: bool,
    ) -> dict[int, dict[str, Any]]:
        """The images to train on; `sizes` learns those that the file does not tell."""
        kept = {}
        for image_id, entry in images.items():
            name = entry["file_name"]
            if not (boxes[image_id] or keep_empty):
                self._skip(name, "image without a box")
                continue
            if not sizes[image_id][0]:
                try:
                    sizes[image_id] = read_image(self.image_dir / name).shape[1::-1]
                except UserError as error:
                    self._bad(name, "unreadable image", str(error))
                    continue
            if min(sizes[image_id]) < min_size:
                self._skip(name, f"image below {min_size} pixels")
            else:
                kept[image_id] = entry
        if not any(boxes[image_id] for image_id in kept):
            reasons = ", ".join(f"{reason}: {len(what)}" for reason, what in self._skipped.items())
            raise UserError(f"{self.annotation_path}: holds no box to train on ({reasons or 'it lists none'})")
        return kept


def _folder_of_all(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
