"""Accelerated modules against their originals: results, gradients, statistics, and all that must not change."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet, accelerate, acceleration, revert
from rtmdet_fast.acceleration import ATTENTION, DEPTHWISE, EPILOGUE, UNKNOWN
from rtmdet_fast.kernels import _dispatch

INTERPRETED = _dispatch.BACKEND == "triton"  # make test-triton
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="a whole model takes Triton's interpreter minutes")


def depthwise(channels: int, size: int = 5, stride: int = 1, **options) -> nn.Conv2d:
    options = {"padding": size // 2, "groups": channels, "bias": False} | options
    return nn.Conv2d(channels, channels, size, stride, **options)


def plain() -> nn.Sequential:
    """Dense, depth-wise (3, 5, 7; stride 2) and point-wise layers, one Sequential in another."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
        nn.Sequential(depthwise(6, 5), nn.BatchNorm2d(6), nn.SiLU()),
        depthwise(6, 3, 2, padding=(1, 1)),
        nn.BatchNorm2d(6),
        nn.SiLU(inplace=True),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        depthwise(4, 7),
        nn.BatchNorm2d(4),
        nn.SiLU(),
    )
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    return model


PLAIN = {"1": EPILOGUE, "3.1": DEPTHWISE, "5": DEPTHWISE, "11": DEPTHWISE}


def equal(found, expected) -> None:
    """To the bit where the reference runs, else within fp32's rounding."""
    if INTERPRETED:
        # the gradient of a bias before a BatchNorm is nothing but rounding, of sums of hundreds of numbers
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)
    else:
        assert torch.equal(found, expected)


def check_same(found: nn.Module, original: nn.Module, x: torch.Tensor, steps: int = 2) -> None:
    """Outputs, all gradients and all running statistics, in training and then in inference."""
    for model in (found, original):
        model.train()
    for _ in range(steps):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [model(leaf) for model, leaf in zip((found, original), leaves, strict=True)]
        equal(*outputs)
        g = torch.randn_like(outputs[1])
        for model, y in zip((found, original), outputs, strict=True):
            model.zero_grad()
            y.backward(g)
        equal(leaves[0].grad, leaves[1].grad)
        for (name, ours), theirs in zip(found.named_parameters(), original.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                equal(ours.grad, theirs.grad)
        for ours, theirs in zip(found.buffers(), original.buffers(), strict=True):
            equal(ours, theirs)
    for model in (found, original):
        model.eval()
    with torch.no_grad():
        equal(found(x), original(x))


@pytest.fixture
def fused_calls(monkeypatch):
    """Names of the fused ops in the order in which they are called."""
    import rtmdet_fast.models.fused

    calls: list[str] = []

    def counting(name):
        op = getattr(rtmdet_fast.models.fused, name)
        return lambda *args, **kwargs: (calls.append(name), op(*args, **kwargs))[1]

    for name in ("bn_silu", "dwconv_bn_silu"):
        monkeypatch.setattr(rtmdet_fast.models.fused, name, counting(name))
    return calls


def test_plain_layers(fused_calls):
    original = plain()
    model = copy.deepcopy(original)
    report = accelerate(model)
    assert report.replaced == PLAIN
    assert report.left == {"8": "before ReLU, not SiLU"}
    check_same(model, original, torch.randn(2, 3, 9, 12))
    assert fused_calls[:4] == ["bn_silu", "dwconv_bn_silu", "dwconv_bn_silu", "dwconv_bn_silu"]


def test_nothing_but_the_classes_changes():
    model = plain()
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules())
    classes = [type(m) for m in modules.values()]
    accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    assert dict(model.named_modules()) == modules
    assert isinstance(model, nn.Sequential) and isinstance(model[3], nn.Sequential)
    changed = [type(m) for m in modules.values()]
    assert accelerate(model).replaced == PLAIN and [type(m) for m in modules.values()] == changed  # again: no more
    revert(model)
    assert [type(m) for m in modules.values()] == classes
    assert list(map(id, model.modules())) == list(map(id, modules.values()))


def test_the_printout_names_and_groups():
    model = nn.Sequential(*(nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(6)), nn.ReLU())
    model.append(nn.BatchNorm2d(4))
    assert str(accelerate(model)) == (
        f"fused: 6\n  6x {DEPTHWISE}: 0.1, 1.1, 2.1, 3.1, … 2 more\nleft: 1\n  1x {UNKNOWN}: 7"
    )


class CircularConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, 3), weight, bias)


CONVOLUTIONS = {
    "has a bias": depthwise(4, bias=True),
    "dilation (2, 2)": depthwise(4, 3, dilation=2, padding=2),
    "padding mode circular": depthwise(4, padding_mode="circular"),
    "padding mode reflect": depthwise(4, padding_mode="reflect"),
    "padding (0, 0)": depthwise(4, padding=0),
    "padding valid": depthwise(4, padding="valid"),
    "kernel (9, 9)": depthwise(4, 9),
    "kernel (3, 5)": nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4, bias=False),
    "stride (3, 3)": depthwise(4, 5, 3),
    "stride (1, 2)": nn.Conv2d(4, 4, 3, (1, 2), 1, groups=4, bias=False),
    "CircularConv computes in its own way": CircularConv(4, 4, 3, padding=1, groups=4, bias=False),
}


@pytest.mark.parametrize("why", CONVOLUTIONS)
def test_other_convolutions_run_as_they_are(why, fused_calls):
    original = nn.Sequential(CONVOLUTIONS[why], nn.BatchNorm2d(4), nn.SiLU())
    model = copy.deepcopy(original)
    report = accelerate(model)
    assert report.replaced == {"1": EPILOGUE} and report.left == {"0": why}
    check_same(model, original, torch.randn(2, 4, 12, 12))
    assert set(fused_calls) == {"bn_silu"}


def test_padding_same_is_the_fused_one():
    original = nn.Sequential(depthwise(4, padding="same"), nn.BatchNorm2d(4), nn.SiLU())
    model = copy.deepcopy(original)
    assert accelerate(model).replaced == {"1": DEPTHWISE}
    check_same(model, original, torch.randn(2, 4, 7, 6))


def untracked() -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(4)
    bn.track_running_stats = False
    return bn


NORMS = {
    "momentum None (cumulative average)": nn.BatchNorm2d(4, momentum=None),
    "without running statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "without running statistics ": untracked(),
    "without weight or bias": nn.BatchNorm2d(4, affine=False),
    "InstanceNorm2d": nn.InstanceNorm2d(4),
    "before Hardswish, not SiLU": nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("why", NORMS)
def test_other_norms_and_activations_are_left_with_a_reason(why, fused_calls):
    act = nn.Hardswish() if "Hardswish" in why else nn.SiLU()
    original = nn.Sequential(depthwise(4), NORMS[why], act)
    model = copy.deepcopy(original)
    report = accelerate(model)
    if why == "InstanceNorm2d":
        assert report.left == {"0": UNKNOWN}
    else:
        assert report.left == {"0": why.strip(), "1": why.strip()}
    assert not report.replaced and type(model) is nn.Sequential
    check_same(model, original, torch.randn(2, 4, 6, 5))
    assert fused_calls == []


def test_one_dimensional_layers_are_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU())
    assert accelerate(model).left == {"1": "BatchNorm1d is not BatchNorm2d or SyncBatchNorm"}


def test_containers_with_a_forward_of_their_own_are_left():
    class Wider(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    class Callless(Block):
        forward = nn.Module.forward

    model = nn.ModuleList([Wider(depthwise(4), nn.BatchNorm2d(4), nn.SiLU()), Callless()])
    report = accelerate(model)
    assert not report.replaced
    assert report.left == dict.fromkeys(("0.0", "0.1", "1.conv", "1.bn"), UNKNOWN)
    patched = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
    patched.forward = lambda x: x
    assert accelerate(patched).left == {"1": "the forward of its Sequential was replaced"}


class Block(nn.Module):
    """As most libraries write it; LibreYOLO's RTMDet with `activate`, timm's efficientvit with `norm` and a dropout."""

    def __init__(self, conv="conv", bn="bn", act="act"):
        super().__init__()
        self.names, self.enabled, self.shift = [conv, bn, act], True, 0.0
        for name, layer in zip(self.names, (depthwise(4), nn.BatchNorm2d(4), nn.SiLU(inplace=True)), strict=True):
            self.add_module(name, layer)

    def forward(self, x):
        conv, bn, act = (getattr(self, name) for name in self.names)
        return act(bn(conv(x))) if self.enabled else x


class WithDropout(Block):
    def forward(self, x, skip=None):
        return super().forward(self.drop(x)) if skip is None else x + skip

    def __init__(self):
        super().__init__(bn="norm")
        self.drop = nn.Dropout(0.0)


@pytest.mark.parametrize("kind", [Block, lambda: Block("c", "norm", "activate"), WithDropout])
def test_any_container_is_known_by_what_its_forward_does(kind, fused_calls):
    original = nn.Sequential(kind(), kind())
    model = copy.deepcopy(original)
    modes = [m.training for m in model.modules()]
    model[0].names, state = list(model[0].names), {name: dict(vars(m)) for name, m in model.named_modules()}
    report = accelerate(model)
    bn = original[0].names[1]
    assert report.replaced == {f"0.{bn}": DEPTHWISE, f"1.{bn}": DEPTHWISE} and report.left == {}
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == state
    assert [m.training for m in model.modules()] == modes
    check_same(model, original, torch.randn(2, 4, 6, 5))
    assert fused_calls and set(fused_calls) == {"dwconv_bn_silu"}
    check_same(pickle.loads(pickle.dumps(model)), original, torch.randn(2, 4, 6, 5), steps=1)
    revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_a_container_runs_as_before_where_it_is_asked_something_else(fused_calls):
    model = WithDropout()
    accelerate(model)
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(model(x, skip=x), x + x)
    plain_block = Block()
    accelerate(plain_block)
    plain_block.enabled = False
    assert torch.equal(plain_block(x), x)
    plain_block.enabled = True
    del plain_block.act
    with pytest.raises(AttributeError, match="act"):
        plain_block(x)
    assert fused_calls == []


class Residual(Block):
    def forward(self, x):
        return x + super().forward(x)


class Moded(Block):
    def forward(self, x):
        return super().forward(x) if self.training else self.act(self.conv(x))


class ModedByChild(Block):
    def forward(self, x):
        return super().forward(x) if self.bn.training else self.conv(x)


class Remembering(Block):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class Shifted(Block):
    def forward(self, x):
        return super().forward(x + self.shift)


class Widened(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Frozen(Block):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class OfTwo(Block):
    def forward(self, x, y):
        return super().forward(x)


class Branching(Block):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class MadeElsewhere(Block):
    def __reduce__(self):
        return MadeElsewhere, ()


@pytest.mark.parametrize(
    "kind",
    [Residual, Moded, ModedByChild, Remembering, Shifted, Widened, Frozen, OfTwo, Branching, MadeElsewhere],
)
def test_containers_that_do_anything_else_are_left(kind):
    """Also those whose class has a name that is known."""
    kind = type("ConvNormAct", (kind,), {"__module__": "timm.models.of_somebody"})
    model = nn.Sequential(kind())
    modes = [m.training for m in model.eval().modules()]
    report = accelerate(model)
    assert report.replaced == {} and report.left == {"0.conv": UNKNOWN, "0.bn": UNKNOWN}
    assert type(model[0]) is kind and "last" not in vars(model[0])
    assert [m.training for m in model.modules()] == modes


def test_all_or_nothing(monkeypatch):
    """A class that cannot be changed: the containers before it are as they were."""

    class Fixed(Block):
        __slots__ = ()

        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("is what it is")
            super().__setattr__(name, value)

    model = nn.Sequential(Block(), Fixed(), Block())
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="is what it is"):
        accelerate(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_passes_its_own_check():
    """Which traces again without gradients, where a SiLU that comes last used to run in place."""
    x = torch.randn(1, 4, 8, 8)
    model = nn.Sequential(Block(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.SiLU(inplace=True)).eval()
    expected = model(x)
    accelerate(model)
    equal(torch.jit.trace(model, x)(x), expected)
    model = RTMDet("nano", num_classes=1).eval()
    images = torch.randn(1, 3, 64, 64)
    traced = torch.jit.trace(model, images, strict=False)
    for found, expected in zip(traced(images), model(images), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_frozen_norm_stays_frozen(fused_calls):
    original = plain()
    model = copy.deepcopy(original)
    accelerate(model)
    for m in (model, original):
        m.train()
        m[5].eval()  # as norm_eval does
        m[4].weight.requires_grad_(False)
        m[1].bias.requires_grad_(False)
    before = model[5].running_mean.clone()
    x = torch.randn(2, 3, 8, 8)
    for m in (model, original):
        m(x).square().sum().backward()
    assert torch.equal(model[5].running_mean, before) and model[5].num_batches_tracked == 0
    assert model[4].weight.grad is None and model[1].bias.grad is None
    equal(model[0].weight.grad, original[0].weight.grad)
    equal(model[5].weight.grad, original[5].weight.grad)
    assert "dwconv_bn_silu" in fused_calls


@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_children_fire(child, kind, fused_calls):
    model = nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU())
    before = copy.deepcopy(model)
    accelerate(model)
    called = []
    handle = getattr(model[child], f"register_{kind}_hook")(lambda *args: called.append(1))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert called == [1]
    equal(y, before(x))
    assert fused_calls == (["bn_silu"] if child == 0 else [])  # the convolution alone is as it was
    report = accelerate(model)
    assert report.left["0" if child == 0 else "1"] == "has hooks"
    handle.remove()
    model(x)
    assert fused_calls[-1] == "dwconv_bn_silu"


def test_hooks_on_the_container_and_on_tensors_fire():
    model = nn.Sequential(nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU()))
    called = []
    model[0].register_forward_hook(lambda *args: called.append("forward"))
    model[0].register_full_backward_hook(lambda *args: called.append("backward"))
    model[0][0].weight.register_hook(lambda grad: called.append("weight"))
    accelerate(model)
    model(torch.randn(2, 4, 6, 6, requires_grad=True)).sum().backward()
    assert sorted(called) == ["backward", "forward", "weight"]


def test_hooks_on_all_modules_fire():
    model = nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU())
    accelerate(model)
    called = []
    with nn.modules.module.register_module_forward_hook(lambda m, *args: called.append(type(m).__name__)):
        model(torch.randn(2, 4, 6, 6))
    assert called == ["Conv2d", "BatchNorm2d", "SiLU", "FusedSequential"]


def test_a_child_that_is_replaced_later_is_used(fused_calls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
    accelerate(model)
    model[1] = nn.Identity()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), nn.functional.silu(model[0](x))) and fused_calls == []
    model[1] = nn.SyncBatchNorm(4)  # one process: as BatchNorm
    model(x)
    assert fused_calls == ["bn_silu"]


def test_parametrised_weights_are_used():
    original = nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU())
    nn.utils.parametrizations.weight_norm(original[0])
    model = copy.deepcopy(original)
    assert accelerate(model).replaced == {"1": DEPTHWISE}
    check_same(model, original, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m, 0)), "save"])
def test_copies_and_files(copied, fused_calls):
    model = plain()
    accelerate(model)
    if copied == "save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copied(model)
    assert type(other) is type(model) and other[0].weight is not model[0].weight
    check_same(other, model, torch.randn(2, 3, 8, 8), steps=1)
    assert fused_calls.count("dwconv_bn_silu") == 2 * 2 * 3
    revert(other)
    assert type(other) is nn.Sequential
    plain().load_state_dict(model.state_dict())


def test_replicas_of_data_parallel():
    model = nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.SiLU())
    accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model) and replica.forward.__self__ is replica
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(nn.DataParallel(model)(x), model(x))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no float64 and bfloat16 of the references")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    original = plain().to(dtype)
    model = plain()
    accelerate(model)
    check_same(model.to(dtype), original, torch.randn(2, 3, 8, 8, dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="rounds in other places")
def test_autocast():
    original = plain()
    model = copy.deepcopy(original)
    accelerate(model)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), original(x)
    assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training):
    torch.compiler.reset()
    model = plain().train(training)
    other = copy.deepcopy(model)
    accelerate(model)
    x = torch.randn(2, 3, 8, 8)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, other(x))
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)


def test_own_models_are_fused_already():
    model = RTMDet("nano", num_classes=1)
    report = accelerate(model)
    assert report.replaced == report.left == {}
    assert str(report) == "fused: 0\nleft: 0"


MMCV = {
    "depth-wise": (dict(groups=4, padding=2), {"bn": DEPTHWISE}, {}),
    "dense": (dict(padding=2), {"bn": EPILOGUE}, {}),
    "reflect": (dict(groups=4, padding=2, padding_mode="reflect"), {"bn": EPILOGUE}, {"conv": "padding (0, 0)"}),
    "order": (dict(order=("norm", "conv", "act"), padding=2), {}, {"bn": "before Conv2d, not SiLU"}),
    "ReLU": (dict(act_cfg=dict(type="ReLU"), padding=2), {}, {"bn": "before ReLU, not SiLU"}),
    "no activation": (dict(act_cfg=None, padding=2), {}, {"bn": UNKNOWN}),
    "no norm": (dict(norm_cfg=None, padding=2), {}, {}),
    "spectral norm": (dict(with_spectral_norm=True, groups=4, padding=2), {"bn": EPILOGUE}, {"conv": "has hooks"}),
    "efficient": (dict(efficient_conv_bn_eval=True, padding=2), {}, {"bn": UNKNOWN}),
}


@pytest.mark.parametrize("kind", MMCV)
def test_mmcv_conv_module(kind, fused_calls):
    mmcv = pytest.importorskip("mmcv.cnn", reason="mmcv is not installed")
    options, replaced, left = MMCV[kind]
    original = mmcv.ConvModule(4, 4, 5, **({"norm_cfg": dict(type="BN"), "act_cfg": dict(type="SiLU")} | options))
    model = copy.deepcopy(original)
    report = accelerate(model)
    assert (report.replaced, report.left) == (replaced, left)
    assert isinstance(model, mmcv.ConvModule) and list(model.state_dict()) == list(original.state_dict())
    if not (INTERPRETED and kind == "efficient"):
        check_same(model, original, torch.randn(2, 4, 7, 6))
    assert bool(fused_calls) == bool(replaced)
    calls = len(fused_calls)
    x = torch.randn(2, 4, 7, 6)
    for skipped in ({"activate": False}, {"norm": False}):
        torch.testing.assert_close(model(x, **skipped), original(x, **skipped))
    assert len(fused_calls) == calls
    pickle.loads(pickle.dumps(model))
    revert(model)
    assert type(model) is mmcv.ConvModule


def test_mmdet_model(fused_calls):
    """A small RTMDet of mmdet's own: every layer of it runs fused, in training and in inference."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    common = dict(norm_cfg=dict(type="SyncBN"), act_cfg=dict(type="SiLU", inplace=True))
    original = MODELS.build(dict(type="mmdet.CSPNeXt", deepen_factor=0.167, widen_factor=0.125, **common))
    model = copy.deepcopy(original)
    report = accelerate(model)
    norms = [name for name, m in original.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert sorted(report.replaced) == sorted(norms) and report.left == {}
    assert sum(what == DEPTHWISE for what in report.replaced.values()) == 4
    check_same(nn.Sequential(model, Last()), nn.Sequential(original, Last()), torch.randn(2, 3, 64, 64), steps=1)
    assert fused_calls.count("dwconv_bn_silu") == 8
    assert model.state_dict().keys() == original.state_dict().keys()


class Last(nn.Module):
    def forward(self, features):
        return features[-1]


@pytest.mark.parametrize(
    ("options", "replaced", "left"),
    [
        (dict(groups=4), {"bn": DEPTHWISE}, {}),
        (dict(), {"bn": EPILOGUE}, {}),
        (dict(groups=4, bias=True), {"bn": EPILOGUE}, {"conv": "has a bias"}),
        (dict(groups=4, act_layer=nn.ReLU), {}, dict.fromkeys(("conv", "bn"), "before ReLU, not SiLU")),
        (dict(groups=4, drop_layer=nn.Dropout), {}, dict.fromkeys(("conv", "bn"), "drops some of its output")),
        (dict(groups=4, stride=2, aa_layer="avg"), {"bn": DEPTHWISE}, {}),
    ],
)
def test_timm_conv_norm_act(options, replaced, left, fused_calls):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    original = layers.ConvNormAct(4, 4, 3, **({"act_layer": nn.SiLU} | options))
    model = copy.deepcopy(original)
    report = accelerate(model)
    assert (report.replaced, report.left) == (replaced, left)
    if "drop_layer" not in options:
        check_same(model, original, torch.randn(2, 4, 7, 6))
    assert set(fused_calls) == (
        {"dwconv_bn_silu" if DEPTHWISE in replaced.values() else "bn_silu"} if replaced else set()
    )
    revert(model)
    assert type(model) is layers.ConvNormAct and type(model.bn) is layers.BatchNormAct2d


def test_timm_hooks_fire():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    model = layers.ConvNormAct(4, 4, 3, groups=4, act_layer=nn.SiLU)
    accelerate(model)
    called = []
    model.bn.register_forward_hook(lambda *args: called.append("bn"))
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(model(x), copy.deepcopy(model.eval().train())(x))
    assert called == ["bn", "bn"]


def test_timm_model(fused_calls):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    original = timm.create_model("efficientnet_b0", num_classes=3, drop_path_rate=0.0)
    model = copy.deepcopy(original)
    report = accelerate(model)
    assert len(report.replaced) > 30
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), original.eval()(x))
    assert len(fused_calls) == len(report.replaced)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = plain()
    model[9] = nn.SiLU()  # on a CPU only the fused one synchronises
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    accelerate(model)
    x = torch.randn(4, 3, 8, 8).chunk(2)[rank]
    y = model(x)
    y.square().sum().backward()
    torch.save((y.detach(), model[4].weight.grad, model[5].running_var), folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(INTERPRETED, reason="the reference is enough")
def test_sync_batch_norm(tmp_path):
    """Two processes with half a batch each against plain BatchNorm over the whole batch."""
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    torch.manual_seed(0)
    model = plain()
    model[9] = nn.SiLU()
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]]), y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1] + found[1][1], model[4].weight.grad, rtol=1e-3, atol=1e-4)
    for rank in range(2):
        torch.testing.assert_close(found[rank][2], model[5].running_var, rtol=1e-4, atol=1e-6)


def rtdetr_of_transformers(version: int, **options) -> tuple[nn.Module, torch.Tensor]:
    """A small one with random weights, some of its layers' too that start at zero, and images that are no squares."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra bench)")
    names = (
        ("RTDetrConfig", "RTDetrForObjectDetection")
        if version == 1
        else ("RTDetrV2Config", "RTDetrV2ForObjectDetection")
    )
    config, model = (getattr(transformers, name) for name in names)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    torch.manual_seed(0)
    made = model(
        config(
            backbone_config=backbone, encoder_in_channels=[16, 24, 32], feat_strides=[8, 16, 32], encoder_hidden_dim=32,
            encoder_ffn_dim=32, d_model=32, decoder_in_channels=[32, 32, 32], decoder_layers=2, decoder_ffn_dim=32,
            decoder_attention_heads=4, encoder_attention_heads=4, num_queries=20, num_denoising=0, num_labels=3,
            anchor_image_size=None, **options,
        )
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter, std=0.5)
    return made, torch.rand(2, 3, 96, 128)


@not_interpreted
@pytest.mark.parametrize("kind", ["v1", "v2", "v2 discrete"])
def test_attention_of_transformers(kind):
    """Outputs and gradients of the whole model, where the loss knows both."""
    version = int(kind[1])
    model, images = rtdetr_of_transformers(version, **({"decoder_method": "discrete"} if "discrete" in kind else {}))
    model.train()  # BatchNorm stays the model's own: revert() below undoes what else is fused
    original = copy.deepcopy(model)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    done = accelerate(model)
    names = [name for name, what in done.replaced.items() if what == ATTENTION]
    assert names == [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    called = []
    results = []
    for which in (model, original):
        out = which(images)
        called.append(type(which.model.decoder.layers[0].encoder_attn).__name__)
        loss = out.logits.square().sum() + out.pred_boxes.square().sum()
        names = [name for name, _ in which.named_parameters()]
        grads = torch.autograd.grad(loss, list(which.parameters()), allow_unused=True)
        results.append((out.logits, out.pred_boxes, dict(zip(names, grads, strict=True))))
    assert called[0] == f"Fused{called[1]}"
    ours, theirs = results
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-5)
    moved = 0
    for name, grad in theirs[2].items():
        found = ours[2][name]
        assert (found is None) == (grad is None), name
        if grad is not None:
            assert (found - grad).abs().max() <= 1e-4 * max(1, grad.abs().max()), name
            moved += "sampling_offsets" in name and bool(grad.any())
    assert moved == (0 if "discrete" in kind else 4)
    revert(model)
    assert all(
        torch.equal(x, state[name])
        for name, x in model.state_dict().items()
        if "running" not in name and "tracked" not in name
    )
    assert [type(part) for part in model.modules()] == [type(part) for part in original.modules()]


@not_interpreted
def test_attention_of_transformers_with_weights_recorded_and_padding():
    """What it returns beside the result; and a mask, which it takes from a call."""
    model, images = rtdetr_of_transformers(2)
    model.eval()
    expected = model(images, output_attentions=True).cross_attentions
    attention = model.model.decoder.layers[0].encoder_attn
    memory, mask = torch.rand(2, 20, 32), torch.rand(2, 20) > 0.3
    call = dict(
        hidden_states=torch.rand(2, 5, 32), encoder_hidden_states=memory, attention_mask=mask,
        position_embeddings=torch.rand(2, 5, 32), reference_points=torch.rand(2, 5, 1, 4),
        spatial_shapes=torch.tensor([[3, 4], [2, 3], [1, 2]]), spatial_shapes_list=[(3, 4), (2, 3), (1, 2)],
    )  # fmt: skip
    masked = attention(**call)
    accelerate(model)
    for found, want in zip(model(images, output_attentions=True).cross_attentions, expected, strict=True):
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(attention(**call), masked, rtol=1e-5, atol=1e-5)


def deformable_attention_core_func(value, value_spatial_shapes, sampling_locations, attention_weights):
    """The published function of version 1, by its signature: locations [B, Q, H, L, P, 2]."""
    return deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4),
        [sampling_locations.shape[4]] * len(value_spatial_shapes),
    )  # fmt: skip


def deformable_attention_core_func_v2(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    samples = []
    levels = value.split([h * w for h, w in value_spatial_shapes], 1)
    for level, places, (h, w) in zip(
        levels, sampling_locations.split(num_points_list, 3), value_spatial_shapes, strict=True
    ):
        image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
        places = places.transpose(1, 2).flatten(0, 1)
        if method == "default":
            samples.append(nn.functional.grid_sample(image, 2 * places - 1, align_corners=False))
            continue
        index = (places * torch.tensor([w, h]) + 0.5).long().clamp(0, h - 1)  # x too, as published
        samples.append(torch.stack([i[:, p[..., 1], p[..., 0]] for i, p in zip(image, index, strict=True)]))
    weights = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]
    out = (torch.cat(samples, 3) * weights).sum(3)
    return out.unflatten(0, (len(value), -1)).flatten(1, 2).transpose(1, 2)


class MSDeformableAttention(nn.Module):
    """A stand-in with the layout of the published class; version 2 has a list of points."""

    def __init__(self, embed_dim=32, num_heads=4, num_levels=3, num_points=4, version=1, method="default"):
        super().__init__()
        self.embed_dim, self.num_heads, self.num_levels, self.num_points = embed_dim, num_heads, num_levels, num_points
        self.version = version
        counts = num_points if isinstance(num_points, list) else [num_points] * num_levels
        if version == 2:
            self.num_points_list, self.offset_scale, self.method = counts, 0.5, method
            self.register_buffer("num_points_scale", torch.tensor([1 / n for n in counts for _ in range(n)]))
            self.ms_deformable_attn_core = partial(deformable_attention_core_func_v2, method=method)
        else:
            self.ms_deformable_attn_core = deformable_attention_core_func
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * sum(counts) * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * sum(counts))
        self.value_proj, self.output_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, query, reference_points, value, value_spatial_shapes, value_mask=None):
        (B, Q), H = query.shape[:2], self.num_heads
        value = self.value_proj(value)
        if value_mask is not None:
            value = value * value_mask.to(value.dtype)[..., None]
        value = value.view(B, -1, H, self.embed_dim // H)
        offsets = self.sampling_offsets(query).view(B, Q, H, -1, 2)
        weights = self.attention_weights(query).view(B, Q, H, -1).softmax(3)
        centre, size = reference_points[:, :, None, :, :2], reference_points[:, :, None, :, 2:]
        if self.version == 2:
            places = centre + offsets * self.num_points_scale[:, None] * size * self.offset_scale
            out = self.ms_deformable_attn_core(value, value_spatial_shapes, places, weights, self.num_points_list)
        else:
            offsets = offsets.view(B, Q, H, self.num_levels, self.num_points, 2)
            places = centre[:, :, :, :, None] + offsets / self.num_points * size[:, :, :, :, None] * 0.5
            weights = weights.view(B, Q, H, self.num_levels, self.num_points)
            out = self.ms_deformable_attn_core(value, value_spatial_shapes, places, weights)
        return self.output_proj(out)


PUBLISHED = {
    "v1": {},
    "v2": dict(version=2, num_points=[2, 4, 3]),
    "v2 discrete": dict(version=2, num_points=[2, 4, 3], method="discrete"),
}


def published(kind: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = nn.ModuleList([MSDeformableAttention(**PUBLISHED[kind]), nn.Linear(2, 2)])
    sizes = [[4, 6], [2, 3], [1, 2]]  # wide
    return model, (torch.rand(2, 7, 32), torch.rand(2, 7, 1, 4), torch.rand(2, 32, 32), sizes)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_attention_of_the_published_implementation(kind, monkeypatch):
    model, inputs = published(kind)
    original = copy.deepcopy(model)
    assert accelerate(model).replaced == {"0": ATTENTION}
    results = []
    for attention in (model[0], original[0]):
        leaves = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
        out = attention(*leaves)
        wanted = [*attention.parameters(), leaves[0], leaves[1], leaves[2]]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied[0](*inputs), model[0](*inputs))
    # and it was ours that ran
    monkeypatch.setattr(acceleration, "box_deformable_attention", None)
    with pytest.raises(TypeError, match="NoneType"):
        model[0](*inputs)
    revert(model)
    assert type(model[0]) is MSDeformableAttention
    assert torch.equal(model[0](*inputs), original[0](*inputs))


def test_attention_that_is_called_or_made_in_other_ways_runs_as_it_did(monkeypatch):
    model, (query, references, value, sizes) = published("v2")
    original = copy.deepcopy(model)
    assert accelerate(model).replaced == {"0": ATTENTION}
    monkeypatch.setattr(acceleration, "box_deformable_attention", None)
    mask = torch.rand(2, 32) > 0.5
    assert torch.equal(
        model[0](query, references, value, sizes, mask), original[0](query, references, value, sizes, mask)
    )
    for changed in (model[0], original[0]):
        changed.offset_scale = 0.25
    assert torch.equal(model[0](query, references, value, sizes), original[0](query, references, value, sizes))

    model, _ = published("v1")
    model[0].forward = lambda *args: None
    assert accelerate(model).left == {"0": "its forward was replaced"}

    class Other(MSDeformableAttention):
        def forward(self, query, reference_points, value):
            return query

    assert not accelerate(nn.Sequential(Other())).replaced
    model, _ = published("v1")
    model[0].ms_deformable_attn_core = lambda *args: None
    assert not accelerate(model).replaced
