"""What the fused ops keep for their backward pass, and for how long; what they do where autograd is another one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from lowering import needs_lowering, record_launches
from torch.utils._python_dispatch import TorchDispatchMode

from rtmdet_fast.kernels import _dispatch, batch_norm, bn_silu, dwconv_bn_silu, dynamic_mask, dynamic_mask_triton

pytestmark = needs_lowering


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    return record_launches(monkeypatch, batch_norm, bn_silu, dwconv_bn_silu, dynamic_mask_triton)


def layer(name):
    """A function of x [2, 3, 8, 8], in training."""
    weight, bias = (torch.ones(3, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(3), torch.ones(3)
    kernel = torch.ones(3, 1, 5, 5, requires_grad=True)
    if name == "bn_silu":
        return lambda x: bn_silu.bn_silu(x, weight, bias, mean, var, training=True)
    return lambda x: dwconv_bn_silu.dwconv_bn_silu(x, kernel, weight, bias, mean, var, training=True)


def mask_loss(features, kernels):
    index = torch.zeros(len(kernels), dtype=torch.int64)
    masks = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    points, strides = torch.rand(len(kernels), 2), torch.ones(len(kernels))
    return dynamic_mask.dynamic_mask_dice_loss(features, kernels, points, strides, index, masks, index)


@pytest.mark.parametrize("name", ["bn_silu", "dwconv_bn_silu"])
def test_a_forward_pass_without_a_backward_one_is_freed(name):
    function = layer(name)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    function(x)  # registers the op, which keeps frames
    gc.collect()
    gc.disable()  # a cycle through autograd's nodes it would never find
    try:
        h = x * 1
        y = function(h)
        alive = [weakref.ref(h), weakref.ref(y.grad_fn)]
        del h, y
        assert [ref() is None for ref in alive] == [True, True]
    finally:
        gc.enable()


class Zeros(TorchDispatchMode):
    """Counts the elements that are filled with zeros."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "zero" in str(function) and isinstance(out, torch.Tensor):
            self.count += out.numel()
        return out


@pytest.mark.parametrize("name", ["bn_silu", "dwconv_bn_silu"])
def test_backward_fills_no_zeros(name):
    y = layer(name)(torch.randn(2, 3, 8, 8, requires_grad=True))
    dy = torch.ones_like(y)
    with Zeros() as zeros:
        y.backward(dy)
    assert zeros.count == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_of_masks_fills_no_zeros_for_its_sums(backend, monkeypatch):
    monkeypatch.setattr(dynamic_mask, "use_triton", lambda x: backend == "triton")
    features = torch.rand(1, 8, 8, 8, requires_grad=True)
    loss = mask_loss(features, torch.rand(3, 169, requires_grad=True))
    dloss = torch.ones_like(loss)
    with Zeros() as zeros:
        loss.backward(dloss)
    assert zeros.count == 0


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("name", ["bn_silu", "dwconv_bn_silu", "masks"])
def test_no_gradient_from_what_comes_after(name):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = mask_loss(torch.rand(1, 8, 8, 8, requires_grad=True), torch.rand(3, 169)) if name == "masks" else layer(name)(x)
    NoGradient.apply(y).sum().backward()
    assert x.grad is None


def reference_and_op(name):
    weight, bias, mean, var = torch.rand(3), torch.rand(3), torch.zeros(3), torch.ones(3)
    if name == "bn_silu":
        return tuple(lambda x, f=f: f(x, weight, bias, mean, var) for f in (bn_silu.bn_silu_reference, bn_silu.bn_silu))
    kernel = torch.rand(3, 1, 5, 5)
    functions = dwconv_bn_silu.dwconv_bn_silu_reference, dwconv_bn_silu.dwconv_bn_silu
    return tuple(lambda x, f=f: f(x, kernel, weight, bias, mean, var) for f in functions)


@pytest.mark.parametrize("name", ["bn_silu", "dwconv_bn_silu"])
def test_forward_mode_and_transforms_take_the_reference(name, launches):
    """The ops have no rule for them, and without gradients would drop the tangent in silence."""
    reference, op = reference_and_op(name)
    x, tangent = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected = torch.func.jvp(reference, (x,), (tangent,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), fwAD.dual_level():
            found = fwAD.unpack_dual(op(fwAD.make_dual(x, tangent)))
        torch.testing.assert_close(found.tangent, expected[1])
    torch.testing.assert_close(torch.func.jvp(op, (x,), (tangent,)), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda x: op(x).sum())(x), torch.func.grad(lambda x: reference(x).sum())(x)
    )
    torch.testing.assert_close(torch.func.vmap(op)(x[None]), torch.func.vmap(reference)(x[None]))
    assert not launches
    with torch.no_grad():
        op(x)
    assert launches  # and nothing else does
