"""Reading and writing weights: files of every origin, this project's own, and the published ones by name.

Files of the reference carry pickled extras (log buffers, configs), which `torch.load(weights_only=True)` refuses and
a plain unpickler would execute: `torch_file` reads them, and nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from rtmdet_fast.class_names import class_name
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.files import write_atomically
from rtmdet_fast.models.paddle import read_paddle
from rtmdet_fast.models.torch_file import load_archive

_MMDET = "https://download.openmmlab.com/mmdetection/v3.0/rtmdet/"
_MMROTATE = "https://download.openmmlab.com/mmrotate/v1.0/rotated_rtmdet/"
_MMPOSE = "https://download.openmmlab.com/mmpose/v1/projects/"


def _mmdet_url(config: str, stamp: str) -> str:
    return f"{_MMDET}{config}/{config}_{stamp}.pth"


def _mmrotate_url(config: str, digest: str) -> str:
    return f"{_MMROTATE}{config}/{config}-{digest}.pth"


_RTDETR = "https://github.com/lyuwenyu/storage/releases/download/"
_PADDLE = "https://bj.bcebos.com/v1/paddledet/models/"

# The published models. Of RTMDet the file name ends in the first digits of the file's SHA-256 (but for the two older
# backbones); of RT-DETR no checksum is published.
PRETRAINED = {
    "rtmdet-nano-person": f"{_MMPOSE}rtmpose/rtmdet_nano_8xb32-100e_coco-obj365-person-05d8511e.pth",
    "rtmdet-nano-hand": f"{_MMPOSE}rtmposev1/rtmdet_nano_8xb32-300e_hand-267f9c8f.pth",
    "rtmdet-tiny": _mmdet_url("rtmdet_tiny_8xb32-300e_coco", "20220902_112414-78e30dcc"),
    "rtmdet-s": _mmdet_url("rtmdet_s_8xb32-300e_coco", "20220905_161602-387a891e"),
    "rtmdet-m": _mmdet_url("rtmdet_m_8xb32-300e_coco", "20220719_112220-229f527c"),
    "rtmdet-l": _mmdet_url("rtmdet_l_8xb32-300e_coco", "20220719_112030-5a0be7c4"),
    "rtmdet-x": _mmdet_url("rtmdet_x_8xb32-300e_coco", "20220715_230555-cc79b9ae"),
    "rtmdet-ins-tiny": _mmdet_url("rtmdet-ins_tiny_8xb32-300e_coco", "20221130_151727-ec670f7e"),
    "rtmdet-ins-s": _mmdet_url("rtmdet-ins_s_8xb32-300e_coco", "20221121_212604-fdc5d7ec"),
    "rtmdet-ins-m": _mmdet_url("rtmdet-ins_m_8xb32-300e_coco", "20221123_001039-6eba602e"),
    "rtmdet-ins-l": _mmdet_url("rtmdet-ins_l_8xb32-300e_coco", "20221124_103237-78d1d652"),
    "rtmdet-ins-x": _mmdet_url("rtmdet-ins_x_8xb16-300e_coco", "20221124_111313-33d4595b"),
    "rotated-rtmdet-tiny": _mmrotate_url("rotated_rtmdet_tiny-3x-dota", "9d821076"),
    "rotated-rtmdet-s": _mmrotate_url("rotated_rtmdet_s-3x-dota", "11f6ccf5"),
    "rotated-rtmdet-m": _mmrotate_url("rotated_rtmdet_m-3x-dota", "beeadda6"),
    "rotated-rtmdet-l": _mmrotate_url("rotated_rtmdet_l-3x-dota", "23992372"),
    "cspnext-tiny": f"{_MMDET}cspnext_rsb_pretrain/cspnext-tiny_imagenet_600e.pth",
    "cspnext-s": f"{_MMDET}cspnext_rsb_pretrain/cspnext-s_imagenet_600e.pth",
    "cspnext-m": f"{_MMDET}cspnext_rsb_pretrain/cspnext-m_8xb256-rsb-a1-600e_in1k-ecb3bbd9.pth",
    "cspnext-l": f"{_MMDET}cspnext_rsb_pretrain/cspnext-l_8xb256-rsb-a1-600e_in1k-6a760974.pth",
    "cspnext-x": f"{_MMDET}cspnext_rsb_pretrain/cspnext-x_8xb256-rsb-a1-600e_in1k-b3f78edd.pth",
    "rtdetr-r18": f"{_RTDETR}v0.1/rtdetr_r18vd_dec3_6x_coco_from_paddle.pth",
    "rtdetr-r34": f"{_RTDETR}v0.1/rtdetr_r34vd_dec4_6x_coco_from_paddle.pth",
    "rtdetr-r50m": f"{_RTDETR}v0.1/rtdetr_r50vd_m_6x_coco_from_paddle.pth",
    "rtdetr-r50": f"{_RTDETR}v0.1/rtdetr_r50vd_6x_coco_from_paddle.pth",
    "rtdetr-r101": f"{_RTDETR}v0.1/rtdetr_r101vd_6x_coco_from_paddle.pth",
    "rtdetr-l": f"{_PADDLE}rtdetr_hgnetv2_l_6x_coco.pdparams",
    "rtdetr-x": f"{_PADDLE}rtdetr_hgnetv2_x_6x_coco.pdparams",
    "rtdetr-r18-coco-objects365": f"{_RTDETR}v0.1/rtdetr_r18vd_5x_coco_objects365_from_paddle.pth",
    "rtdetr-r50-coco-objects365": f"{_RTDETR}v0.1/rtdetr_r50vd_2x_coco_objects365_from_paddle.pth",
    "rtdetr-r101-coco-objects365": f"{_RTDETR}v0.1/rtdetr_r101vd_2x_coco_objects365_from_paddle.pth",
    "rtdetr-r18-objects365": f"{_RTDETR}v0.1/rtdetr_r18vd_1x_objects365_from_paddle.pth",
    "rtdetr-r50-objects365": f"{_RTDETR}v0.1/rtdetr_r50vd_1x_objects365_from_paddle.pth",
    "rtdetr-r101-objects365": f"{_RTDETR}v0.1/rtdetr_r101vd_1x_objects365_from_paddle.pth",
    "rtdetrv2-r18": f"{_RTDETR}v0.2/rtdetrv2_r18vd_120e_coco_rerun_48.1.pth",
    "rtdetrv2-r34": f"{_RTDETR}v0.1/rtdetrv2_r34vd_120e_coco_ema.pth",
    "rtdetrv2-r50m": f"{_RTDETR}v0.1/rtdetrv2_r50vd_m_7x_coco_ema.pth",
    "rtdetrv2-r50": f"{_RTDETR}v0.1/rtdetrv2_r50vd_6x_coco_ema.pth",
    "rtdetrv2-r101": f"{_RTDETR}v0.1/rtdetrv2_r101vd_6x_coco_from_paddle.pth",
    "rtdetrv2-l": f"{_RTDETR}v0.1/rtdetrv2_hgnetv2_l_6x_coco_from_paddle.pth",
    "rtdetrv2-x": f"{_RTDETR}v0.1/rtdetrv2_hgnetv2_x_6x_coco_from_paddle.pth",
    "rtdetrv2-h": f"{_RTDETR}v0.1/rtdetrv2_hgnetv2_h_6x_coco_from_paddle.pth",
    "rtdetrv2-r18-discrete": f"{_RTDETR}v0.1/rtdetrv2_r18vd_dsp_3x_coco.pth",
    "rtdetrv2-r34-discrete": f"{_RTDETR}v0.1/rrtdetrv2_r34vd_dsp_1x_coco.pth",
    "rtdetrv2-r50m-discrete": f"{_RTDETR}v0.1/rtdetrv2_r50vd_m_dsp_3x_coco.pth",
    "rtdetrv2-r50-discrete": f"{_RTDETR}v0.1/rtdetrv2_r50vd_dsp_1x_coco.pth",
    "rtdetrv2-r18-points1": f"{_RTDETR}v0.1/rtdetrv2_r18vd_sp1_120e_coco.pth",
    "rtdetrv2-r18-points2": f"{_RTDETR}v0.1/rtdetrv2_r18vd_sp2_120e_coco.pth",
    "rtdetrv2-r18-points3": f"{_RTDETR}v0.1/rtdetrv2_r18vd_sp3_120e_coco.pth",
    "presnet-18": f"{_RTDETR}v0.1/ResNet18_vd_pretrained_from_paddle.pth",
    "presnet-34": f"{_RTDETR}v0.1/ResNet34_vd_pretrained_from_paddle.pth",
    "presnet-50": f"{_RTDETR}v0.1/ResNet50_vd_ssld_v2_pretrained_from_paddle.pth",
    "presnet-101": f"{_RTDETR}v0.1/ResNet101_vd_ssld_pretrained_from_paddle.pth",
    "hgnetv2-l": f"{_RTDETR}v0.1/PPHGNetV2_L_ssld_pretrained_from_paddle.pth",
    "hgnetv2-x": f"{_RTDETR}v0.1/PPHGNetV2_X_ssld_pretrained_from_paddle.pth",
    "hgnetv2-h": f"{_RTDETR}v0.1/PPHGNetV2_H_ssld_pretrained_from_paddle.pth",
}
SAFETENSORS = "model.safetensors"
"""The weights in a folder of Hugging Face."""
EXPORTED = ".onnx", ".xml", ".pt2"
"""Suffixes of exported files, which other rooms read."""
COMPUTED = ("decoder.anchors", "decoder.valid_mask")


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file says: its state_dict, class names and plain metadata."""

    path: Path
    state_dict: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    meta: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights from a file of mmengine, mmcv, `torch.save` or this project; of RT-DETR also from Hugging Face's
    safetensors (or the folder that holds them) and PaddlePaddle's pdparams.

    Raises UserError where the file is missing, damaged or no checkpoint, and where weights are not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / SAFETENSORS
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.suffix in EXPORTED:
        raise UserError(f"{path} is an exported file, and no weights: take those that it was made from")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content: Mapping[Any, Any] = {}
    with damage_told(path):
        if path.suffix == ".pdparams":
            state_dict = read_paddle(path)
        else:
            content = load_archive(path)
            state_dict = _tensors(_find_state_dict(content))
        if not state_dict:
            raise UserError(f"{path} holds no weights")
        check_tensors(path, state_dict)
        meta = content.get("meta")
        meta = dict(meta) if isinstance(meta, Mapping) else {}
        return Checkpoint(path, state_dict, _class_names(meta) or _class_names({"classes": content.get("names")}), meta)


def _read_safetensors(path: Path) -> Checkpoint:
    """With the names of classes that Hugging Face's config.json beside it tells, and `meta["config"]`, all of it."""
    from safetensors.torch import load_file

    with damage_told(path, "a file of safetensors"):
        state_dict = _tensors(load_file(path))
        if not state_dict:
            raise UserError(f"{path} holds no weights")
        check_tensors(path, state_dict)
    config = path.parent / "config.json"
    if not config.is_file():
        return Checkpoint(path, state_dict, None, {})
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} cannot be read as JSON ({error})") from error
    if not isinstance(told, Mapping):
        raise UserError(f"{config} is damaged: it holds no settings of a model")
    names = told.get("id2label")
    if isinstance(names, Mapping) and all(str(key).isdecimal() for key in names):
        names = {int(key): name for key, name in names.items()}
    return Checkpoint(path, state_dict, _class_names({"classes": names}), {"config": told})


@contextmanager
def damage_told(path: Path, kind: str = "a PyTorch checkpoint") -> Iterator[None]:
    """Where a file is read in the block: a damaged or hostile one can raise anything, and what it raises is told."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read as {kind} ({shown(reason[:200])})") from error


def trained_sizes(checkpoint: Checkpoint, check_image_size: Callable[[int], int]) -> dict[str, int | None]:
    """`image_size` and `patch_size` (of the model, in pixels), as far as a file of this project tells them.

    Raises UserError where they cannot be; `check_image_size` raises it where the network cannot take the image size.
    """
    own = checkpoint.meta.get("rtmdet_fast")
    told = own if isinstance(own, Mapping) else {}
    sizes = {what: told[what] for what in ("image_size", "patch_size") if what in told}
    for what, size in sizes.items():
        if not ((type(size) is int and size > 0) or (what, size) == ("patch_size", None)):
            raise UserError(f"{checkpoint.path} is damaged: its {what} is {str(size)[:40]!r}, not a number of pixels")
    try:
        check_image_size(sizes.get("image_size", 32))
    except UserError as error:
        raise UserError(f"{checkpoint.path} is damaged: {error}") from None
    return sizes


def trained_thresholds(checkpoint: Checkpoint, classes: int) -> tuple[float, ...] | None:
    """The score threshold of each class, as far as a file of this project tells it of so many classes.

    Raises UserError where it cannot be.
    """
    own = checkpoint.meta.get("rtmdet_fast")
    told = own.get("score_thresholds") if isinstance(own, Mapping) else None
    if told is None:
        return None
    proper = isinstance(told, (list, tuple)) and all(type(value) is float and 0 <= value <= 1 for value in told)
    if not proper:
        raise UserError(f"{checkpoint.path} is damaged: its score_thresholds are {str(told)[:40]!r}, not in [0, 1]")
    return tuple(told) if len(told) == classes else None


def check_tensors(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Raises UserError for tensors larger than their file can hold, and for weights quantised or not finite."""
    size = path.stat().st_size
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state_dict.values()}
    large = any(value.nbytes > size for value in state_dict.values())
    # layers are shared, by three levels for instance; a storage that is shown a million times would take hours to check
    if large or sum(storages.values()) > size or sum(value.nbytes for value in state_dict.values()) > 100 * size:
        raise UserError(f"{path} is damaged: its weights would be larger than the file")
    for key, value in state_dict.items():
        if key.endswith((".weight", ".bias")) and not (value.is_floating_point() or value.is_complex()):
            raise UserError(f"{path} holds weights of {value.dtype} (first: {shown(key)}): quantised ones are not read")
        if value.is_complex() or not torch.isfinite(value.float()).all():
            raise UserError(
                f"{path} holds weights that are no finite numbers (first: {shown(key)}): the training that wrote them "
                "had failed; take an earlier checkpoint"
            )


def _find_state_dict(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    # mmengine swaps before saving: `state_dict` holds the averaged weights, `ema_state_dict` the raw ones.
    # RT-DETR's beside `model` an average of it, which figures are measured with.
    average = content.get("ema")
    if isinstance(average, Mapping) and isinstance(average.get("module"), Mapping):
        return average["module"]
    for key in ("state_dict", "model", "ema_state_dict"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _tensors(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by name without the prefixes of wrappers, and without those that RT-DETRv2 computes, partly infinite."""
    tensors = {}
    for key, value in state_dict.items():
        if isinstance(key, str) and isinstance(value, Tensor) and not key.endswith(COMPUTED):
            tensors[re.sub(r"^(module\.|_orig_mod\.)+", "", key)] = value
    return tensors


def _class_names(meta: dict[str, Any]) -> tuple[str, ...] | None:
    dataset = meta.get("dataset_meta")
    for holder, key in ((dataset, "classes"), (dataset, "CLASSES"), (meta, "CLASSES"), (meta, "classes")):
        names = holder.get(key) if isinstance(holder, Mapping) else None
        if isinstance(names, Mapping) and all(isinstance(key, int) for key in names):  # LibreYOLO's, by class id
            names = [names[key] for key in sorted(names)]
        if isinstance(names, str):  # mmdet writes a single class as a bare string
            names = (names,)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(class_name(name) or f"class {i}" for i, name in enumerate(names))
    return None


def resolve_weights(path_or_name: str | Path) -> Path:
    """The local file of a path, or of a published name (downloaded once into torch.hub's cache, hash checked)."""
    if Path(path_or_name).is_file() or (Path(path_or_name) / SAFETENSORS).is_file():
        return Path(path_or_name)
    url = PRETRAINED.get(str(path_or_name).lower().replace("_", "-"))
    if url is None:
        raise UserError(
            f"weights {str(path_or_name)!r} are neither a file nor a known name; known: {', '.join(PRETRAINED)}"
        )
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    match = re.search(r"-([0-9a-f]{8})\.pth$", target.name)
    digest = match.group(1) if match else None
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), digest)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(f"cannot download {url} ({error}); without a network, put that file at {target}") from error
    elif digest and not hashlib.sha256(target.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{target} is damaged (its SHA-256 does not start with {digest}); delete it and try again")
    return target


def save_atomically(content: Any, path: str | Path) -> None:
    """`torch.save` by `write_atomically`: a crash leaves the old file or the new one, whole.

    Raises UserError where it cannot be written.
    """
    with write_atomically(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Of a full disk torch tells that it stands at a wrong position; what it met first is the reason.
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise (reason or error) from None
