"""What torch.compile makes of the Triton side, as far as a machine without a GPU can tell."""

from __future__ import annotations

import builtins
import dis
import importlib
import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lowering import needs_lowering

import rtmdet_fast.kernels
from rtmdet_fast.kernels import _dispatch, assign

pytestmark = needs_lowering


def kernels() -> list:
    found = []
    for path in sorted(Path(rtmdet_fast.kernels.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"rtmdet_fast.kernels.{path.stem}")
        found += [f for name, f in vars(module).items() if name.endswith("_kernel") and f.__module__ == module.__name__]
    return found


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.__name__)
def test_inductor_copies_all_that_a_kernel_names(kernel, tmp_path):
    """It copies the functions that a kernel calls and plain constants: a class or a dict would be missing there."""
    import triton
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code

    path = tmp_path / "copied.py"
    head = "import triton\nimport triton.language as tl\n\n@triton.jit\n"
    path.write_text(head + user_defined_triton_kernel_transitive_closure_source_code(kernel))
    spec = importlib.util.spec_from_file_location("copied", path)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    functions = [function for function in vars(copied).values() if isinstance(function, triton.JITFunction)]
    named = {x.argval for f in functions for x in dis.Bytecode(f.fn) if x.opname == "LOAD_GLOBAL"}
    missing = named - set(vars(copied)) - set(vars(builtins))
    assert "tl" in named and not missing


@pytest.mark.parametrize("box", [4, 5], ids=["xyxy", "rotated"])
@pytest.mark.parametrize(
    ("method", "dynamic"),
    [("soft_label", False), ("soft_label", True), ("atss", True)],
    ids=["static", "dynamic", "atss"],
)
def test_kernels_of_assign_get_every_tensor_and_write_outputs_alone(monkeypatch, method, box, dynamic):
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", gpu)
    launches = []

    def record(graph, inputs):
        launches.extend(node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target))
        return lambda *_: [torch.zeros(())] * 3  # nothing is run

    boxes, gt_boxes = torch.rand(2, 21, box), torch.rand(2, 7, box)
    labels, counts = torch.zeros(2, 7, dtype=torch.int64), torch.tensor([7, 7])
    priors, truths = torch.rand(21, 4), (gt_boxes, labels, counts)
    problem = boxes, torch.rand(2, 21, 3), priors, *truths, gt_boxes[..., :2]
    if method == "atss":
        problem = boxes, priors, *truths
    call = {"soft_label": assign.dynamic_soft_label_assign, "atss": partial(assign.atss_assign, strides=(8, 16, 32))}
    torch.compile(
        lambda boxes, *rest: call[method](boxes * 2, *rest),
        backend=aot_autograd(fw_compiler=record),
        fullgraph=True,
        dynamic=dynamic,
    )(*problem)
    written = [set(launch["tensors_to_clone"]) for launch in launches]
    near = [{"near_ptr"}] * 3 if method == "atss" else []
    resolved = {"assigned_ptr", "iou_ptr", "assigned_label_ptr"}
    assert written == [{"sum_ptr"}, *near, {"index_ptr", "key_ptr"}, resolved]
    given = [{name for name in launch["kwargs"] if name.endswith("_ptr")} for launch in launches]
    assert [len(names) for names in given] == ([6, 6, 6, 6, 7, 10] if method == "atss" else [8, 10, 12])
