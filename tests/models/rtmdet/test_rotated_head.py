"""The rotated head against the published one, and against float64: keys, outputs, losses, assignments, detections."""

import json
import math

import numpy as np
import pytest
import torch
from polygons import corners, exact_iou

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.inference.detections import Detections
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import Assignment, DetectionHead
from rtmdet_fast.models.rtmdet.rotated_head import (
    RotatedHead,
    RotatedOutput,
    distances_to_rotated_boxes,
    half_turn,
    regularize,
    rescale,
)


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def padded(gts):
    return Targets(
        torch.nn.utils.rnn.pad_sequence([gt["bboxes"] for gt in gts], batch_first=True),
        torch.nn.utils.rnn.pad_sequence([gt["labels"] for gt in gts], batch_first=True, padding_value=-1),
        torch.tensor([len(gt["labels"]) for gt in gts]),
    )


def corner_tensor(boxes):
    return torch.tensor(np.array([corners(box) for box in boxes.tolist()]))


@pytest.fixture(scope="module")
def reference(shared):
    return torch.load(shared / "reference/rotated_rtmdet_tiny.pt", weights_only=True)


@pytest.fixture
def model(reference):
    model = RTMDet("tiny", "rotated", num_classes=15)
    model.load_state_dict(reference["state_dict"], strict=True)
    return model.eval()


@pytest.mark.parametrize("size", ["tiny", "s", "m", "l"])
def test_state_dict_is_the_published_one(shared, size):
    published = json.loads((shared / f"reference/keys/rotated_rtmdet_{size}.json").read_text())
    with torch.device("meta"):
        model = RTMDet(size, "rotated", num_classes=15)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["keys"]
    assert sum(p.numel() for p in model.parameters()) == published["info"]["params"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, aliases in published["aliases"].items():
        assert all(parameters[alias] is parameters[key] for alias in aliases)
    assert model.bbox_head.exponential == (size in "ml") and model.image_size == 1024


def test_head_outputs(model, reference):
    with torch.no_grad():
        output = model(reference["input"])
    assert len(output) == len(reference["head"]) == 3
    for ours, theirs in zip(output, reference["head"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("rescaled", [False, True])
def test_predictions(model, reference, rescaled):
    expected = reference["predict_rescale" if rescaled else "predict"]
    head = model.bbox_head
    with torch.no_grad():
        (found,) = head.detect(model(reference["input"]), (256, 256), head.test_settings)
    scale = expected["meta"]["scale_factor"] if rescaled else (1.0, 1.0)
    found = head.to_image(found, tuple(scale), expected["meta"]["ori_shape"], clip=True)
    n = len(expected["labels"])
    assert len(found.labels) == n == 657
    theirs = regularize(expected["bboxes"])  # the same boxes: the reference's own may have w < h
    turned = half_turn(found.boxes[:, None, 4] - theirs[:, 4]).abs()
    # Neighbours whose scores differ in the last bit may change places with the number of threads.
    same = (
        (found.labels[:, None] == expected["labels"])
        & ((found.scores[:, None] - expected["scores"]).abs() < 1e-4)
        & ((found.boxes[:, None, :4] - theirs[:, :4]).abs() < 1e-2).all(-1)
        & (turned < 1e-3)
    )
    row, column = same.nonzero(as_tuple=True)
    assert torch.equal(row, torch.arange(n)) and torch.equal(column.sort().values, torch.arange(n))
    assert (row - column).abs().max() <= 1
    # some reach over the edge, where the detection head would clip them
    reach = corner_tensor(found.boxes)
    assert (reach < 0).any() and (reach[..., 0] > 256 / scale[0]).any()


def test_losses_and_gradients(model, reference):
    train = reference["train"]
    model.train()
    losses = model(train["input"], padded(train["gts"]))
    for name in ("loss_cls", "loss_bbox"):
        torch.testing.assert_close(losses[name], sum(train["losses"][name]), rtol=1e-4, atol=0)
    total = sum(losses.values())
    torch.testing.assert_close(total, train["total"], rtol=1e-4, atol=0)
    total.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == train["grad_norms"].keys()
    for name, norm in train["grad_norms"].items():
        gradient = parameters[name].grad
        ours = 0.0 if gradient is None else gradient.norm().item()
        assert ours == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_the_box_loss_is_the_exact_one(reference):
    """In float64, by polygon clipping: the reference's IoU is right for all 45 positives of its training batch.

    It is wrong where boxes coincide (an IoU below 0.5 for some identical ones): there ours is compared with float64
    alone, which says 0.
    """
    train = reference["train"]
    exact = weight = 0.0
    for gt, image in zip(train["gts"], train["assign"], strict=True):
        for i in image["gt_inds"].nonzero()[:, 0].tolist():
            iou = exact_iou(image["pred"]["bboxes"][i].tolist(), gt["bboxes"][image["gt_inds"][i] - 1].tolist())
            quality = image["max_overlaps"][i].item()
            exact += 2 * quality * (1 - iou)
            weight += quality
    assert sum(train["losses"]["loss_bbox"]).item() == pytest.approx(exact / max(weight, 1), rel=1e-4)

    gts = train["gts"][0]["bboxes"]
    coinciding = torch.cat([gts, gts + torch.tensor([0, 0, 0, 0, math.pi]), gts[:, [0, 1, 3, 2, 4]]])
    coinciding[-len(gts) :, 4] += math.pi / 2
    index = torch.arange(len(gts)).repeat(3)[None]
    assigned = Assignment(index, torch.ones(1, 3 * len(gts)), torch.zeros_like(index))
    head = RotatedHead(8, 15)
    loss = head.box_loss(coinciding[None].requires_grad_(), padded(train["gts"][:1]), assigned)
    assert 0 <= loss.item() < 3 * len(gts) * 1e-5


def test_assignments(reference):
    head = RotatedHead(8, 15)
    for gt, expected in zip(reference["train"]["gts"], reference["train"]["assign"], strict=True):
        pred = expected["pred"]
        found = head.assign(pred["scores"][None], pred["bboxes"][None], pred["priors"], padded([gt]))
        assert torch.equal(found.gt[0] + 1, expected["gt_inds"])
        matched = expected["gt_inds"] > 0
        torch.testing.assert_close(found.quality[0][matched], expected["max_overlaps"][matched])
        assert torch.equal(found.labels[0][matched], expected["labels"][matched])


def test_predictions_of_negative_size_count_as_slivers():
    """As published; an untrained head predicts many, and which of them match must not be chance."""
    priors = torch.tensor([[16.0, 16, 8, 8], [24.0, 16, 8, 8]])
    boxes = torch.tensor([[[16.0, 16, -3, 8, 0.3], [24.0, 16, 4, -1, 0.3]]])
    gt = [20.0, 16, 30, 12, 0.3]
    targets = Targets(torch.tensor([[gt]]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1).long())
    found = RotatedHead(8, 1).assign(torch.zeros(1, 2, 1), boxes, priors, targets)
    slivers = [exact_iou([16, 16, 1e-3, 8, 0.3], gt), exact_iou([24, 16, 4, 1e-3, 0.3], gt)]
    winner = int(np.argmax(slivers))
    assert found.gt[0].tolist() == [0 if i == winner else -1 for i in range(2)]
    assert found.quality[0, winner].item() == pytest.approx(slivers[winner], rel=1e-3)


@pytest.mark.parametrize("exponential", [False, True])
def test_an_untrained_head_predicts_boxes_that_overlap_what_it_is_to_find(exponential):
    torch.manual_seed(0)
    head = RotatedHead(16, 3, exponential=exponential)
    features = tuple(torch.randn(1, 16, s, s) for s in (16, 8, 4))
    logits, boxes, priors = head.decode(head(features))
    assert (boxes[..., 2:4] > priors[:, 2:]).all() and (boxes[..., 2:4] < 3 * priors[:, 2:]).all()
    gts = torch.tensor([[[30.0, 40, 18, 12, 0.4], [90, 70, 50, 20, -1.2], [64, 100, 14, 9, 1.5]]])
    found = head.assign(logits, boxes, priors, Targets(gts, torch.tensor([[0, 1, 2]]), torch.tensor([3])))
    for j in range(3):
        assert found.quality[0][found.gt[0] == j].max() > 0.1
    assert all((conv.bias == -math.log(99)).all() for conv in head.rtm_cls)
    assert all((conv.bias == 0).all() for conv in head.rtm_ang)


def test_distances_are_those_to_the_sides_in_the_frame_of_the_box():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(1, 50, 5, generator=generator) * torch.tensor([200, 200, 80, 40, 40.0])
    boxes = (boxes - torch.tensor([0, 0, -1, -1, 20.0])).double()  # angles of several turns
    points = (boxes[0, :, :2] + torch.randn(50, 2, generator=generator) * 20).double()
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    dx, dy = (points - boxes[0, :, :2]).unbind(-1)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin  # of the point in the frame of the box
    w, h = boxes[..., 2], boxes[..., 3]
    distances = torch.stack([w / 2 + u, h / 2 + v, w / 2 - u, h / 2 - v], -1)
    found = distances_to_rotated_boxes(points, distances, boxes[..., 4:])
    torch.testing.assert_close(found[..., :4], boxes[..., :4])
    assert ((found[..., 4] >= -math.pi / 2) & (found[..., 4] < math.pi / 2)).all()
    turns = (found[..., 4] - boxes[..., 4]) / math.pi
    torch.testing.assert_close(turns, turns.round())


def test_regularized_boxes_have_the_same_corners():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 5, generator=generator) * torch.tensor([100, 100, 50, 50, 20.0])
    boxes[:, 4] -= 10
    boxes[:3, 4] = torch.tensor([math.pi / 2, -math.pi / 2, -math.pi / 2 - 1e-7])
    found = regularize(boxes)
    assert (found[:, 2] >= found[:, 3]).all()
    assert ((found[:, 4] >= -math.pi / 2) & (found[:, 4] < math.pi / 2)).all()
    distance = torch.cdist(corner_tensor(found), corner_tensor(boxes))
    assert distance.min(-1).values.max() < 1e-3 and distance.min(-2).values.max() < 1e-3


def test_rescaled_boxes():
    boxes = torch.tensor([[10.0, 20, 30, 8, 0.4], [50.0, 40, 20, 19, -1.2]])
    torch.testing.assert_close(corner_tensor(rescale(boxes, (2.5, 2.5))), corner_tensor(boxes) * 2.5, rtol=0, atol=1e-4)
    # unequal scales shear: the sides keep their lengths, and w its direction
    found, plain = corner_tensor(rescale(boxes, (2.0, 2.02))), corner_tensor(boxes) * torch.tensor([2.0, 2.02])
    along, expected = (c[:, 1] - c[:, 0] for c in (found, plain))
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close((found[:, 3] - found[:, 0]).norm(dim=-1), (plain[:, 3] - plain[:, 0]).norm(dim=-1))
    torch.testing.assert_close(found.mean(1), plain.mean(1))


def test_to_image_gives_le90_boxes_that_are_not_clipped():
    boxes = torch.tensor([[2.0, 3, 8, 20, 0.1], [100, 3, 50, 20, 3.0]])
    found = Detections(boxes, torch.ones(2), torch.zeros(2).long(), torch.arange(2))
    found = RotatedHead(8, 1).to_image(found, (0.5, 0.5), (20, 30), clip=True)
    expected = [[4, 6, 40, 16, 0.1 - math.pi / 2], [200, 6, 100, 40, 3.0 - math.pi]]
    torch.testing.assert_close(found.boxes, torch.tensor(expected))


def test_picking_the_positives_gives_the_dense_loss():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 60, 5, generator=generator) * torch.tensor([60, 60, 30, 30, 3.0])
    gts = torch.rand(2, 4, 5, generator=generator) * torch.tensor([60, 60, 40, 30, 3.0])
    targets = Targets(gts, torch.zeros(2, 4).long(), torch.tensor([4, 2]))
    gt = torch.randint(-1, 2, (2, 60), generator=generator)
    quality = torch.where(gt >= 0, torch.rand(2, 60, generator=generator), 0)
    results = []
    for method in (RotatedHead.box_loss, DetectionHead.box_loss):
        leaf = boxes.clone().requires_grad_()
        loss = method(RotatedHead(8, 1), leaf, targets, Assignment(gt, quality, gt.clamp(max=0)))
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for picked, dense in zip(*results, strict=True):
        torch.testing.assert_close(picked, dense)
    assert results[0][1][gt < 0].abs().max() == 0 and results[0][1].abs().max() > 0


def test_batch_without_any_object_has_a_finite_loss_and_gradient():
    model = RTMDet("nano", "rotated", num_classes=2)
    for most in (0, 3):
        empty = Targets(torch.zeros(2, most, 5), torch.zeros(2, most).long(), torch.zeros(2).long())
        losses = model(torch.randn(2, 3, 64, 64), empty)
        assert losses["loss_bbox"].item() == 0 and losses["loss_cls"].item() > 0
        sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_detection_weights_initialise_all_but_the_angle(tmp_path):
    path = tmp_path / "det.pth"
    detector = RTMDet("nano", num_classes=15)
    detector.save(path)
    from rtmdet_fast.models.checkpoint import read_checkpoint

    model = RTMDet("nano", "rotated", num_classes=15)
    with pytest.warns(UserWarning, match=r"det.pth: freshly initialised, to be trained: bbox_head.rtm_ang$"):
        model.load_weights(read_checkpoint(path))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in detector.state_dict().items())
    with pytest.raises(UserError, match="task 'det', not 'rotated'"):
        RTMDet.from_pretrained(path, task="rotated")


def test_save_and_load(tmp_path):
    model = RTMDet("nano", "rotated", class_names=["plane", "ship"])
    model.image_size = 256
    model.save(tmp_path / "a.pth")
    loaded = RTMDet.from_pretrained(tmp_path / "a.pth")
    assert loaded.task == "rotated" and loaded.class_names == ("plane", "ship") and loaded.image_size == 256
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_compiled_and_exported_models_equal_the_eager_one(model):
    images, more = torch.randn(2, 3, 64, 96), torch.randn(3, 3, 64, 96)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with torch.no_grad():
        # traced whole; test_model.py has Inductor compile the layers, which are the same
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        pairs = [(model(images), compiled), (model(images), program(images)), (model(more), program(more))]
    for expected, found in pairs:
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert relative_error(a, b) < 1e-4


def random_targets(generator, count):
    """Boxes of every size from 0 through 1e-3 to 20,000 px in and around a 64 px image, in both forms."""
    boxes = torch.rand(2, count, 5, generator=generator) * torch.tensor([64, 64, 60, 60, 7.0])
    boxes[..., 4] -= 3.5
    sides = torch.tensor([0.0, 1e-3, 0.5, 3.0, 60.0, 20000.0])
    kind = torch.randint(2 * len(sides), boxes[..., 2:4].shape, generator=generator)
    boxes[..., 2:4] = torch.where(kind < len(sides), sides[kind % len(sides)], boxes[..., 2:4])
    labels = torch.randint(3, (2, count), generator=generator)
    return Targets(boxes, labels, torch.randint(count + 1, (2,), generator=generator))


def bf16_steps(steps, *, exponential):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    head = RotatedHead(8, 3, exponential=exponential)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for step in range(steps):
        # now and then features that a network on the verge of diverging would give
        size = 10.0 ** torch.randint(-2, 5, (1,), generator=generator).item() if step % 5 == 0 else 1.0
        features = tuple((torch.randn(2, 8, s, s, generator=generator) * size).requires_grad_() for s in (8, 4, 2))
        with torch.autocast("cpu", torch.bfloat16):
            losses = head.loss(head(features), random_targets(generator, 6))
        total = sum(losses.values())
        total.backward()
        assert all(loss.isfinite() and loss >= 0 for loss in losses.values()), (step, losses)
        for name, parameter in head.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (step, name)
        assert all(f.grad.isfinite().all() for f in features), step
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("exponential", [False, True])
def test_no_nan_under_autocast(exponential):
    bf16_steps(60, exponential=exponential)


@pytest.mark.slow
@pytest.mark.parametrize("exponential", [False, True])
def test_no_nan_in_2000_steps_under_autocast(exponential):
    bf16_steps(2000, exponential=exponential)


@pytest.mark.parametrize("exponential", [False, True])
def test_outputs_beyond_every_range_have_finite_losses_and_gradients(exponential):
    """What float16 convolutions can give at most, in and out of reach of exp."""
    head = RotatedHead(8, 3, exponential=exponential)
    with torch.no_grad():
        for conv in head.rtm_reg:
            conv.weight.zero_()
            conv.bias.copy_(torch.tensor([65504.0, -65504, 100, 65504]))
        for conv in head.rtm_ang:
            conv.bias.fill_(65504.0)
    features = tuple(torch.randn(2, 8, s, s).requires_grad_() for s in (8, 4, 2))
    losses = head.loss(head(features), random_targets(torch.Generator().manual_seed(0), 6))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert all(f.grad.isfinite().all() for f in features)


def test_outputs_are_float32_under_autocast():
    head = RotatedHead(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(tuple(torch.randn(1, 8, s, s) for s in (8, 4, 2)))
    assert isinstance(output, RotatedOutput)
    assert {level.dtype for level in (*output.distances, *output.angles)} == {torch.float32}
