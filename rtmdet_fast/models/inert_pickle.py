"""Reading pickles without running them: tensors and plain containers, and an inert placeholder for all else."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Placeholder:
    """Stands for any object of a checkpoint that is neither a tensor nor a plain container. Does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> Placeholder:
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


class Function:
    """An allowed function; what a file sets on it (BUILD) is dropped, and never reaches torch's own."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: object) -> Any:
        return self.function(*args)

    def __setstate__(self, state: object) -> None:
        pass


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    # In Python: for a memo index of 2^31 in a file of ten bytes, the one in C fills 32 GB.

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("__builtin__", "builtins"), name))
        if allowed is None:
            return type("Placeholder", (Placeholder,), {})
        return allowed if isinstance(allowed, type) else Function(allowed)

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        """What `torch.load` sets, but for modules: of these it compares sources, and can be led to write files."""

        def load(saved_id: Any) -> Any:
            kind = saved_id[0]
            if kind not in ("storage", b"storage"):
                raise pickle.UnpicklingError(f"{kind!r} is no storage")
            return self._load_storage(saved_id)

        return load

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        self._load_storage = load


def _inert_load(file: Any, **kwargs: Any) -> Any:
    return InertUnpickler(file, **kwargs).load()


INERT_PICKLE = SimpleNamespace(__name__="inert_pickle", Unpickler=InertUnpickler, load=_inert_load)
