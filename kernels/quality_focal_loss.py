"""Quality focal loss (arXiv:2006.04388, equation 3, beta 2) of all logits of a batch, summed, forward and backward.

    p = sigmoid(x);  e = exp(-|x|);  bce = max(x, 0) + log(1 + e) - x y
    loss = weight (p - y)^2 bce;     dx = dloss weight (p - y) (2 p (1 - p) bce + (p - y)^2)

where the target y is the quality at a prior's label and 0 elsewhere.

Bytes. Forward reads the logits, backward reads them again and writes their gradient: three passes in the logits' own
precision, as nothing but they is kept. The reference makes some thirty over [B, N, C] in fp32, and keeps four of them.

The logits are walked as flat memory, so that no lane idles whatever C is: in pieces of V = gcd(C, 16), each of which
lies in one row, whose label and quality it loads once. C is a constant of the kernel, as is a model's number of
classes: the row of a piece costs a multiplication. A program's share is summed in it and the shares after it, without
atomics: a result is the same bit for bit in every run.

For sm_90 Triton 3.6 makes of fp16 logits and 80 classes 33 instructions an element forward and 38 backward, where with
tl.log it would be 46 and 54.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, use_triton, wrap_triton

TUNING = {
    "forward": {"BLOCK": 4096, "num_warps": 4},  # logits of a program
    "backward": {"BLOCK": 2048, "num_warps": 4},
    "odd": {"BLOCK": 1024, "num_warps": 4},  # of both where V is below 4: a row for each logit takes more registers
}


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of the quality focal loss of `logits` against scores that are `quality` at the label and 0 elsewhere.

    Args:
        logits: [B, N, C], before the sigmoid.
        labels: [B, N] integers; outside of [0, C) is background, all of whose targets are 0.
        quality: [B, N] in [0, 1]; what stands at background does not matter.
        weight: [B, N] of the priors, 1 if not given.

    Returns a scalar in float32, whatever the logits' dtype (float64 of float64). Gradients are those of the logits
    alone. Raises ValueError or TypeError, naming the argument, for shapes, dtypes or devices that do not fit.
    """
    _check(logits, labels, quality, weight)
    quality, weight = quality.detach(), None if weight is None else weight.detach()
    if use_triton(logits) and logits.dtype != torch.float64 and logits.numel() > 0:
        return _forward(logits, labels, quality, weight)
    return quality_focal_loss_reference(logits, labels, quality, weight)


def quality_focal_loss_reference(
    logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None = None
) -> Tensor:
    """`quality_focal_loss` in PyTorch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not logits.numel():
        return logits.sum()
    # Against a target of 0 the loss is sigmoid(x)^2 softplus(x): one dense pass without building the targets;
    # the few positives then exchange their one element.
    background = logits.sigmoid().square() * F.softplus(logits)
    index = labels.long().clamp(min=0, max=logits.shape[2] - 1)[..., None]
    positive = labels == index[..., 0]
    quality = quality.to(logits.dtype).where(positive, 0.0)
    logit = logits.gather(-1, index)[..., 0]
    at_label = (logit.sigmoid() - quality).square() * F.binary_cross_entropy_with_logits(
        logit, quality, reduction="none"
    )
    exchanged = torch.where(positive, at_label - background.gather(-1, index)[..., 0], 0.0)
    if weight is not None:
        return (weight.to(logits.dtype) * (background.sum(-1) + exchanged)).sum()
    return background.sum() + exchanged.sum()


def _check(logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None) -> None:
    if logits.dim() != 3 or not logits.shape[2]:
        raise ValueError(f"logits: expected shape [B, N, C] with C > 0 classes, got {tuple(logits.shape)}")
    for name, x in {"logits": logits, "labels": labels, "quality": quality, "weight": weight}.items():
        if x is None:
            continue
        integer = name == "labels"
        if x.is_floating_point() == integer or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name}: expected {'an integer' if integer else 'a floating-point'} tensor, got {x.dtype}")
        if name != "logits" and x.shape != logits.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(logits.shape[:2])}, got {tuple(x.shape)}")
        if x.device != logits.device:
            raise ValueError(f"{name}: on {x.device}, but logits are on {logits.device}")


@triton.jit
def _log1p_over(e):
    """log(1 + e) / e of 0 <= e <= 1, within 3.4e-7 of itself in fp32: minimax, found by Lawson's iteration.

    Eight instructions, a third of tl.log's; and log(1 + e) in fp32 has no digit left of a small e.
    """
    value = tl.fma(e, -0.008539202623069286, 0.04408961907029152)
    value = tl.fma(e, value, -0.10768170654773712)
    value = tl.fma(e, value, 0.17745241522789001)
    value = tl.fma(e, value, -0.24495463073253632)
    value = tl.fma(e, value, 0.33275479078292847)
    value = tl.fma(e, value, -0.4999740421772003)
    return tl.fma(e, value, 0.9999998211860657)


@triton.jit(do_not_specialize=["rows"])
def _loss_kernel(
    logits_ptr, labels_ptr, quality_ptr, weight_ptr, dloss_ptr, out_ptr, rows,
    C: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program's share of the loss to out [programs], or of the gradient to out [rows, C]."""
    EACH: tl.constexpr = C // V  # pieces of a row
    first = tl.program_id(0).to(tl.int64) * (BLOCK // V)
    piece = (first % EACH).to(tl.int32) + tl.arange(0, BLOCK // V)
    row = first // EACH + piece // EACH
    column = (piece % EACH * V)[:, None] + tl.arange(0, V)[None]
    offsets = (first + tl.arange(0, BLOCK // V))[:, None] * V + tl.arange(0, V)[None]
    inside = row < rows
    label = tl.load(labels_ptr + row, mask=inside, other=-1)
    positive = (label >= 0) & (label < C)
    quality = tl.load(quality_ptr + row, mask=positive, other=0).to(tl.float32)
    x = tl.load(logits_ptr + offsets, mask=inside[:, None], other=0).to(tl.float32)
    y = tl.where(label.to(tl.int32)[:, None] == column, tl.where(positive, quality, 0.0)[:, None], 0.0)
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    root = tl.rsqrt(1 + e)
    r = root * root  # 1 / (1 + e), as in batch_norm.sigmoid
    deviation = tl.where(x >= 0, r, e * r) - y
    bce = tl.maximum(x, 0) - x * y + e * _log1p_over(e)
    if BACKWARD:
        value = deviation * (2 * e * r * r * bce + deviation * deviation)
        value *= tl.load(dloss_ptr).to(tl.float32)
    else:
        value = deviation * deviation * bce
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + row, mask=inside, other=0).to(tl.float32)[:, None]
    if BACKWARD:
        tl.store(out_ptr + offsets, value, mask=inside[:, None])
    else:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(tl.where(inside[:, None], value, 0.0), 1), 0))


def _plan(logits: Tensor, backward: bool) -> tuple[int, dict[str, int]]:
    """The number of programs, and the kernel's constants."""
    V = math.gcd(logits.shape[2], 16)
    tuning = TUNING["odd" if V < 4 else "backward" if backward else "forward"]
    return cdiv(logits.numel(), tuning["BLOCK"]), {"C": logits.shape[2], "V": V, **tuning}


def _launch(
    logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None, dloss: Tensor | None, out: Tensor
) -> None:
    programs, constants = _plan(logits, dloss is not None)
    weight = None if weight is None else weight.contiguous()
    wrap_triton(_loss_kernel)[(programs,)](
        logits.contiguous(), labels.contiguous(), quality.contiguous(), weight, dloss, out,
        logits.shape[0] * logits.shape[1], BACKWARD=dloss is not None, **constants,
    )  # fmt: skip


@triton_op("rtmdet_fast::quality_focal_loss")
def _forward(logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None) -> Tensor:
    shares = logits.new_empty(_plan(logits, False)[0], dtype=torch.float32)
    _launch(logits, labels, quality, weight, None, shares)
    return shares.sum()


@triton_op("rtmdet_fast::quality_focal_loss_backward")
def _backward(dloss: Tensor, logits: Tensor, labels: Tensor, quality: Tensor, weight: Tensor | None) -> Tensor:
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch(logits, labels, quality, weight, dloss, dlogits)
    return dlogits


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dloss):
    return None if dloss is None else _backward(dloss, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_gradients, setup_context=_context)
