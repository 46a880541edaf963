"""What the hot kernels compile to for a GPU that need not be there: registers, spills, instructions.

    python -m benches.machine_code                the kernels of this checkout, as a table
    python -m benches.machine_code ../before      those of another, made by git worktree add ../before COMMIT

NVIDIA's machine code for sm_90 is what Triton's own tools make and show. "loops" counts those that stand in no other,
as if every branch in them were taken. "an element" is the first of them (of a kernel without one all instructions) by
the elements of the result (of the input, where a kernel sums) that a thread makes in a turn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TARGET = "sm_90"


def depthwise(last: bool, training: bool, stored: bool = False) -> None:
    """5 x 5 of RTMDet-s's second stage."""
    from rtmdet_fast.kernels import dwconv_bn_silu

    x = _images(128, 40, last, training)
    vectors = [torch.ones(128) for _ in range(4)]
    tuning, before = dwconv_bn_silu.TUNING, dwconv_bn_silu.TUNING.get("store_dz")
    tuning["store_dz"] = stored
    with torch.set_grad_enabled(training):
        y = dwconv_bn_silu.dwconv_bn_silu(x, torch.ones(128, 1, 5, 5).half(), *vectors, training=training)
    if training:
        y.backward(torch.empty_like(y))
    tuning["store_dz"] = before


def batch_norm(channels: int, last: bool) -> None:
    from rtmdet_fast.kernels import bn_silu

    x = _images(channels, 80, last, True)
    y = bn_silu.bn_silu(x, *(torch.ones(channels) for _ in range(4)), training=True)
    y.backward(torch.empty_like(y))


def focal_loss() -> None:
    from rtmdet_fast.kernels import quality_focal_loss

    logits = torch.zeros(32, 8400, 80, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(32, 8400, dtype=torch.int64)
    quality_focal_loss.quality_focal_loss(logits, labels, torch.zeros(32, 8400)).backward()


def assignment() -> None:
    from rtmdet_fast.kernels import assign

    boxes, logits = torch.zeros(32, 8400, 4), torch.zeros(32, 8400, 80)
    labels = torch.zeros(32, 100, dtype=torch.int64)
    truths = boxes[:, :100], labels, labels.new_full((32,), 100)
    assign.dynamic_soft_label_assign(boxes, logits, torch.ones(8400, 4), *truths)


def suppression() -> None:
    from rtmdet_fast.kernels import nms

    labels = torch.zeros(32, 1000, dtype=torch.int64)
    nms.batched_nms_padded(torch.zeros(32, 1000, 4), torch.zeros(32, 1000), labels, 0.65, 300)


def masks() -> None:
    from rtmdet_fast.kernels import dynamic_mask

    features, kernels = torch.zeros(8, 8, 80, 80, requires_grad=True), torch.zeros(256, 169, requires_grad=True)
    index = torch.zeros(256, dtype=torch.int64)
    inputs = features, kernels, torch.zeros(256, 2), torch.ones(256), index
    dynamic_mask.dynamic_mask_dice_loss(*inputs, torch.zeros(8, 32, 160, 160, dtype=torch.bool), index).sum().backward()


def _images(channels: int, side: int, last: bool, gradient: bool) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(32, channels, side, side, dtype=torch.float16)
    return x.contiguous(memory_format=layout).requires_grad_(gradient)


RUNS: dict[str, Callable[[], None]] = {
    "depth-wise inference, channels_last": partial(depthwise, True, False),
    "depth-wise inference, contiguous": partial(depthwise, False, False),
    "depth-wise training, channels_last": partial(depthwise, True, True),
    "depth-wise training, contiguous": partial(depthwise, False, True),
    "depth-wise, dz stored, channels_last": partial(depthwise, True, True, True),
    "depth-wise, dz stored, contiguous": partial(depthwise, False, True, True),
    "BatchNorm + SiLU, 64 channels, channels_last": partial(batch_norm, 64, True),
    "BatchNorm + SiLU, 24 channels, channels_last": partial(batch_norm, 24, True),
    "BatchNorm + SiLU, 64 channels, contiguous": partial(batch_norm, 64, False),
    "quality focal loss": focal_loss,
    "assignment, 32 x 100": assignment,
    "NMS, 32 x 1000": suppression,
    "masks with Dice loss": masks,
}  # fmt: skip


def elements(launch: Any) -> float | None:
    """Of the result that a thread makes in a turn of the first loop; None where that has no one answer."""
    c, threads = dict(launch.constexprs), 32 * dict(launch.options).get("num_warps", 4)
    block = math.prod(c["BLOCK"]) if isinstance(c.get("BLOCK"), tuple) else c.get("BLOCK")
    name = launch.kernel.__name__
    if name == "_forward_kernel" and "UNROLL" in c:
        return block * c.get("COLUMNS", 2) * c["UNROLL"] / threads
    if name == "_backward_kernel" and "PREFETCH" in c:
        return block * 2 * c["S"] / threads
    return (
        block / threads
        if name in ("_moments_kernel", "_apply_kernel", "_sums_kernel", "_dx_kernel", "_loss_kernel")
        else None
    )


def rows(runs: dict[str, Callable[[], None]]) -> Iterator[tuple[str, str, Any, int, list[int], float | None]]:
    """Case, kernel, resources, all instructions, those of its loops, and an element's."""
    import lowering
    import pytest

    from rtmdet_fast.kernels import _dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "BACKEND", "triton")
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what nobody writes is an index later
        launches = lowering.record_launches(patch, *_modules())
        told = set()
        for case, run in runs.items():
            launches.clear()
            try:
                run()
            except ImportError:  # of a checkout that has no such op yet
                continue
            for launch in dict.fromkeys(launches):
                if launch in told:  # two cases may have a kernel in common
                    continue
                told.add(launch)
                resources = launch.lower(TARGET)
                total, loops = resources.instructions()
                each = elements(launch)
                yield case, launch.kernel.__name__, resources, total, loops, each and [*loops, total][0] / each


def _modules() -> list[Any]:
    """Of the package's kernels those that launch."""
    import importlib

    import rtmdet_fast

    folder = Path(rtmdet_fast.__file__).parent / "kernels"
    names = sorted(
        path.stem for path in folder.glob("*.py") if "\nfrom rtmdet_fast.kernels._dispatch" in path.read_text()
    )
    modules = [importlib.import_module(f"rtmdet_fast.kernels.{name}") for name in names]
    return [module for module in modules if hasattr(module, "wrap_triton")]


def main() -> None:
    if len(sys.argv) > 1:
        sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
    sys.path.append(str(ROOT / "tests"))
    print("| case | kernel | registers | spills | instructions | loops | an element |\n|---|---|---|---|---|---|---|")
    for case, kernel, resources, total, loops, each in rows(RUNS):
        told = ", ".join(map(str, loops)), "" if each is None else f"{each:.1f}"
        figures = resources.registers, resources.spills, total, *told
        print("|", " | ".join(map(str, (case, f"`{kernel}`", *figures))), "|", flush=True)


if __name__ == "__main__":
    main()
