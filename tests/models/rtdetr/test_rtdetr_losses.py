"""Losses against the published ones, and against their definitions written out image by image in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from rtdetr_reference import fixture_recipe, load, padded, pairs_by_target

from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import iou_and_giou, relative_targets
from rtmdet_fast.models.rtdetr.decoder import DecoderOutput
from rtmdet_fast.models.rtdetr.denoising import denoising_queries
from rtmdet_fast.models.rtdetr.losses import detr_losses
from rtmdet_fast.models.rtdetr.matcher import match


def output_of(layers, encoder, denoising=None):
    """DecoderOutput of (logits, boxes) by layer; those of the denoising queries before them."""
    logits, boxes = (
        torch.stack([x if denoising is None else torch.cat((d, x), 1) for d, x in zip(given, of_layers, strict=True)])
        for given, of_layers in zip(zip(*(denoising or layers), strict=True), zip(*layers, strict=True), strict=True)
    )
    return DecoderOutput(logits, boxes, *encoder, torch.zeros(0))


def scene(counts, *, queries=12, classes=6, layers=3, seed=0, dtype=torch.float32):
    """Targets, denoising queries, and predictions with gradients, boxes within the image."""
    g = torch.Generator().manual_seed(seed)
    targets = padded(
        [
            {"boxes": torch.rand(n, 4, generator=g) * 0.3 + 0.35, "labels": torch.randint(classes, (n,), generator=g)}
            for n in counts
        ]
    )
    torch.manual_seed(seed)
    denoising = denoising_queries(targets, classes, queries, num_denoising=8)
    shape = layers, len(counts), denoising.labels.shape[1] + queries
    leaves = [
        (torch.randn(*shape, classes, generator=g) * 3).to(dtype).requires_grad_(),
        (torch.rand(*shape, 4, generator=g) * 0.3 + 0.35).requires_grad_(),
        (torch.randn(len(counts), queries, classes, generator=g) * 3).to(dtype).requires_grad_(),
        (torch.rand(len(counts), queries, 4, generator=g) * 0.3 + 0.35).requires_grad_(),
    ]
    return targets, denoising, DecoderOutput(*leaves, torch.zeros(0)), leaves


def oracle(logits, boxes, queries, targets, image, repeat=1):
    """Sums of the three losses of one image of one layer, weighted, with (query, ground truth) given by `queries`."""
    count = int(targets.counts[image])
    labels, gts = targets.labels[image, :count].repeat(repeat), targets.boxes[image, :count].double().repeat(repeat, 1)
    quality, weight = torch.zeros_like(logits), 0.75 * logits.detach().sigmoid() ** 2
    bbox = giou_sum = 0 * boxes.sum()
    for query, label, gt in zip(queries, labels.tolist(), gts, strict=True):
        if query < 0:
            continue
        box = boxes[query]
        low, high, gt_low, gt_high = (
            box[:2] - box[2:] / 2,
            box[:2] + box[2:] / 2,
            gt[:2] - gt[2:] / 2,
            gt[:2] + gt[2:] / 2,
        )
        overlap = (torch.min(high, gt_high) - torch.max(low, gt_low)).clamp(min=0).prod()
        union = box[2:].prod() + gt[2:].prod() - overlap
        hull = (torch.max(high, gt_high) - torch.min(low, gt_low)).prod()
        bbox = bbox + 5 * (box - gt).abs().sum()
        giou_sum = giou_sum + 2 * (1 - (overlap / union - (hull - union) / hull))
        quality[query, label] = weight[query, label] = (overlap / union).detach()
    vfl = (weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()
    return torch.stack((vfl, bbox, giou_sum))


@pytest.mark.parametrize("version", [1, 2])
def test_the_published_losses(shared, version):
    recipe = fixture_recipe(shared)
    for case in load(shared, "unit_cases.pt")[f"v{version}"]["criterion"]:
        targets = padded(case["targets"])
        denoising = denoising_queries(targets, 80, 40)
        assert denoising.positives.shape[1] == case["dn_num_group"]
        for positives, expected in zip(denoising.positives, case["dn_positive_idx"], strict=True):
            assert positives[positives >= 0].tolist() == expected.tolist()

        def made_up(layer, queries, name=case["name"]):
            logits = -5 + 6 * recipe.uniform(f"crit{name}/{layer}/l", (3, queries, 80))
            boxes = 0.1 + 0.8 * recipe.uniform(f"crit{name}/{layer}/b", (3, queries, 4))
            return [torch.from_numpy(x).float().requires_grad_() for x in (logits, boxes)]

        final, aux, encoder = (made_up(layer, 40) for layer in ("final", "aux0", "enc"))
        of_denoising = made_up("dn0", denoising.labels.shape[1])
        losses = detr_losses(
            output_of([aux, final], encoder, [of_denoising, of_denoising]), denoising, targets, version=version
        )
        # the last layer's, of the same predictions, are not in the fixture
        assert losses.keys() == case["losses"].keys() | {f"loss_{kind}_dn_1" for kind in ("vfl", "bbox", "giou")}
        for name, value in case["losses"].items():
            assert losses[name].item() == pytest.approx(value, rel=1e-6), name

        found = match(*(torch.stack(x) for x in zip(final, aux, encoder, strict=True)), targets)
        for queries, pairs in zip(found, case["matches"], strict=True):
            assert torch.equal(queries, pairs_by_target(pairs, targets.labels.shape[1]))

        sum(losses[name] for name in case["losses"]).backward()
        for leaf, expected in zip(final, (case["grad_final_logits"], case["grad_final_boxes"]), strict=True):
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)
        for leaves, sums in zip((final, aux, encoder, of_denoising), case["grad_abs_sums"], strict=True):
            assert [leaf.grad.double().abs().sum().item() for leaf in leaves] == pytest.approx(sums, rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "version"), [((3, 0, 5), 1), ((1,), 2), ((0, 2), 2), ((12, 4), 1), ((0, 0), 1)], ids=str
)
def test_losses_and_gradients_by_their_definition(counts, version):
    targets, denoising, output, leaves = scene(counts)
    losses = detr_losses(output, denoising, targets, version=version)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    layers, N = len(output.logits), denoising.labels.shape[1]
    groups = denoising.positives.shape[1]
    number = max(sum(counts), 1)
    sets = [(doubles[0][i, :, N:], doubles[1][i, :, N:]) for i in range(layers)] + [(doubles[2], doubles[3])]
    matches = match(*(torch.stack(x).float() for x in zip(*sets, strict=True)), targets)
    names = ["_aux_0", "_aux_1", "", "_aux_2" if version == 1 else "_enc_0"]
    expected = {}
    for name, (logits, boxes), queries in zip(names, sets, matches, strict=True):
        expected[name] = (
            sum(oracle(logits[i], boxes[i], queries[i, : counts[i]].tolist(), targets, i) for i in range(len(counts)))
            / number
        )
    for layer in range(layers):
        expected[f"_dn_{layer}"] = (
            sum(
                oracle(
                    doubles[0][layer, i, :N],
                    doubles[1][layer, i, :N],
                    denoising.positives[i, :, : counts[i]].flatten().tolist(),
                    targets,
                    i,
                    repeat=groups,
                )
                for i in range(len(counts))
            )
            / number
            / groups
        )
    assert losses.keys() == {f"loss_{kind}{name}" for kind in ("vfl", "bbox", "giou") for name in expected}
    for name, values in expected.items():
        for kind, value in zip(("vfl", "bbox", "giou"), values, strict=True):
            assert losses[f"loss_{kind}{name}"].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
    sum(losses.values()).backward()
    sum(values.sum() for values in expected.values()).backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_no_denoising_queries():
    targets, _, output, _ = scene((0, 0))
    plain = output._replace(logits=output.logits[:, :, 2:], boxes=output.boxes[:, :, 2:])
    losses = detr_losses(plain, None, targets)
    assert len(losses) == 12 and not any("_dn_" in name for name in losses)
    assert sum(losses.values()).isfinite()


def test_every_output_has_a_gradient_without_objects():
    """For which another process would wait."""
    targets, denoising, output, leaves = scene((0, 0))
    losses = detr_losses(output, denoising, targets)
    sum(losses.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert all(losses[name] == 0 for name in losses if "vfl" not in name)


def test_more_objects_than_queries():
    targets, denoising, output, leaves = scene((15, 2), queries=10)
    with pytest.warns(UserWarning, match="more objects than the model has queries"):
        losses = detr_losses(output, denoising, targets)
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[:, 0, -10:].abs().sum(-1) > 0).all()  # each of the ten has one


def test_padding_costs_nothing_whatever_the_first_query_predicts():
    """Which is where padding points to."""
    targets, _, output, leaves = scene((0, 2))
    output = output._replace(logits=output.logits[:, :, 16:], boxes=output.boxes[:, :, 16:])
    before = detr_losses(output, None, targets)
    with torch.no_grad():
        leaves[1][:, 0, 16, 2:] = 0
    after = detr_losses(output._replace(boxes=leaves[1][:, :, 16:]), None, targets)
    assert all(after[name] == before[name] for name in after)


@pytest.mark.parametrize("prediction", [0.0, 1e-30, 1e-8, 0.5, 1.0])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1.0])
def test_degenerate_boxes(prediction, size):
    """Predictions with the target's centre or another, all sides as said."""
    targets = padded([{"boxes": torch.tensor([[0.5, 0.5, size, size]] * 2), "labels": torch.tensor([0, 1])}])
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.1, 0.9, 0, 0], [1.0, 1.0, 0, 0]])
    boxes[:, 2:] = prediction
    logits = torch.tensor([[9.0, -9], [-200, 200], [0, 0]]).expand(2, 1, 3, 2).clone()
    leaves = [x.requires_grad_() for x in (logits, boxes.expand(2, 1, 3, 4).clone())]
    output = DecoderOutput(leaves[0][:1], leaves[1][:1], leaves[0][1], leaves[1][1], torch.zeros(0))
    losses = detr_losses(output, None, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_have_float32_losses(dtype):
    targets, denoising, output, leaves = scene((3, 0, 5), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detr_losses(output, denoising, targets)
    wide = output._replace(logits=output.logits.float(), encoder_logits=output.encoder_logits.float())
    expected = detr_losses(wide, denoising, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-6)
    sum(losses.values()).backward()
    assert leaves[0].grad.dtype == dtype and leaves[0].grad.isfinite().all()


def test_sums_that_overflow_half_precision():
    """As published they do, one argument away."""
    logits = torch.full((1, 1, 300, 80), 8.0, dtype=torch.float16)
    boxes = torch.full((1, 1, 300, 4), 0.5, dtype=torch.float16)
    output = DecoderOutput(logits, boxes, logits[0], boxes[0], torch.zeros(0))
    targets = padded([{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "labels": torch.tensor([3])}])
    losses = detr_losses(output, None, targets)
    assert losses["loss_vfl"].item() == pytest.approx(300 * 80 * 0.75 * 8, rel=0.01)
    assert detr_losses(output, None, targets, precision=torch.float16)["loss_vfl"] == math.inf


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile looks at where the graph goes on
def test_under_torch_compile():
    """The host's part of the matching breaks the graph, nothing else does, and it is not traced."""
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    compiled = torch.compile(detr_losses, backend="eager")
    for seed, counts in enumerate([(3, 0, 5), (1, 2, 2)]):
        targets, denoising, output, _ = scene(counts, seed=seed)
        found, expected = (f(output, denoising, targets) for f in (compiled, detr_losses))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    (reason,) = breaks
    assert "function solve" in reason


def test_double_precision_stays():
    targets, denoising, output, _ = scene((3, 1), dtype=torch.float64)
    output = output._replace(boxes=output.boxes.double(), encoder_boxes=output.encoder_boxes.double())
    assert all(value.dtype == torch.float64 for value in detr_losses(output, denoising, targets).values())


def test_giou_by_hand():
    boxes = torch.tensor([[1.0, 1, 2, 2], [0.5, 0.5, 1, 1], [2, 2, 4, 4], [0.5, 0.5, 0, 0]])
    others = torch.tensor([[2.0, 2, 2, 2], [2.5, 2.5, 1, 1], [2, 2, 4, 4], [0.5, 0.5, 0, 0]])
    iou, giou = iou_and_giou(boxes, others)
    torch.testing.assert_close(iou, torch.tensor([1 / 7, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(giou, torch.tensor([1 / 7 - 2 / 9, -7 / 9, 1.0, 0.0]))
    pairs, _ = iou_and_giou(boxes[:, None], others)
    assert pairs.shape == (4, 4)
    torch.testing.assert_close(pairs.diagonal(), iou)


def test_targets_in_units_of_the_image():
    boxes = torch.tensor([[[0.0, 10, 40, 20], [10, 0, 40, 20]]])
    found = relative_targets(Targets(boxes, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2])), (20, 40))
    torch.testing.assert_close(found.boxes, torch.tensor([[[0.5, 0.75, 1, 0.5], [0.625, 0.5, 0.75, 1]]]))
