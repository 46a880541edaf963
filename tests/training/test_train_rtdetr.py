"""RT-DETR by the loop that trains RTMDet: its recipe is followed, a resumed run equals an unbroken one; failures."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.data.recipes import multi_scale_sizes
from rtmdet_fast.data.shapes import CLASSES, make_shapes
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.families import load_model
from rtmdet_fast.models.rtdetr import losses
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.config import TrainConfig, resolve
from rtmdet_fast.training.recipe import RECIPES
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.schedule import random_side, warmup_factor
from rtmdet_fast.training.train import train


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=6, num_val=2, image_size=96)


@pytest.fixture(scope="module")
def config(shapes):
    """Three steps of two batches of two images, where each epoch's last step has but one batch."""
    return TrainConfig(
        train=shapes.train_ann,
        train_images=shapes.train_images,
        val=shapes.val_ann,
        val_images=shapes.val_images,
        model="rtdetr",
        queries=12,
        epochs=3,
        stage2_epochs=1,
        batch_size=2,
        accumulate=2,
        seed=5,  # whose sizes of batches in the last epoch, if any were drawn, would not be the base
        image_size=128,
        num_workers=0,
        device="cpu",
        val_interval=1,
        progress=False,
        report=False,
    )


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """A run, with what its model and its optimiser were given."""
    found = SimpleNamespace(sides=[], norms=[], rates=[])
    forward, clip, step = RTDETR.forward, torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def recorded_forward(self, images, targets=None):
        if targets is not None:
            found.sides.append(tuple(images.shape[2:]))
        return forward(self, images, targets)

    def recorded_clip(parameters, max_norm):
        parameters = list(parameters)
        before = clip(parameters, max_norm)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        found.norms.append((before.item(), after.item()))
        return before

    def recorded_step(self, *args, **kwargs):
        found.rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RTDETR, "forward", recorded_forward)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
        patch.setattr(torch.optim.AdamW, "step", recorded_step)
        found.result = train(replace(config, out=tmp_path_factory.mktemp("unbroken"), report=True))
    found.state = torch.load(found.result.last, weights_only=True)["training"]
    return found


def test_the_run_is_one_of_rtdetr(unbroken):
    out = unbroken.result.last.parent
    told = json.loads((out / "config.json").read_text())
    assert (told["model"], told["size"], told["version"], told["queries"]) == ("rtdetr", "r18", 1, 12)
    assert "<h1>RT-DETR-r18 on instances_train.json</h1>" in (out / "report.html").read_text()
    model = load_model(unbroken.result.best)
    assert isinstance(model, RTDETR) and model.image_size == 128 and model.decoder.num_queries == 12
    rows = read_metrics(out / "metrics.csv")
    (losses,) = (row for row in rows if row["loss"])
    assert all(float(losses[name]) > 0 for name in ("loss_vfl", "loss_bbox", "loss_giou"))
    assert [row["epoch"] for row in rows if row["AP"]] == ["1", "2", "3"]


def test_batches_have_sizes_of_the_list_but_in_the_last_epoch(unbroken):
    expected = [
        random_side(multi_scale_sizes(128), 5, iteration, part)
        for iteration, parts in ((0, 2), (1, 1), (2, 2), (3, 1))
        for part in range(parts)
    ]
    assert len(set(expected)) > 1
    assert unbroken.sides == [(side, side) for side in (*expected, 128, 128, 128)]


def test_sizes_of_batches_are_spread_over_the_list():
    sides = multi_scale_sizes(640)
    drawn = [random_side(sides, 3, iteration, 0) for iteration in range(2000)]
    shares = {side: drawn.count(side) / 2000 for side in sorted(set(sides))}
    assert all(abs(share - sides.count(side) / len(sides)) < 0.03 for side, share in shares.items())


def test_gradients_are_clipped(unbroken):
    assert len(unbroken.norms) == 6
    assert all(before > 1 and after == pytest.approx(0.1, rel=1e-3) for before, after in unbroken.norms)


def test_the_optimiser_has_the_published_groups(unbroken):
    """A tenth of the rate for the backbone, no decay for norms and, outside of the backbone, biases."""
    groups = unbroken.state["optimizer"]["param_groups"]
    found = {(round(group["lr_factor"], 9), group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(0.1, 1e-4): 23, (0.1, 0.0): 46, (1.0, 1e-4): 98, (1.0, 0.0): 159}
    base = 1e-4 * (4 / 16) ** 0.5
    assert len(unbroken.rates) == 6
    for rates in unbroken.rates:  # version 1 has neither warm-up nor decay
        assert rates == [pytest.approx(base * group["lr_factor"]) for group in groups]


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(config, unbroken, tmp_path, monkeypatch):
    broken = replace(config, out=tmp_path)
    evaluate, calls = train_module.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # in epoch 2, whose steps are lost
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    torch.manual_seed(12345)
    resumed = train(replace(broken, resume=True))
    state = torch.load(resumed.last, weights_only=True)["training"]
    assert state["iteration"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(value, state[part][key]) for key, value in unbroken.state[part].items())
    a, b = (run["optimizer"]["state"] for run in (unbroken.state, state))
    assert all(torch.equal(a[i]["exp_avg"], b[i]["exp_avg"]) for i in a)
    assert resumed.metrics == unbroken.result.metrics
    drop = {"images_per_second", "data_wait"}
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(result.last.parent / "metrics.csv")]
        for result in (unbroken.result, resumed)
    ]
    assert logs[0] == logs[1]

    for change, word in (
        (dict(model="rtmdet", queries=None), "--model is rtmdet"),
        (dict(queries=9), "--queries is 9"),
    ):
        with pytest.raises(UserError, match=f"^{word}, but the run in .* has"):
            train(replace(broken, resume=True, **change))


def test_one_batch_is_learnt():
    """By the optimiser's published groups, ten times their rate: classes, boxes and what denoises them."""
    torch.manual_seed(0)
    recipe = RECIPES["rtdetr"]("r18", 2, "det", 12, None)
    model = recipe.build(class_names=("blue", "green")).train()
    boxes = torch.tensor([[4.0, 6, 30, 30], [34, 30, 60, 60]])
    images = torch.full((2, 3, 64, 64), 60, dtype=torch.uint8)
    for (x1, y1, x2, y2), channel in zip(boxes.int().tolist(), (0, 1), strict=True):
        images[:, channel, y1:y2, x1:x2] = 250
    targets = Targets(boxes.expand(2, -1, -1), torch.tensor([[0, 1]]).expand(2, -1), torch.tensor([2, 2]))
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, recipe.weight_decay), lr=1e-3)
    totals = []
    for _ in range(15):
        losses = model(model.normalize(images), targets)
        total = sum(losses.values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        totals.append(total.item())
    assert max(totals[-3:]) < 0.7 * totals[0]


def test_half_precision_and_images_without_objects(config, tmp_path, monkeypatch):
    """Losses are float32; images without objects, a whole batch of them too, are trained on."""
    content = json.loads(config.train.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(content))
    dtypes = set()
    forward = RTDETR.forward

    def recorded(self, images, targets=None):
        output = forward(self, images, targets)
        if targets is not None:
            dtypes.update(value.dtype for value in output.values())
        return output

    monkeypatch.setattr(RTDETR, "forward", recorded)
    result = train(replace(config, train=empty, out=tmp_path, epochs=1, stage2_epochs=0, image_size=64, amp="bf16"))
    assert not result.skipped and torch.load(result.last, weights_only=True)["training"]["iteration"] == 2
    assert dtypes == {torch.float32}
    assert all(value.isfinite().all() for value in load_model(result.last).parameters())


TWO_PROCESSES = """
import sys
import torch
from rtmdet_fast.cli import main
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.distributed import gather, join_processes

rank, world_size = join_processes(torch.device("cpu"))
torch.manual_seed(0)
model = RTDETR("r18", num_classes=2, num_queries=8).train()
images = torch.rand(2, 3, 64, 64)
stem = model.backbone.conv1.conv1_1.conv(images)
means = 0.1 * stem.mean((0, 2, 3)), 0.9 + 0.1 * stem.var((0, 2, 3))  # of both processes' images
model.enable_sync_bn()
parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
targets = Targets(torch.tensor([[[8.0, 8, 40, 40]]]), torch.tensor([[1]]), torch.tensor([1 - rank]))  # or none
sum(parallel(images[rank : rank + 1], targets).values()).backward()
gradients = {name: p.grad for name, p in model.named_parameters()}
assert all(gradient is not None for gradient in gradients.values())
norm = model.backbone.conv1.conv1_1.norm
torch.testing.assert_close((norm.running_mean, norm.running_var), means)
for found in (gradients, dict(model.named_buffers())):
    mine, theirs = gather(found, world_size)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow  # test_processes.py compares two processes with one by default
def test_two_processes_train_as_one(config, tmp_path):
    """Gradients and statistics of batch norm are those of both, where the images of one have no objects too."""
    options = ["--train", config.train, "--train-images", config.train_images, "--val", config.val]
    options += ["--val-images", config.val_images, "--model", "rtdetr", "--queries", 12, "--epochs", 1]
    options += ["--batch-size", 1, "--image-size", 64, "--num-workers", 0, "--device", "cpu", "--out", tmp_path / "run"]
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "script.py", "train", *options, "--no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run/last.pth", weights_only=True)["training"]
    assert state["iteration"] == 3 and len(state["samplers"]) == 2
    assert (tmp_path / "run/report.html").exists()


def test_predictions_that_are_not_finite_name_the_image_and_keep_the_batch(config, tmp_path, monkeypatch):
    """The image is known by its pixels: it is white, and the last stage alters none."""
    images = shutil.copytree(config.train_images, tmp_path / "images")
    white = json.loads(config.train.read_text())["images"][3]["file_name"]
    cv2.imwrite(str(images / white), np.full((96, 96, 3), 255, np.uint8))
    normalize, match = RTDETR.normalize, losses.match
    places = []

    def watched(batch):
        places[:] = (batch == 255).all(3).all(2).all(1).nonzero()[:, 0].tolist()
        return normalize(batch)

    def poisoned(logits, boxes, targets):
        logits = logits.clone()
        logits[:, places] = math.nan
        return match(logits, boxes, targets)

    monkeypatch.setattr(RTDETR, "normalize", staticmethod(watched))
    monkeypatch.setattr(losses, "match", poisoned)
    run = replace(config, train_images=images, out=tmp_path / "run", image_size=64, stage2_epochs=3, num_workers=2)
    words = rf"predictions for image \d of the batch are not finite.*; of {white}; the batch, .* is in .*nan_batch\.pt"
    with pytest.raises(UserError, match=words):
        train(run)
    batch = torch.load(tmp_path / "run/nan_batch.pt", weights_only=True)
    assert [batch["files"][place] for place in places] == [white] and (batch["images"][places] == 255).all()
    assert batch["images"].shape == (2, 3, 64, 64) and len(batch["files"]) == 2


def test_labels_are_checked_before_the_first_step(config, tmp_path):
    content = json.loads(config.train.read_text())
    content["annotations"][0]["category_id"] = 77
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"train\.json: .*77"):
        train(replace(config, train=path, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_weights_of_its_family_and_size(config, tmp_path):
    torch.manual_seed(1)
    RTMDet("nano", num_classes=5).save(tmp_path / "rtmdet.pth")
    RTDETR("r34", num_classes=5).save(tmp_path / "r34.pth")
    for name in ("rtmdet", "r34"):
        with pytest.raises(UserError, match=rf"{name}\.pth") as caught:
            train(replace(config, out=tmp_path / "run", init=str(tmp_path / f"{name}.pth")))
        assert len(str(caught.value).splitlines()) == 1


def test_frozen_norms_without_weights_are_told(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "ModelEMA", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.warns(UserWarning, match="RT-DETR-r50 has frozen batch norms"), pytest.raises(KeyboardInterrupt):
        train(replace(config, size="r50", out=tmp_path))


def test_discrete_sampling_goes_on_from_bilinear_weights(config, tmp_path):
    """Whose offsets, which whole cells have no gradient for, stay."""
    torch.manual_seed(1)
    before = RTDETR("r18", 2, class_names=CLASSES, num_queries=12)
    torch.nn.init.normal_(before.decoder.get_submodule("decoder.layers.0.cross_attn.sampling_offsets").weight)
    before.save(tmp_path / "bilinear.pth")
    bilinear = str(tmp_path / "bilinear.pth")
    settings = replace(config, version=2, sampling="discrete", init=bilinear, epochs=1, image_size=64, out=tmp_path)
    trained = load_model(train(settings).last)
    assert trained.decoder.sampling == "discrete"
    same = {name for name, p in trained.named_parameters() if torch.equal(p, before.get_parameter(name))}
    offsets = {name for name in same if ".sampling_offsets." in name}
    assert len(offsets) == 6 and not any(".attention_weights." in name for name in same)

    assert resolve(replace(settings, epochs=None)).epochs == 36
    for wrong, words in (
        (dict(version=1), "--sampling discrete is for --version 2"),
        (dict(init=None), "give bilinear weights to go on from, --init"),
        (dict(sampling="nearest"), "--sampling 'nearest' is unknown; choose bilinear or discrete"),
        (dict(model="rtmdet", version=None, queries=None), "--sampling discrete is for --model rtdetr"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(replace(settings, **wrong))


def test_the_published_recipe_is_the_default(tmp_path):
    plain = TrainConfig(train=tmp_path, train_images=tmp_path, model="rtdetr", device="cpu")
    at = resolve(plain)
    assert (at.size, at.version, at.epochs, at.stage2_epochs, at.batch_size, at.image_size) == (
        "r18",
        1,
        72,
        0,
        16,
        640,
    )
    assert (at.lr, at.weight_decay, at.ema_momentum) == (1e-4, 1e-4, None)
    assert (at.recipe.warmup, at.recipe.batch_sides(640)) == (0, multi_scale_sizes(640))
    at = resolve(replace(plain, version=2, epochs=40, batch_size=4))
    assert (at.stage2_epochs, at.lr, at.recipe.warmup, at.recipe.batch_sides(640)) == (1, 5e-5, 2000, (640,))
    assert (
        resolve(replace(plain, size="h")).version == 2 and resolve(replace(plain, size="r34", version=2)).epochs == 120
    )
    assert [warmup_factor(i, 10**5, 2000) for i in (0, 999, 1999, 5000)] == [1 / 2000, 0.5, 1, 1]


def test_the_horizon_of_the_average_is_that_of_the_run():
    """As published where the run is long; in a short one its first half is no part of the last average."""
    share = resolve(TrainConfig(train=Path("a"), train_images=Path("b"), model="rtdetr", device="cpu")).recipe.ema_share
    for step in (0, 100, 3000, 10**5):
        published = 0.9999 * (1 - math.exp(-(step + 1) / 2000))
        assert share(step, 200_000, None) == pytest.approx(1 - published, rel=1e-9)
    for total in (100, 3000, 20_000):
        shares = np.array([share(step, total, None) for step in range(total)])
        assert (shares > 0).all() and (shares <= 1).all()
        weights = shares * np.append(np.cumprod(1 - shares[::-1])[::-1][1:], 1.0)  # of each step in the last average
        horizon = (weights * np.arange(total)[::-1]).sum()
        assert 0.03 * total < horizon < 0.06 * total and weights[: total // 2].sum() < 1e-3
    assert share(0, 3, None) == 1 and share(10, 3000, 0.5) >= 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "rtdetr", "--size", "tiny"], "no RT-DETR version 1 of size 'tiny'; choose one of r18, "),
        (["--model", "rtdetr", "--size", "h", "--version", "1"], "no RT-DETR version 1 of size 'h'"),
        (["--model", "rtdetr", "--version", "3"], "--version is 3; it must lie between 1 and 2"),
        (["--model", "rtdetr", "--task", "ins"], "--task ins is for --model rtmdet: rtdetr finds boxes, det, alone"),
        (["--model", "rtdetr", "--queries", "0"], "--queries is 0; it must lie between 1 and"),
        (["--model", "yolo"], "--model 'yolo' is unknown; choose one of rtmdet, rtdetr"),
        (["--size", "r18"], "size 'r18' is unknown; choose one of nano, tiny"),
        (["--version", "2"], "--version 2 is for --model rtdetr"),
        (["--queries", "50"], "--queries 50 is for --model rtdetr"),
    ],
)
def test_what_a_family_lacks_is_said_in_a_sentence(config, tmp_path, capsys, arguments, message):
    paths = ["--train", str(config.train), "--train-images", str(config.train_images), "--out", str(tmp_path / "run")]
    assert main(["train", *paths, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1 and not (tmp_path / "run").exists()
