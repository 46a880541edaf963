"""Fused layers inside somebody else's model: `accelerate(model)`, undone by `revert(model)`.

A container whose `forward` is known (mmcv's ConvModule, timm's ConvNormAct and BatchNormAct2d, nn.Sequential, and what
inherits theirs) gets a class that inherits from its own and runs depth-wise convolution + BatchNorm + SiLU, or
BatchNorm + SiLU, in one kernel. Nothing else changes: the objects, their children, parameters, buffers and hooks are
the same ones, so state_dict, optimisers, `.to()`, train() and eval(), DDP and `isinstance` go on as before.

Every forward pass looks whether that still holds: with a hook on a convolution, BatchNorm or activation, or with one of
them replaced by something else, the container runs as it did originally.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from rtmdet_fast.models.rtmdet.layers import ConvModule, fused_bn_silu

DEPTHWISE = "depth-wise convolution + BatchNorm + SiLU"
EPILOGUE = "BatchNorm + SiLU"
UNKNOWN = "not before a SiLU in a container whose forward is known"
SHOWN = 4  # names of a group in the printout


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; print it to read it."""

    replaced: dict[str, str]
    """Name of each BatchNorm that is fused → with what."""
    left: dict[str, str]
    """Name of each other BatchNorm, and of each depth-wise convolution that is not fused → why."""

    def __str__(self) -> str:
        return "\n".join((*_grouped("fused", self.replaced), *_grouped("left", self.left)))


def accelerate(module: nn.Module) -> Acceleration:
    """Lets `module` and what it contains run BatchNorm + SiLU, with a depth-wise convolution before, in one kernel.

    In place. Outputs, gradients and running statistics stay those of the original up to rounding (on a CPU to the
    bit). SyncBatchNorm takes its statistics over its processes; a BatchNorm in eval() stays frozen. On a GPU the fused
    layers have no second derivatives. `revert` before handing the model to fx or TorchScript.
    """
    replaced: dict[nn.Module, str] = {}
    left: dict[nn.Module, str] = {}
    own: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, ConvModule):
            own |= {part.conv, part.bn}
        mixin = _MIXINS.get(_forward_of(type(part)))
        if mixin is None:
            continue
        for tail in mixin.tails(part):
            obstacle = mixin.differs(part) or _obstacle(tail.bn, tail.act, mixin.norms, tail.bn is part)
            if "forward" in vars(part):
                obstacle = f"the forward of its {type(part).__name__} was replaced"
            conv_obstacle = obstacle or _conv_obstacle(tail.conv)
            if obstacle is not None:
                left[tail.bn] = obstacle
            elif conv_obstacle is None or mixin.has_epilogue:
                replaced.setdefault(tail.bn, EPILOGUE if conv_obstacle else DEPTHWISE)
                part.__class__ = _fused_class(_original(type(part)))
            if _is_depthwise(tail.conv) and conv_obstacle is not None:
                left[tail.conv] = conv_obstacle
            elif tail.conv is not None:
                own.add(tail.conv)
    for part in module.modules():
        if part not in own and (isinstance(part, _BatchNorm) or _is_depthwise(part)):
            left.setdefault(part, UNKNOWN)
    names = {part: name for name, part in module.named_modules()}
    return Acceleration(
        {names[part]: what for part, what in replaced.items()},
        {names[part]: why for part, why in left.items() if part not in replaced},
    )


def revert(module: nn.Module) -> None:
    """Undoes `accelerate`: every container in `module` has its own class again."""
    for part in module.modules():
        if isinstance(part, _Fused):
            part.__class__ = part._original  # type: ignore[assignment]


class _Tail(NamedTuple):
    """BatchNorm, what runs right before it, and right after it."""

    conv: Any
    bn: Any
    act: Any


class _Fused(nn.Module):
    """Mixed into the class of a container."""

    _original: type[nn.Module]
    norms: tuple[tuple[str, str], ...] = (("torch", "_BatchNorm.forward"), ("torch", "SyncBatchNorm.forward"))
    has_epilogue = True  # whether it can fuse BatchNorm and SiLU alone

    @staticmethod
    def tails(module: Any) -> Iterable[_Tail]:
        """What could be fused in a container of the original class."""
        raise NotImplementedError

    @staticmethod
    def differs(module: Any) -> str | None:
        """Why the container computes something else than its tail."""
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made when it was needed: it is pickled as its original, and made again
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_restore, (self._original,), *reduced[2:])


class _FusedSequential(_Fused):
    @staticmethod
    def tails(module: Any) -> Iterable[_Tail]:
        layers = [None, *module._modules.values()]
        return [
            _Tail(*three)
            for three in zip(layers, layers[1:], layers[2:], strict=False)
            if isinstance(three[1], _BatchNorm)
        ]

    def forward(self, input: Any) -> Any:
        layers: list[Any] = [*self._modules.values(), None, None]
        at = 0
        while at < len(layers) - 2:
            first, second, third = layers[at : at + 3]
            if _fits(first, second, third):
                input = fused_bn_silu(input, second, first, process_group=_process_group(second))
                at += 3
            elif _obstacle(first, second) is None:
                input = fused_bn_silu(input, first, process_group=_process_group(first))
                at += 2
            else:
                input = first(input)
                at += 1
        return input


class _FusedConvModule(_Fused):
    """mmcv's."""

    @staticmethod
    def tails(module: Any) -> Iterable[_Tail]:
        act = module.activate if module.with_activation else None
        return [_Tail(module.conv, module.norm, act)] if module.with_norm else []

    @staticmethod
    def differs(module: Any) -> str | None:
        if tuple(module.order) != ("conv", "norm", "act"):
            return f"order {', '.join(module.order)}"
        if module.with_explicit_padding:
            return "a padding layer before the convolution"
        return "efficient_conv_bn_eval" if getattr(module, "efficient_conv_bn_eval_forward", None) else None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        whole = activate and norm and self.differs(self) is None
        for conv, bn, act in self.tails(self) if whole else ():
            if _fits(conv, bn, act):
                return fused_bn_silu(x, bn, conv, process_group=_process_group(bn))
            if _obstacle(bn, act) is None:
                return fused_bn_silu(conv(x), bn, process_group=_process_group(bn))
        return super().forward(x, activate, norm)


class _FusedConvNormAct(_Fused):
    """timm's, with a depth-wise convolution; else its BatchNormAct2d alone is fused."""

    norms = (("timm", "BatchNormAct2d.forward"), ("timm", "SyncBatchNormAct.forward"))
    has_epilogue = False

    @staticmethod
    def tails(module: Any) -> Iterable[_Tail]:
        normed = isinstance(module.bn, _BatchNorm)
        return [_Tail(module.conv, module.bn, getattr(module.bn, "act", None))] if normed else []

    @staticmethod
    def differs(module: Any) -> str | None:
        return None if getattr(module, "aa", None) is None else "anti-aliasing behind it"

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn, act in self.tails(self) if self.differs(self) is None else ():
            if _fits(conv, bn, act, self.norms):
                return fused_bn_silu(x, bn, conv, process_group=_process_group(bn))
        return super().forward(x)


class _FusedBatchNormAct(_Fused):
    """timm's BatchNorm that holds its activation."""

    norms = _FusedConvNormAct.norms

    @staticmethod
    def tails(module: Any) -> Iterable[_Tail]:
        return [_Tail(None, module, module.act)]

    def forward(self, x: Tensor) -> Tensor:
        if _obstacle(self, self.act, self.norms, itself=True) is None:
            norm: Any = self
            return fused_bn_silu(x, norm, process_group=_process_group(self))
        return super().forward(x)


# by package and name: none of the packages has to be there, and a subclass that overrides forward is not taken
_MIXINS: dict[tuple[str, str], type[_Fused]] = {
    ("torch", "Sequential.forward"): _FusedSequential,
    ("mmcv", "ConvModule.forward"): _FusedConvModule,
    ("timm", "ConvNormAct.forward"): _FusedConvNormAct,
    ("timm", "BatchNormAct2d.forward"): _FusedBatchNormAct,
    ("timm", "SyncBatchNormAct.forward"): _FusedBatchNormAct,
}


@cache
def _fused_class(original: Any) -> Any:
    namespace = {"_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Fused{original.__name__}", (_MIXINS[_forward_of(original)], original), namespace)


def _restore(original: Any) -> nn.Module:
    made = _fused_class(original)
    return made.__new__(made)


def _original(cls: type) -> Any:
    return cls._original if issubclass(cls, _Fused) else cls


def _forward_of(cls: type) -> tuple[str, str]:
    """Package and name of the forward of a class before it was fused."""
    forward = getattr(_original(cls), "forward", None)
    return getattr(forward, "__module__", "").partition(".")[0], getattr(forward, "__qualname__", "")


def _fits(conv: Any, bn: Any, act: Any, norms: tuple[tuple[str, str], ...] = _Fused.norms) -> bool:
    return _conv_obstacle(conv) is None and _obstacle(bn, act, norms) is None


def _obstacle(bn: Any, act: Any, norms: tuple[tuple[str, str], ...] = _Fused.norms, itself: bool = False) -> str | None:
    """Why BatchNorm and activation cannot be fused; `itself`: the BatchNorm is the container, whose hooks do fire."""
    if type(act) is not nn.SiLU:
        return UNKNOWN if act is None else f"before {type(act).__name__}, not SiLU"
    if isinstance(bn, nn.BatchNorm1d | nn.BatchNorm3d) or _forward_of(type(bn)) not in norms:
        return f"{type(bn).__name__} is not BatchNorm2d or SyncBatchNorm"
    if not isinstance(getattr(bn, "drop", None), nn.Identity | type(None)):
        return "drops some of its output"
    if bn.weight is None or bn.bias is None:
        return "without weight or bias"
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return "without running statistics"
    if bn.momentum is None:
        return "momentum None (cumulative average)"
    if (not itself and _is_hooked(bn)) or _is_hooked(act) or _has_any_global_hook():
        return "has hooks"
    return None


def _conv_obstacle(conv: Any) -> str | None:
    """Why a convolution cannot be fused with what follows it."""
    if not _is_depthwise(conv):
        return "not depth-wise"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} computes in its own way"
    size, stride = conv.kernel_size[0], conv.stride[0]
    same = conv.padding == "same" and stride == 1
    if conv.bias is not None:
        return "has a bias"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.kernel_size not in ((3, 3), (5, 5), (7, 7)):
        return f"kernel {conv.kernel_size}"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"stride {conv.stride}"
    if not same and conv.padding != (size // 2, size // 2):
        return f"padding {conv.padding}"
    return "has hooks" if _is_hooked(conv) else None


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _process_group(bn: Any) -> dist.ProcessGroup | None:
    """The processes that a SyncBatchNorm takes its statistics over, where they are several."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _grouped(verb: str, entries: dict[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, what in entries.items():
        groups.setdefault(what, []).append(name or "the module itself")
    lines = [f"{verb}: {len(entries)}"]
    for what, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        more = f", … {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  {len(names)}x {what}: {', '.join(names[:SHOWN])}{more}")
    return lines
