"""Importing this registers every Triton op with PyTorch."""

from importlib import import_module
from pkgutil import iter_modules

import rtmdet_fast.kernels

for _module in iter_modules(rtmdet_fast.kernels.__path__, "rtmdet_fast.kernels."):
    for _value in vars(import_module(_module.name)).values():
        getattr(_value, "library_op", None)  # of a TritonOp
