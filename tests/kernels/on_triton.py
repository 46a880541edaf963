"""Where the tests of kernels run: on a GPU, under Triton's interpreter, or, of references, on any CPU."""

import os

import pytest
import torch

from rtmdet_fast.kernels import _dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    _dispatch.BACKEND == "torch" or not (DEVICE == "cuda" or (INTERPRETED and _dispatch.BACKEND == "triton")),
    reason="needs CUDA, or TRITON_INTERPRET=1 RTMDET_FAST_KERNELS=triton",
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not trace")
