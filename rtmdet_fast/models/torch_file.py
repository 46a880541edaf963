"""Files of `torch.save`, the zip archives of now and the older kind, read without `torch.load`.

That takes two more kinds of files, TorchScript and tar archives, and finds out with a reader of its own which kind one
is: a file that two readers see differently would be run where it was checked as another.
"""

from __future__ import annotations

import io
import math
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.inert_pickle import Function, InertUnpickler

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""What a file of before torch 1.6 begins with, as a pickle; then 1001, and what machine wrote it."""
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


def load_archive(path: Path) -> Mapping[Any, Any]:
    """The mapping that `torch.save` wrote: tensors, plain containers and inert placeholders. To be read within
    `damage_told`.

    Whatever the file says of sizes, no more memory is taken for tensors than it has bytes. Raises UserError for
    archives that are none of `torch.save`.
    """
    with path.open("rb") as file:
        _refuse_tar(path, file)
        content = _read_zip(path, file) if zipfile.is_zipfile(file) else _read_legacy(path, file)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no state_dict")
    return content


def _refuse_tar(path: Path, file: IO[bytes]) -> None:
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        file.seek(0)
    else:
        raise UserError(f"{path} is a tar archive, which PyTorch has not written since 2016: save it anew")


def _read_zip(path: Path, file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if any(name.endswith("constants.pkl") for name in names):
            raise UserError(f"{path} is a TorchScript archive, not a checkpoint with a state_dict")
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > path.stat().st_size:
            raise UserError(f"{path} is a compressed archive, which is not what PyTorch writes: save it anew")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive, but none that torch.save wrote")
        top = pickles[0].removesuffix("data.pkl")
        if f"{top}byteorder" in names and archive.read(f"{top}byteorder") != sys.byteorder.encode():
            raise UserError(f"{path} was written on a machine of another byte order: save it anew on one like this")

        def read(key: str, size: int) -> Tensor:
            data = archive.read(f"{top}data/{key}")  # which compares checksums
            if len(data) != size:
                raise ValueError(f"its storage {key} has {len(data)} bytes, not {size}")
            storage = torch.empty(size, dtype=torch.uint8)
            storage.numpy()[:] = np.frombuffer(data, np.uint8)
            return storage

        return _TorchUnpickler(io.BytesIO(archive.read(pickles[0])), read).load()


def _read_legacy(path: Path, file: IO[bytes]) -> Any:
    """Of before torch 1.6: pickles one after the other, the last of which names the storages that follow."""
    room = path.stat().st_size
    storages: dict[str, Tensor] = {}

    def make(key: str, size: int) -> Tensor:
        nonlocal room
        room -= size
        if room < 0:
            raise ValueError("its weights would be larger than the file")
        storages[key] = torch.empty(size, dtype=torch.uint8)
        return storages[key]

    file.seek(0)
    if InertUnpickler(file).load() != MAGIC_NUMBER:
        raise ValueError("it does not begin as a checkpoint does")
    InertUnpickler(file).load()
    InertUnpickler(file).load()
    unpickler = _TorchUnpickler(file, make)
    content = unpickler.load()
    keys = InertUnpickler(file).load()
    if sorted(keys) != sorted(storages):
        raise ValueError("the storages that it lists are not those of its weights")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count * unpickler.element_sizes[key] != len(storage):
            raise ValueError(f"its storage {key} has {count} elements, and its weights tell of others")
        if file.readinto(storage.numpy()) != len(storage):  # type: ignore[attr-defined]
            raise EOFError("it ends within its weights")
    return content


class _TorchUnpickler(InertUnpickler):
    """`storage` gives the bytes of a key, [size] uint8, when it is met first."""

    def __init__(self, file: Any, storage: Callable[[str, int], Tensor]) -> None:
        super().__init__(file, encoding="utf-8")  # as Python 2 wrote its strings
        self._storage = storage
        self._storages: dict[str, Tensor] = {}
        self.element_sizes: dict[str, int] = {}
        """In bytes, by key."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return Function(_tensor)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return Function(lambda data, *_: data)
        return super().find_class(module, name)

    def persistent_load(self, saved_id: Any) -> Tensor:
        """[numel] of the storage's dtype."""
        kind, dtype, key, _, numel, *view = saved_id
        if kind not in ("storage", b"storage") or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError(f"{kind!r} is no storage")
        size = dtype.itemsize
        if key not in self._storages:
            self._storages[key] = self._storage(key, numel * size)
            self.element_sizes[key] = size
        elements = self._storages[key].view(dtype)
        if view and view[0] is not None:  # of the older kind: a part of another's storage
            _, start, count = view[0]
            return elements[start : start + count]
        return elements


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if math.prod(size) == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, storage.storage_offset() + offset)  # which refuses what lies outside
