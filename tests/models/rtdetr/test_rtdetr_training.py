"""Training steps of RT-DETR against those of the published implementation, and over boxes of every kind."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from rtdetr_reference import fixture_recipe, load, padded, pairs_by_target

from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr import denoising
from rtmdet_fast.models.rtdetr.boxes import cxcywh_to_xyxy
from rtmdet_fast.models.rtdetr.matcher import match
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtdetr.recipe import LR, training_recipe
from rtmdet_fast.training.schedule import ModelEMA, ema_share

VERSIONS = {1: "rtdetr_r18", 2: "rtdetrv2_r18"}


def three_steps(shared, version, dtype=torch.float32):
    """The published training of three steps on the fixture's batch, and what the first of them made."""
    recipe, fixture = fixture_recipe(shared), load(shared, f"{VERSIONS[version]}.pt")
    train = fixture["train"]
    keys = json.loads((shared / f"reference/rtdetr/keys/{VERSIONS[version]}.json").read_text())
    model = RTDETR("r18", version)
    model.load_state_dict(recipe.state_dict(keys, fixture["eval"]["overrides"]))
    model.to(dtype).train()
    images = torch.stack([recipe.image(name, 256, 256) for name in train["image_names"]]).to(dtype)
    relative = padded(train["targets"])
    targets = relative._replace(boxes=cxcywh_to_xyxy(relative.boxes.to(dtype)) * 256)
    groups = training_recipe("r18", version).parameter_groups(model)
    optimizer = torch.optim.AdamW([{**group, "lr": LR * group["lr_factor"]} for group in groups])
    ema = ModelEMA(model, lambda step: ema_share(step, 1e-4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = SimpleNamespace(fixture=train, targets=relative, before=before, totals=[], norms=[])
    for draws in train["draws"]:
        noise = denoising.Noise(*(x.to(dtype) if x.is_floating_point() else x for x in draws))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoising, "draw_noise", lambda *_, noise=noise: noise)
            seen = {}
            hook = model.decoder.register_forward_hook(
                lambda _, args, output, seen=seen: seen.update(denoising=args[2], output=output)
            )
            losses = model(images, targets)
            hook.remove()
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        if not found.totals:
            found.denoising, found.output, found.losses = seen["denoising"], seen["output"], losses
            found.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.first = {name: value.clone() for name, value in model.state_dict().items()}
        found.totals.append(total.item())
        found.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        ema.update(model)
    found.after, found.average = model.state_dict(), ema.model.state_dict()
    # the decoder does not mind the order of the queries: ours as published
    ours, published = found.output.topk, train["topk_ind"]
    assert torch.equal(ours.sort().values, published.sort().values)
    found.order = ours.argsort().gather(1, published.argsort().argsort())
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def run(request, shared):
    return three_steps(shared, request.param)


def published_sets(fixture):
    """(logits, boxes) of the decoder's layers, then of the encoder."""
    layers = [*fixture["aux"][:2], fixture, *fixture.get("enc_aux", fixture["aux"][2:])]
    return [(layer["pred_logits"], layer["pred_boxes"]) for layer in layers]


def our_sets(output, number):
    layers = zip(output.logits[:, :, number:], output.boxes[:, :, number:], strict=True)
    return [*layers, (output.encoder_logits, output.encoder_boxes)]


def test_denoising_queries_of_the_first_step(run):
    torch.testing.assert_close(run.denoising.boxes_unact, run.fixture["dn_bbox_unact"], rtol=0, atol=1e-4)
    assert torch.equal(run.denoising.attn_mask, run.fixture["dn_attn_mask"])
    for positives, expected in zip(run.denoising.positives, run.fixture["dn_positive_idx"], strict=True):
        assert positives[positives >= 0].tolist() == expected.tolist()


def test_outputs_of_the_first_step(run):
    number = run.denoising.labels.shape[1]
    for ours, published in zip(our_sets(run.output, number), published_sets(run.fixture), strict=True):
        for found, expected, tolerance in zip(ours, published, (1e-3, 5e-5), strict=True):
            found = found.gather(1, run.order[..., None].expand_as(found))
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for logits, boxes, published in zip(run.output.logits, run.output.boxes, run.fixture["dn_aux"], strict=True):
        torch.testing.assert_close(logits[:, :number], published["pred_logits"], rtol=0, atol=1e-3)
        torch.testing.assert_close(boxes[:, :number], published["pred_boxes"], rtol=0, atol=5e-5)


def test_matches_of_the_first_step(run):
    number, width = run.denoising.labels.shape[1], run.targets.labels.shape[1]
    *aux, last, encoder = (
        match(logits[None], boxes[None], run.targets)[0] for logits, boxes in our_sets(run.output, number)
    )
    for found, pairs in zip((last, *aux, encoder), run.fixture["matches"], strict=True):
        expected = pairs_by_target(pairs, width)
        assert torch.equal(found, run.order.gather(1, expected.clamp(min=0)).where(expected >= 0, -1))


def test_losses_of_the_first_step(run):
    assert run.losses.keys() == run.fixture["losses"].keys()
    for name, value in run.losses.items():
        assert value.item() == pytest.approx(run.fixture["losses_float64"][name], rel=1e-4), name


def test_gradients_of_the_first_step(run):
    vanishing = set(run.fixture["info"]["vanishing"])  # zero but for rounding
    norms = run.fixture["grad_norms_float64"]
    assert norms.keys() == run.gradients.keys()
    for name in norms.keys() - vanishing:
        assert run.gradients[name].norm().item() == pytest.approx(norms[name], rel=1e-3), name
    for name, expected in run.fixture["grads"].items():
        assert (run.gradients[name] - expected).norm() < 2e-3 * expected.norm(), name
    assert not run.gradients["decoder.denoising_class_embed.weight"][80].any()  # padding


def test_batch_statistics_of_the_first_step(run):
    for name, expected in run.fixture["bn_after_first_forward"].items():
        torch.testing.assert_close(run.first[name], expected, rtol=1e-5, atol=1e-5)


def test_three_steps(run):
    """Whose first ones are signs of gradients, also of tiny ones: some are off, and most steps are the same."""
    assert run.totals == pytest.approx([step["total"] for step in run.fixture["steps"]], rel=1e-3)
    assert run.norms == pytest.approx([step["grad_norm"] for step in run.fixture["steps"]], rel=0.02)
    for ours, published in ((run.after, "params_after"), (run.average, "ema_after")):
        off = []
        for name, expected in run.fixture[published].items():
            moved = expected - run.before[name]
            off.append(((ours[name] - expected).norm() / moved.norm()).item())
        assert max(off) < 0.5 and sorted(off)[len(off) // 2] < 0.1
    for name, expected in run.fixture["ema_bn_after"].items():
        if expected.is_floating_point():
            torch.testing.assert_close(run.average[name], expected, rtol=1e-4, atol=1e-4)
