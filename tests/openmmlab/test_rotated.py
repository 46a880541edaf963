"""mmrotate's heads with batched targets; needs an environment of its own (mmdet 3.0.0)."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from needs import openmmlab

openmmlab("mmrotate")

from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmrotate.registry import MODELS
from mmrotate.structures import RotatedBoxes
from mmrotate.utils import register_all_modules

from benches import openmmlab_proof as proof
from rtmdet_fast.compat import mmdet as compat

register_all_modules(init_default_scope=False)
CLASSES, CHANNELS, SIZE = 4, 16, 160


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmrotate")


def truths(count: int, seed: int) -> InstanceData:
    g = torch.Generator().manual_seed(seed)
    boxes = torch.cat(
        [
            torch.rand(count, 2, generator=g) * SIZE,
            4 + torch.rand(count, 2, generator=g) * SIZE * 0.3,
            torch.rand(count, 1, generator=g) * 6 - 3,  # not yet of the form le90
        ],
        1,
    )
    return InstanceData(bboxes=RotatedBoxes(boxes), labels=torch.randint(CLASSES, (count,), generator=g))


def problem() -> tuple[tuple, list[InstanceData], list[dict]]:
    g = torch.Generator().manual_seed(0)
    features = tuple(torch.randn(3, CHANNELS, SIZE // s, SIZE // s, generator=g) for s in (8, 16, 32))
    shapes = [(SIZE, SIZE), (SIZE, SIZE), (128, 100)]
    return features, [truths(n, n) for n in (25, 0, 4)], [dict(img_shape=x, pad_shape=x) for x in shapes]


def losses_and_gradients(head, case) -> list[torch.Tensor]:
    features, gts, metas = copy.deepcopy(case)
    head.zero_grad()
    losses = head.loss_by_feat(*head(features), gts, metas)
    flat = [x for value in losses.values() for x in value]
    sum(flat).backward()
    return [x.detach() for x in flat] + [p.grad.clone() for p in head.parameters() if p.grad is not None]


def head_config(kind: str) -> dict:
    return dict(
        type=kind,
        num_classes=CLASSES,
        in_channels=CHANNELS,
        feat_channels=CHANNELS,
        stacked_convs=1,
        angle_version="le90",
        anchor_generator=dict(type="mmdet.MlvlPointGenerator", offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type="DistanceAnglePointCoder", angle_version="le90"),
        loss_cls=dict(type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type="RotatedIoULoss", mode="linear", loss_weight=2.0),
        norm_cfg=dict(type="BN"),
        with_objectness=False,
        **(dict(scale_angle=False, exp_on_reg=False) if "SepBN" in kind else dict(scale_angle=True)),
        train_cfg=dict(
            assigner=dict(type="mmdet.DynamicSoftLabelAssigner", iou_calculator=dict(type="RBboxOverlaps2D"), topk=13),
            allowed_border=-1,
            pos_weight=-1,
        ),
    )


def test_assigner():
    config = dict(iou_calculator=dict(type="RBboxOverlaps2D"), topk=13)
    original, batched = (
        MMDET_TASK_UTILS.build(dict(type=f"mmdet.{name}DynamicSoftLabelAssigner", **config)) for name in ("", "Batched")
    )
    points = torch.cat(
        [
            torch.stack([x, y, x * 0 + s, x * 0 + s], -1).view(-1, 4)
            for s in (8, 16, 32)
            for y, x in [torch.meshgrid(torch.arange(0, SIZE, s), torch.arange(0, SIZE, s), indexing="ij")]
        ]
    ).float()
    for seed, count in ((0, 0), (1, 1), (2, 40), (3, 100)):
        g = torch.Generator().manual_seed(seed)
        # as of a model that is not trained: many sides are below 0
        shift, sides = torch.randn(len(points), 2, generator=g), torch.randn(len(points), 2, generator=g) + 1
        angle = torch.rand(len(points), 1, generator=g) * 3
        pred = InstanceData(
            bboxes=torch.cat([points[:, :2] + shift * points[:, 2:], sides * points[:, 2:] * 2, angle], 1),
            scores=torch.randn(len(points), CLASSES, generator=g) * 2,
            priors=points,
        )
        gt = truths(count, seed)
        expected, found = original.assign(pred, gt), batched.assign(pred, gt)
        assert torch.equal(found.gt_inds, expected.gt_inds)
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.max_overlaps, expected.max_overlaps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["RotatedRTMDetHead", "RotatedRTMDetSepBNHead"])
def test_losses_of_heads(kind, monkeypatch):
    torch.manual_seed(0)
    original = MODELS.build(head_config(kind))
    original.init_weights()
    batched = MODELS.build(head_config(f"Batched{kind}"))
    batched.load_state_dict(original.state_dict())
    case = problem()
    assert (get_box_tensor(case[1][0].bboxes)[:, 4].abs() > torch.pi / 2).any()
    expected = losses_and_gradients(original, case)
    assert sum(expected[:3]) > 0 and sum(expected[3:6]) > 0
    torch.testing.assert_close(losses_and_gradients(batched, case), expected, rtol=1e-4, atol=1e-5)
    calls = []
    match = compat.dynamic_soft_label_assign
    monkeypatch.setattr(compat, "dynamic_soft_label_assign", lambda *a, **k: calls.append(len(a[0])) or match(*a, **k))
    with compat.patched():
        torch.testing.assert_close(losses_and_gradients(original, case), expected, rtol=1e-4, atol=1e-5)
    assert calls == [3]


def test_losses_of_the_first_20_iterations(shared, tmp_path):
    data = shared / "data/hit_uav"
    if not data.is_dir():
        pytest.skip("../shared/data/hit_uav is not here")
    losses = proof.first_losses(proof.hit_uav(data, tmp_path, size=192, batch_size=4))
    assert len(losses) == 20
    assert losses[-1][0]["loss_bbox"] > 0.1
    assert proof.difference(losses) < 1e-4


def test_predicts():
    head = MODELS.build({**head_config("RotatedRTMDetSepBNHead"), "test_cfg": testing()})
    torch.manual_seed(0)
    head.init_weights()
    metas = [dict(img_shape=(SIZE, SIZE), scale_factor=(1, 1))] * 3
    with torch.no_grad():
        found = head.predict_by_feat(*head(problem()[0]), batch_img_metas=metas)
    assert all(len(instances) > 50 and instances.bboxes.tensor.shape[1] == 5 for instances in found)


SCRIPT = """
import collections, collections.abc, sys
import numpy as np
from mmrotate.evaluation.functional import eval_rbbox_map

if __name__ == "__main__":
    boxes = np.load(sys.argv[1])
    labels = np.arange(len(boxes)) % 2
    scored = np.concatenate([boxes, np.ones((len(boxes), 1), np.float32)], 1)
    ignored = dict(bboxes_ignore=boxes[:0], labels_ignore=labels[:0])
    detections = [[scored[labels == c] for c in (0, 1)]]
    truth = [dict(bboxes=boxes, labels=labels, **ignored)]
    print("mAP", eval_rbbox_map(detections, truth, nproc=1, logger="silent")[0])
"""


@pytest.mark.parametrize("how", ["import", "command", "no file"])
def test_evaluation_in_spawned_processes(tmp_path, how):
    """mmrotate evaluates in processes that import mmcv.ops anew; without its `_ext` they die, and it waits for ever."""
    script = tmp_path / "script.py"
    script.write_text("import rtmdet_fast.compat.mmcv_ext\n" * (how != "command") + SCRIPT)
    np.save(tmp_path / "boxes.npy", truths(30, 0).bboxes.tensor.numpy())
    program = {"import": [script], "command": ["-m", "rtmdet_fast.compat.mmcv_ext", script]}
    program["no file"] = ["-c", script.read_text()]  # as in a notebook and in pytest
    command = [sys.executable, "-W", "ignore", *map(str, program[how]), str(tmp_path / "boxes.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "mAP 1.0", done.stderr


def testing() -> ConfigDict:
    nms = dict(type="nms_rotated", iou_threshold=0.1)
    return ConfigDict(nms_pre=2000, min_bbox_size=0, score_thr=0.0, nms=nms, max_per_img=2000)
