"""RTMDet without the install trouble: official weights, plain PyTorch, and Triton kernels for the hot paths."""

from rtmdet_fast.accelerate import Acceleration, accelerate, revert
from rtmdet_fast.errors import UserError
from rtmdet_fast.inference.results import Results
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtmdet.model import RTMDet

__version__ = "0.1.0"
__all__ = ["RTDETR", "Acceleration", "RTMDet", "Results", "UserError", "__version__", "accelerate", "revert"]
