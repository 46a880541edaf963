"""Ops that put values in other places: CARAFE, masked convolution, oriented filters, point-wise attention masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rtmdet_fast.compat.mmcv_ext._common import check, fit, gradients


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Features [N, C, H, W], masks [N, groups k k, s H, s W] -> into output [N, C, s H, s W] (CARAFE, 2019)."""
    check(features, masks=masks)
    sizes = _sizes(features, kernel_size, group_size, scale_factor)
    fit("features N C H W, masks N M SH SW, output N C SH SW", features, masks, output, **sizes)
    output.copy_(_reassembled(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Adds the gradients of features and masks to bottom_grad and mask_grad."""
    check(top_grad, features=features, masks=masks)
    settings = kernel_size, group_size, scale_factor
    sizes = _sizes(features, *settings)
    fit("features N C H W, masks N M SH SW, top_grad N C SH SW", features, masks, top_grad, **sizes)
    found = gradients(lambda *x: _reassembled(x[0], x[1], *settings), [features, masks], top_grad)
    for into, gradient in zip((bottom_grad, mask_grad), found, strict=True):
        into += gradient


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_forward`; `rfeatures`, which the backward pass is given, takes the features."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_backward`."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _sizes(features: Tensor, kernel: int, groups: int, scale: int) -> dict[str, int]:
    return dict(M=groups * kernel**2, SH=features.shape[2] * scale, SW=features.shape[3] * scale)


def _reassembled(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    N, C, H, W = features.shape
    around = F.unfold(features, kernel, padding=kernel // 2).view(N, groups, C // groups, kernel**2, H, W)
    weights = masks.view(N, groups, kernel**2, H, scale, W, scale)
    return torch.einsum("ngckhw,ngkhiwj->ngchiwj", around, weights).reshape(N, C, H * scale, W * scale)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Image [1, C, H, W], rows and columns [M] int64 -> what the kernel covers at each into col [C KH KW, M]."""
    check(im, col=col)
    taps = im.shape[1] * kernel_h * kernel_w
    fit("im 1 C H W, mask_h_idx M, mask_w_idx M, col taps M", im, mask_h_idx, mask_w_idx, col, taps=taps)
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    row = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None]
    column = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, row[:, None], column].reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Columns [C, M] -> to their rows and columns [M] of im [1, C, height, width]."""
    check(col, im=im)
    sizes = dict(C=channels, H=height, W=width)
    fit("im 1 C H W, mask_h_idx M, mask_w_idx M, col C M", im, mask_h_idx, mask_w_idx, col, **sizes)
    im[0, :, mask_h_idx, mask_w_idx] = col


def active_rotated_filter_forward(input: Tensor, indices: Tensor, output: Tensor) -> None:
    """Filters [O, I, orientations, KH, KW] -> turned copies into output [O rotations, I orientations, KH, KW].

    `indices` [orientations, KH, KW, rotations] int32, from 1 on: where each entry goes (S2A-Net, 2020).
    """
    check(input, output=output)
    _check_filters(input, indices, output)
    planes, inputs = input.shape[:2]
    entry = _entries(indices)
    turned = output.view(planes, len(entry), inputs, entry.shape[1])
    index = entry[:, None].expand(planes, -1, inputs, -1)
    turned.scatter_(3, index, input.reshape(planes, 1, inputs, entry.shape[1]).expand_as(index))


def active_rotated_filter_backward(grad_out: Tensor, indices: Tensor, grad_in: Tensor) -> None:
    """Writes the gradient of the filters into grad_in."""
    check(grad_out, grad_in=grad_in)
    _check_filters(grad_in, indices, grad_out)
    planes, inputs = grad_in.shape[:2]
    entry = _entries(indices)
    turned = grad_out.reshape(planes, len(entry), inputs, entry.shape[1])
    grad_in.copy_(turned.gather(3, entry[:, None].expand(planes, -1, inputs, -1)).sum(1).view(grad_in.shape))


def _check_filters(filters: Tensor, indices: Tensor, turned: Tensor) -> None:
    planes, inputs, orientations = filters.shape[:3]
    sizes = dict(OR=planes * indices.shape[-1], IQ=inputs * orientations)
    pattern = "filters O I Q KH KW, indices Q KH KW R, turned OR IQ KH KW"
    fit(pattern, filters, indices, turned, **sizes)


def _entries(indices: Tensor) -> Tensor:
    """[rotations, entries] int64, from 0 on."""
    return indices.flatten(0, 2).t().long() - 1


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Masks around each pixel [N, MH MW, H, W] -> over the whole map into output [N, H W, H, W] (PSANet, 2018).

    `psa_type` 0 collects (a map of sources at each pixel), 1 distributes.
    """
    check(input, output=output)
    sizes = dict(N=num_, M=h_mask * w_mask, H=h_feature, W=w_feature, HW=h_feature * w_feature)
    fit("input N M H W, output N HW H W", input, output, **sizes)
    source, place = _mask_places(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, psa_type, input.device)
    output.view(num_, -1)[:, place] = input.reshape(num_, -1)[:, source]


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Writes the gradient of the masks into grad_input."""
    check(grad_output, grad_input=grad_input)
    sizes = dict(N=num_, M=h_mask * w_mask, H=h_feature, W=w_feature, HW=h_feature * w_feature)
    fit("grad_input N M H W, grad_output N HW H W", grad_input, grad_output, **sizes)
    device = grad_output.device
    source, place = _mask_places(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, psa_type, device)
    grad_input.view(num_, -1)[:, source] = grad_output.reshape(num_, -1)[:, place]


def _mask_places(
    H: int, W: int, MH: int, MW: int, half_h: int, half_w: int, psa_type: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of what falls inside the map: its place among MH MW H W of the mask, and among H W H W of the output."""
    i, j, y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in (MH, MW, H, W)), indexing="ij")
    row, column = i + y - half_h, j + x - half_w
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    here, there = (y * W + x)[inside], (row * W + column)[inside]
    place = there * (H * W) + here if psa_type == 0 else here * (H * W) + there
    return inside.flatten().nonzero()[:, 0], place
