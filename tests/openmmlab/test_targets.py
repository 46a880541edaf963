"""Batched targets against mmdet's own, problem by problem and through the losses of whole heads."""

import copy
import itertools

import pytest
import torch
from needs import openmmlab

openmmlab("mmdet")

from mmdet.models.task_modules.assigners import BboxOverlaps2D, DynamicSoftLabelAssigner
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from rtmdet_fast.compat import mmdet as compat

CLASSES, CHANNELS, SIZE = 5, 16, 160


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet")


@pytest.fixture
def assigners():
    original = TASK_UTILS.build(dict(type="DynamicSoftLabelAssigner", topk=13))
    return original, TASK_UTILS.build(dict(type="BatchedDynamicSoftLabelAssigner", topk=13))


def same_assignment(original, batched, pred, gt, tied: bool = False) -> int:
    expected, found = (assigner.assign(copy.copy(pred), copy.copy(gt)) for assigner in (original, batched))
    assert found.num_gts == expected.num_gts
    assert found.gt_inds.dtype == expected.gt_inds.dtype and found.labels.dtype == expected.labels.dtype
    if tied:  # of equal costs either may win: then the boxes are equal too
        assert torch.equal(found.gt_inds > 0, expected.gt_inds > 0)
        boxes = torch.cat([gt.bboxes.new_zeros(1, 4), gt.bboxes])
        assert torch.equal(boxes[found.gt_inds], boxes[expected.gt_inds])
    else:
        assert torch.equal(found.gt_inds, expected.gt_inds)
        assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.max_overlaps, expected.max_overlaps, atol=1e-6, rtol=0)
    return int((found.gt_inds > 0).sum())


def test_assigner_on_the_reference_cases(assigners, shared):
    for case in torch.load(shared / "reference/assign_cases.pt", weights_only=True):
        pred = InstanceData(bboxes=case["decoded_bboxes"], scores=case["cls_logits"], priors=case["priors"])
        gt = InstanceData(bboxes=case["gt_bboxes"], labels=case["gt_labels"])
        same_assignment(*assigners, pred, gt, tied="duplicate" in case["name"])


def priors(size: int) -> torch.Tensor:
    levels = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(torch.arange(0, size, stride), torch.arange(0, size, stride), indexing="ij")
        levels.append(torch.stack([x, y, x * 0 + stride, x * 0 + stride], -1).view(-1, 4))
    return torch.cat(levels).float()


def truths(count: int, seed: int, size: int = SIZE, masks: bool = False) -> InstanceData:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g) * size * 0.7
    gt = InstanceData(
        bboxes=torch.cat([corner, corner + 6 + torch.rand(count, 2, generator=g) * size * 0.25], 1),
        labels=torch.randint(CLASSES, (count,), generator=g),
    )
    if masks:
        grid = torch.arange(size)
        inside = [
            ((grid >= box[1 - axis]) & (grid < box[3 - axis])) for box in gt.bboxes for axis in (0, 1)
        ]  # rows, then columns
        full = [
            y[:, None] & x & (torch.rand(size, size, generator=g) > 0.4)
            for y, x in zip(inside[::2], inside[1::2], strict=True)
        ]
        gt.masks = torch.stack(full) if full else torch.zeros(0, size, size, dtype=torch.bool)
    return gt


@pytest.mark.parametrize("masks", [False, True])
def test_assigner_on_random_problems(assigners, masks):
    points = priors(SIZE)
    matched = 0
    for seed, count in itertools.product(range(3), (0, 1, 7, 60)):
        g = torch.Generator().manual_seed(100 + seed)
        reach = torch.rand(len(points), 4, generator=g) * 4 * points[:, 2:3] - 4
        pred = InstanceData(
            bboxes=torch.cat([points[:, :2] - reach[:, :2], points[:, :2] + reach[:, 2:]], 1),
            scores=torch.randn(len(points), CLASSES, generator=g) * 3,
            priors=points,
        )
        matched += same_assignment(*assigners, pred, truths(count, seed, masks=masks))
        outside = truths(2, seed, masks=masks)
        outside.bboxes += 10 * SIZE
        assert same_assignment(*assigners, pred, outside) == 0
    assert matched > 200


def head_config(kind: str) -> dict:
    ins = "Ins" in kind
    norm = dict(type="BN")
    return dict(
        type=kind,
        num_classes=CLASSES,
        in_channels=CHANNELS,
        feat_channels=CHANNELS,
        stacked_convs=1,
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        norm_cfg=norm,
        **(dict(loss_mask=dict(type="DiceLoss", loss_weight=2.0, eps=5e-6, reduction="mean")) if ins else {}),
        **(dict(share_conv=True) if "SepBN" in kind else {}),
        with_objectness="SepBN" not in kind,
        train_cfg=dict(assigner=dict(type="DynamicSoftLabelAssigner", topk=13), allowed_border=-1, pos_weight=-1),
    )


def problem(masks: bool, seed: int = 0) -> tuple[tuple, list[InstanceData], list[dict]]:
    """Features, ground truths of 3 images (one has none), of which the last is padded."""
    g = torch.Generator().manual_seed(seed)
    features = tuple(torch.randn(3, CHANNELS, SIZE // s, SIZE // s, generator=g) for s in (8, 16, 32))
    gts = [truths(count, seed + count, masks=masks) for count in (20, 0, 3)]
    for gt in gts:
        if masks:
            gt.masks = BitmapMasks(gt.masks.numpy().astype("uint8"), SIZE, SIZE)
    shapes = [(SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE)] if masks else [(SIZE, SIZE), (SIZE, SIZE), (128, 100)]
    return features, gts, [dict(img_shape=shape, pad_shape=shape) for shape in shapes]


def losses_and_gradients(head, case) -> list[torch.Tensor]:
    features, gts, metas = copy.deepcopy(case)
    head.zero_grad()
    losses = head.loss_by_feat(*head(features), gts, metas)
    flat = [x for value in losses.values() for x in (value if isinstance(value, (list, tuple)) else [value])]
    sum(flat).backward()
    return [x.detach() for x in flat] + [p.grad.clone() for p in head.parameters() if p.grad is not None]


# mmdet's mask loss takes kernels and priors of different positions where some priors are left out
@pytest.mark.parametrize(
    "kind, train_cfg",
    [
        ("RTMDetHead", {}),
        ("RTMDetHead", dict(allowed_border=10, pos_weight=1.7)),
        ("RTMDetSepBNHead", {}),
        ("RTMDetSepBNHead", dict(allowed_border=10, pos_weight=1.7)),
        ("RTMDetInsHead", {}),
        ("RTMDetInsSepBNHead", {}),
    ],
)
def test_losses_of_heads(kind, train_cfg, monkeypatch):
    config = head_config(kind)
    config["train_cfg"].update(train_cfg)
    torch.manual_seed(0)
    original = MODELS.build(config)
    original.init_weights()
    batched = MODELS.build({**config, "type": f"Batched{kind}"})
    batched.load_state_dict(original.state_dict())
    case = problem(masks="Ins" in kind)
    expected = losses_and_gradients(original, case)
    assert sum(expected[:3]) > 0 and sum(expected[3:6]) > 0
    torch.testing.assert_close(losses_and_gradients(batched, case), expected, rtol=1e-5, atol=1e-6)

    calls = []
    match = compat.dynamic_soft_label_assign
    monkeypatch.setattr(compat, "dynamic_soft_label_assign", lambda *a, **k: calls.append(len(a[0])) or match(*a, **k))
    with compat.patched():
        torch.testing.assert_close(losses_and_gradients(original, case), expected, rtol=1e-5, atol=1e-6)
    assert calls == [3]  # all images at once
    losses_and_gradients(original, case)
    assert calls == [3]


def test_no_ground_truth_at_all():
    original = MODELS.build(head_config("RTMDetSepBNHead"))
    features, gts, metas = problem(masks=False)
    case = features, [gt[:0] for gt in gts], metas
    expected = losses_and_gradients(original, case)
    with compat.patched():
        torch.testing.assert_close(losses_and_gradients(original, case), expected)


def test_no_ground_truth_of_any_shape(assigners):
    """Of which mmdet asks the length alone: its own tests have predictions [N, 1, 4] then, others boxes [0]."""
    for boxes in (torch.zeros(0, 4), torch.zeros(0)):
        gt = InstanceData(bboxes=boxes, labels=torch.zeros(0))
        pred = InstanceData(bboxes=torch.rand(2, 1, 4), scores=torch.rand(2, 1), priors=torch.rand(2, 4))
        assert same_assignment(*assigners, pred, gt) == 0
    none = InstanceData(bboxes=torch.zeros(0, 4), scores=torch.zeros(0, 1), priors=torch.zeros(0, 4))
    assert same_assignment(*assigners, none, truths(2, 0)) == 0
    original = MODELS.build(head_config("RTMDetSepBNHead"))
    features, gts, metas = problem(masks=False)
    gts[1] = InstanceData(bboxes=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    expected = losses_and_gradients(original, (features, gts, metas))
    with compat.patched():
        torch.testing.assert_close(
            losses_and_gradients(original, (features, gts, metas)), expected, rtol=1e-5, atol=1e-6
        )


def test_patch_is_undone():
    from mmdet.models.dense_heads import RTMDetHead

    before = RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign
    compat.patch()
    compat.patch()
    assert RTMDetHead.get_targets is not before[0] and DynamicSoftLabelAssigner.assign is not before[1]
    with compat.patched():
        pass
    assert RTMDetHead.get_targets is not before[0]  # it was on before the block
    compat.unpatch()
    assert (RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign) == before
    with pytest.raises(KeyError), compat.patched():
        raise KeyError
    assert (RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign) == before


@TASK_UTILS.register_module()
class OwnOverlaps(BboxOverlaps2D):
    """An IoU that the batched assignment does not know."""


def test_unknown_parts_stay_with_mmdet():
    """Under the patch; in the batched classes they are an error."""
    config = head_config("RTMDetSepBNHead")
    torch.manual_seed(0)
    case = problem(masks=False)
    for change in (
        dict(assigner=dict(type="SimOTAAssigner")),
        dict(assigner=dict(type="DynamicSoftLabelAssigner", topk=65)),
        dict(assigner=dict(type="DynamicSoftLabelAssigner", iou_calculator=dict(type="OwnOverlaps"))),
    ):
        config["train_cfg"].update(change)
        head = MODELS.build(config)
        batched = MODELS.build({**config, "type": "BatchedRTMDetSepBNHead"})
        if change["assigner"]["type"] != "SimOTAAssigner":  # which takes scores, not logits
            expected = losses_and_gradients(head, case)
            with compat.patched():
                torch.testing.assert_close(losses_and_gradients(head, case), expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"assigner is|topk is|iou_calculator is"):
            losses_and_gradients(batched, case)
    with pytest.raises(ValueError, match="topk is 65"):
        TASK_UTILS.build(dict(type="BatchedDynamicSoftLabelAssigner", topk=65))


def test_a_config_names_the_head(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "custom_imports = dict(imports=['rtmdet_fast.compat.mmdet'])\n"
        f"head = { ({**head_config('BatchedRTMDetSepBNHead')})!r}\n"
    )
    head = MODELS.build(Config.fromfile(path).head)
    head.assigner = TASK_UTILS.build(dict(type="BatchedDynamicSoftLabelAssigner"))
    assert isinstance(head, compat.BatchedRTMDetSepBNHead)
    assert losses_and_gradients(head, problem(masks=False))[0] > 0
