"""PaddlePaddle's .pdparams: a pickle of NumPy arrays, read without running it."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.inert_pickle import Function, InertUnpickler, Placeholder

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i4": torch.int32, "i8": torch.int64}
NATIVE = {"little": "<", "big": ">"}[sys.byteorder]


class _DType(Placeholder):
    """What a file says of NumPy's dtype: its code, and (by BUILD) the order of its bytes."""

    def __init__(self, code: object = None, *args: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]


class _Array(Placeholder):
    """An array as its file has it; BUILD gives version, shape, dtype, whether in Fortran's order, and the bytes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def nbytes(self) -> int:
        return len(self.state[4])

    def tensor(self) -> Tensor:
        _, shape, dtype, fortran, data = self.state
        if not (isinstance(dtype, _DType) and dtype.code in DTYPES and dtype.order in ("=", NATIVE)):
            raise pickle.UnpicklingError("an array has a dtype that no weights have")
        if len(data) != math.prod(shape) * DTYPES[dtype.code].itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        if not data:
            return torch.empty(shape, dtype=DTYPES[dtype.code])
        flat = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype.code])
        if fortran:
            return flat.view(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
        return flat.view(shape)


def _encoded(text: str, encoding: str) -> bytes:
    """How pickle's protocol 2 writes bytes."""
    return text.encode("latin1")


class _PaddleUnpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case ("numpy.core.multiarray", "_reconstruct"):
                return _Array
            case ("numpy", "dtype"):
                return _DType
            case ("_codecs", "encode"):
                return Function(_encoded)
        return super().find_class(module, name)


def read_paddle(path: Path) -> dict[str, Tensor]:
    """The arrays of a file in their order, by Paddle's names. To be read within `damage_told`."""
    with path.open("rb") as file:
        content = _PaddleUnpickler(file).load()
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights")
    arrays = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, _Array)}
    if sum(array.nbytes for array in arrays.values()) > path.stat().st_size:
        raise UserError(f"{path} is damaged: its weights would be larger than the file")
    return {key: array.tensor() for key, array in arrays.items()}
