"""`nms` and `batched_nms` with the signatures of `torchvision.ops`: only the import line changes."""

from rtmdet_fast.kernels.nms import torchvision_batched_nms as batched_nms
from rtmdet_fast.kernels.nms import torchvision_nms as nms

__all__ = ["batched_nms", "nms"]
