"""Reading pickles without running them: plain containers, and an inert placeholder for all else.

Whatever a file says, no function of its choice is called, nothing outside of it is changed, and the memory that it
takes is in proportion to the file, or to `MOST_OPERATIONS`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

MOST_OPERATIONS = 5_000_000
"""Of one pickle: each may take some hundred bytes. The largest checkpoints of mmengine have some hundred thousand."""
DEEPEST_TUPLE = 100
"""Tuples in each other: to hash those of a million Python takes the machine's stack, and crashes."""


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


class Function:
    """A function that a file may call, and do nothing else to."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: object) -> Any:
        return self.function(*args)


_CONTAINERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
}


class _Operations(dict[int, Callable[[Any], None]]):
    """What carries out each operation of a pickle, for so many of them."""

    def __init__(self, operations: dict[int, Callable[[Any], None]]) -> None:
        super().__init__(operations)
        self.left = MOST_OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"its pickle has more than {MOST_OPERATIONS:,} operations")
        return super().__getitem__(code)


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Use it for one `load`.

    In Python: for a memo index of 2^31 in a file of ten bytes, the unpickler in C fills 32 GB.
    """

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        own = {
            pickle.BYTEARRAY8: InertUnpickler._load_bytes,  # Python's own fills what the file says, before it reads
            pickle.BUILD: InertUnpickler._load_build,
            pickle.TUPLE: InertUnpickler._load_tuple,
            pickle.TUPLE1: lambda self: self._join(1),
            pickle.TUPLE2: lambda self: self._join(2),
            pickle.TUPLE3: lambda self: self._join(3),
        }
        self.dispatch = _Operations({**super().dispatch, **{code[0]: load for code, load in own.items()}})
        self._depths: dict[int, int] = {}  # of all tuples, by their id
        self._copies = MOST_OPERATIONS

    def find_class(self, module: str, name: str) -> Any:
        kind = _CONTAINERS.get((module.replace("__builtin__", "builtins"), name))
        return Placeholder if kind is None else Function(lambda *args: self._copied(kind, args))

    def _copied(self, kind: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._copies -= sum(len(items) for items in args)  # a list may be copied again and again
        if self._copies < 0:
            raise pickle.UnpicklingError(f"its pickle copies more than {MOST_OPERATIONS:,} items")
        return kind(*args)

    def _load_bytes(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _load_build(self) -> None:
        """Attributes are set on nothing but what was made to take them."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].__setstate__(state)

    def _load_tuple(self) -> None:
        items = self.pop_mark()
        self.stack.extend(items)
        self._join(len(items))

    def _join(self, count: int) -> None:
        start = len(self.stack) - count
        if start < 0:
            raise pickle.UnpicklingError("a tuple of it lacks items")
        joined = tuple(self.stack[start:])
        depth = 1 + max((self._depths.get(id(item), 0) for item in joined if type(item) is tuple), default=0)
        if depth > DEEPEST_TUPLE:
            raise pickle.UnpicklingError(f"it has more than {DEEPEST_TUPLE} tuples in each other")
        self._depths[id(joined)] = depth
        self.stack[start:] = [joined]
