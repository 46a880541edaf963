"""Reading and writing weights: mmengine's files, this project's own, and the published ones by name.

Files of the reference carry pickled extras (log buffers, configs), which `torch.load(weights_only=True)` refuses and
a plain unpickler would execute. `read_checkpoint` builds tensors and plain containers, and puts an inert placeholder
for everything else, so nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from rtmdet_fast.errors import UserError

_MMDET = "https://download.openmmlab.com/mmdetection/v3.0/rtmdet/"
_MMROTATE = "https://download.openmmlab.com/mmrotate/v1.0/rotated_rtmdet/"
_MMPOSE = "https://download.openmmlab.com/mmpose/v1/projects/"


def _mmdet_url(config: str, stamp: str) -> str:
    return f"{_MMDET}{config}/{config}_{stamp}.pth"


def _mmrotate_url(config: str, digest: str) -> str:
    return f"{_MMROTATE}{config}/{config}-{digest}.pth"


# The published models. The file name ends in the first digits of the file's SHA-256 (but for the two older backbones).
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
}


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file says: its state_dict (keys of the published models), class names and plain metadata."""

    path: Path
    state_dict: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    meta: dict[str, Any]


class _Placeholder:
    """Stands for any object of a checkpoint that is neither a tensor nor a plain container. Does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __new__(cls, *args: object, **kwargs: object) -> _Placeholder:
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> _Placeholder:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("__builtin__", "builtins"), name))
        if allowed is None:
            return type("Placeholder", (_Placeholder,), {})
        if isinstance(allowed, type):
            return allowed
        # A fresh function each time: a file may set attributes on what it names, and must not reach torch's own.
        return lambda *args: allowed(*args)


def _inert_load(file: Any, **kwargs: Any) -> Any:
    return _InertUnpickler(file, **kwargs).load()


_INERT_PICKLE = SimpleNamespace(__name__="inert_pickle", Unpickler=_InertUnpickler, load=_inert_load)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of RTMDet or CSPNeXt from a file of mmengine, mmcv, `torch.save` or this project.

    Raises UserError where the file is missing, is not a checkpoint or holds no such weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise UserError(f"{path} is a TorchScript archive, not a checkpoint with a state_dict")
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_INERT_PICKLE, weights_only=False)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no state_dict")
    state_dict = _tensors(_find_state_dict(content))
    if not any(key.startswith("backbone.stem.") for key in state_dict):
        raise UserError(f"{path} holds no RTMDet or CSPNeXt weights (no key starts with 'backbone.stem.')")
    meta = content.get("meta")
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    return Checkpoint(path, state_dict, _class_names(meta) or _class_names({"classes": content.get("names")}), meta)


def _find_state_dict(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    # mmengine swaps before saving: `state_dict` holds the averaged weights, `ema_state_dict` the raw ones.
    for key in ("state_dict", "model", "ema_state_dict"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _tensors(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by the key of the published models: wrappers' prefixes taken off, a bare backbone's put on."""
    tensors = {}
    for key, value in state_dict.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[re.sub(r"^(module\.|_orig_mod\.)+", "", key)] = value
    if any(key.startswith("head.rtm_") for key in tensors):  # LibreYOLO's
        tensors = {re.sub(r"^head\.", "bbox_head.", key): value for key, value in tensors.items()}
    if "stem.0.conv.weight" in tensors:
        tensors = {f"backbone.{key}": value for key, value in tensors.items()}
    return {k: v for k, v in tensors.items() if k.startswith(("backbone.", "neck.", "bbox_head."))}


def _class_names(meta: dict[str, Any]) -> tuple[str, ...] | None:
    dataset = meta.get("dataset_meta")
    for holder, key in ((dataset, "classes"), (dataset, "CLASSES"), (meta, "CLASSES"), (meta, "classes")):
        names = holder.get(key) if isinstance(holder, Mapping) else None
        if isinstance(names, Mapping) and all(isinstance(key, int) for key in names):  # LibreYOLO's, by class id
            names = [names[key] for key in sorted(names)]
        if isinstance(names, str):  # mmdet writes a single class as a bare string
            names = (names,)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def resolve_weights(path_or_name: str | Path) -> Path:
    """The local file of a path, or of a published name (downloaded once into torch.hub's cache, hash checked)."""
    if Path(path_or_name).is_file():
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
    """`torch.save` through a temporary file, fsync and rename: a crash leaves the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # there no more where an interrupt came after the renaming
        raise
