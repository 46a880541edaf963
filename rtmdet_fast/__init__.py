"""RTMDet and RT-DETR without the install trouble: official weights, plain PyTorch, Triton kernels for the hot paths."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtmdet_fast.errors import UserError

if TYPE_CHECKING:
    from rtmdet_fast.acceleration import Acceleration, accelerate, revert
    from rtmdet_fast.inference.results import Results
    from rtmdet_fast.models.rtdetr.model import RTDETR
    from rtmdet_fast.models.rtmdet.model import RTMDet

__version__ = "0.1.0"
__all__ = ["RTDETR", "Acceleration", "RTMDet", "Results", "UserError", "__version__", "accelerate", "revert"]

_MODULES = {
    "Acceleration": "acceleration",
    "RTDETR": "models.rtdetr.model",
    "RTMDet": "models.rtmdet.model",
    "Results": "inference.results",
    "accelerate": "acceleration",
    "revert": "acceleration",
}

if Path(__file__).with_name("kernels").is_file():
    # A checkout's link to kernels/, which git makes a text file of where there are no links, as on most Windows.
    _spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).parents[1] / "kernels")]
    sys.modules[_spec.name] = kernels = module_from_spec(_spec)


def __getattr__(name: str) -> Any:
    """Of the names above, at first use: PyTorch takes a second to import, which `rtmdet-fast --help` does not need."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
