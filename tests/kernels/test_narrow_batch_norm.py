"""Batch norm of few channels on a CPU: against float64, and where it is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels import narrow_batch_norm as m
from rtmdet_fast.kernels.bn_silu import bn_silu

EPS = 1e-3
# rows of one, several and all pixels; an odd number of pixels beside them
SHAPES = [(2, 12, 8, 8), (1, 24, 5, 6), (3, 8, 7, 4), (2, 40, 9, 2), (1, 3, 64, 64), (2, 12, 1, 1)]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    """And where the environment insists on Triton."""
    monkeypatch.setattr(m, "LEAST", 0)
    monkeypatch.setattr(_dispatch, "BACKEND", "torch")


def inputs(shape, mean=3.0, std=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * std + mean).contiguous(memory_format=torch.channels_last)
    weight, bias, running_mean = (torch.randn(shape[1], generator=g) for _ in range(3))
    return x, weight, bias, running_mean, torch.rand(shape[1], generator=g) + 0.1


def by_pytorch(x, running_mean, running_var, weight, bias, momentum, eps):
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)


def outputs(function, tensors, dy, differentiable=(True, True, True)):
    """y, dx, dweight, dbias (None of what has none) and the running statistics."""
    leaves = [t.detach().clone().requires_grad_(d) for t, d in zip(tensors[:3], differentiable, strict=True)]
    running = [t.clone() for t in tensors[3:]]
    y = function(leaves[0], *running, *leaves[1:], 0.1, EPS)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves), *running]


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("y", "dx", "dweight", "dbias", "mean", "var"), found, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max()), name  # NaN fails


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["", "dy contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, layout):
    tensors = inputs(shape)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    found = outputs(m.narrow_batch_norm, tensors, dy)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found[:2])
    assert_close(found, outputs(by_pytorch, [t.double() for t in tensors], dy), 1e-5)


def test_it_loses_fewer_digits_than_pytorch():
    """Of many pixels and a mean far from 0."""
    tensors, dy = inputs((8, 12, 64, 64), mean=100.0), torch.randn(8, 12, 64, 64)
    exact = outputs(by_pytorch, [t.double() for t in tensors], dy)
    errors = [
        [(a.double() - b).abs().max().item() for a, b in zip(outputs(f, tensors, dy), exact, strict=True)]
        for f in (m.narrow_batch_norm, by_pytorch)
    ]
    assert errors[0][0] < errors[1][0] and errors[0][1] < errors[1][1], errors
    assert_close(outputs(m.narrow_batch_norm, tensors, dy), exact, 1e-4)


def test_an_expanded_gradient():
    """As a sum over images has it."""
    tensors, dy = inputs((2, 12, 8, 8)), torch.randn(12, 8, 8).expand(2, 12, 8, 8)
    exact = outputs(by_pytorch, [t.double() for t in tensors], dy.clone())
    assert_close(outputs(m.narrow_batch_norm, tensors, dy), exact, 1e-5)


@pytest.mark.parametrize("differentiable", [(False, True, True), (True, False, False), (False, False, True)], ids=str)
def test_gradients_of_what_needs_one(differentiable):
    tensors, dy = inputs((2, 12, 8, 8)), torch.randn(2, 12, 8, 8)
    exact = outputs(by_pytorch, [t.double() for t in tensors], dy, differentiable)
    assert_close(outputs(m.narrow_batch_norm, tensors, dy, differentiable), exact, 1e-5)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["", "no_grad"])
def test_nothing_needs_a_gradient(grad_mode):
    """SiLU then overwrites what batch norm returned."""
    x, *parameters = inputs((2, 12, 8, 8))
    running = parameters[2].double(), parameters[3].double()
    expected = F.silu(by_pytorch(x.double(), *running, *(p.double() for p in parameters[:2]), 0.1, EPS))
    with torch.set_grad_enabled(grad_mode):
        y = bn_silu(x, *parameters, training=True, eps=EPS)
    assert not y.requires_grad and (y - expected).abs().max() < 1e-5 and x.equal(inputs(x.shape)[0])


def test_a_gradient_has_a_gradient_itself():
    tensors = [t.requires_grad_() for t in inputs((2, 12, 4, 4))[:3]]
    running = torch.zeros(12), torch.ones(12)

    def penalty(function, x, weight, bias):
        y = function(x, *(r.to(x.dtype) for r in running), weight, bias, 0.1, EPS)
        dx, dweight = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dweight.square().sum(), (x, weight, bias))

    exact = penalty(by_pytorch, *(t.detach().double().requires_grad_() for t in tensors))
    for a, b in zip(penalty(m.narrow_batch_norm, *tensors), exact, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_nan_reaches_everything_of_its_channel():
    tensors, dy = inputs((2, 12, 8, 8)), torch.randn(2, 12, 8, 8)
    tensors[0][1, 5, 3, 3] = torch.nan
    for name, found in zip("y dx dw db mean var".split(), outputs(m.narrow_batch_norm, tensors, dy), strict=True):
        channels = found if found.dim() == 1 else found.isnan().float().amax((0, 2, 3))
        lost = (channels.isnan() if found.dim() == 1 else channels > 0).nonzero().flatten().tolist()
        assert lost == ([] if name == "db" else [5]), name


def taken(monkeypatch, function):
    """How often `function` has a narrow batch norm."""
    calls, original = [], m._NarrowBatchNorm.apply
    monkeypatch.setattr(m._NarrowBatchNorm, "apply", lambda *a: calls.append(1) or original(*a))
    function()
    return len(calls)


def train(x):
    C = x.shape[1]
    return bn_silu(x, *(f(C).to(x.dtype) for f in (torch.ones, torch.zeros, torch.zeros, torch.ones)), training=True)


def test_where_it_is_taken(monkeypatch):
    x = inputs((2, 12, 8, 8))[0]
    assert taken(monkeypatch, lambda: train(x)) == 1
    pad = torch.zeros(2, 24, 8, 8).contiguous(memory_format=torch.channels_last)
    for other in (x.contiguous(), x[:, :, :, ::2], pad[:, :12], inputs((2, 16, 8, 8))[0], inputs((2, 72, 8, 8))[0]):
        assert taken(monkeypatch, lambda other=other: train(other)) == 0
    assert taken(monkeypatch, lambda: train(x.double())) == 0
    monkeypatch.setattr(m, "LEAST", x.numel() + 1)
    assert taken(monkeypatch, lambda: train(x)) == 0


def test_what_traces_or_transforms_takes_pytorchs_own(monkeypatch):
    x = inputs((2, 12, 8, 8))[0]
    with forward_ad.dual_level():
        assert taken(monkeypatch, lambda: train(forward_ad.make_dual(x, torch.ones_like(x)))) == 0
    assert taken(monkeypatch, lambda: torch.func.grad(lambda x: train(x).sum())(x)) == 0
    expected = train(x)
    compiled = torch.compile(train, backend="eager", fullgraph=True)
    assert taken(monkeypatch, lambda: compiled(x)) == 0
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_a_model_trains_with_it_as_without(monkeypatch):
    """The gradients of a stem and a stage; the model's own layout."""
    from rtmdet_fast import RTMDet

    model = RTMDet("nano", num_classes=2).train().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def gradients():
        model.zero_grad()
        sum(f.square().mean() for f in model.backbone(images)).backward()
        return torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None])

    found = []
    assert taken(monkeypatch, lambda: found.append(gradients())) == 2  # the stem, but its last
    monkeypatch.setattr(m, "LEAST", 2**40)
    expected = gradients()
    assert (found[0] - expected).norm() < 1e-3 * expected.norm()
