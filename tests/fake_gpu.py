"""A second device made of CPU tensors, for finding out without a GPU where code mixes tensors of host and device.

`python tests/fake_gpu.py TASK` trains one step of RTMDet on it, or with "rtdetr" of RT-DETR, and predicts. Own process:
the device stays registered for good.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from rtmdet_fast import RTMDet
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.model import RTDETR

_setup_privateuseone_for_python_backend("fake")
torch.fake.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
DEVICE = torch.device("fake:0")
WAITS: list[str] = []
"""Operations for whose outcome a host would wait."""


class FakeGpuTensor(Tensor):
    """Reports to be on DEVICE, and has its values in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeGpuTensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, host.size(), dtype=host.dtype, device=DEVICE, **layout)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    # these two reach no dispatcher
    def tolist(self) -> Any:
        WAITS.append("tolist")
        return self.host.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        return FakeGpuTensor(self.host.new_tensor(data, dtype=dtype))


class FakeGpu(TorchDispatchMode):
    """Within it, tensors can be made on DEVICE."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class FakeGpuFactory(TorchFunctionMode):
    """Within it, torch.tensor makes them there too, which reaches no dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return FakeGpuTensor(func(*args, **{**kwargs, "device": None}))
        return func(*args, **kwargs)


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on the values; what CUDA would refuse raises."""
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, FakeGpuTensor)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeGpuTensor)]
    name = func._schema.name
    copies = name in ("aten::copy_", "aten::_to_copy")
    if ours and not copies:
        # x[index] takes indices from the host too, and everything takes numbers
        index = torch.int64 if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") else None
        wrong = [x for x in others if x.dim() and x.dtype != index]
        if wrong:
            raise RuntimeError(f"{name} mixes devices: {[(tuple(x.shape), x.dtype) for x in wrong]} are on the host")
    if ours and func.namespace == "rtmdet_fast":
        with FakeGpu(), FakeGpuFactory():
            return OPDEFS[name]._init_fn(*args, **kwargs)

    def to_host(x: Any) -> Any:
        if isinstance(x, FakeGpuTensor):
            return x.host
        return torch.device("cpu") if isinstance(x, torch.device) else x

    known = {id(x.host): x for x in ours}

    def to_fake(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else FakeGpuTensor(x)

    result = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    if devices := [x for x in leaves if isinstance(x, torch.device)]:
        stays = devices[0] == DEVICE
    else:
        stays = any(isinstance(x, FakeGpuTensor) for x in ([args[0]] if copies else leaves))
    result = tree_map(to_fake, result) if stays else result
    if ours and (name == "aten::nonzero" or not any(isinstance(x, FakeGpuTensor) for x in tree_leaves(result))):
        WAITS.append(name)
    return result


def move(model: nn.Module) -> None:
    """All parameters and buffers to DEVICE; what is shared stays so."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = moved.setdefault(parameter, nn.Parameter(FakeGpuTensor(parameter.data)))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(buffer, FakeGpuTensor(buffer))


def check(task: str) -> None:
    torch.manual_seed(0)
    model = RTMDet("nano", task, num_classes=3)
    for predictor in model.bbox_head.rtm_reg:
        nn.init.ones_(predictor.bias)  # boxes that are not empty
    move(model)
    boxes = torch.tensor([10.0, 20, 60, 80] if task != "rotated" else [50.0, 50, 40, 20, 0.3]).repeat(2, 5, 1)
    targets = [boxes + torch.rand_like(boxes) / 5, torch.zeros(2, 5, dtype=torch.int64), torch.full((2,), 5)]
    if task == "ins":
        targets += [boxes[..., :2] + 20, torch.ones(2, 5, 32, 32, dtype=torch.uint8)]
    images = torch.randn(2, 3, 128, 128)
    with FakeGpu():
        losses = model(FakeGpuTensor(images), Targets(*map(FakeGpuTensor, targets)))
        sum(losses.values()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(isinstance(x, FakeGpuTensor) and x.host.isfinite().all() for x in gradients)
        noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
        result = model.predict(noise, score_threshold=0.0)
        assert len(result) > 0
        assert len(result.to_coco(1)) == len(result)
        if task == "ins":
            assert result.masks.shape == (len(result), 100, 150)


def check_detr() -> None:
    torch.manual_seed(0)
    model = RTDETR("r18", num_classes=3, num_queries=20).train()
    move(model)
    boxes = torch.tensor([[10.0, 20, 60, 80], [5, 5, 20, 90]]).repeat(2, 3, 1)
    some = [boxes, torch.zeros(2, 6, dtype=torch.int64), torch.tensor([6, 2])]
    none = [torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
    images = torch.rand(2, 3, 128, 128)
    for targets in some, none:
        with FakeGpu(), FakeGpuFactory():
            WAITS.clear()
            losses = model(FakeGpuTensor(images), Targets(*map(FakeGpuTensor, targets)))
            sum(losses.values()).backward()
            assert WAITS == ["aten::_to_copy"], WAITS  # the costs of the matching
        assert all(p.grad.host.isfinite().all() for p in model.parameters())


if __name__ == "__main__":
    check_detr() if sys.argv[1] == "rtdetr" else check(sys.argv[1])
    print("fine")
