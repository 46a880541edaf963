"""letterbox_normalize: reference and Triton kernel against float64, and against what the CPU's own path makes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lowering import TARGETS, needs_lowering, record_launches
from on_triton import DEVICE, needs_triton
from torch.library import opcheck

from rtmdet_fast.inference.preprocess import MEAN, STD, letterbox, normalize, squash
from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels import letterbox as m

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
BOTH = [
    pytest.param(m.letterbox_normalize_reference, id="reference"),
    pytest.param(m.letterbox_normalize, marks=needs_triton, id="triton"),
]
FITS = [pytest.param(False, id="letterbox"), pytest.param(True, id="squash")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))  # the grey levels themselves
# smaller, larger, as large, flat, of one pixel
SIZES = [(1, 1), (9, 16), (16, 9), (5, 3), (7, 7), (14, 14), (13, 2), (1, 12), (2, 1)]


def noise(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(256, size=(*size, 3), dtype=np.uint8) for size in sizes]


def buffer(images, spare=11, fill=77):
    """frames and sizes of these images, with `spare` bytes behind the longest."""
    frames = torch.full((len(images), max(image.size for image in images) + spare), fill, dtype=torch.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[: image.size] = torch.from_numpy(image.ravel())
    return frames.to(DEVICE), torch.tensor([image.shape[:2] for image in images], dtype=torch.int32, device=DEVICE)


def taps(i, size, new, antialias):
    """The pixels that pixel i of an axis is the mean of, and their weights, from exact fractions."""
    support = max(size / new, 1.0) if antialias else 1.0
    place = (i + Fraction(1, 2)) * size / new - Fraction(1, 2)
    near = range(math.floor(place - Fraction(support)), math.ceil(place + Fraction(support)) + 1)
    weights = {j: max(0.0, 1 - float(abs(j - place)) / support) for j in near}
    if not antialias:  # beyond the border its last pixel goes on
        merged = dict.fromkeys(range(size), 0.0)
        for j, weight in weights.items():
            merged[min(max(j, 0), size - 1)] += weight
        weights = merged
    weights = {j: weight for j, weight in weights.items() if 0 <= j < size and weight}
    total = sum(weights.values())
    return list(weights), np.array([weight / total for weight in weights.values()])


def oracle(image, size, squashed):
    """The canvas in float64, without any rounding, NaN where it is padding; and its content's height and width."""
    h, w = image.shape[:2]
    ratio = size / max(h, w)
    new_h, new_w = (size if squashed else max(int(side * ratio + 0.5), 1) for side in (h, w))
    columns = [taps(i, w, new_w, squashed) for i in range(new_w)]
    rows = [taps(i, h, new_h, squashed) for i in range(new_h)]
    wide = np.stack([np.tensordot(image[:, at].astype(float), weight, (1, 0)) for at, weight in columns], 1)
    canvas = np.full((size, size, 3), np.nan)
    canvas[:new_h, :new_w] = np.stack([np.tensordot(wide[at], weight, (0, 0)) for at, weight in rows])
    return canvas


def canvases(function, images, size, **options):
    """[B, S, S, 3] in grey levels."""
    found = function(*buffer(images), size, **PLAIN | options)
    return found.permute(0, 2, 3, 1).cpu().double().numpy()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("squashed", FITS)
def test_parity_with_float64(function, squashed):
    images = noise(SIZES)
    for image, found in zip(images, canvases(function, images, 7, squash=squashed), strict=True):
        expected = oracle(image, 7, squashed)
        padding = np.isnan(expected)
        assert (found[padding] == 114).all() and (found == found.round()).all()
        # half a level of rounding and what OpenCV's weights of 11 bits cost, or Pillow's byte between the passes
        assert np.abs(found - expected)[~padding].max() <= 1


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("size", [1, 5, 13])
def test_the_letterbox_is_that_of_the_cpu(function, size):
    images = noise(SIZES, seed=size)
    for image, found in zip(images, canvases(function, images, size, pad=3), strict=True):
        expected, _ = letterbox(image, size, pad_value=3)
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.01  # of many, 1 in 1000


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("size", [3, 6])
def test_the_squash_is_that_of_the_cpu(function, size):
    images = noise(SIZES, seed=size)
    different = []
    for image, found in zip(images, canvases(function, images, size, squash=True), strict=True):
        expected, _ = squash(image, size)
        assert np.abs(found - expected).max() <= 1
        if image.shape[0] <= size:  # of higher ones some versions of Pillow take the columns first
            different.append(np.mean(found != expected))
    assert np.mean(different) < 0.05


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalisation(function, dtype, channels_last):
    images = noise([(4, 7), (3, 2)])
    options = dict(dtype=dtype, channels_last=channels_last)
    found = function(*buffer(images), 4, mean=MEAN, std=STD, **options)
    levels = canvases(m.letterbox_normalize_reference, images, 4)
    expected = normalize(torch.from_numpy(levels).permute(0, 3, 1, 2))
    assert found.dtype == dtype and found.shape == (2, 3, 4, 4)
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert (found.cpu().float() - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    # RT-DETR's: RGB in 0..1, the three channels by themselves
    found = function(*buffer(images), 4, mean=(0, 8, 16), std=(255, 100, 50), squash=True, rgb=True, **options)
    levels = canvases(m.letterbox_normalize_reference, images, 4, squash=True)
    for channel, (mean, std) in enumerate([(0, 255), (8, 100), (16, 50)]):
        expected = torch.from_numpy((levels[..., 2 - channel] - mean) / std)
        apart = (found[:, channel].cpu() - expected).abs() - 6 * torch.finfo(dtype).eps
        # the two may round a half to another level
        assert apart.max() <= 1 / std and (apart > 0).double().mean() < 0.1


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("squashed", FITS)
def test_what_follows_a_frame_does_not_matter(function, squashed):
    images = noise([(5, 8), (1, 3), (3, 3)])
    sizes = buffer(images)[1]
    zeros, ones = (function(buffer(images, 500, fill)[0], sizes, 4, **PLAIN, squash=squashed) for fill in (0, 255))
    tight = function(buffer(images, 0)[0], sizes, 4, **PLAIN, squash=squashed)
    assert torch.equal(zeros, ones) and torch.equal(zeros, tight)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("squashed", FITS)
def test_frames_of_nothing_and_sizes_beyond_the_buffer(function, squashed):
    frames = torch.full((6, 71), 255, dtype=torch.uint8, device=DEVICE)
    sizes = torch.tensor([[8, 10], [0, 0], [0, 5], [4, 0], [-3, 5], [4, 5]], dtype=torch.int32, device=DEVICE)
    found = function(frames, sizes, 5, **PLAIN, squash=squashed)
    # the first frame's third row passes its end: it is black from there on, and not the next frame's
    assert (found[0, :, 0] == 255).all() and (found[0, :, 3] == 0).all()
    assert (found[1:5] == 114).all() and (found[5, :, 0] == 255).all()
    scales = m.letterbox_scales(sizes, 5, squash=squashed)
    assert scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("function", BOTH)
def test_sides_are_rounded_as_python_rounds_them(function):
    # side * size / longest is a half: Python's division and product decide
    cases = [(size, *sides) for size in (9, 10, 12, 13) for sides in _halves(size)]
    exact = [math.floor(Fraction(side * size, longest) + Fraction(1, 2)) for size, longest, side in cases]
    python = [int(side * (size / longest) + 0.5) for size, longest, side in cases]
    assert sum(a != b for a, b in zip(exact, python, strict=True)) >= 4
    for size, longest, side in cases:
        image = np.full((longest, side, 3), 200, np.uint8)
        canvas, scale = letterbox(image, size)
        frames, sizes = buffer([image])
        found = function(frames, sizes, size, **PLAIN)[0].permute(1, 2, 0).cpu().numpy()
        assert np.array_equal(found, canvas)
        assert m.letterbox_scales(sizes, size)[0].tolist() == pytest.approx(scale, rel=1e-6)


def _halves(size):
    found = [(n, s) for n in range(size, 160) for s in range(1, n) if 2 * s * size % n == 0 and 2 * s * size // n % 2]
    wrong = [
        (n, s) for n, s in found if int(s * (size / n) + 0.5) != math.floor(Fraction(s * size, n) + Fraction(1, 2))
    ]
    return [*wrong[:1], *found[:1]]


@pytest.mark.parametrize("function", BOTH)
def test_places_in_long_frames_are_exact(function):
    """In fp32 a place near 300,000 would be off by a sixtieth of a pixel."""
    width, size = 300_007, 8
    image = noise([(1, width)])[0]
    expected = np.zeros((size, 3))
    for i in range(size):
        place = (i + Fraction(1, 2)) * width / size - Fraction(1, 2)
        first, part = math.floor(place), float(place - math.floor(place))
        expected[i] = image[0, first] * (1 - part) + image[0, first + 1] * part
    assert np.abs(canvases(function, [image], size)[0][0] - expected).max() <= 1


@pytest.mark.parametrize("function", BOTH)
def test_averages_of_many_pixels(function):
    image = noise([(2, 81)])[0]
    assert np.abs(canvases(function, [image], 2, squash=True)[0] - oracle(image, 2, True)).max() <= 1


def test_scales_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 3000, size=(300, 2))
    letterboxed, squashed = (m.letterbox_scales(torch.tensor(sizes).int(), 64, squash=s) for s in (False, True))
    assert letterboxed.dtype == squashed.dtype == torch.float32
    for (h, w), found, other in zip(sizes.tolist(), letterboxed.tolist(), squashed.tolist(), strict=True):
        ratio = 64 / max(h, w)
        new_h, new_w = (max(int(side * ratio + 0.5), 1) for side in (h, w))
        assert found == pytest.approx([new_w / w, new_h / h], rel=1e-6)
        assert other == pytest.approx([64 / w, 64 / h], rel=1e-6)


def test_on_a_cpu_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "auto")
    frames, sizes = (x.cpu() for x in buffer(noise([(9, 20)])))
    options = dict(mean=MEAN, std=STD, squash=True, rgb=True, dtype=torch.bfloat16, channels_last=False, pad=1)
    found = m.letterbox_normalize(frames, sizes, 8, **options)
    assert torch.equal(found, m.letterbox_normalize_reference(frames, sizes, 8, **options))


FRAMES, SHAPES = torch.zeros(2, 30, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.int32)
BAD = {
    "frames: expected uint8": dict(frames=FRAMES.float()),
    "frames: expected shape": dict(frames=FRAMES.view(2, 2, 5, 3)),
    "frames: expected contiguous bytes": dict(frames=torch.zeros(2, 60, dtype=torch.uint8)[:, ::2]),
    "frames: expected contiguous bytes, got strides": dict(frames=torch.zeros(2, 60, dtype=torch.uint8)[:, :30]),
    "frames: expected shape .* 0": dict(frames=FRAMES[:, :0]),
    "sizes: expected int32": dict(sizes=SHAPES.long()),
    "sizes: expected contiguous shape": dict(sizes=SHAPES[:1]),
    "sizes: on meta": dict(sizes=SHAPES.to("meta")),
    "out_size: expected 1..16384 pixels, got 0": dict(out_size=0),
    "mean: expected 3 numbers, got 1": dict(mean=(0,)),
    "std: expected no 0": dict(std=(1, 0, 1)),
    "pad: expected a grey level 0..255, got 256": dict(pad=256),
    "dtype: expected float32": dict(dtype=torch.int8),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments = dict(frames=FRAMES, sizes=SHAPES, out_size=8, **PLAIN) | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        m.letterbox_normalize(**arguments)


@needs_triton
@pytest.mark.parametrize("squashed", FITS)
def test_opcheck(squashed):
    tests = ("test_schema",) + ("test_faketensor",) * (DEVICE == "cuda")
    arguments = *buffer(noise([(3, 5)])), 4, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], 114, squashed, True
    for channels_last in (False, True):
        opcheck(m._letterbox.library_op, (*arguments, torch.float16, channels_last), test_utils=tests)


@needs_lowering
@pytest.mark.parametrize("channels_last", [True, False])
def test_traces_for_torch_compile(monkeypatch, channels_last):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", gpu)
    written = []

    def collect(graph, inputs):
        nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend(node.kwargs["tensors_to_clone"] for node in nodes)
        shape = (2, 3, 8, 8)
        result = torch.zeros(shape, dtype=torch.float16)
        return make_boxed_func(lambda *_: [result.to(memory_format=torch.channels_last) if channels_last else result])

    torch._dynamo.reset()
    options = dict(mean=MEAN, std=STD, dtype=torch.float16, channels_last=channels_last)
    compiled = torch.compile(
        lambda frames, sizes: m.letterbox_normalize(frames, sizes, 8, **options) * 2,
        backend=aot_autograd(fw_compiler=collect),
        fullgraph=True,
    )
    assert compiled(*(x.cpu() for x in buffer(noise([(9, 7), (5, 5)])))).shape == (2, 3, 8, 8)
    assert written == [["out_ptr"]]


@needs_lowering
@pytest.mark.parametrize(
    ("target", "squashed", "dtype", "channels_last"),
    [
        case if i % 7 == 0 else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(product(TARGETS, (False, True), DTYPES, (True, False)))
    ],
)
def test_lowering(target, squashed, dtype, channels_last, monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    launches = record_launches(monkeypatch, m)
    frames, sizes = torch.zeros(2, 999, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.int32)
    options = dict(mean=MEAN, std=STD, squash=squashed, dtype=dtype, channels_last=channels_last)
    for size in (640, 1280, 417):
        m.letterbox_normalize(frames, sizes, size, **options)
    launches = set(launches)
    assert len(launches) == 2  # sizes of 16 n, and others: no more is compiled
    for launch in launches:
        resources = launch.lower(target)
        assert resources.spills == 0, launch
        assert resources.registers <= 128, launch


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("squashed", FITS)
def test_one_graph_serves_frames_of_every_size(squashed):
    options = dict(mean=MEAN, std=STD, squash=squashed, dtype=torch.float16)
    small, large = (buffer(noise(sizes), 3 * 900 * 1200) for sizes in ([(37, 50), (9, 9)], [(900, 1200), (640, 33)]))
    frames = torch.zeros(2, 3 * 900 * 1200, dtype=torch.uint8, device=DEVICE)
    sizes = torch.zeros_like(small[1])

    def load(source):
        frames.copy_(source[0][:, : frames.shape[1]])
        sizes.copy_(source[1])

    load(small)
    with torch.no_grad():
        eager = m.letterbox_normalize(frames, sizes, 640, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = m.letterbox_normalize(frames, sizes, 640, **options)
        for source in (small, large, small):
            load(source)
            graph.replay()
            assert torch.equal(found, m.letterbox_normalize(frames, sizes, 640, **options))
        assert torch.equal(found, eager)
        reference = m.letterbox_normalize_reference(frames, sizes, 640, **options)
    apart = (found.double() - reference.double()).abs() * max(STD)
    assert apart.max() <= 1.1 and (apart > 0.1).double().mean() < 0.01
