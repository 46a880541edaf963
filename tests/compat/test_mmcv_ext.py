"""The stand-in for `mmcv._ext`, by itself; through mmcv's own Python: tests/openmmlab."""

import collections
import collections.abc
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from multiprocessing import spawn
from pathlib import Path

import numpy as np
import pytest
import torch

import rtmdet_fast.compat.mmcv_ext as ext
from benches import openmmlab_table
from rtmdet_fast import ops
from rtmdet_fast.compat.mmcv_ext import _pkg_resources
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_boxes(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes [n, 5] of which some have no area, distinct scores, labels."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.cat([torch.rand(n, 2, generator=g) * 100, torch.rand(n, 2, generator=g) * 40 - 2], 1)
    boxes = torch.cat([boxes, torch.rand(n, 1, generator=g) * 3], 1)
    return (
        boxes.to(DEVICE),
        torch.randperm(n, generator=g).to(DEVICE) / n,
        torch.randint(3, (n,), generator=g).to(DEVICE),
    )


def greedy(iou: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou[i, j] <= threshold or iou[i, j].isnan() for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset):
    boxes, scores, _ = random_boxes(150)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]], 1)
    boxes[3], boxes[4, 0], scores[9] = torch.inf, torch.nan, torch.nan
    wide = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1).double()
    sides = (torch.minimum(wide[:, None, 2:], wide[:, 2:]) - torch.maximum(wide[:, None, :2], wide[:, :2])).clamp(min=0)
    area = (wide[:, 2:] - wide[:, :2]).prod(1)
    inter = sides.prod(2)
    iou = inter / (area[:, None] + area - inter)
    kept = ext.nms(boxes, scores, iou_threshold=0.4, offset=offset)
    finite = scores.nan_to_num(2)
    iou[9], iou[:, 9] = 0, 0  # a score that is no number suppresses nothing
    assert kept.tolist() == greedy(iou, finite, 0.4)
    assert 20 < len(kept) < 145 and {3, 4, 9} <= set(kept.tolist())
    assert ext.nms(boxes[:0], scores[:0], 0.5, 0).tolist() == []


@pytest.mark.parametrize("multi_label", [False, True])
def test_nms_rotated_leaves_labels_out_of_account_as_mmcv_does(multi_label):
    boxes, scores, labels = random_boxes(120)
    iou = box_iou_rotated_reference(boxes.double(), boxes.double())
    order = scores.argsort(descending=True)
    dets = torch.cat([boxes, labels[:, None].to(boxes)], 1) if multi_label else boxes
    kept = ext.nms_rotated(dets, scores, order, dets[order], labels, 0.2, multi_label)
    assert kept.tolist() == greedy(iou, scores, 0.2)
    assert 20 < len(kept) < 115


def test_no_boxes_may_have_one_dimension():
    none = torch.zeros(0, device=DEVICE)
    assert ext.nms(none, none, 0.5, 0).shape == ext.nms_rotated(none, none, none, none, none, 0.5, False).shape == (0,)


def test_softnms_writes_boxes_and_lowered_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [20.0, 0, 30, 10]])
    dets = torch.full((3, 5), torch.nan)
    kept = ext.softnms(boxes, torch.tensor([0.5, 0.8, 0.6]), dets, 0.3, 0.5, 0.1, 1, 0)
    assert kept.tolist() == [1, 2, 0]
    torch.testing.assert_close(dets, torch.cat([boxes[kept], torch.tensor([[0.8], [0.6], [0.25]])], 1))


def test_box_iou_rotated_writes_every_element():
    one, two = random_boxes(7)[0].abs(), random_boxes(7, 1)[0].abs()
    for flag, aligned in ((0, False), (1, False), (0, True), (1, True)):
        out = one.new_full((7,) if aligned else (49,), torch.nan)
        ext.box_iou_rotated(one, two, out, mode_flag=flag, aligned=aligned)
        iou = box_iou_rotated_reference(one.double(), two.double(), aligned)
        if flag:
            area1, area2 = one[:, 2:4].double().prod(1), two[:, 2:4].double().prod(1)
            area1, area2 = (area1, area2) if aligned else (area1[:, None], area2)
            iou = iou / (1 + iou) * (area1 + area2) / area1
        torch.testing.assert_close(out.view(iou.shape), iou.float(), atol=1e-5, rtol=0)


def test_sorted_vertices_enclose_the_polygon():
    """Of regular polygons with 3 to 8 corners, in a random order, some corners more than once."""
    g = torch.Generator().manual_seed(0)
    for corners, copies in ((3, 0), (5, 0), (8, 0), (4, 4), (8, 3), (4, 7)):
        angle = torch.arange(corners) * 2 * torch.pi / corners + 0.1
        polygon = torch.stack([angle.cos(), angle.sin()], 1) * 5
        points = torch.cat([polygon, polygon[torch.arange(copies) % corners] + 1e-6])
        place = torch.randperm(24, generator=g)[: len(points)]
        vertices, mask = torch.zeros(1, 1, 24, 2), torch.zeros(1, 1, 24, dtype=torch.bool)
        vertices[0, 0, place], mask[0, 0, place] = points, True
        index = ext.diff_iou_rotated_sort_vertices_forward(vertices, mask, mask.sum(-1).int())
        assert index.shape == (1, 1, 9) and index.dtype == torch.int32
        x, y = vertices[0, 0, index[0, 0].long()].unbind(-1)
        area = (x[:-1] * y[1:] - y[:-1] * x[1:]).sum().abs() / 2
        assert area == pytest.approx(12.5 * corners * torch.tensor(2 * torch.pi / corners).sin().item(), rel=1e-5)
    mask[:] = False
    mask[..., [0, 9]] = True
    few = ext.diff_iou_rotated_sort_vertices_forward(vertices, mask, mask.sum(-1).int())
    assert (few == few[0, 0, 0]).all() and few[0, 0, 0] >= 8 and not mask[0, 0, few[0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deformable_attention_forward_and_backward(dtype):
    """As mmcv calls them, of a function that grid_sample makes up level by level."""
    torch.manual_seed(0)
    shapes = torch.tensor([[3, 4], [2, 2]], device=DEVICE)
    starts = torch.tensor([0, 12], device=DEVICE)
    value = torch.rand(2, 16, 2, 8, device=DEVICE).to(dtype)
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2, device=DEVICE).to(dtype), torch.rand(2, 5, 2, 2, 3, device=DEVICE)
    leaves = [x.double().requires_grad_() for x in (value, locations, weights.to(dtype))]
    samples = []
    for level, (image, size) in enumerate(zip(leaves[0].split([12, 4], 1), ((3, 4), (2, 2)), strict=True)):
        image = image.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)
        grid = 2 * leaves[1][:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples.append(torch.nn.functional.grid_sample(image, grid, align_corners=False))
    out = (torch.cat(samples, 3) * leaves[2].transpose(1, 2).flatten(0, 1).flatten(2)[:, None]).sum(3)
    out = out.unflatten(0, (2, 2)).flatten(1, 2).transpose(1, 2)
    upstream = torch.rand_like(out).to(dtype)
    expected = out, *torch.autograd.grad(out, leaves, upstream.double())

    arguments = value, shapes, starts, locations, weights.to(dtype)
    found = ext.ms_deform_attn_forward(*arguments, im2col_step=64)
    grads = [torch.full_like(x, torch.nan) for x in (value, locations, weights.to(dtype))]
    ext.ms_deform_attn_backward(*arguments, upstream, *grads, im2col_step=64)
    assert not found.requires_grad and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for got, want in zip((found, *grads), expected, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    applied = ops.MultiScaleDeformableAttnFunction.apply(*arguments, 64)
    assert torch.equal(applied, found)
    shapes.copy_(torch.tensor([[4, 3], [1, 4]]))  # the sizes of a tensor are remembered, of this version of it
    assert not torch.equal(ops.MultiScaleDeformableAttnFunction.apply(*arguments, 64), applied)


def test_other_ops_exist_and_say_that_they_are_missing():
    assert hasattr(ext, "three_nn_forward")
    with pytest.raises(NotImplementedError, match=r"roiaware_pool3d_forward needs the compiled mmcv"):
        ext.roiaware_pool3d_forward(torch.zeros(1), pool_method=1)
    assert not hasattr(ext, "__wrapped__")
    assert "rtmdet_fast" in ext.get_compiler_version() and ext.get_compiling_cuda_version()


def test_every_op_stands_in_the_table():
    named = {op for name in openmmlab_table.OPS for op in openmmlab_table.exported(name)}
    assert named == set(ext.__all__) - {"install", "get_compiler_version", "get_compiling_cuda_version"}


def test_mmengine_finds_packages_without_pkg_resources():
    found = _pkg_resources.get_distribution("numpy")
    assert found.version == importlib.metadata.version("numpy") and (Path(found.location) / "numpy").is_dir()
    assert found.has_metadata("METADATA") and "Name: numpy" in found.get_metadata("METADATA")
    assert not found.has_metadata("bogus")
    with pytest.raises(_pkg_resources.DistributionNotFound):
        _pkg_resources.get_distribution("no-such-package")


def test_names_that_are_gone_are_there_again():
    assert np.float is float and collections.Sequence is collections.abc.Sequence
    assert "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources")


@pytest.fixture(params=[False, True], ids=["lite", "compiled"])
def mmcv(request, tmp_path, monkeypatch):
    """An mmcv whose ops find their binary module as the real one does; whether it is compiled."""
    (tmp_path / "mmcv/ops").mkdir(parents=True)
    (tmp_path / "mmcv/__init__.py").touch()
    (tmp_path / "mmcv/ops/__init__.py").write_text("import importlib\next = importlib.import_module('mmcv._ext')\n")
    if request.param:
        (tmp_path / "mmcv/_ext.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)  # which install() wraps
    yield request.param
    for name in ("mmcv._ext", "mmcv.ops", "mmcv"):
        sys.modules.pop(name, None)


def test_a_compiled_module_keeps_its_place(mmcv):
    assert ext.install() == (not mmcv)
    ops = importlib.import_module("mmcv.ops")
    assert (ops.ext is ext) == (not mmcv)
    assert importlib.util.find_spec("mmcv._ext").loader is not None  # what mmcv.utils.check_ops_exist asks
    assert ext.install() == (not mmcv)
    if mmcv:
        with pytest.raises(RuntimeError, match=r"mmcv\.ops is imported already"):
            ext.install(replace=True)


def test_a_compiled_module_is_replaced_on_request(mmcv):
    assert ext.install(replace=True)
    assert importlib.import_module("mmcv.ops").ext is ext


def test_runs_scripts(tmp_path):
    """Importing is enough, under a script that knows nothing of it."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv[1:], sys.modules['mmcv._ext'].__name__)\n")
    command = [sys.executable, "-m", "rtmdet_fast.compat.mmcv_ext", str(script), "a", "--b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "__main__ ['a', '--b'] rtmdet_fast.compat.mmcv_ext" in done.stdout, done.stderr


SPAWNING = """
import sys
sys.path.insert(0, {folder!r})
import rtmdet_fast.compat.mmcv_ext as ext
ext.install(replace={replace})
import mmcv.ops
from multiprocessing import get_context
if __name__ == "__main__":
    with get_context({method!r}).Pool(1) as pool:
        print(pool.apply_async(mmcv.ops.which).get(timeout=200))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_processes_inherit_it(mmcv, tmp_path, method):
    """Also where the main module is no file, as in `python -c`, notebooks and pytest; a worker would die without."""
    with open(tmp_path / "mmcv/ops/__init__.py", "a") as file:
        file.write("def which(): return ext.__name__\n")
    code = SPAWNING.format(folder=str(tmp_path), replace=mmcv, method=method)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "rtmdet_fast.compat.mmcv_ext", done.stderr


def test_a_compiled_module_leaves_spawned_processes_alone(mmcv):
    before = spawn.get_preparation_data
    assert ext.install() == (not mmcv) == (spawn.get_preparation_data is not before)
    before = spawn.get_preparation_data
    ext.install()
    assert spawn.get_preparation_data is before
