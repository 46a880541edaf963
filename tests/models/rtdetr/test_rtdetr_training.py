"""Training steps of RT-DETR against those of the published implementation, and over boxes of every kind."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rtdetr_reference import fixture_recipe, load, padded, pairs_by_target

from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr import denoising
from rtmdet_fast.models.rtdetr.boxes import cxcywh_to_xyxy, relative_targets
from rtmdet_fast.models.rtdetr.decoder import Decoder
from rtmdet_fast.models.rtdetr.losses import detr_losses
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
        ema.update()
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
    """Where a sampling point lies at the centre of a pixel, rounding, and so the processor, decides which of two
    slopes of the bilinear weights it has: gradients of offsets are checked closely in double precision alone."""
    vanishing = set(run.fixture["info"]["vanishing"])  # zero but for rounding
    norms = run.fixture["grad_norms_float64"]
    assert norms.keys() == run.gradients.keys()
    for name in norms.keys() - vanishing:
        tolerance = 0.02 if "sampling_offsets" in name else 1e-3
        assert run.gradients[name].norm().item() == pytest.approx(norms[name], rel=tolerance), name
    for name, expected in run.fixture["grads"].items():
        tolerance = 0.1 if "sampling_offsets" in name else 5e-3
        assert (run.gradients[name] - expected).norm() < tolerance * expected.norm(), name
    assert not run.gradients["decoder.denoising_class_embed.weight"][80].any()  # padding


def test_batch_statistics_of_the_first_step(run):
    for name, expected in run.fixture["bn_after_first_forward"].items():
        torch.testing.assert_close(run.first[name], expected, rtol=1e-5, atol=1e-5)


def test_three_steps(run):
    """Whose first ones are signs of gradients, also of tiny ones: some are off, and most steps are the same.

    Which are off depends on the processor's rounding, and the loss (which falls by 5 % a step) follows from the second
    step on; in double precision all is compared closely.
    """
    totals = [step["total"] for step in run.fixture["steps"]]
    assert run.totals[0] == pytest.approx(totals[0], rel=1e-5)
    assert run.totals == pytest.approx(totals, rel=5e-3)
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


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_three_steps_in_double_precision(shared, version):
    """In which no sign is off, and no sampling point on the other side of a pixel's centre."""
    run = three_steps(shared, version, torch.float64)
    norms = run.fixture["grad_norms_float64"]
    for name in norms.keys() - set(run.fixture["info"]["vanishing"]):
        assert run.gradients[name].norm().item() == pytest.approx(norms[name], rel=1e-5), name
    assert run.totals == pytest.approx([step["total_float64"] for step in run.fixture["steps"]], rel=1e-6)


def random_targets(rng, images, size, classes):
    """From no box to more than there are queries, of a hair's width to the whole image, and beyond its edges."""
    counts = rng.choice([0, 0, 1, 3, 20], images)
    boxes = torch.zeros(images, int(counts.max()), 4)
    labels = torch.full(boxes.shape[:2], -1)
    for i, n in enumerate(counts):
        center, side = rng.uniform(-0.1, 1.1, (n, 2)), np.minimum(10.0 ** rng.uniform(-6, 0.5, (n, 2)), 2)
        boxes[i, :n] = torch.from_numpy(np.concatenate([center - side / 2, center + side / 2], 1) * size)
        labels[i, :n] = torch.from_numpy(rng.integers(classes, size=n))
    return Targets(boxes, labels, torch.from_numpy(counts))


@pytest.mark.filterwarnings("ignore:an image has more objects")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [5, pytest.param(2000, marks=pytest.mark.slow)])
def test_mixed_precision_stays_finite(steps, dtype):
    """A decoder by itself, on noise, over boxes of every kind."""
    torch.manual_seed(0)
    rng, classes, queries = np.random.default_rng(0), 5, 16
    decoder = Decoder(8, classes, 2, queries, (1, 1, 1), "bilinear", 2).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for step in range(steps):
        targets = relative_targets(random_targets(rng, 2, 64, classes), (64, 64))
        features = tuple(torch.randn(2, 8, side, side) * 10 ** rng.uniform(-1, 1.5) for side in (4, 2, 1))
        noised = denoising.denoising_queries(targets, classes, queries, num_denoising=6)
        with torch.autocast("cpu", dtype):
            losses = detr_losses(decoder(*decoder.flatten(features), noised), noised, targets, version=2)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        total = sum(losses.values())
        assert total.isfinite(), step
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 0.1)
        assert norm.isfinite() or (scaler.is_enabled() and scaler.get_scale() > 1), step
        scaler.step(optimizer)
        scaler.update()
    assert all(parameter.isfinite().all() for parameter in decoder.parameters())
    assert scaler.get_scale() >= 1


@pytest.mark.slow
def test_the_whole_model_stays_finite_in_bfloat16():
    torch.manual_seed(0)
    rng, classes = np.random.default_rng(0), 5
    model = RTDETR("r18", num_classes=classes, num_queries=16).train()
    groups = training_recipe("r18", 1).parameter_groups(model)
    optimizer = torch.optim.AdamW([{**group, "lr": 10 * LR * group["lr_factor"]} for group in groups])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an image has more objects")
        for step in range(100):
            images = torch.rand(2, 3, 64, 64) * 10 ** rng.uniform(-3, 0.5)
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(images, random_targets(rng, 2, 64, classes))
            assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values()), (step, losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).isfinite(), step
            optimizer.step()
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(("classes", "version"), [(1, 1), (1, 2), (365, 1), (365, 2)])
def test_one_class_and_those_of_objects365(classes, version):
    torch.manual_seed(0)
    model = RTDETR("r18", version, num_classes=classes, num_queries=10).train()
    boxes = torch.tensor([[[4.0, 4, 40, 30], [20, 10, 60, 60]], [[10, 10, 30, 50], [0, 0, 0, 0]]])
    targets = Targets(boxes, torch.tensor([[0, classes - 1], [classes // 2, -1]]), torch.tensor([2, 1]))
    losses = model(torch.rand(2, 3, 64, 64), targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    score = model.decoder.dec_score_head[-1]
    assert (score.weight.grad.abs().sum(1) > 0).all()  # of every class: those that are not there are to score low
    with torch.no_grad():
        logits, predicted = model.eval()(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 10, classes) and predicted.shape == (2, 10, 4)
    (found, _) = model.predict([np.zeros((64, 64, 3), np.uint8)] * 2, score_threshold=0, image_size=64)
    assert len(found) and (found.labels < classes).all()


# ---- two processes, of which the second has no objects


def scene_of(rank):
    """The process's images, and targets with three boxes or none."""
    g = torch.Generator().manual_seed(rank)
    boxes = torch.tensor([[[4.0, 4, 40, 30], [20, 10, 60, 60], [0, 0, 20, 20]]] * 2)[:, : 3 if rank == 0 else 0]
    labels, counts = torch.zeros(boxes.shape[:2], dtype=torch.int64), torch.full((2,), boxes.shape[1])
    return torch.rand(2, 3, 64, 64, generator=g), Targets(boxes, labels, counts)


def step_of(rank, wrap):
    """Losses and gradients of a first step."""
    torch.manual_seed(0)
    model = wrap(RTDETR("r18", num_classes=3, num_queries=20).train())
    losses = model(*scene_of(rank))
    sum(losses.values()).backward()
    gradients = {name.removeprefix("module."): p.grad.numpy() for name, p in model.named_parameters()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def join(rank, store, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put((rank, *step_of(rank, torch.nn.parallel.DistributedDataParallel)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_process_without_objects_keeps_no_other_waiting(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=join, args=(rank, tmp_path / "store", queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    answers = {rank: answer for rank, *answer in (queue.get(timeout=300) for _ in range(2))}
    for process in processes:
        process.join()
    (losses, gradients), (empty_losses, empty_gradients) = answers[0], answers[1]
    assert losses.keys() == empty_losses.keys()
    assert all(np.array_equal(gradient, empty_gradients[name]) for name, gradient in gradients.items())
    alone, _ = step_of(0, lambda model: model)
    # 3 boxes in each of 2 images, 3 a process: all is divided by half of what it is alone
    for name, value in alone.items():
        assert losses[name] == pytest.approx(2 * value, rel=1e-5)
