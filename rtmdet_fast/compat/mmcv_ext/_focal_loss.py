"""Focal losses (Lin et al., 2017) with their gradients as formulas, which hold where a probability is 0 or 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rtmdet_fast.compat.mmcv_ext._common import check, exact, fit

_LEAST = torch.finfo(torch.float32).tiny  # of what a logarithm is taken


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Logits [N, C], target [N] int64 (another number than 0 to C - 1: background) -> losses into output [N, C].

    `weight` [C], or empty, weighs the rows by their target.
    """
    _check(input, target, weight)
    fit("input N C, output N C", input, output)
    positive, p, row = _parts(input, target, weight)
    loss = torch.where(positive, -alpha * (1 - p) ** gamma * _log(p), (alpha - 1) * p**gamma * _log(1 - p))
    output.copy_(loss * row)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivative of each loss by its logit into grad_input [N, C]."""
    _check(input, target, weight)
    fit("input N C, grad_input N C", input, grad_input)
    positive, p, row = _parts(input, target, weight)
    up = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p))
    down = (alpha - 1) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p)
    grad_input.copy_(torch.where(positive, up, down) * row)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Probabilities [N, C], target [N] int64 (below 0: no loss) -> losses into output [N]."""
    _check(input, target, weight)
    fit("target N, output N", target, output)
    p, row, _ = _of_target(input, target, weight)
    output.copy_(-alpha * (1 - p) ** gamma * _log(p) * row)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivatives by the logits into grad_input [N, C]; those by ln(probability) into buff [N]."""
    _check(input, target, weight)
    fit("input N C, buff N, grad_input N C", input, buff, grad_input)
    p, row, label = _of_target(input, target, weight)
    power = 0 if gamma == 0 else gamma * (1 - p) ** (gamma - 1) * p * _log(p)
    slope = alpha * (power - (1 - p) ** gamma) * row
    buff.copy_(slope)
    grad_input.copy_(slope[:, None] * (F.one_hot(label, input.shape[1]) - exact(input)))


def _check(input: Tensor, target: Tensor, weight: Tensor) -> None:
    check(input, weight=weight)
    fit("input N C, target N", input, target)
    if weight.numel():
        fit("input N C, weight C", input, weight)


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=_LEAST).log()


def _parts(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return positive, exact(input).sigmoid(), exact(weight)[target][:, None] if weight.numel() else 1.0


def _of_target(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    label = target.clamp(min=0)
    row = (target >= 0).to(exact(input).dtype)
    if weight.numel():
        row = row * exact(weight)[label]
    return exact(input).gather(1, label[:, None])[:, 0], row, label
