"""Ops of the stand-in that sample, pool and convolve feature maps, against loops in float64 over their definitions.

Without torchvision and with it, where that loads; against the compiled mmcv: tests/openmmlab/test_compiled_mmcv.py.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch

import rtmdet_fast.compat.mmcv_ext as ext
from rtmdet_fast.compat.mmcv_ext import _torchvision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOUBLE = dict(dtype=torch.float64, device=DEVICE)


@pytest.fixture(params=[False, True], ids=["torch", "torchvision"], autouse=True)
def torchvision(request, monkeypatch):
    if request.param and not _torchvision.is_there():
        pytest.skip("torchvision does not load here")
    if not request.param:
        monkeypatch.setattr(_torchvision, "takes", lambda x: False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Of image [C, H, W], by RoIAlign's rule."""
    H, W = image.shape[1:]
    if not (-1 <= y <= H and -1 <= x <= W):
        return np.zeros(len(image))
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    top, left = min(int(y), max(H - 2, 0)), min(int(x), max(W - 2, 0))
    below, right = min(top + 1, H - 1), min(left + 1, W - 1)
    a, b = y - top, x - left
    upper = image[:, top, left] * (1 - b) + image[:, top, right] * b
    return upper * (1 - a) + (image[:, below, left] * (1 - b) + image[:, below, right] * b) * a


def pooled(image, extent, size, ratio, start, angle=0.0, center=(0.0, 0.0), reduce=np.mean) -> np.ndarray:
    """One region of `extent` (height, width) [C, PH, PW]: from `start`, turned by `angle`, then moved by `center`."""
    counts = [ratio or math.ceil(side / bins) for side, bins in zip(extent, size, strict=True)]
    out = np.zeros((len(image), *size))
    for row, column in product(range(size[0]), range(size[1])):
        samples = []
        for i, j in product(range(counts[0]), range(counts[1])):
            y = start[0] + (row + (i + 0.5) / counts[0]) * extent[0] / size[0]
            x = start[1] + (column + (j + 0.5) / counts[1]) * extent[1] / size[1]
            turned = y * math.cos(angle) - x * math.sin(angle), y * math.sin(angle) + x * math.cos(angle)
            samples.append(bilinear(image, turned[0] + center[0], turned[1] + center[1]))
        if samples:
            out[:, row, column] = reduce(samples, axis=0)
    return out


def tensor(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array), **DOUBLE)


def assert_adjoint(forward, backward, shape) -> None:
    """A linear op's gradient is its transpose: <g, f(x)> = <f'(g), x>, for many x."""
    upstream = random(*forward(torch.zeros(shape, **DOUBLE)).shape, seed=8)
    gradient = backward(upstream)
    for seed in range(20):
        x = random(*shape, seed=seed)
        torch.testing.assert_close((upstream * forward(x)).sum(), (gradient * x).sum(), atol=1e-9, rtol=1e-9)


def assert_derivative(function, inputs: list, gradients: list, upstream: torch.Tensor, only=None) -> None:
    """By central differences along random directions."""
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        for seed in range(3):
            step = random(*x.shape, seed=seed) * 1e-6
            plus, minus = ([*inputs[:i], x + s, *inputs[i + 1 :]] for s in (step, -step))
            change = ((function(*plus) - function(*minus)) * upstream).sum() / 2
            torch.testing.assert_close((gradient * step).sum(), change, atol=1e-11, rtol=1e-5)


REGIONS = torch.tensor(
    [
        [0, 1.0, 2, 30, 22],
        [1, -9, -12, 16, 9],
        [1, 20, 8, 21, 30],
        [0, 40, 40, 60, 60],
        [0, 5, 5, 5, 5],
        [1, 9, 4, 70, 33],
    ],
    **DOUBLE,
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", [0, 1])
def test_roi_align(mode, ratio, aligned):
    features, size, scale = random(2, 3, 7, 9), (2, 3), 0.25
    images, reduce = features.cpu().numpy(), np.mean if mode else np.max
    expected = []
    for image, *box in REGIONS.tolist():
        x1, y1, x2, y2 = (v * scale - aligned * 0.5 for v in box)
        extent = [max(s, 0 if aligned else 1) for s in (y2 - y1, x2 - x1)]
        expected.append(pooled(images[int(image)], extent, size, ratio, (y1, x1), reduce=reduce))
    expected = tensor(expected)
    if mode == 0 and ratio == 0 and aligned:
        expected[4] = -10000  # no sample: what mmcv starts from

    def forward(x):
        out = torch.full((6, 3, *size), torch.nan, **DOUBLE)
        ext.roi_align_forward(x, REGIONS, out, *argmax, *size, scale, ratio, mode, aligned)
        return out

    argmax = torch.zeros(2, 6, 3, *size, **DOUBLE)
    torch.testing.assert_close(forward(features), expected)

    def backward(upstream):
        gradient = torch.zeros_like(features)
        ext.roi_align_backward(upstream, REGIONS, *argmax, gradient, *size, scale, ratio, mode, aligned)
        return gradient

    if mode:
        assert_adjoint(forward, backward, features.shape)
    else:
        upstream = random(*expected.shape, seed=3)
        assert_derivative(forward, [features], [backward(upstream)], upstream)


@pytest.mark.parametrize("turned", [False, True], ids=["roi_align_rotated", "riroi_align_rotated"])
@pytest.mark.parametrize("clockwise", [False, True])
def test_rotated_regions(turned, clockwise):
    features, size, scale, ratio = random(2, 4, 7, 9), (2, 2), 0.5, 2
    angles = torch.tensor([0.4, -2.9, 1.6, 3.0, 0, 7.1], **DOUBLE)
    rois = torch.cat([REGIONS[:, :3], (REGIONS[:, 3:] - REGIONS[:, 1:3]) / 2, angles[:, None]], 1)
    shift, orientations = (0, 4) if turned else (0.5, 1)
    images = features.cpu().numpy()
    expected = []
    for image, cx, cy, width, height, angle in rois.tolist():
        width, height = (max(s * scale, 1) if turned else s * scale for s in (width, height))
        center = cy * scale - shift, cx * scale - shift
        turn = -angle if clockwise else angle
        one = pooled(images[int(image)], (height, width), size, ratio, (-height / 2, -width / 2), turn, center)
        if turned:
            turn = angle * orientations / (2 * math.pi)
            whole, part = math.floor(turn), turn - math.floor(turn)
            channels = [(o - whole) % orientations for o in range(orientations)]
            one = (1 - part) * one[channels] + part * one[[(c + 1) % orientations for c in channels]]
        expected.append(one)
    op = "riroi_align_rotated" if turned else "roi_align_rotated"
    settings = (*size, scale, ratio, orientations if turned else True, clockwise)

    def forward(x):
        out = torch.full((6, 4, *size), torch.nan, **DOUBLE)
        getattr(ext, f"{op}_forward")(x, rois, out, *settings)
        return out

    def backward(upstream):
        gradient = torch.zeros_like(features)
        getattr(ext, f"{op}_backward")(upstream, rois, gradient, *settings)
        return gradient

    torch.testing.assert_close(forward(features), tensor(expected))
    assert_adjoint(forward, backward, features.shape)


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(points):
    features, scale = random(1, 2, 4, 5), 0.5
    boxes = random(1, 4, 5, 5, seed=1) * 2 + torch.tensor([4, 5, 3, 4, 0], **DOUBLE)
    expected = features.clone()
    for i, j in product(range(4), range(5)):
        y, x, w, h, a = boxes[0, i, j].tolist()
        corners = [(0, 0), (1, 1), (-1, 1), (-1, -1), (1, -1)][:points]
        for s, t in corners:
            u, v = s * w * scale / 2, t * h * scale / 2
            at = y * scale + u * math.sin(a) + v * math.cos(a), x * scale + u * math.cos(a) - v * math.sin(a)
            expected[0, :, i, j] += tensor(bilinear(features[0].cpu().numpy(), *at))

    def forward(x):
        out = torch.full_like(x, torch.nan)
        ext.rotated_feature_align_forward(x, boxes, out, scale, points)
        return out

    def backward(upstream):
        gradient = torch.zeros_like(features)
        ext.rotated_feature_align_backward(upstream, boxes, gradient, scale, points)
        return gradient

    torch.testing.assert_close(forward(features), expected)
    assert_adjoint(forward, backward, features.shape)
    # of two images, and as mmrotate's R3Det calls it: one box after another
    apart, both = torch.cat([expected, features]), torch.cat([features, features])
    far = torch.cat([boxes, boxes + 1000])
    for shape in (far, far.view(-1, 5)):
        out = torch.full_like(both, torch.nan)
        ext.rotated_feature_align_forward(both, shape, out, scale, points)
        torch.testing.assert_close(out, apart)


def test_border_align():
    features, steps = random(2, 8, 6, 7), 3
    boxes = (random(2, 5, 4, seed=1) * 2 + torch.tensor([1, 1, 4, 5], **DOUBLE)).contiguous()
    expected = torch.zeros(2, 2, 5, 4, **DOUBLE)
    for n, m in product(range(2), range(5)):
        x1, y1, x2, y2 = boxes[n, m].tolist()
        w, h = (x2 - x1) / steps, (y2 - y1) / steps
        borders = [(y1, x1, 0, w), (y1, x1, h, 0), (y2, x2, 0, -w), (y2, x2, -h, 0)]
        for border, (y, x, dy, dx) in enumerate(borders):
            part = features[n, border * 2 : border * 2 + 2].cpu().numpy()
            samples = [bilinear(part, y + i * dy, x + i * dx) for i in range(steps + 1)]
            expected[n, :, m, border] = tensor(np.max(samples, axis=0))
    argmax = torch.zeros(expected.shape, dtype=torch.int32, device=DEVICE)

    def forward(x):
        out = torch.full_like(expected, torch.nan)
        ext.border_align_forward(x, boxes, out, argmax, steps)
        return out

    torch.testing.assert_close(forward(features), expected)
    upstream, gradient = random(*expected.shape, seed=2), torch.zeros_like(features)
    ext.border_align_backward(upstream, boxes, argmax, gradient, steps)
    assert_derivative(forward, [features], [gradient], upstream)


def test_roi_pool(monkeypatch):
    monkeypatch.setattr("rtmdet_fast.compat.mmcv_ext._roi._PIXELS_AT_ONCE", 20)  # several chunks
    features, size, scale = random(2, 3, 7, 9), (2, 3), 0.25
    rois = torch.cat([REGIONS, torch.tensor([[0, 9, 9, 2, 2]], **DOUBLE)])
    expected = torch.zeros(7, 3, *size, **DOUBLE)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i, j in product(range(size[0]), range(size[1])):
            high, wide = (y2 - y1) / size[0], (x2 - x1) / size[1]
            rows = range(max(math.floor(i * high + y1), 0), min(math.ceil((i + 1) * high + y1), 7))
            columns = range(max(math.floor(j * wide + x1), 0), min(math.ceil((j + 1) * wide + x1), 9))
            if high > 0 and wide > 0 and len(rows) and len(columns):
                part = features[int(image), :, rows.start : rows.stop, columns.start : columns.stop]
                expected[k, :, i, j] = part.amax((1, 2))
    argmax = torch.full(expected.shape, -7, dtype=torch.int32, device=DEVICE)

    def forward(x):
        out = torch.full_like(expected, torch.nan)
        ext.roi_pool_forward(x, rois, out, argmax, *size, scale)
        return out

    torch.testing.assert_close(forward(features), expected)
    upstream, gradient = random(*expected.shape, seed=2), torch.zeros_like(features)
    ext.roi_pool_backward(upstream, rois, argmax, gradient, *size, scale)
    assert_derivative(forward, [features], [gradient], upstream)


def test_prroi_pool_is_an_integral(monkeypatch):
    monkeypatch.setattr("rtmdet_fast.compat.mmcv_ext._roi._PIXELS_AT_ONCE", 400)
    features, size, scale = random(2, 3, 7, 9), (2, 3), 0.25
    rois = REGIONS + torch.tensor([0, 0.13, 0.27, 0.41, 0.53], **DOUBLE)
    rois[4, 3:] = rois[4, 1:3]  # no area
    expected = torch.zeros(6, 3, *size, **DOUBLE)
    padded = torch.nn.functional.pad(features, (30, 30, 30, 30)).cpu().numpy()  # nothing outside
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        for i, j in product(range(size[0]), range(size[1])):
            high, wide = (y2 - y1) * scale / size[0], (x2 - x1) * scale / size[1]
            n = 12
            ys = [y1 * scale + (i + (s + 0.5) / n) * high + 30 for s in range(n)]
            xs = [x1 * scale + (j + (s + 0.5) / n) * wide + 30 for s in range(n)]
            if high > 0:
                samples = [bilinear(padded[int(image)], y, x) for y, x in product(ys, xs)]
                expected[k, :, i, j] = tensor(np.mean(samples, axis=0))

    def forward(x, rois):
        out = torch.full_like(expected, torch.nan)
        ext.prroi_pool_forward(x, rois, out, *size, scale)
        return out

    out = forward(features, rois)
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0)  # of a Riemann sum
    assert (out[4] == 0).all()
    upstream, gradient, grad_rois = random(*out.shape, seed=2), torch.zeros_like(features), torch.zeros_like(rois)
    ext.prroi_pool_backward(upstream, rois, gradient, *size, scale)
    ext.prroi_pool_coor_backward(out, upstream, features, rois, grad_rois, *size, scale)
    assert (grad_rois[:, 0] == 0).all()
    usable = torch.tensor([0, 1, 2, 3, 5])
    assert_derivative(
        lambda x, boxes: forward(x, torch.cat([rois[:, :1], boxes], 1))[usable],
        [features, rois[:, 1:]],
        [gradient, grad_rois[:, 1:]],
        upstream[usable],
    )


GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 2), (2, 1), (0, 2), (1, 2), 2, 1),
    ((1, 3), (1, 2), (1, 1), (1, 1), 1, 2),
]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deformable_convolution(geometry, modulated):
    (KH, KW), stride, padding, dilation, groups, D = geometry
    image, weight, bias = random(2, 4, 6, 7), random(4, 4 // groups, KH, KW, seed=1), random(4, seed=2)
    HO, WO = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((6, 7), padding, dilation, (KH, KW), stride, strict=True)
    )
    offset = random(2, D * KH * KW * 2, HO, WO, seed=3) * 1.5
    offset[:, :, 0, 0] = 0  # at pixels, and right at one outside, as in a new layer
    mask = (
        random(2, D * KH * KW, HO, WO, seed=4).sigmoid() if modulated else torch.ones(2, D * KH * KW, HO, WO, **DOUBLE)
    )
    maps, kernel, moved, factor = (x.cpu().numpy() for x in (image, weight, offset, mask))
    expected = np.zeros((2, 4, HO, WO)) + bias.cpu().numpy()[:, None, None] * modulated

    def at(n, c, y, x):
        total = 0.0
        for row, column in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < 6 and 0 <= column < 7:
                total += maps[n, c, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
        return total

    for n, i, j, channel, ky, kx in product(range(2), range(HO), range(WO), range(4), range(KH), range(KW)):
        tap = channel // (4 // D) * KH * KW + ky * KW + kx
        y = i * stride[0] - padding[0] + ky * dilation[0] + moved[n, 2 * tap, i, j]
        x = j * stride[1] - padding[1] + kx * dilation[1] + moved[n, 2 * tap + 1, i, j]
        group, c = divmod(channel, 4 // groups)
        outputs = slice(group * (4 // groups), (group + 1) * (4 // groups))
        expected[n, outputs, i, j] += at(n, channel, y, x) * kernel[outputs, c, ky, kx] * factor[n, tap, i, j]
    expected = tensor(expected)

    none = torch.zeros(0, **DOUBLE)
    if modulated:
        settings = [KH, KW, *stride, *padding, *dilation, groups, D, True]

        def forward(image, offset, weight, mask, bias):
            out = torch.full_like(expected, torch.nan)
            ext.modulated_deform_conv_forward(image, weight, bias, none, offset, mask, out, none, *settings)
            return out
    else:
        settings = [KW, KH, stride[1], stride[0], padding[1], padding[0], dilation[1], dilation[0], groups, D]

        def forward(image, offset, weight):
            out = torch.full_like(expected, torch.nan)
            ext.deform_conv_forward(image, weight, offset, out, none, none, *settings, im2col_step=2)
            return out

    inputs = [image, offset, weight] + ([mask, bias] if modulated else [])
    torch.testing.assert_close(forward(*inputs), expected)
    upstream, grads = random(*expected.shape, seed=6), [torch.zeros_like(x) for x in inputs]
    if modulated:
        order = [grads[i] for i in (0, 2, 4, 1, 3)]
        ext.modulated_deform_conv_backward(image, weight, bias, none, offset, mask, none, *order, upstream, *settings)
    else:
        ext.deform_conv_backward_input(image, offset, upstream, *grads[:2], weight, none, *settings, im2col_step=2)
        rest = (image, offset, upstream, grads[2], none, none, *settings)
        ext.deform_conv_backward_parameters(*rest, scale=1, im2col_step=2)
    outside = offset[:, :, 0, 0] == 0  # where the function has a kink
    kinks = torch.zeros_like(offset)
    kinks[:, :, 0, 0] = outside.double()
    smooth = [(x * (1 - kinks) if i == 1 else x) for i, x in enumerate(grads)]

    def stepped(*changed):
        return forward(changed[0], changed[1] * (1 - kinks) + offset * kinks, *changed[2:])

    assert_derivative(stepped, inputs, smooth, upstream)
    if padding[0]:
        assert (grads[1][:, 0:2, 0, 0] == 0).all()  # the first tap is a pixel outside: mmcv leaves it where it is


def test_carafe():
    kernel, groups, scale = 3, 2, 2
    features, masks = random(1, 4, 3, 4), random(1, groups * 9, 6, 8, seed=1)
    expected = torch.zeros(1, 4, 6, 8, **DOUBLE)
    for c, y, x, i, j in product(range(4), range(6), range(8), range(3), range(3)):
        row, column = y // scale + i - 1, x // scale + j - 1
        if 0 <= row < 3 and 0 <= column < 4:
            expected[0, c, y, x] += features[0, c, row, column] * masks[0, c // 2 * 9 + i * 3 + j, y, x]
    kept = torch.zeros_like(features)

    def forward(features, masks):
        out = torch.full_like(expected, torch.nan)
        ext.carafe_forward(features, masks, kept, out, masks.clone(), out, kernel, groups, scale)
        return out

    torch.testing.assert_close(forward(features, masks), expected)
    naive = torch.full_like(expected, torch.nan)
    ext.carafe_naive_forward(features, masks, naive, kernel, groups, scale)
    torch.testing.assert_close(naive, expected)
    upstream = random(*expected.shape, seed=2)
    for backward in ("carafe", "carafe_naive"):
        grads = [torch.zeros_like(features), torch.zeros_like(masks)]
        if backward == "carafe":
            forward(features, masks)
            ext.carafe_backward(upstream, kept, masks, *[None] * 4, *grads, kernel, groups, scale)
        else:
            ext.carafe_naive_backward(upstream, features, masks, *grads, kernel, groups, scale)
        assert_derivative(forward, [features, masks], grads, upstream)


def test_masked_convolution_is_a_convolution_at_the_pixels_asked_for():
    image, weight = random(1, 3, 5, 6), random(4, 3, 3, 3, seed=1)
    row, column = (random(5, 6, seed=2) > 0).nonzero(as_tuple=True)
    columns = torch.full((27, len(row)), torch.nan, **DOUBLE)
    ext.masked_im2col_forward(image, row, column, columns, 3, 3, 1, 1)
    out = torch.zeros(1, 4, 5, 6, **DOUBLE)
    ext.masked_col2im_forward(weight.flatten(1) @ columns, row, column, out, 5, 6, 4)
    expected, mask = torch.nn.functional.conv2d(image, weight, padding=1), torch.zeros_like(out)
    mask[..., row, column] = 1
    torch.testing.assert_close(out, expected * mask)


def test_active_rotated_filter():
    filters = random(2, 3, 4, 3, 3)
    indices = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in range(5)], 1) + 1
    indices = indices.view(4, 3, 3, 5).int().to(DEVICE)
    expected = torch.zeros(2, 5, 3, 36, **DOUBLE)
    for o, i, entry, r in product(range(2), range(3), range(36), range(5)):
        expected[o, r, i, indices.view(36, 5)[entry, r] - 1] = filters.view(2, 3, 36)[o, i, entry]

    def forward(x):
        out = torch.full((10, 12, 3, 3), torch.nan, **DOUBLE)
        ext.active_rotated_filter_forward(x, indices, out)
        return out

    def backward(upstream):
        gradient = torch.full_like(filters, torch.nan)
        ext.active_rotated_filter_backward(upstream, indices, gradient)
        return gradient

    torch.testing.assert_close(forward(filters), expected.view(10, 12, 3, 3))
    assert_adjoint(forward, backward, filters.shape)


@pytest.mark.parametrize("kind", [0, 1])
def test_psamask(kind):
    masks, sizes = random(2, 15, 4, 5), (2, 4, 5, 3, 5, 1, 2)
    expected = torch.zeros(2, 20, 20, **DOUBLE)
    for i, j, y, x in product(range(3), range(5), range(4), range(5)):
        row, column = i + y - 1, j + x - 2
        if 0 <= row < 4 and 0 <= column < 5:
            there, here = row * 5 + column, y * 5 + x
            expected[(slice(None), here, there) if kind else (slice(None), there, here)] = masks[:, i * 5 + j, y, x]

    def forward(x):
        out = torch.zeros(2, 20, 4, 5, **DOUBLE)
        ext.psamask_forward(x, out, kind, *sizes)
        return out

    def backward(upstream):
        gradient = torch.zeros_like(masks)
        ext.psamask_backward(upstream, gradient, kind, *sizes)
        return gradient

    torch.testing.assert_close(forward(masks), expected.view(2, 20, 4, 5))
    assert_adjoint(forward, backward, masks.shape)


def test_wrong_input_raises_as_in_mmcv():
    features, out = random(1, 2, 5, 5), torch.zeros(1, 2, 2, 2, **DOUBLE)
    none = torch.zeros(0, **DOUBLE)
    settings = (none, none, 2, 2, 1.0, 0, 1, True)
    with pytest.raises(RuntimeError, match=r"rois is torch\.float32"):
        ext.roi_align_forward(features, REGIONS[:1].float(), out, *settings)
    with pytest.raises(RuntimeError, match=r"torch\.int64: expected a floating dtype"):
        ext.roi_align_forward(features.long(), REGIONS[:1].long(), out, *settings)
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="the features have 1"):
            ext.roi_align_forward(features, REGIONS[1:2], out, *settings)
        for wrong in (torch.tensor([[0.0, 4, 4, 2, 2]]), torch.tensor([[0.0, 4, 4, torch.nan, 8]])):
            with pytest.raises(RuntimeError, match="ROIs in ROIAlign"):
                ext.roi_align_forward(features, wrong.double(), out, *settings)
    offset, weight = torch.zeros(1, 18, 5, 5, **DOUBLE), torch.zeros(2, 2, 3, 3, **DOUBLE)
    convolution = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    result = torch.zeros(1, 2, 5, 5, **DOUBLE)
    ext.deform_conv_forward(features, weight, offset, result, none, none, *convolution)
    for wrong, words in (
        (dict(offset=offset[:, :16]), "offset has shape"),
        (dict(weight=weight[:, :1]), "do not match"),
        (dict(offset=offset.float()), r"offset is torch\.float32"),
    ):
        arguments = dict(input=features, weight=weight, offset=offset, output=result) | wrong
        with pytest.raises(RuntimeError, match=words):
            ext.deform_conv_forward(*arguments.values(), none, none, *convolution)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_regions_and_half_precision(dtype):
    features = random(1, 2, 5, 6).to(dtype)
    for op, columns in (("roi_align", 5), ("roi_align_rotated", 6), ("roi_pool", 5), ("prroi_pool", 5)):
        rois = torch.tensor([[0, 1.0, 1, 5, 5, 0.3]], device=DEVICE, dtype=dtype)[:, :columns]
        for some in (rois, rois[:0]):
            out = torch.zeros(len(some), 2, 2, 2, dtype=dtype, device=DEVICE)
            exact = torch.zeros(len(some), 2, 2, 2, **DOUBLE)
            for x, boxes, into in ((features, some, out), (features.double(), some.double(), exact)):
                extra = dict(
                    roi_align=(into.clone(), into.clone(), 2, 2, 1.0, 0, 1, True),
                    roi_align_rotated=(2, 2, 1.0, 0, True, False),
                    roi_pool=(into.int(), 2, 2, 1.0),
                    prroi_pool=(2, 2, 1.0),
                )[op]
                getattr(ext, f"{op}_forward")(x, boxes, into, *extra)
            torch.testing.assert_close(out.double(), exact, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=1e-3)
            gradient = torch.zeros_like(features)
            getattr(ext, f"{op}_backward")(torch.ones_like(out), *backward_arguments(op, some, out, gradient))
            assert gradient.isfinite().all() and bool(gradient.any()) == bool(len(some))


def backward_arguments(op, rois, out, gradient):
    if op == "roi_align":
        return rois, out, out, gradient, 2, 2, 1.0, 0, 1, True
    if op == "roi_align_rotated":
        return rois, gradient, 2, 2, 1.0, 0, True, False
    return (rois, *([torch.zeros_like(out).int()] if op == "roi_pool" else []), gradient, 2, 2, 1.0)
