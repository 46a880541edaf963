"""Deformable attention of RT-DETR's decoder beside the published one, a grid_sample for each level.

transformers' function is that one, from locations and weights on; softmax and locations before it are RT-DETR's too.
msda-triton (github.com/rziga/msda-triton, MIT) is the public Triton kernel, from locations and weights on as well.
Boxes lie anywhere, sizes are those of objects, and offsets reach a box's size from its centre, as trained ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.harness import Absent, Case, Contender, compiled, own, relative_error
from rtmdet_fast.kernels.deformable_attention import box_deformable_attention
from rtmdet_fast.kernels.deformable_attention_torch import (
    attention,
    box_locations,
    deformable_attention_grid_sample,
    undispatched,
)

SIZES, POINTS = ((80, 80), (40, 40), (20, 20)), (4, 4, 4)  # of 640 px
QUERIES, HEADS, CHANNELS = 300, 8, 32


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, mode, batch, torch.float32) for batch in (1, 4) for mode in ("forward", "with backward")]
    return [
        _case(device, mode, batch, torch.float16, headline=batch != 4)
        for batch in (1, 4, 32)
        for mode in ("forward", "with backward")
    ]


def _case(device: torch.device, mode: str, batch: int, dtype: torch.dtype, headline: bool = True) -> Case:
    forward = mode == "forward"
    wrap: Callable[[Any], Any] = without_graph if forward else training
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return Case(
        op="deformable_attention",
        name=f"{mode}, {str(dtype).removeprefix('torch.')}: {batch} x 640 px, {QUERIES} queries, {sum(POINTS)} points",
        shapes={"value": [batch, sum(h * w for h, w in SIZES), HEADS, CHANNELS]},
        inputs=partial(_inputs, device, batch, dtype),
        expected=lambda *inputs: wrap(standard)(*(x.double() for x in inputs)),
        compare=lambda result, expected: relative_error(result, expected, tolerance),
        contenders=[
            *own(device, wrap(_ours), wrap(_reference(forward))),
            Contender(name="transformers", build=lambda: wrap(_transformers()), graph=forward),
            Contender(name="grid_sample", build=lambda: wrap(standard), graph=forward),
            *([Contender(name="msda-triton", build=lambda: wrap(_msda_triton()))] if device.type == "cuda" else []),
            Contender(name="torch.compile", build=lambda: wrap(compiled(device, standard)()), graph=forward),
        ],
        headline=headline,
    )


def _inputs(device: torch.device, batch: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Value, boxes, offsets, logits."""
    g = torch.Generator(device).manual_seed(seed)
    randn, rand = (partial(f, generator=g, device=device) for f in (torch.randn, torch.rand))
    points = batch, QUERIES, HEADS, sum(POINTS)
    value = randn(batch, sum(h * w for h, w in SIZES), HEADS, CHANNELS)
    boxes = torch.cat([rand(batch, QUERIES, 2), 0.02 * 20 ** rand(batch, QUERIES, 2)], 2)
    return value.to(dtype), boxes.to(dtype), (2 * randn(*points, 2)).to(dtype), randn(*points).to(dtype)


def without_graph(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    return run


def training(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The result and the gradients of value, offsets and logits: the decoder's boxes are detached."""

    def run(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (value, offsets, logits)]
        out = function(leaves[0], boxes, *leaves[1:])
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _ours(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return box_deformable_attention(value, SIZES, boxes, offsets, logits, POINTS)


def _reference(forward: bool) -> Callable[..., Tensor]:
    """What runs on CPUs."""
    op: Any = undispatched if forward else lambda *arguments: attention(*arguments)[0]
    sizes = [n for size in SIZES for n in size]

    def run(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations = box_locations(boxes.float(), offsets.float(), POINTS)
        return op(value, locations, logits.float().softmax(3), sizes, list(POINTS), "bilinear", False)

    return run


def standard(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """The same in this project's form for export."""
    locations = box_locations(boxes, offsets, POINTS)
    return deformable_attention_grid_sample(value, SIZES, locations, logits.softmax(3), POINTS)


def _transformers() -> Callable[..., Tensor]:
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (  # type: ignore[import-untyped]
        multi_scale_deformable_attention_v2,
    )

    def run(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        scale = torch.tensor([[1 / count] for count in POINTS for _ in range(count)]).to(offsets)
        reference = boxes[:, :, None, None]
        locations = reference[..., :2] + offsets * scale * reference[..., 2:] * 0.5
        return multi_scale_deformable_attention_v2(value, SIZES, locations, logits.softmax(-1), list(POINTS))

    return run


def _msda_triton() -> Callable[..., Tensor]:
    # not its `multiscale_deformable_attention`, which takes grid_sample where the kernel fails, and does not say so
    from msda_triton.frontend import (  # type: ignore[import-not-found]
        triton_multiscale_deformable_attention,
    )

    if len(set(POINTS)) > 1:
        raise Absent("it takes as many points of each level")
    by_level = len(POINTS), POINTS[0]

    def run(value: Tensor, boxes: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes = torch.tensor(SIZES, device=value.device)
        locations = box_locations(boxes, offsets, POINTS).unflatten(3, by_level)
        weights = logits.softmax(3).unflatten(3, by_level)
        return triton_multiscale_deformable_attention(value, sizes, locations, weights, "zeros", False).flatten(2)

    return run
