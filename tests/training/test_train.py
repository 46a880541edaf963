"""The trainer on drawn scenes: what it writes, that a resumed run equals an unbroken one, how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from told import assert_same_run

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.inference.preprocess import normalize
from rtmdet_fast.kernels import nms as nms_kernels
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.training import run_report
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig, resolve
from rtmdet_fast.training.run_log import RunLog, read_metrics
from rtmdet_fast.training.schedule import parameter_groups
from rtmdet_fast.training.state import STATE, remove_run
from rtmdet_fast.training.train import train


def weights(path, *keys):
    content = torch.load(path, weights_only=True)
    for key in keys:
        content = content[key]
    return content


def test_a_run_writes_what_it_promises(config):
    result = train(replace(config, report=True))
    out = config.out
    assert result.report == out / "report.html"
    html = result.report.read_text()
    assert "AP50" in html and "<svg" in html and 'src="data:image' in html
    rows = read_metrics(out / "metrics.csv")
    steps = [row for row in rows if row["loss"]]
    assert int(steps[-1]["iteration"]) == 3 * (18 // 4)
    assert all(float(row["loss"]) > 0 and 0 <= float(row["data_wait"]) <= 1 for row in steps)
    assert [row["epoch"] for row in rows if row["AP"]] == ["1", "2", "3"]
    assert json.loads((out / "config.json").read_text())["size"] == "nano"
    assert set(json.loads((out / "metrics.json").read_text())) >= {"AP", "AP50", "per_class"}
    assert any(path.name.startswith("events.out.tfevents") for path in out.iterdir())
    model = RTMDet.from_pretrained(result.best)
    assert model.image_size == 64 and len(model.class_names) == len(json.loads(config.train.read_text())["categories"])


@pytest.mark.parametrize(("num_workers", "task"), [(0, "det"), (2, "det"), (0, "ins")])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(config, whole, monkeypatch, num_workers, task):
    config = replace(config, num_workers=num_workers, task=task)
    with monkeypatch.context() as patch:
        interrupt_evaluation(patch, at=2)  # after the steps of epoch 2
        with pytest.raises(KeyboardInterrupt):
            train(config)
    torch.manual_seed(12345)
    resumed = train(replace(config, resume=True))
    unbroken = whole(config)
    assert_same_run(unbroken, resumed)
    a, b = weights(unbroken.last, "training", "optimizer"), weights(resumed.last, "training", "optimizer")
    assert all(torch.equal(a["state"][i]["exp_avg"], b["state"][i]["exp_avg"]) for i in a["state"])


def test_the_seed_decides_the_run(config, tmp_path):
    a = train(replace(config, epochs=1, stage2_epochs=0))
    b = train(replace(config, epochs=1, stage2_epochs=0, out=tmp_path / "b"))
    c = train(replace(config, epochs=1, stage2_epochs=0, out=tmp_path / "c", seed=1))
    key = "bbox_head.rtm_reg.0.weight"
    first, same, other = (weights(r.last, "state_dict", key) for r in (a, b, c))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.slow  # test_processes.py compares two processes with one by default
def test_two_processes_train_as_one(config, tmp_path):
    """torchrun on the CPU: each takes its half of every epoch, the weights stay the same, and the run resumes."""
    options = ["--train", config.train, "--train-images", config.train_images, "--val", config.val]
    options += ["--val-images", config.val_images, "--size", "nano", "--epochs", 2, "--stage2-epochs", 1]
    options += ["--batch-size", 4, "--image-size", 64, "--num-workers", 0, "--device", "cpu", "--out", config.out]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rtmdet_fast", "train", *map(str, options), "--no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    state = weights(config.out / "last.pth", "training")
    assert state["iteration"] == 2 * (18 // 2 // 4) and len(state["samplers"]) == 2
    assert (config.out / "report.html").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_accumulated_batches_make_one_step(config):
    result = train(replace(config, epochs=1, stage2_epochs=0, accumulate=3, val_interval=1))
    assert weights(result.last, "training", "iteration") == 2  # 4 batches: 3 + 1


def test_masks_are_trained_validated_and_reported(config):
    config = replace(config, task="ins", report=True, epochs=2)
    result = train(config)
    assert {"AP", "AP50", "segm_AP", "segm_AP50"} <= result.metrics.keys()
    rows = read_metrics(config.out / "metrics.csv")
    assert any(row["loss_mask"] for row in rows) and any(row["segm_AP"] for row in rows)
    assert "mask AP" in result.report.read_text()
    model = RTMDet.from_pretrained(result.best)
    assert model.task == "ins"
    image = np.full((50, 80, 3), 90, np.uint8)
    found = model.predict(image, score_threshold=0.0, max_detections=4)
    assert found.masks.shape == (len(found), 50, 80)


@pytest.mark.parametrize("task", ["det", "ins"])
def test_bf16_and_gradients_stay_finite(config, task):
    result = train(replace(config, task=task, epochs=1, stage2_epochs=0, amp="bf16"))
    assert all(value.isfinite().all() for value in weights(result.last, "state_dict").values())


def test_training_starts_from_other_weights(config, tmp_path):
    torch.manual_seed(7)
    RTMDet("nano", num_classes=9).save(tmp_path / "other.pth")
    with pytest.warns(UserWarning, match="freshly initialised for"):
        train(replace(config, epochs=1, stage2_epochs=0, init=str(tmp_path / "other.pth")))


def test_nan_stops_the_run_and_keeps_the_batch(config, monkeypatch):
    count = []

    def poisoned(images):
        count.append(1)
        return normalize(images) * (float("nan") if len(count) == 6 else 1.0)

    monkeypatch.setattr(RTMDet, "normalize", staticmethod(poisoned))
    with pytest.raises(UserError, match=r"loss is nan.*nan_batch\.pt"):
        train(config)
    batch = torch.load(config.out / "nan_batch.pt", weights_only=True)
    assert batch["images"].shape == (4, 3, 64, 64) and batch["gt_boxes"].shape[0] == 4
    assert all(v.isfinite().all() for v in weights(config.out / "last.pth", "state_dict").values())


@pytest.mark.parametrize(("task", "asked"), [("det", False), ("det", True), ("ins", True), ("rotated", True)])
def test_images_without_objects_are_trained_on_where_it_is_asked_for(config, tmp_path, task, asked):
    content = json.loads(config.train.read_text())
    with_objects = {entry["id"] for entry in content["images"][::3]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in with_objects]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(content))
    config = replace(config, train=path, task=task, epochs=1, stage2_epochs=1, batch_size=2, empty_images=asked)
    train(replace(config, val=None, val_images=None))
    steps = [row for row in read_metrics(config.out / "metrics.csv") if row["loss"]]
    assert int(steps[-1]["iteration"]) == (18 if asked else len(with_objects)) // 2
    assert np.isfinite([float(row["loss"]) for row in steps]).all()


def test_a_model_learns_one_image_by_heart():
    """Assigner, losses, decoding, averaging and prediction pull the same way: three squares are found again."""
    torch.manual_seed(0)
    image = np.full((96, 96, 3), 60, np.uint8)
    boxes = torch.tensor([[8.0, 10, 40, 42], [50, 12, 86, 44], [30, 52, 70, 90]])
    colours = ((250, 40, 40), (40, 250, 40), (250, 40, 40))
    for (x1, y1, x2, y2), colour in zip(boxes.int().tolist(), colours, strict=True):
        image[y1:y2, x1:x2] = colour
    labels = torch.tensor([0, 1, 0])
    model = RTMDet("nano", class_names=("blue", "green")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # so that the statistics follow in so few steps
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=4e-3)
    targets = Targets(boxes.expand(4, -1, -1), labels.expand(4, -1), torch.full((4,), 3))
    batch = normalize(torch.from_numpy(image).permute(2, 0, 1).expand(4, -1, -1, -1))
    for step in range(80):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 4e-3 * (1 - step / 80)
        losses = model(batch + 0.1 * torch.randn_like(batch), targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model.predict(image, image_size=96, score_threshold=0.3)
    assert sorted(found.labels[:3].tolist()) == [0, 0, 1]
    for box, label in zip(boxes, labels, strict=True):
        error = (found.boxes[:3] - box).abs().amax(1)[found.labels[:3] == label]
        assert error.min() < 4


def test_recipe_defaults():
    at = resolve(TrainConfig(train=Path("a"), train_images=Path("b"), epochs=300, batch_size=256, device="cpu"))
    assert (at.lr, at.stage2_epochs, at.image_size, at.amp) == (4e-3, 20, 640, "none")
    at = resolve(TrainConfig(train=Path("a"), train_images=Path("b"), epochs=30, size="x", batch_size=64, device="cpu"))
    assert at.lr == pytest.approx(1e-3) and at.stage2_epochs == 15
    assert resolve(TrainConfig(train=Path("a"), train_images=Path("b"), size="nano", device="cpu")).image_size == 320


def test_the_command_lines_own_options_are_no_settings_of_the_run():
    """A run goes on with another --json, or without."""

    @dataclass(frozen=True, kw_only=True)
    class Command(TrainConfig):
        json: Path | None = None

    settings = resolve(Command(train=Path("a"), train_images=Path("b"), json=Path("x.json"), device="cpu"))
    assert settings.as_json().keys() == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(epochs=0), "--epochs"),
        (dict(batch_size=0), "--batch-size"),
        (dict(image_size=100), "multiple of 32"),
        (dict(amp="int8"), "--amp"),
        (dict(amp="fp16"), "needs a GPU"),
        (dict(device="tpu0"), "--device"),
        (dict(val=None), "go together"),
        (dict(train=None), "--train FILE"),
        (dict(stage2_epochs=9), "--stage2-epochs"),
        (dict(size="huge"), "huge"),
        (dict(resume=True), "nothing to resume"),
        (dict(init="nowhere.pth"), r"nowhere\.pth"),
    ],
)
def test_bad_settings_are_named(config, change, word):
    with pytest.raises(UserError, match=word):
        train(replace(config, **change))


def test_a_finished_run_is_not_overwritten_and_another_one_not_resumed(config):
    config = replace(config, epochs=1, stage2_epochs=0, val=None, val_images=None)
    train(config)
    with pytest.raises(UserError, match="--resume"):
        train(config)
    with pytest.raises(UserError, match=r"--batch-size is 2, but the run in .* has 4"):
        train(replace(config, resume=True, batch_size=2))
    train(replace(config, resume=True))


def test_the_hot_paths_are_called_through_the_kernels(config, monkeypatch):
    """Evaluation goes through kernels.nms: the head holds no NMS of its own."""
    import rtmdet_fast.models.rtmdet.detection_head as heads

    assert heads.batched_nms_padded is nms_kernels.batched_nms_padded


def test_what_is_wrong_with_the_validation_file_is_said_at_the_start_and_what_is_left_out_at_the_end(config, tmp_path):
    content = json.loads(config.val.read_text())
    val = tmp_path / "val.json"
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "bbox": [0, 0, "x", 1]})
    val.write_text(json.dumps(content))
    result = train(replace(config, val=val, epochs=1, stage2_epochs=0, skip_bad=True))
    assert result.skipped["bbox is not four finite numbers x, y, w, h, of validation"] == 1

    missing = content["categories"].pop(0)
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != missing["id"]]
    val.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"class {missing['name']!r} is not in .*val.json"):
        train(replace(config, val=val, skip_bad=True, out=tmp_path / "other"))
    assert not (tmp_path / "other" / "metrics.csv").exists()


def test_unreadable_images_are_told_before_anything_is_done(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "CHECK_SECONDS", None)  # however long it takes here
    changed = {}
    for part in ("train_images", "val_images"):
        changed[part] = shutil.copytree(getattr(config, part), tmp_path / part)
        victim = sorted(changed[part].iterdir())[1]
        victim.write_bytes(victim.read_bytes()[:-1])
    config = replace(config, **changed, epochs=1, stage2_epochs=0)
    config.out.mkdir()
    (config.out / "last.pth").write_text("the old run's")
    with pytest.raises(UserError, match=r"1 of its \d+ images cannot be read: 000001\.jpg \(.*--skip-bad"):
        train(replace(config, overwrite=True))
    assert (config.out / "last.pth").read_text() == "the old run's"
    told = [pytest.warns(UserWarning, match=f"1 of its {count} images cannot be read") for count in (4, 18)]
    with told[0], told[1]:
        result = train(replace(config, overwrite=True, skip_bad=True))
    assert result.skipped["unreadable image"] == result.skipped["unreadable image, of validation"] == 1


def test_images_checked_while_it_trains_are_told_each_epoch(config, monkeypatch):
    calls = []
    monkeypatch.setattr(train_module.ImageCheck, "report", lambda self, **options: calls.append(options))
    train(replace(config, epochs=2))
    assert calls == [{"wait": 10, "progress": False}, {}, {}]


@pytest.mark.parametrize("damage", ["truncated", "empty", "a list", "no state", "part of a state", "folder"])
def test_a_damaged_run_is_not_resumed(config, damage):
    config.out.mkdir()
    last = config.out / "last.pth"
    state = {name: kind() for name, kind in STATE.items() if kind is list}
    state |= {name: {} for name, kind in STATE.items() if kind is Mapping}
    state |= {"epoch": 1, "iteration": 1, "best_epoch": None}
    match damage:
        case "truncated":
            torch.save({"training": state, "more": torch.zeros(10**4)}, last)
            last.write_bytes(last.read_bytes()[:9000])
        case "empty":
            last.write_bytes(b"")
        case "a list":
            torch.save([1], last)
        case "no state":
            torch.save({"state_dict": {}}, last)
        case "part of a state":
            torch.save({"training": {"config": {}}}, last)
        case "folder":
            last.mkdir()
    with pytest.raises(UserError, match="no training state" if damage == "no state" else r"last\.pth"):
        train(replace(config, resume=True))


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """The settings of a run of one epoch, and its last.pth."""
    out = tmp_path_factory.mktemp("finished")
    config = TrainConfig(
        train=shapes.train_ann, train_images=shapes.train_images, val=shapes.val_ann, val_images=shapes.val_images,
        out=out, size="nano", epochs=1, stage2_epochs=0, batch_size=4, image_size=64, num_workers=0, device="cpu",
        progress=False, report=False,
    )  # fmt: skip
    train(config)
    return config, (out / "last.pth").read_bytes()


def refused(finished, out, change=None, raw=None):
    """What `--resume` says of a changed last.pth."""
    config, whole = finished
    last = out / "last.pth"
    last.write_bytes(whole if raw is None else raw(bytearray(whole)))
    if change is not None:
        content = torch.load(last, weights_only=True)
        change(content["training"])
        torch.save(content, last)
    with pytest.raises(UserError) as caught:
        train(replace(config, out=out, resume=True))
    assert len(str(caught.value).splitlines()) == 1 and "last.pth" in str(caught.value)
    return str(caught.value)


def test_flipped_bits_of_a_state_are_seen(finished, tmp_path):
    """torch does not look at checksums: moments would be wrong without a word."""

    def flip(content):
        for place in range(len(content) // 4, len(content) * 3 // 4, 9973):  # some may be padding
            content[place] ^= 64
        return content

    assert "Bad CRC-32" in refused(finished, tmp_path, raw=flip)


def test_a_state_that_grows_when_read_is_refused(finished, tmp_path):
    def inflate(content):
        path = tmp_path / "plain.zip"
        path.write_bytes(content)
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
            for member in whole.infolist():
                bomb.writestr(member.filename, whole.read(member))
            bomb.writestr("last/data/1000", bytes(2**24))
        return (tmp_path / "bomb").read_bytes()

    assert "compressed archive" in refused(finished, tmp_path, raw=inflate)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s["model"]["bbox_head.rtm_reg.0.weight"].fill_(torch.nan), "no finite numbers"),
        (lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(torch.inf), "no finite numbers"),
        (lambda s: s["model"].pop("bbox_head.rtm_reg.0.weight"), "Missing key"),
        (lambda s: s["ema"].update({"backbone.stem.0.conv.weight": torch.zeros(3)}), "size mismatch|cannot be read"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2, 2)), "moments of shapes"),
        (lambda s: s["optimizer"]["state"][0].pop("step"), "moments of shapes|cannot be read"),
        (lambda s: s["optimizer"].pop("state"), "cannot be read"),
        (lambda s: s.update(epoch="one"), "lacks 'epoch', or holds something else"),
        (lambda s: s.update(epoch=10**30), "tells of epoch"),
        (lambda s: s.update(model=[]), "lacks 'model', or holds something else"),
        (lambda s: s["best_metrics"].update(AP="high"), "best figures"),
        (lambda s: s["best_metrics"].pop("AP"), "best figures"),
        (lambda s: s.update(random_states=[[torch.zeros(3)]]), "cannot be read"),
        (lambda s: s.update(step=-1), "tells of epoch"),
        (lambda s: s.update(step=5), "tells of epoch"),
        (lambda s: s.update(samplers=["x"]), "cannot be read"),
        (lambda s: s.update(meters=[{"losses": {"loss_cls": torch.zeros(3)}}]), "no means of losses"),
    ],
)
def test_a_state_of_wrong_kinds_is_refused(finished, tmp_path, change, word):
    assert re.search(word, refused(finished, tmp_path, change))


def test_a_run_of_before_there_was_a_setting_had_its_default(finished, tmp_path):
    config, whole = finished
    (tmp_path / "last.pth").write_bytes(whole)
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    for name in ("model", "version", "queries"):
        del content["training"]["config"][name]
    content["training"]["torch_rng"] = content["training"].pop("random_states")[0][0]
    del content["training"]["step"], content["training"]["epoch_losses"], content["training"]["meters"]
    torch.save(content, tmp_path / "last.pth")
    train(replace(config, out=tmp_path, resume=True))
    with pytest.raises(UserError, match=r"--model is rtdetr, but the run in .* has rtmdet"):
        train(replace(config, out=tmp_path, resume=True, model="rtdetr", size=None))


def test_a_row_cut_off_by_a_crash_is_dropped(tmp_path):
    log = RunLog(tmp_path, 0)
    for iteration in (10, 20):
        log.write({"epoch": 1, "iteration": iteration, "loss": 1.5})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2")
    RunLog(tmp_path, 30)
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.csv")] == ["10", "20"]
    (tmp_path / "metrics.csv").write_bytes(b"epoch,iteration\n\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.csv cannot be read"):
        RunLog(tmp_path, 30)


@pytest.mark.parametrize("room", [0, 300, 1500])
def test_a_full_disk_ends_the_log_with_one_sentence(tmp_path, room):
    from full_disk import room_for

    log = RunLog(tmp_path, 0) if room else None
    with room_for(room), pytest.raises(UserError, match=r"^(cannot write )?\S*metrics\.csv.*: File too large$"):
        log = log or RunLog(tmp_path, 0)
        for iteration in range(1, 100):
            log.write({"epoch": 1, "iteration": iteration, "loss": 1.5, "lr": 0.1})


def test_prediction_leaves_frozen_parts_frozen(config):
    model = RTMDet("nano", class_names=["a"])
    model.train()
    model.backbone.eval()
    image = np.zeros((40, 40, 3), np.uint8)
    model.predict(image)
    assert model.training and model.neck.training and not any(m.training for m in model.backbone.modules())
    for name in ("batch_size", "max_detections"):
        with pytest.raises(UserError, match=f"{name} is -1"):
            model.predict(image, **{name: -1})


def test_the_learning_rate_goes_by_the_images_of_all_processes(config, monkeypatch):
    one = resolve(replace(config, batch_size=8)).lr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve(replace(config, batch_size=4)).lr == one == pytest.approx(4e-3 * (8 / 256) ** 0.5)


@pytest.mark.parametrize(("task", "steps", "times"), [("det", 12, 2), ("det", 4 * 2000, 1.426), ("rotated", 12, 1)])
def test_a_short_run_has_a_higher_learning_rate_and_many_plain_epochs(config, capsys, task, steps, times):
    class Ended(Exception):
        pass

    class First(Callback):
        def on_step(self, progress):
            raise Ended

    config = replace(config, task=task, epochs=steps // 4, stage2_epochs=None, lr=None, loggers=(), progress=True)
    with pytest.raises(Ended):
        train(config, callbacks=[First()])
    told = json.loads((config.out / "config.json").read_text())
    published = 2.5e-4 * (4 / 8) ** 0.5 if task == "rotated" else 4e-3 * (4 / 256) ** 0.5
    assert told["lr"] == pytest.approx(published * times, rel=1e-3)
    assert told["stage2_epochs"] == (0 if task == "rotated" else min(20, steps // 8))
    assert (f"{times:.2f} times that in so few steps" in capsys.readouterr().out) == (times > 1)


def interrupt_evaluation(monkeypatch, at: int):
    """`train` is interrupted in the validation with that number, counted from 1."""
    evaluate, calls = train_module.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train_module, "evaluate", interrupted)


def test_nothing_of_an_old_run_is_left_where_a_new_one_is_interrupted(config, monkeypatch):
    train(replace(config, report=True))
    (config.out / "mine.txt").write_text("not the run's")
    old = {path.name for path in config.out.iterdir() if path.name.startswith("events")}
    interrupt_evaluation(monkeypatch, at=1)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, overwrite=True))
    left = {path.name for path in config.out.iterdir()}
    assert not left & (old | {"best.pth", "report.html", "metrics.json", "detections.json"})
    assert "mine.txt" in left
    state = weights(config.out / "last.pth", "training")  # of the new run, before its first validation
    assert state["epoch"] == 0 and state["step"] == state["iteration"] == 4


def test_the_state_is_the_first_to_go_with_an_old_run(config, monkeypatch):
    """Wherever a crash comes while the old run is deleted, there is nothing of it to resume."""
    train(replace(config, epochs=1, stage2_epochs=0))
    gone = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: gone.append(path.name))
    remove_run(config.out)
    assert gone[0] == "last.pth" and {"best.pth", "metrics.csv", "config.json"} < set(gone)


def test_a_mistake_costs_no_run(config):
    done = train(replace(config, epochs=1, stage2_epochs=0))
    with pytest.raises(UserError):
        train(replace(config, overwrite=True, init="no such weights"))
    assert done.last.exists() and done.best.exists()


def test_running_means_go_on_where_a_run_is_resumed(config, tmp_path, monkeypatch):
    """The row of iteration 6 is the mean over steps of two epochs, the first of which was before the interruption."""
    monkeypatch.setattr(train_module, "LOG_EVERY", 6)
    config = replace(config, val_interval=2)
    train(config)
    broken = replace(config, out=tmp_path / "broken")
    with monkeypatch.context() as patched:
        interrupt_evaluation(patched, at=1)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(replace(broken, resume=True))
    drop = {"images_per_second", "data_wait"}
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(out / "metrics.csv")]
        for out in (config.out, broken.out)
    ]
    assert logs[0] == logs[1] and logs[0][0]["iteration"] == "6"


def test_a_crash_while_a_log_is_taken_up_again_costs_no_row(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0)
    for iteration in (10, 20, 30):
        log.write({"epoch": 1, "iteration": iteration, "loss": 1.5})
    before = (tmp_path / "metrics.csv").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, 20)
    assert (tmp_path / "metrics.csv").read_text() == before
    RunLog(tmp_path, 20)
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.csv")] == ["10", "20"]


def changed_classes(config, tmp_path, change):
    content = json.loads(config.val.read_text())
    change(content)
    val = tmp_path / "val.json"
    val.write_text(json.dumps(content))
    return replace(config, val=val, epochs=1, stage2_epochs=0, report=True)


@pytest.mark.parametrize("kind", ["one more", "another order"])
def test_validation_classes_are_those_of_training(config, tmp_path, monkeypatch, kind):
    def change(content):
        if kind == "one more":
            new = {"id": 99, "name": "zebra"}
            content["categories"].insert(0, new)
            content["annotations"].append({**content["annotations"][0], "id": 10**6, "category_id": 99})
        else:
            content["categories"].reverse()

    drawn = []
    write = run_report.write_report

    def written(path, **parts):
        drawn.extend(parts["samples"])
        assert "zebra" not in parts["evaluation"]["per_class"]
        return write(path, **parts)

    monkeypatch.setattr(run_report, "write_report", written)
    train(changed_classes(config, tmp_path, change))
    content = json.loads(config.train.read_text())
    names = [category["name"] for category in content["categories"]]
    of_id = {category["id"]: category["name"] for category in content["categories"]}
    truth = json.loads(config.val.read_text())
    image_ids = {image["file_name"]: image["id"] for image in truth["images"]}
    for sample in drawn:
        ident = next(i for name, i in image_ids.items() if name.endswith(os.path.basename(sample.result.path)))
        expected = sorted(of_id[a["category_id"]] for a in truth["annotations"] if a["image_id"] == ident)
        assert sorted(names[label] for label in sample.gt_labels) == expected


def test_other_names_of_as_many_classes_are_told(config, tmp_path):
    def change(content):
        for category in content["categories"]:
            category["name"] = f"other {category['name']}"

    with pytest.warns(UserWarning, match="none of the classes wanted"):
        train(replace(changed_classes(config, tmp_path, change), report=False))
    model = RTMDet("nano", class_names=tuple("abcde"))
    model.save(tmp_path / "other.pth")
    with pytest.warns(UserWarning, match=r"its classes \(a, b, c, d, e, …\) are taken for those of the training data"):
        train(replace(config, out=tmp_path / "b", epochs=1, stage2_epochs=0, init=str(tmp_path / "other.pth")))


def test_the_line_of_an_epoch_has_a_dash_for_what_was_not_measured(config, tmp_path, capsys):
    content = json.loads(config.val.read_text())
    content["annotations"] = []
    val = tmp_path / "val.json"
    val.write_text(json.dumps(content))
    train(replace(config, val=val, epochs=1, stage2_epochs=0, progress=True))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1: "))
    assert line.endswith(", AP -, AP50 -")


def test_the_line_of_an_epoch_has_the_loss_and_few_figures(config, capsys):
    train(replace(config, task="ins", epochs=1, stage2_epochs=0, progress=True))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1: "))
    assert [figure.split()[0] for figure in line.split(": ")[1].split(", ")] == [
        "loss",
        "AP",
        "AP50",
        "segm_AP",
        "segm_AP50",
    ]


def test_another_assigner_trains_and_the_run_goes_on_by_it_alone(config):
    matched = set()

    class Watch(Callback):
        def on_step(self, progress):
            matched.add(progress.model.bbox_head.assigner)

    started = replace(config, epochs=1, stage2_epochs=0)
    train(replace(started, assigner="task_aligned"), callbacks=[Watch()])
    assert matched == {"task_aligned"}
    assert json.loads((config.out / "config.json").read_text())["assigner"] == "task_aligned"
    with pytest.raises(UserError, match=r"--assigner is atss, but the run in .* has task_aligned"):
        train(replace(started, assigner="atss", resume=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(assigner="hungarian"), "--assigner 'hungarian' is unknown; choose one of soft_label, simota, "),
        (dict(assigner="atss", model="rtdetr", size=None), "--assigner atss is for --model rtmdet"),
    ],
)
def test_assigners_that_there_are_not(config, change, words):
    with pytest.raises(UserError, match=words):
        resolve(replace(config, **change))
