"""Fused layers inside somebody else's model: `accelerate(model)`, undone by `revert(model)`.

A container that passes its input through its children, one after another, gets a class that inherits from its own and
runs depth-wise convolution + BatchNorm + SiLU, or BatchNorm + SiLU, in one kernel. Whether it does that shows a trace
of its own forward, in training and in inference: mmcv's ConvModule, timm's ConvNormAct, nn.Sequential and any
`act(bn(conv(x)))` are known by what they do and not by their names. timm's BatchNormAct2d, which holds its activation,
is known by its module, and so is the deformable attention of RT-DETR and RT-DETRv2, transformers' and the published
one, which takes softmax, locations and samples in one kernel. Nothing else changes: the objects, their children,
parameters, buffers and hooks are the same ones, so state_dict, optimisers, `.to()`, train() and eval(), DDP and
`isinstance` go on as before.

Every forward pass looks whether that still holds: with a hook on a convolution, BatchNorm or activation, with one of
them replaced by something else, or with an attribute changed that the forward reads, the container runs as it did
originally.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from rtmdet_fast.kernels.deformable_attention import box_deformable_attention
from rtmdet_fast.models.fused import fused_bn_silu
from rtmdet_fast.models.rtmdet.layers import ConvModule

DEPTHWISE = "depth-wise convolution + BatchNorm + SiLU"
EPILOGUE = "BatchNorm + SiLU"
ATTENTION = "deformable attention"
UNKNOWN = "not before a SiLU in a container that passes its input from child to child"
SHOWN = 4  # names of a group in the printout


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; print it to read it."""

    replaced: dict[str, str]
    """Name of each BatchNorm that is fused → with what; of each deformable attention that is."""
    left: dict[str, str]
    """Name of each other BatchNorm, and of each depth-wise convolution or deformable attention that is not → why."""

    def __str__(self) -> str:
        return "\n".join((*_grouped("fused", self.replaced), *_grouped("left", self.left)))


def accelerate(module: nn.Module) -> Acceleration:
    """Lets `module` and what it contains run BatchNorm + SiLU, with a depth-wise convolution before, in one kernel.

    The deformable attention of RT-DETR likewise. In place. Outputs, gradients and running statistics stay those of the
    original up to rounding (on a CPU to the bit, but for the attention). SyncBatchNorm takes its statistics over its
    processes; a BatchNorm in eval() stays frozen. On a GPU the fused layers have no second derivatives, and on no
    device has the attention. `revert` before handing the model to fx or TorchScript.
    """
    replaced: dict[nn.Module, str] = {}
    left: dict[nn.Module, str] = {}
    own: set[nn.Module] = set()
    fused: dict[nn.Module, type] = {}
    for part in module.modules():
        if attention := _attention(part):
            if "forward" in vars(part):
                left[part] = "its forward was replaced"
            else:
                replaced[part], fused[part] = ATTENTION, _fused_class(attention, _original(type(part)), None, ())
        if isinstance(part, ConvModule):
            own |= {part.conv, part.bn}
        candidate: Any = None if isinstance(part, ConvModule) else _candidate(part)
        for tail in _tails(part, candidate) if candidate else ():
            obstacle = _obstacle(tail.bn, tail.act, tail.bn is part)
            if "forward" in vars(part):
                obstacle = f"the forward of its {type(part).__name__} was replaced"
            conv_obstacle = obstacle or _conv_obstacle(tail.conv)
            if obstacle is not None:
                left[tail.bn] = obstacle
            elif conv_obstacle is None or tail.bn is part or not _holds_act(tail.bn):
                replaced.setdefault(tail.bn, EPILOGUE if conv_obstacle else DEPTHWISE)
                fused[part] = candidate
            if _is_depthwise(tail.conv) and conv_obstacle is not None:
                left[tail.conv] = conv_obstacle
            elif tail.conv is not None:
                own.add(tail.conv)
    for part in module.modules():
        if part not in own and (isinstance(part, _BatchNorm) or _is_depthwise(part)):
            left.setdefault(part, UNKNOWN)
    names = {part: name for name, part in module.named_modules()}
    before = {part: part.__class__ for part in fused}
    try:
        for part, cls in fused.items():
            part.__class__ = cls
    except BaseException:  # all or nothing
        for part, cls in before.items():
            part.__class__ = cls
        raise
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
    """BatchNorm, what runs right before it, and the activation right after it."""

    conv: Any
    bn: Any
    act: Any


class _Fused(nn.Module):
    """Mixed into the class of a container."""

    _original: type[nn.Module]
    _recipe: tuple[Any, ...]  # what the class was made of

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made when it was needed: it is pickled as its original, and made again
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_restore, self._recipe, *reduced[2:])


class _FusedChain(_Fused):
    """Passes its one argument through the children of these names; of all names (nn.Sequential) if None."""

    _chain: tuple[str, ...] | None
    _flags: tuple[tuple[str, Any], ...]  # what the original's forward reads, with which it was traced

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        if len(args) != 1 or kwargs or any(name not in own or own[name] != value for name, value in self._flags):
            return super().forward(*args, **kwargs)
        layers = _layers(self, self._chain)
        if None in layers:  # a child is gone
            return super().forward(*args, **kwargs)
        input = args[0]
        layers += [None, None]
        at = 0
        while at < len(layers) - 2:
            first, second, third = layers[at : at + 3]
            if _conv_obstacle(first) is None and _obstacle(second, _act(second, third)) is None:
                input = fused_bn_silu(input, second, first, process_group=_process_group(second))
                at += 2 if _holds_act(second) else 3
            elif not _holds_act(first) and _obstacle(first, second) is None:
                input = fused_bn_silu(input, first, process_group=_process_group(first))
                at += 2
            else:
                input = first(input)
                at += 1
        return input


class _FusedBatchNormAct(_Fused):
    """timm's BatchNorm that holds its activation."""

    def forward(self, x: Tensor) -> Tensor:
        if _obstacle(self, self.act, itself=True) is None:
            norm: Any = self
            return fused_bn_silu(x, norm, process_group=_process_group(self))
        return super().forward(x)


def _attend(
    part: Any, query: Tensor, references: Tensor, value: Tensor, sizes: Any, heads: int, points: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """query [B, Q, C], references [B, Q, 1, 4], projected value [B, S, C] -> result [B, Q, C], logits [B, Q, H, P]."""
    B, Q = query.shape[:2]
    offsets, logits = part.sampling_offsets(query), part.attention_weights(query).view(B, Q, heads, -1)
    out = box_deformable_attention(
        value.unflatten(2, (heads, -1)), [tuple(size) for size in sizes], references.squeeze(2),
        offsets.view(B, Q, heads, -1, 2), logits, points, **options,
    )  # fmt: skip
    return part.output_proj(out), logits


def _takes_attention(references: Any, scale: float, method: str) -> bool:
    """Whether that is boxes, one for all levels, in ways of sampling that are known."""
    return references.shape[2:] == (1, 4) and scale == 0.5 and method in ("default", "discrete")


class _FusedTransformersAttention(_Fused):
    """transformers' RTDetrMultiscaleDeformableAttention and RTDetrV2MultiscaleDeformableAttention."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None, position_embeddings: Tensor | None = None,
        reference_points: Any = None, spatial_shapes: Any = None, spatial_shapes_list: Any = None,
        level_start_index: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own: Any = self
        scale, method = getattr(own, "offset_scale", 0.5), getattr(own, "method", "default")
        core = getattr(own, "attn", None)  # version 1 has a module for it
        hooked = core is not None and (_is_hooked(core) or _has_any_global_hook())
        if hooked or not _takes_attention(reference_points, scale, method):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, position_embeddings,
                reference_points, spatial_shapes, spatial_shapes_list, level_start_index, **kwargs,
            )  # fmt: skip
        query = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        value = own.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(~attention_mask[..., None], 0.0)
        points = getattr(own, "n_points_list", [own.n_points] * own.n_levels)
        options = dict(method="discrete" if method == "discrete" else "bilinear")
        out, logits = _attend(own, query, reference_points, value, spatial_shapes_list, own.n_heads, points, **options)
        weights = logits.softmax(3)
        return out, weights if core is None else weights.unflatten(3, (own.n_levels, own.n_points))


class _FusedPublishedAttention(_Fused):
    """MSDeformableAttention of the published RT-DETR and RT-DETRv2."""

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, value_spatial_shapes: Any, value_mask: Any = None
    ) -> Tensor:
        own: Any = self
        scale, method = getattr(own, "offset_scale", 0.5), getattr(own, "method", "default")
        if value_mask is not None or not _takes_attention(reference_points, scale, method) or not _has_core(own):
            return super().forward(query, reference_points, value, value_spatial_shapes, value_mask)
        points = _published_points(own)
        options = dict(method="discrete", published_clamp=True) if method == "discrete" else {}
        value = own.value_proj(value)
        return _attend(own, query, reference_points, value, value_spatial_shapes, own.num_heads, points, **options)[0]


def _published_points(part: Any) -> Any:
    """Points on each level: version 2 has a list of them."""
    return getattr(part, "num_points_list", None) or [part.num_points] * part.num_levels


def _has_core(part: Any) -> bool:
    """Whether the function that samples is the published one."""
    core = getattr(part, "ms_deformable_attn_core", None)
    core = core.func if isinstance(core, partial) else core
    return getattr(core, "__name__", "").startswith("deformable_attention_core_func")


def _attention(part: Any) -> Any:
    """The class that runs the deformable attention `part` in one kernel; None if it is none that is known."""
    module, name = _forward_of(type(part))
    if (module, name) in _TRANSFORMERS_ATTENTION:
        return _FusedTransformersAttention
    if name.endswith("MSDeformableAttention.forward") and _has_core(part):
        layers = [getattr(part, layer, None) for layer in _ATTENTION_LAYERS]
        parameters = list(inspect.signature(_original(type(part)).forward).parameters)[1:]
        if all(isinstance(layer, nn.Linear) for layer in layers) and parameters == _PUBLISHED_PARAMETERS:
            return _FusedPublishedAttention
    return None


# by module and name: none of the packages has to be there, and a subclass that overrides forward is not taken
_SEQUENTIAL = ("torch.nn.modules.container", "Sequential.forward")
_TRANSFORMERS_ATTENTION = [
    ("transformers.models.rt_detr.modeling_rt_detr", "RTDetrMultiscaleDeformableAttention.forward"),
    ("transformers.models.rt_detr_v2.modeling_rt_detr_v2", "RTDetrV2MultiscaleDeformableAttention.forward"),
]
_ATTENTION_LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_PUBLISHED_PARAMETERS = ["query", "reference_points", "value", "value_spatial_shapes", "value_mask"]
_NORMS = [("torch.nn.modules.batchnorm", f"{name}.forward") for name in ("_BatchNorm", "SyncBatchNorm")]
_NORM_ACTS = [("timm.layers.norm_act", f"{name}.forward") for name in ("BatchNormAct2d", "SyncBatchNormAct")]


def _candidate(part: nn.Module) -> Any:
    """The class that runs `part` fused as far as its layers can be; None if nothing in it might."""
    original = _original(type(part))
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return None  # made in some way that the fused class would not know
    if _holds_act(part):
        return _fused_class(_FusedBatchNormAct, original, None, ())
    if not any(isinstance(child, _BatchNorm) for child in part.children()):
        return None
    if _forward_of(original) == _SEQUENTIAL:
        return _fused_class(_FusedChain, original, None, ())
    chain = _traced(part, original)
    return chain and _fused_class(_FusedChain, original, chain, _flags(part, original))


@cache
def _fused_class(mixin: Any, original: Any, chain: tuple[str, ...] | None, flags: tuple[tuple[str, Any], ...]) -> Any:
    namespace = {
        "_original": original,
        "_recipe": (mixin, original, chain, flags),
        "_chain": chain,
        "_flags": flags,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (mixin, original), namespace)


def _restore(*recipe: Any) -> nn.Module:
    made = _fused_class(*recipe)
    return made.__new__(made)


def _original(cls: type) -> Any:
    return cls._original if issubclass(cls, _Fused) else cls


class _Tracer(fx.Tracer):
    """Records which children a forward calls; anything else that it does shows as well, or raises."""

    def __init__(self, names: dict[nn.Module, str]):
        super().__init__()
        self.names, self.state = names, _state()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if _state() != self.state:
            raise ValueError("runs a child under other settings")
        return self.create_proxy("call_module", self.names[m], args, kwargs)


def _state() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _traced(part: nn.Module, original: Any) -> tuple[str, ...] | None:
    """Names of the children that the forward of `part` passes its first argument through, in inference and training.

    None if it does anything else.
    """
    modes = {child: child.training for child in part.modules()}
    try:
        input, *others = list(inspect.signature(original.forward).parameters.values())[1:]
        if input.kind is input.VAR_POSITIONAL or any(p.default is p.empty and p.kind < p.VAR_KEYWORD for p in others):
            return None
        chains = [_traced_in(mode, part, original, modes) for mode in (True, False)]
    except Exception:  # somebody else's code, which need not bear a stand-in for its input
        return None
    finally:
        for child, mode in modes.items():
            child.training = mode
    return chains[0] if chains[0] == chains[1] else None


def _traced_in(training: bool, part: nn.Module, original: Any, modules: Iterable[nn.Module]) -> tuple[str, ...] | None:
    for module in modules:
        module.training = training
    probe = object.__new__(original)  # what the forward may set is set here
    probe.__dict__.update(vars(part))

    def run(x: Any) -> Any:
        return original.forward(probe, x)

    graph = _Tracer({child: name for name, child in part.named_children()}).trace(run)
    if vars(probe).keys() != vars(part).keys() or any(vars(part)[name] is not x for name, x in vars(probe).items()):
        return None
    return _linear(graph)


def _linear(graph: fx.Graph) -> tuple[str, ...] | None:
    first, *calls, last = graph.nodes
    before = first
    for node in calls:
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return None
        before = node
    return tuple(node.target for node in calls) if last.args == (before,) else None


def _flags(part: nn.Module, original: Any) -> tuple[tuple[str, Any], ...]:
    """Attributes of `part` that its forward reads, as far as they are plain values."""
    read = getattr(getattr(inspect.unwrap(original.forward), "__code__", None), "co_names", ())
    found = ((name, vars(part)[name]) for name in read if name in vars(part) and name != "training")
    return tuple((name, x) for name, x in found if isinstance(x, bool | int | float | str | tuple | type(None)))


def _layers(part: Any, chain: tuple[str, ...] | None) -> list[Any]:
    return list(part._modules.values()) if chain is None else [part._modules.get(name) for name in chain]


def _tails(part: Any, fused: Any) -> list[_Tail]:
    """What could be fused in `part`, were it of the class `fused`."""
    if issubclass(fused, _FusedBatchNormAct):
        return [_Tail(None, part, part.act)]
    layers = [None, *_layers(part, fused._chain), None]
    threes = zip(layers, layers[1:], layers[2:], strict=False)
    return [_Tail(conv, bn, _act(bn, after)) for conv, bn, after in threes if isinstance(bn, _BatchNorm)]


def _forward_of(cls: type) -> tuple[str, str]:
    """Module and name of the forward of a class before it was fused."""
    forward = getattr(_original(cls), "forward", None)
    return getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")


def _holds_act(module: Any) -> bool:
    return _forward_of(type(module)) in _NORM_ACTS


def _act(bn: Any, after: Any) -> Any:
    """The activation of a BatchNorm that `after` follows."""
    return getattr(bn, "act", None) if _holds_act(bn) else after


def _obstacle(bn: Any, act: Any, itself: bool = False) -> str | None:
    """Why BatchNorm and activation cannot be fused; `itself`: the BatchNorm is the container, whose hooks do fire."""
    if type(act) is not nn.SiLU:
        return UNKNOWN if act is None else f"before {type(act).__name__}, not SiLU"
    if isinstance(bn, nn.BatchNorm1d | nn.BatchNorm3d) or _forward_of(type(bn)) not in _NORMS + _NORM_ACTS:
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
