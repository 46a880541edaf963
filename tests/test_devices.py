"""Where tensors live and ops run, as far as a machine without a GPU can tell."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rtmdet_fast.cli import main
from rtmdet_fast.devices import pick_device
from rtmdet_fast.errors import UserError
from rtmdet_fast.kernels import (
    _dispatch,
    assign_triton,
    batch_norm,
    bn_silu,
    dwconv_bn_silu,
    dynamic_mask_triton,
    nms,
    quality_focal_loss,
    rotated_iou,
)
from rtmdet_fast.kernels._dispatch import AVAILABLE, TritonOp, triton_op, unwatched, use_triton, wrap_triton


def twice(x: Tensor, times: int) -> Tensor:
    return x * times


def test_an_op_switches_to_the_gpu_of_its_first_argument(monkeypatch):
    switches = []

    @contextmanager
    def device_of(x):
        switches.append(x)
        yield
        switches.append("back")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    op = triton_op("rtmdet_fast_test::twice")(twice)
    x = torch.arange(3)
    assert torch.equal(op.library_op._backend_fns["cuda"](x, 2), 2 * x)
    assert switches[0] is x and switches[1:] == ["back"]
    assert torch.equal(op.library_op(x, 2), 2 * x) and len(switches) == 2


def test_kernels_are_launched_directly_but_for_tracing():
    kernel = batch_norm._apply_kernel
    inside = []

    def look(x: Tensor) -> Tensor:
        inside.append(wrap_triton(kernel))
        return x.clone()

    op = triton_op("rtmdet_fast_test::look")(look)
    op.undispatched(torch.ones(1))
    assert inside == [kernel]
    if AVAILABLE:
        look(torch.ones(1))
        assert inside[1] is not kernel


def test_the_dispatcher_is_left_out_only_where_nobody_watches():
    x = torch.ones(1, 2, 3, 3)
    assert not unwatched(x)
    with torch.no_grad():
        assert unwatched(x)
        assert not unwatched(torch.nn.Parameter(x))
        with FakeTensorMode():
            assert not unwatched(x)
        seen = []
        make_fx(lambda x: seen.append(unwatched(x)) or x.sin())(x)
        torch.jit.trace(lambda x: seen.append(unwatched(x)) or x.sin(), x, check_trace=False)
        assert seen == [False, False]
        assert torch.equal(torch.compile(lambda x: x + unwatched(x), backend="eager")(x), x)


@pytest.mark.parametrize(
    "module", [assign_triton, bn_silu, dwconv_bn_silu, dynamic_mask_triton, nms, quality_focal_loss, rotated_iou]
)
def test_every_triton_op_has_a_kernel_for_gpus(module):
    import rtmdet_fast.kernels._registered  # noqa: F401

    names = [op.name for op in vars(module).values() if isinstance(op, TritonOp)]
    assert names
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names)


def test_processes_take_the_gpu_that_torchrun_gives_them(monkeypatch):
    current = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    expected = [torch.device("cuda:3")] * 2 + [torch.device("cuda:1")]
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1")] == current == expected
    assert pick_device("cpu") == torch.device("cpu") and len(current) == 3


@pytest.mark.parametrize(
    "name", ["meta", "hpu", "privateuseone", "mps", "vulkan", "mtia", "", "cuda:-1", "cuda:99", "tpu", "xla", "opengl"]
)
def test_a_device_that_holds_no_values_is_one_sentence(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(UserError, match=rf"^--device {name!r} cannot be used here: .+$"):
        pick_device(name)


@pytest.mark.parametrize(("backend", "rest"), [("bogus", "give auto, torch or triton"), ("triton", "not installed")])
def test_an_unknown_backend_is_one_sentence(monkeypatch, capsys, backend, rest):
    monkeypatch.setattr(_dispatch, "BACKEND", backend)
    monkeypatch.setattr(_dispatch, "AVAILABLE", False)
    with pytest.raises(UserError, match=rf"^RTMDET_FAST_KERNELS is .*{backend}.*{rest}"):
        use_triton(torch.zeros(1))
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith("error: RTMDET_FAST_KERNELS is ")


def test_an_unknown_backend_does_not_end_the_import():
    environment = {**os.environ, "RTMDET_FAST_KERNELS": "bogus"}
    command = [sys.executable, "-m", "rtmdet_fast", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: RTMDET_FAST_KERNELS is 'bogus': give auto, torch or triton\n"


@pytest.mark.parametrize("task", ["det", "ins", "rotated", "rtdetr"])
def test_training_and_prediction_never_mix_devices(task):
    on_fake_gpu("train", task)


@pytest.mark.skipif(not AVAILABLE, reason="without Triton no kernel is chosen")
@pytest.mark.parametrize("task", ["det", "ins", "rotated"])
def test_detections_are_packed_without_waiting_for_the_device(task):
    on_fake_gpu("detect", task)


def on_fake_gpu(*arguments):
    script = Path(__file__).with_name("fake_gpu.py")
    environment = {**os.environ, "RTMDET_FAST_KERNELS": "torch"}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "fine", done.stderr
