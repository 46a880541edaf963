"""RTMDet-Ins against the published one: keys, outputs, losses, gradients, assignments, boxes and masks."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.data.masks import MaskStore, read_segmentation
from rtmdet_fast.inference.detections import Detections
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.inference.preprocess import letterbox, normalize
from rtmdet_fast.kernels.assign import dynamic_soft_label_assign
from rtmdet_fast.kernels.dynamic_mask import dynamic_mask_logits
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.models.checkpoint import read_checkpoint
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.model import SIZES
from rtmdet_fast.training.schedule import parameter_groups


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def unpacked(masks) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(masks["packed"].numpy(), axis=-1, count=masks["shape"][-1]))


def centers_of_mass(masks: torch.Tensor) -> torch.Tensor:
    """[n, 2] mean column and row of masks [n, H, W]."""
    columns, rows = masks.double().sum(1), masks.double().sum(2)
    x, y = ((line * torch.arange(line.shape[1])).sum(1) / line.sum(1) for line in (columns, rows))
    return torch.stack((x, y), 1).float()


@pytest.fixture(scope="module")
def reference(shared):
    return torch.load(shared / "reference/rtmdet-ins_tiny.pt", weights_only=True)


@pytest.fixture
def model(reference):
    model = RTMDet("tiny", "ins")
    model.load_state_dict(reference["state_dict"], strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def targets(reference):
    gts = reference["train"]["gts"]
    masks = torch.stack([unpacked(gt["masks"]) for gt in gts])
    return Targets(
        torch.stack([gt["bboxes"] for gt in gts]),
        torch.stack([gt["labels"] for gt in gts]),
        torch.tensor([len(gt["labels"]) for gt in gts]),
        torch.stack([centers_of_mass(m) for m in masks]),
        masks[..., 2::4, 2::4].contiguous(),
    )


@pytest.mark.parametrize("size", ["tiny", "s", "m", "l", "x"])
def test_state_dict_is_the_published_one(shared, size):
    published = json.loads((shared / f"reference/keys/rtmdet-ins_{size}.json").read_text())
    with torch.device("meta"):
        model = RTMDet(size, "ins")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["keys"]
    assert sum(p.numel() for p in model.parameters()) == published["info"]["params"]
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for key, aliases in published["aliases"].items():
        assert all(tensors[alias] is tensors[key] for alias in aliases)


def test_outputs(model, reference):
    with torch.no_grad():
        output = model(reference["input"])
    logits, distances, kernels, features = reference["head"]
    found = (output.kernels[0][..., ::4, ::4], *output.kernels[1:])
    for ours, theirs in ((output.logits, logits), (output.distances, distances), (found, kernels)):
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    assert relative_error(output.features, features) < 1e-4


@torch.no_grad()
def test_predictions(model, reference):
    """All 100 scores of the fixture are 1.0, so that its order is one of many: each detection is looked for."""
    expected, head = reference["predict"], model.bbox_head
    output = model(reference["input"])
    logits, boxes, priors = head.decode(output)
    prior = (priors[:, None, :3] == expected["priors"][:, :3]).all(-1).int().argmax(0)
    assert torch.equal(priors[prior], expected["priors"])
    scores = logits[0].sigmoid()[prior, expected["labels"]]
    torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(head.clip(boxes, (416, 416))[0, prior], expected["bboxes"], rtol=0, atol=1e-2)
    kept = batched_nms_padded(boxes[:, prior], scores[None], expected["labels"][None], 0.6, 100)[1]
    assert kept.item() == 100

    kernels = torch.cat([k.flatten(2) for k in output.kernels], 2)[0, :, prior].T
    logits = dynamic_mask_logits(
        output.features, kernels, priors[prior, :2], priors[prior, 2], torch.zeros(100, dtype=torch.int64)
    )
    ours, theirs = PredictedMasks(logits, (1.0, 1.0), (416, 416)).to_bool(), unpacked(expected["masks"]).bool()
    union = (ours | theirs).sum((1, 2))
    assert (union > 0).sum() > 80  # the random weights leave some masks empty
    # Only a pixel whose logit is next to nothing may flip: by the last bits of the features, which depend on the
    # processor and the number of threads.
    exact = F.interpolate(logits[None].double(), size=(416, 416), mode="bilinear")[0]
    small = exact.abs() < 1e-4 * logits.abs().amax((1, 2), keepdim=True)
    assert not ((ours ^ theirs) & ~small).any()
    assert (ours ^ theirs).sum() <= 1e-3 * union.sum()


@torch.no_grad()
def test_detections_are_the_best_of_their_overlaps_with_masks_of_their_priors(model, reference):
    head = model.bbox_head
    output = model(reference["input"])
    output = output._replace(logits=tuple(0.08 * x - 0.5 for x in output.logits))  # where no score is exactly 1
    (found,) = head.detect(output, (416, 416), head.test_settings)
    assert len(found.labels) == 100 and found.scores.unique().numel() > 95
    assert (found.scores[:-1] >= found.scores[1:]).all() and (found.scores > 0.05).all()
    logits, boxes, priors = head.decode(output)
    torch.testing.assert_close(logits[0, found.priors, found.labels].sigmoid(), found.scores)
    torch.testing.assert_close(head.clip(boxes, (416, 416))[0, found.priors], found.boxes)
    kernels = torch.cat([k.flatten(2) for k in output.kernels], 2)[0, :, found.priors].T
    expected = dynamic_mask_logits(
        output.features, kernels, priors[found.priors, :2], priors[found.priors, 2], torch.zeros(100, dtype=torch.int64)
    )
    torch.testing.assert_close(found.masks.logits, expected)


def test_masks_of_the_image_lie_where_the_loss_puts_them():
    """Logits that the loss has no fault in give the very mask that it was shown, to the pixel."""
    head, edge = RTMDet("nano", "ins", num_classes=1).bbox_head, 37.2
    logits = (edge - (8 * torch.arange(8.0) + 4)).expand(1, 8, 8)
    mask = torch.arange(64) < edge
    up = torch.nn.functional.interpolate(logits[None], scale_factor=2, mode="bilinear")[0, 0, 0]
    assert torch.equal(up > 0, mask[2::4])
    one = torch.ones(1)
    found = Detections(torch.tensor([[0.0, 0, 38, 64]]), one, one, one, PredictedMasks(logits, (1.0, 1.0), (64, 64)))
    (seen,) = head.to_image(found, (1.0, 1.0), (64, 64), clip=True).masks.to_bool()
    assert torch.equal(seen, mask.expand(64, 64))


def test_losses_and_gradients(model, reference, targets):
    train = reference["train"]
    model.train()
    losses = model(train["input"], targets)
    for name, expected in train["losses"].items():
        expected = sum(expected) if isinstance(expected, list) else expected
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=0)
    total = sum(losses.values())
    torch.testing.assert_close(total, train["total"], rtol=1e-4, atol=0)
    total.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == train["grad_norms"].keys()
    for name, norm in train["grad_norms"].items():
        gradient = parameters[name].grad
        ours = 0.0 if gradient is None else gradient.norm().item()
        assert ours == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for key, value in train["bn_running_mean_after"].items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_assignments_take_distances_from_the_centre_of_mass(reference, targets):
    for i, expected in enumerate(reference["train"]["assign"]):
        pred = expected["pred"]
        problem = pred["bboxes"][None], pred["scores"][None], pred["priors"], *(t[i : i + 1] for t in targets[:4])
        assigned, iou, labels = dynamic_soft_label_assign(*problem)
        assert torch.equal(assigned[0] + 1, expected["gt_inds"])
        matched = expected["gt_inds"] > 0
        torch.testing.assert_close(iou[0][matched], expected["max_overlaps"][matched])
        assert torch.equal(labels[0][matched], expected["labels"][matched])


def test_the_head_hands_the_targets_centres_to_the_assigner(reference, targets):
    model = RTMDet("tiny", "ins")
    for i, expected in enumerate(reference["train"]["assign"]):
        pred = expected["pred"]
        own = Targets(*(t[i : i + 1] for t in targets[:5]))
        # in the fixture the boxes' centres give the same answer: others must give another
        for centers, same in ((own.centers, True), (own.centers + 50, False)):
            found = model.bbox_head.assign(
                pred["scores"][None], pred["bboxes"][None], pred["priors"], own._replace(centers=centers)
            )
            assert torch.equal(found.gt[0] + 1, expected["gt_inds"]) == same


@pytest.mark.parametrize(("size", "count"), [*((size, 1) for size in SIZES), ("nano", 0), ("tiny", 0)])
def test_every_size_runs_forward_and_backward(size, count):
    model = RTMDet(size, "ins", num_classes=3)
    targets = Targets(
        torch.tensor([[[8.0, 8, 40, 48]]] * 2)[:, :count],
        torch.zeros(2, count, dtype=torch.int64),
        torch.full((2,), count),
        torch.tensor([[[24.0, 28]]] * 2)[:, :count],
        torch.ones(2, count, 16, 16, dtype=torch.uint8),
    )
    losses = model(torch.randn(2, 3, 64, 64), targets)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_mask"}
    assert (losses["loss_mask"].item() > 0) == (losses["loss_bbox"].item() > 0) == bool(count)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_boxes_alone_do_not_train_masks():
    model = RTMDet("nano", "ins", num_classes=1)
    boxes = torch.tensor([[[8.0, 8, 40, 48]]])
    with pytest.raises(ValueError, match="masks"):
        model(torch.randn(1, 3, 64, 64), Targets(boxes, torch.zeros(1, 1).long(), torch.ones(1).long()))


def test_a_file_says_that_it_holds_masks(model, tmp_path):
    model.save(tmp_path / "ins.pth")
    assert RTMDet.inspect(read_checkpoint(tmp_path / "ins.pth")) == ("tiny", "ins", 80, {})
    again = RTMDet.from_pretrained(tmp_path / "ins.pth")
    assert again.task == "ins"
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with pytest.raises(UserError, match="'ins', not 'det'"):
        RTMDet.from_pretrained(tmp_path / "ins.pth", task="det")


@pytest.mark.parametrize(("task", "other"), [("ins", "det"), ("det", "ins")])
def test_another_tasks_weights_initialise_backbone_and_neck(tmp_path, task, other):
    RTMDet("nano", other, num_classes=2).save(tmp_path / "other.pth")
    model = RTMDet("nano", task, num_classes=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"freshly initialised, to be trained: bbox_head$"):
        model.load_weights(read_checkpoint(tmp_path / "other.pth"))
    taken = torch.load(tmp_path / "other.pth", weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("bbox_head.") else taken[key]), key


def test_masks_are_not_predicted_in_windows():
    with pytest.raises(UserError, match="patch_size is 64"):
        RTMDet("nano", "ins", num_classes=1).predict(np.zeros((90, 90, 3), np.uint8), patch_size=64)


def test_other_classes_leave_only_the_classifier_fresh(tmp_path):
    RTMDet("nano", "ins", num_classes=2).save(tmp_path / "two.pth")
    with pytest.warns(UserWarning, match=r"for 3 classes, to be trained: bbox_head.rtm_cls$"):
        RTMDet.from_pretrained(tmp_path / "two.pth", num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RTMDet.from_pretrained(tmp_path / "two.pth")


def test_a_model_learns_the_masks_of_one_image_by_heart():
    """Augmentation apart, the whole chain pulls the same way: from outlines to targets, and from logits to masks."""
    import cv2

    torch.manual_seed(0)
    rings = [
        [8, 8, 44, 8, 44, 20, 20, 20, 20, 52, 8, 52],
        [60, 10, 116, 10, 88, 52],
        [40, 60, 100, 60, 108, 76, 100, 90, 40, 90, 32, 76],
    ]
    image = np.full((96, 128, 3), 60, np.uint8)
    for ring, colour in zip(rings, ((250, 40, 40), (40, 250, 40), (250, 40, 40)), strict=True):
        cv2.fillPoly(image, [np.array(ring).reshape(-1, 2)], colour)
    outlines = MaskStore([read_segmentation([ring], 128, 96)[0] for ring in rings]).load(0, 3, 128, 96)
    truth = outlines.render(128, 128)
    labels = torch.tensor([0, 1, 0])
    fields = (
        torch.from_numpy(truth.extents),
        labels,
        torch.tensor(3),
        *map(torch.from_numpy, (truth.centers, truth.masks)),
    )
    targets = Targets(*(field.expand(4, *field.shape) for field in fields))
    canvas, _ = letterbox(image, 128)
    batch = normalize(torch.from_numpy(canvas).permute(2, 0, 1).expand(4, -1, -1, -1))
    model = RTMDet("nano", "ins", class_names=("blue", "green")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # so that the statistics follow in so few steps
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=4e-3)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 100)
        losses = model(batch + 0.1 * torch.randn_like(batch), targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["loss_mask"] < 0.1
    found = model.predict(image, image_size=128, score_threshold=0.3)
    assert sorted(found.labels[:3].tolist()) == [0, 0, 1]
    masks = found.masks[:3].numpy()
    for i, label in enumerate(labels):
        x, y, pixels = outlines.region(i)
        mask = np.zeros((96, 128), bool)
        mask[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        iou = (masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2))
        assert iou.max() > 0.75 and found.labels[iou.argmax()] == label


MEMORY = """
import resource, sys, torch
from rtmdet_fast import RTMDet
from rtmdet_fast.models.rtmdet.detection_head import Targets

torch.manual_seed(0)
n = 300
corner = torch.rand(2, n, 2) * 540
boxes = torch.cat([corner, corner + 20 + 80 * torch.rand(2, n, 2)], 2)
at = torch.arange(160) * 4 + 2
inside = [(at >= boxes[..., k, None]) & (at < boxes[..., k + 2, None]) for k in (0, 1)]
masks = (inside[1][..., None] & inside[0][..., None, :]).to(torch.uint8)
targets = Targets(boxes, torch.randint(80, (2, n)), torch.full((2,), n), (boxes[..., :2] + boxes[..., 2:]) / 2, masks)
model = RTMDet("tiny", "ins")
losses = model(torch.randn(2, 3, 640, 640), targets)
sum(losses.values()).backward()
assert losses["loss_mask"].item() > 0.1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_300_instances_an_image_fit_in_memory():
    """Batch 2 at 640 px, forwards and backwards, in less than 4 GB all in all."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 4e9
