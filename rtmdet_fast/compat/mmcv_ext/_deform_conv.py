"""Deformable convolution, of which the modulated one is the general case.

Legend: N images, C channels in, O out, D deformable groups, taps of a kernel KH KW, HO, WO size of the output.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rtmdet_fast.compat.mmcv_ext import _torchvision
from rtmdet_fast.compat.mmcv_ext._common import check, exact, fit, gradients
from rtmdet_fast.compat.mmcv_ext._sampling import weighted_sums


class _Geometry(NamedTuple):
    """Each (along y, along x); and the groups of the convolution and of its offsets."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Input [N, C, H, W], offset [N, D KH KW 2 (y, x), HO, WO], weight [O, C / groups, KH, KW] -> into [N, O, HO, WO].

    `columns`, `ones` and `im2col_step` are not needed.
    """
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _check(input, offset, weight, geometry, output=output)
    output.copy_(_convolve(input, offset, weight, geometry=geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the gradients of input and offset into gradInput and gradOffset."""
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _check(input, offset, weight, geometry, output=gradOutput)
    convolve = partial(_convolve, weight=weight, geometry=geometry)
    for into, gradient in zip((gradInput, gradOffset), gradients(convolve, [input, offset], gradOutput), strict=True):
        into.copy_(gradient)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds the gradient of the weight, times `scale`, to gradWeight."""
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _check(input, offset, gradWeight, geometry, output=gradOutput)
    convolve = partial(_convolve, input, offset, geometry=geometry)
    gradWeight.add_(gradients(convolve, [gradWeight], gradOutput)[0], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """As `deform_conv_forward`, of samples times mask [N, D KH KW, HO, WO], and with bias [O] if `with_bias`."""
    geometry = _Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    offset, mask = _leading(input, offset, mask, geometry)
    _check(input, offset, weight, geometry, output=output, mask=mask, bias=bias if with_bias else None)
    result = _convolve(input, offset, weight, mask, geometry=geometry)
    output.copy_(result + bias.view(-1, 1, 1) if with_bias else result)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes the gradients of all inputs into the `grad_` tensors but the output's."""
    geometry = _Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    leading = dict(zip(("offset", "mask"), _leading(input, offset, mask, geometry), strict=True))
    _check(input, weight=weight, geometry=geometry, output=grad_output, bias=bias if with_bias else None, **leading)

    def convolve(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        offset, mask = _leading(input, offset, mask, geometry)
        return _convolve(input, offset, weight, mask, geometry=geometry)

    found = gradients(convolve, [input, offset, weight, mask], grad_output)
    for into, gradient in zip((grad_input, grad_offset, grad_weight, grad_mask), found, strict=True):
        into.copy_(gradient)
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))


def _size(input: Tensor, geometry: _Geometry) -> tuple[int, int]:
    """HO, WO."""
    _, stride, padding, dilation = geometry[:4]
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (geometry.kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return height, width


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    *,
    output: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Raises RuntimeError where mmcv does, and of shapes that mmcv reads past the end of.

    `output` may be its gradient.
    """
    others = {"mask": mask, "bias": bias}
    check(input, offset=offset, weight=weight, output=output, **{k: x for k, x in others.items() if x is not None})
    if min(*geometry.kernel, *geometry.stride, *geometry.dilation) < 1:
        raise RuntimeError(f"kernel, stride and dilation are {geometry[0]}, {geometry[1]}, {geometry[3]}: below 1")
    N, channels = input.shape[:2]
    if tuple(weight.shape[2:]) != geometry.kernel or weight.shape[1] * geometry.groups != channels:
        raise RuntimeError(f"weight has shape {tuple(weight.shape)}, input has {channels} channels: they do not match")
    if channels % geometry.deform_groups:
        raise RuntimeError(f"{channels} channels cannot be divided into {geometry.deform_groups} deformable groups")
    size = _size(input, geometry)
    if min(size) < 1:
        raise RuntimeError(f"the output would have size {size}: the input, {tuple(input.shape)}, is too small")
    taps = geometry.kernel[0] * geometry.kernel[1] * geometry.deform_groups
    sizes = dict(N=N, taps=taps, twice=2 * taps, O=len(weight), HO=size[0], WO=size[1])
    fit("offset N twice HO WO, output N O HO WO", offset, output, **sizes)
    if mask is not None:
        fit("mask N taps HO WO", mask, **sizes)
    if bias is not None:
        fit("bias O", bias, **sizes)


def _leading(input: Tensor, offset: Tensor, mask: Tensor, geometry: _Geometry) -> tuple[Tensor, Tensor]:
    """Offset and mask; of larger maps than the output, as DyHead passes, mmcv reads the first numbers."""
    size = _size(input, geometry)
    taps = geometry.kernel[0] * geometry.kernel[1] * geometry.deform_groups
    parts = []
    for x, channels in ((offset, 2 * taps), (mask, taps)):
        shape = (len(x), channels, *size)
        larger = x.ndim == 4 and min(size) > 0 and x.shape[1] == channels and x[:1].numel() > math.prod(shape[1:])
        parts.append(x.flatten(1)[:, : math.prod(shape[1:])].view(shape) if larger else x)
    return parts[0], parts[1]


def _places(count: int, geometry: _Geometry, axis: int, device: torch.device) -> Tensor:
    """Where the taps of the kernel stand without offsets [K, count]."""
    tap = torch.arange(geometry.kernel[axis], device=device)[:, None] * geometry.dilation[axis]
    return tap + torch.arange(count, device=device) * geometry.stride[axis] - geometry.padding[axis]


def _convolve(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None, *, geometry: _Geometry
) -> Tensor:
    N, C, H, W = input.shape
    (KH, KW), stride, padding, dilation, groups, D = geometry
    HO, WO = _size(input, geometry)
    base_y, base_x = (_places(count, geometry, i, input.device) for i, count in enumerate((HO, WO)))
    base_y = base_y[:, None, :, None]  # [KH, 1, HO, 1]
    base_x = base_x[:, None]  # [KW, 1, WO]
    offset_y, offset_x = exact(offset).view(N, D, KH, KW, 2, HO, WO).unbind(4)
    y, x = base_y + offset_y, base_x + offset_x  # [N, D, KH, KW, HO, WO]
    # what is a pixel or more outside has no gradient, not even of its position
    inside = (y > -1) & (y < H) & (x > -1) & (x < W)
    y, x = y.where(inside, -2), x.where(inside, -2)
    if _torchvision.takes(input):
        offset = torch.stack([y - base_y, x - base_x], 4).view(offset.shape).to(input.dtype)
        bias = input.new_zeros(len(weight))
        return _torchvision.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    y0, x0 = y.detach().floor(), x.detach().floor()
    ly, lx = y - y0, x - x0
    factor = inside if mask is None else inside * exact(mask).view(inside.shape)
    indices, weights = [], []
    for row, part_y in ((y0, 1 - ly), (y0 + 1, ly)):
        for column, part_x in ((x0, 1 - lx), (x0 + 1, lx)):
            there = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            indices.append((row * W + column).where(there, 0))
            weights.append(part_y * part_x * (there * factor))
    index = torch.stack(indices, -1).long()
    index += torch.arange(N * D, device=input.device).view(N, D, 1, 1, 1, 1, 1) * (H * W)
    pixels = exact(input).view(N, D, C // D, H * W).movedim(2, 3).reshape(-1, C // D)
    sums = weighted_sums(pixels, index.view(-1, 4), torch.stack(weights, -1).view(-1, 4))
    columns = sums.view(N, D, KH * KW, HO * WO, C // D).permute(0, 1, 4, 2, 3)
    columns = columns.reshape(N, groups, C // groups * KH * KW, HO * WO)
    kernel = exact(weight).view(groups, len(weight) // groups, -1)
    return (kernel @ columns).view(N, len(weight), HO, WO).to(input.dtype)
