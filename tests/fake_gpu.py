"""A second device made of CPU tensors, for finding out without a GPU where code mixes tensors of host and device.

`python tests/fake_gpu.py train TASK` trains and predicts one step on it, `train rtdetr` one of RT-DETR; with `detect`,
`graph` or `step` in place of `train`, whatever would make the host wait for the device raises. Own process: the device
stays registered for good.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
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
from rtmdet_fast.data.augment import Batch
from rtmdet_fast.inference.detections import Detections
from rtmdet_fast.kernels import (
    _dispatch,
    assign_triton,
    batch_norm,
    bn_silu,
    deformable_attention_triton,
    dwconv_bn_silu,
    dynamic_mask_triton,
    letterbox,
    nms,
    quality_focal_loss,
    rotated_iou,
)
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.predictor.graphs import GraphDetector
from rtmdet_fast.training.schedule import ModelEMA, parameter_groups
from rtmdet_fast.training.step import GraphStep

_setup_privateuseone_for_python_backend("fake")
torch.fake.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
DEVICE = torch.device("fake:0")
WAITS = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::repeat_interleave", "aten::bincount"),
    *("aten::argwhere", "aten::allclose", "aten::histc"),
}
"""For which CUDA makes the host wait: their result, or its size, is a matter of the values."""
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put")
refusing_to_wait = False
references_may_wait = False
arrived: list[str] = []
"""Operations whose outcome, of tensors on the device, the host got to see."""
trace: list[tuple[str, list[torch.Size]]] = []
"""All operations, and the shapes of what they made."""


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
        refuse("tolist")
        arrived.append("tolist")
        return self.host.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        refuse("new_tensor")
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


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, what would make the host wait for the device raises; copies between the two do, unless pinned."""
    global refusing_to_wait
    refusing_to_wait = True
    try:
        yield
    finally:
        refusing_to_wait = False


def refuse(what: str) -> None:
    if refusing_to_wait:
        raise RuntimeError(f"{what} makes the host wait for the device")


def would_wait(name: str, ours: list[Tensor], others: list[Tensor], devices: list[torch.device]) -> bool:
    """Whether CUDA makes the host wait for an operator of tensors `ours` on the device and `others` on the host."""
    if name in ("aten::copy_", "aten::_to_copy"):
        return bool(ours and others) or bool(devices and (devices[0] == DEVICE) != bool(ours))
    if name in INDEXING and ours:  # by bool, which asks how many; or by what has to be copied first
        return any(x.dtype == torch.bool for x in ours[1:]) or any(x.dim() for x in others)
    return bool(ours) and name in WAITS


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on the values; what CUDA would refuse raises."""
    global refusing_to_wait
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, FakeGpuTensor)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeGpuTensor)]
    name = func._schema.name
    copies = name in ("aten::copy_", "aten::_to_copy")
    if would_wait(name, ours, others, [x for x in leaves if isinstance(x, torch.device)]):
        refuse(name)
    if ours and not copies:
        # x[index] takes indices from the host too, and everything takes numbers
        index = torch.int64 if name in INDEXING else None
        wrong = [x for x in others if x.dim() and x.dtype != index]
        if wrong:
            raise RuntimeError(f"{name} mixes devices: {[(tuple(x.shape), x.dtype) for x in wrong]} are on the host")
    if ours and func.namespace == "rtmdet_fast":
        refused, before = refusing_to_wait, list(trace)
        if references_may_wait:
            refusing_to_wait = False
        with FakeGpu(), FakeGpuFactory():
            result = OPDEFS[name]._init_fn(*args, **kwargs)
        if references_may_wait:
            refusing_to_wait, trace[:] = refused, before
        trace.append((name, [x.shape for x in tree_leaves(result)]))
        return result

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
    if _dispatch.BACKEND == "triton" and "empty" in name:  # which nothing writes: indices are to be indices
        result.zero_()
    if devices := [x for x in leaves if isinstance(x, torch.device)]:
        stays = devices[0] == DEVICE
    else:
        stays = any(isinstance(x, FakeGpuTensor) for x in ([args[0]] if copies else leaves))
    result = tree_map(to_fake, result) if stays else result
    trace.append((name, [x.shape for x in tree_leaves(result) if isinstance(x, Tensor)]))
    if ours and (name == "aten::nonzero" or not any(isinstance(x, FakeGpuTensor) for x in tree_leaves(result))):
        arrived.append(name)
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


def train(task: str) -> None:
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


def detect(task: str) -> None:
    torch.manual_seed(0)
    model, images, size = RTMDet("nano", task, num_classes=3).fold(), torch.randn(2, 3, 128, 96), (128, 96)
    head, output = model.bbox_head, model(images)
    # an untrained network says the same everywhere
    logits = tuple(2 * torch.randn_like(level) - 3 for level in output.logits)
    distances = tuple(5 * torch.randn_like(level) + 8 for level in output.distances)
    output = output._replace(logits=logits, distances=distances)
    settings = replace(model.test_settings, score_threshold=0.3, max_detections=20)
    expected = model.unpack(model.pack(output, size, settings), size, settings)
    assert expected is not None and all(len(found.scores) == 20 for found in expected)
    for found, eager in zip(expected, head.detect(output, size, settings), strict=True):
        assert all(map(torch.equal, found[:4], eager[:4]))
        if task == "ins":
            torch.testing.assert_close(found.masks.logits, eager.masks.logits)
    move(model)
    output = type(output)(*(FakeGpuTensor(x) if isinstance(x, Tensor) else [*map(FakeGpuTensor, x)] for x in output))
    with FakeGpu():
        packed = model.pack(output, size, settings).host
    for found, other in zip(model.unpack(packed, size, settings), expected, strict=True):
        assert all(map(torch.equal, found[:4], other[:4]))
    launched = launch_nothing()
    with FakeGpu(), no_waiting():
        model(FakeGpuTensor(images))
        model.pack(output, size, settings)
    assert launched == ["_words_kernel", "_scan_kernel", *(["_logits_kernel"] if task == "ins" else [])]
    try:
        with FakeGpu(), no_waiting():
            head.detect(output, size, settings)
    except RuntimeError as error:
        assert "makes the host wait" in str(error)
    else:
        raise AssertionError("post-processing of no fixed size would wait")


def graph(task: str) -> None:
    """What is captured on a GPU, uncaptured."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # of the benches, which a script by itself does not see
    from busy import busy

    model = busy(task).fold()
    pictures = [np.random.default_rng(i).integers(0, 256, (60 + 30 * i, 90, 3), np.uint8) for i in range(3)]
    settings = replace(model.test_settings, score_threshold=0.3, max_detections=20)
    here, there = GraphDetector(model, batch_size=2), GraphDetector(copy.deepcopy(model), batch_size=2)
    move(there.model)
    for most in (1000, 10):  # with fewer than the candidates there are, it is as without a graph
        here.model.max_candidates = there.model.max_candidates = most
        expected = here.detect_whole(pictures, 96, settings)
        with FakeGpu(), FakeGpuFactory():
            found = there.detect_whole(pictures, 96, settings)
            assert all(isinstance(one.scores, FakeGpuTensor) == (most == 10) for one in found)
            found = [Detections(*(x.cpu() for x in one if x is not None)) for one in found]
        for one, truth in zip(found, expected, strict=True):
            assert all(map(torch.equal, one[:4], truth[:4])) and 10 < len(one.scores) <= 20
            assert task != "ins" or torch.equal(one.masks.logits, truth.masks.logits)
    there.model.max_candidates = 1000
    assert sorted(key[0] for key in there._graphs) == [1, 2]
    launched = launch_nothing()
    with FakeGpu(), FakeGpuFactory(), no_waiting():
        there._graphs[2, 96, settings].run()
    if task == "rtdetr":
        assert launched == ["_letterbox_kernel", *["_forward_kernel"] * 2], launched
        return
    assert launched == ["_letterbox_kernel", "_words_kernel", "_scan_kernel", *["_logits_kernel"] * (task == "ins")]


def step(task: str) -> None:
    """A step of training as it is captured on a GPU, uncaptured: first by the references, whose ops may wait.

    "det:atss" is of the task det with ATSS.
    """
    global references_may_wait
    task, _, assigner = task.partition(":")
    torch.manual_seed(0)
    model = RTMDet("nano", task, num_classes=3).to(memory_format=torch.channels_last).train()
    model.bbox_head.assigner = assigner or "soft_label"
    for predictor in model.bbox_head.rtm_reg:
        nn.init.ones_(predictor.bias)  # boxes that are not empty
    here = copy.deepcopy(model)
    move(model)
    steps = []
    for made in (here, model):
        optimizer = torch.optim.AdamW(parameter_groups(made, 0.05), lr=1e-3, fused=True)
        ema = ModelEMA(made, lambda step: 1.0 if step == 0 else 0.1)
        with FakeGpu():
            steps.append(GraphStep(made, optimizer, torch.amp.GradScaler("cpu", enabled=False), ema))
    near, fixed = steps
    pairs = [(5, 1), (7, 9), (0, 6)]
    batches = [drawn_batch(task, pair, seed) for seed, pair in enumerate(pairs)]

    def run(batch: Batch) -> list[tuple[str, list[torch.Size]]]:
        """The trace of the step of a batch."""
        there = Batch(*(None if x is None else FakeGpuTensor(x) for x in astuple(batch)))
        with FakeGpu():
            fixed._objects = int(batch.gt_counts.sum())
            places = fixed._fitting(there)
            places.fill(there)
            fixed._share.fill_(fixed.ema.share(fixed.ema.step))
            trace.clear()
            with no_waiting():
                fixed.step(places)
            fixed.ema.step += 1
        return list(trace)

    references_may_wait = True
    run(batches[0])  # makes the moments
    ((_, places),) = fixed._places.items()
    expected = near.backward(near.take(batches[0], 64))
    torch.testing.assert_close(places.losses.host, torch.stack([expected[1], *expected[0].values()]), rtol=1e-4, atol=0)
    traces = [run(batch) for batch in batches]
    references_may_wait = False
    launched = launch_nothing(assign_triton, batch_norm, bn_silu, dwconv_bn_silu, quality_focal_loss, rotated_iou)
    traces += [run(batch) for batch in batches]
    assert len(fixed._places) == 1 and len(traces[0]) > 1000
    for three in (traces[:3], traces[3:]):
        assert three[0] == three[1] == three[2], "an operation, or a size, is a matter of the values"
    kernels = {
        "_nearest_kernel" if assigner == "atss" else "_match_kernel",
        "_moments_kernel",
        "_dx_kernel",
        "_merge_kernel",
        "_loss_kernel",
    }
    kernels |= {"_dice_kernel", "_dkernels_kernel"} if task == "ins" else set()
    kernels |= {"_aligned_kernel"} if task == "rotated" else set()
    assert kernels <= set(launched), set(launched)


def drawn_batch(task: str, objects: tuple[int, ...], seed: int) -> Batch:
    """Images of noise with as many objects each."""
    torch.manual_seed(seed)
    images, most = len(objects), max(objects)
    start = torch.rand(images, most, 2) * 30
    boxes = torch.cat((start, start + 20), -1)
    if task == "rotated":
        boxes = torch.cat((start + 10, torch.full_like(start, 20), start[..., :1]), -1)
    more = (start + 10, torch.ones(images, most, 16, 16, dtype=torch.uint8)) if task == "ins" else ()
    pictures = torch.randint(256, (images, 3, 64, 64), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return Batch(pictures, boxes, torch.zeros(images, most, dtype=torch.int64), torch.tensor(objects), *more)


def launch_nothing(*more: Any) -> list[str]:
    """From now on kernels are chosen and prepared as on a GPU, but what would be launched is named in this list.

    `more` modules that launch kernels, besides those of inference.
    """
    launched: list[str] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launched.append(self.kernel.__name__)

    _dispatch.BACKEND = "triton"
    for module in (nms, deformable_attention_triton, dynamic_mask_triton, letterbox, *more):
        module.wrap_triton = Recorder
    return launched


def train_rtdetr() -> None:
    torch.manual_seed(0)
    model = RTDETR("r18", num_classes=3, num_queries=20).train()
    move(model)
    boxes = torch.tensor([[10.0, 20, 60, 80], [5, 5, 20, 90]]).repeat(2, 3, 1)
    some = [boxes, torch.zeros(2, 6, dtype=torch.int64), torch.tensor([6, 2])]
    none = [torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
    images = torch.rand(2, 3, 128, 128)
    for targets in some, none:
        with FakeGpu(), FakeGpuFactory():
            arrived.clear()
            losses = model(FakeGpuTensor(images), Targets(*map(FakeGpuTensor, targets)))
            sum(losses.values()).backward()
            assert arrived == ["aten::_to_copy"], arrived  # the costs of the matching
        assert all(p.grad.host.isfinite().all() for p in model.parameters())


if __name__ == "__main__":
    command, task = sys.argv[1:]
    if (command, task) == ("train", "rtdetr"):
        train_rtdetr()
    else:
        {"train": train, "detect": detect, "graph": graph, "step": step}[command](task)
    print("fine")
