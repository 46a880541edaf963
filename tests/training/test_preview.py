"""train --preview: what is drawn is what a run would see, of both stages, and nothing is trained."""

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast.cli import main
from rtmdet_fast.data.augment import Batch
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.training import preview as module
from rtmdet_fast.training.config import TrainConfig, resolve
from rtmdet_fast.training.preview import draw_batch, sheet, write_previews


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=2, image_size=64)


@pytest.fixture
def config(shapes, tmp_path):
    def make(**changes):
        settings = dict(
            data=(shapes.root,),
            out=tmp_path / "run",
            image_size=64,
            batch_size=4,
            epochs=4,
            stage2_epochs=1,
            num_workers=0,
            device="cpu",
            progress=False,
        )
        return TrainConfig(**settings | changes)

    return make


@pytest.mark.parametrize(
    "model", [dict(task="det"), dict(task="ins"), dict(task="rotated"), dict(model="rtdetr", version=1)], ids=str
)
def test_both_stages_are_drawn_and_nothing_is_trained(config, model, tmp_path):
    made = write_previews(config(**model))
    assert [(preview.stage, preview.images) for preview in made] == [(1, 4), (1, 4), (2, 4), (2, 4)]
    for preview in made:
        picture = cv2.imread(str(preview.path))
        assert picture.shape == (2 * preview.side + 4, 2 * preview.side + 4, 3)
        assert preview.objects and (preview.stage == 1 or preview.side == 64)
    left = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*"))
    assert left == [f"preview/stage{stage}_{number}.jpg" for stage in (1, 2) for number in (1, 2)]


def test_the_seed_decides_with_workers_or_without(config, tmp_path):
    def pixels(**changes):
        return [preview.path.read_bytes() for preview in write_previews(config(out=tmp_path / "other", **changes))]

    first = pixels()
    assert first == pixels(num_workers=1) and first != pixels(seed=1)
    assert len(set(first)) == 4


@pytest.mark.parametrize(("stage2_epochs", "stages"), [(0, [1, 1]), (4, [2, 2])])
def test_a_stage_that_the_run_lacks_is_not_drawn(config, stage2_epochs, stages):
    assert [preview.stage for preview in write_previews(config(stage2_epochs=stage2_epochs))] == stages


class Labels:
    """All that plans need of a data set: the first of eight images alone holds class 1."""

    labels_by_image = (np.array([0, 1]), *[np.array([0])] * 7)

    def __len__(self):
        return 8


def plans_of(settings, stage2, batches):
    return [plan for batch in module._plans(Labels(), settings, stage2, batches) for plan in batch]


def test_mosaics_are_of_full_caches(config):
    settings = resolve(config(size="s", batch_size=3))
    plans = plans_of(settings, False, 2)
    assert len(plans) == 2 * 3
    assert {len(plan.mosaic_cache) for plan in plans} == {40} and {len(plan.mixup_cache) for plan in plans} == {20}
    assert not any(plan.mosaic_cache for plan in plans_of(settings, True, 2))


def test_repeated_images_are_seen_as_often_as_in_the_run(config):
    shares = [
        np.mean([plan.index == 0 for plan in plans_of(resolve(config(repeat_threshold=threshold)), True, 200)])
        for threshold in (None, 1.0)
    ]
    assert shares == pytest.approx([1 / 8, 8**0.5 / (7 + 8**0.5)], abs=0.02)


def test_truth_stands_where_the_batch_has_it():
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    boxes = torch.zeros(2, 2, 4)
    boxes[0, 0] = torch.tensor([8.0, 16, 40, 48])
    masks = torch.zeros(2, 2, 16, 16, dtype=torch.uint8)
    masks[0, 0, 5:11, 3:8] = 1  # rows 20 to 44, columns 12 to 32
    labels = torch.tensor([[0, -1], [-1, -1]])
    batch = Batch(images, boxes, labels, torch.tensor([1, 0]), torch.zeros(2, 2, 2), masks)
    first, second = draw_batch(batch, ("car",))
    assert (second == 255).all()
    changed = np.argwhere((first != 255).any(2))
    assert changed[:, 0].max() in (48, 49) and changed[:, 1].min() in (7, 8)
    filled = (first[18:46, 10:38] != 255).any(2)
    assert filled[3:25, 3:21].all() and not filled[:, 24:26].any() and not filled[:1, 3:21].any()
    (alone,) = draw_batch(batch, ("car",), most=1)
    np.testing.assert_array_equal(alone, first)


def test_a_sheet_holds_every_image():
    images = [np.full((8, 6, 3), value, np.uint8) for value in range(5)]
    made = sheet(images, gap=2)
    assert made.shape == (2 * 8 + 2, 3 * 6 + 2 * 2, 3)
    for i, image in enumerate(images):
        y, x = i // 3 * 10, i % 3 * 8
        np.testing.assert_array_equal(made[y : y + 8, x : x + 6], image)
    assert (made[10:, 16:] == 255).all() and (made[8:10] == 255).all()


def test_from_the_command_line_a_run_is_left_as_it_is(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.pth").write_bytes(b"a run")
    arguments = ["--image-size", "64", "--batch-size", "2", "--epochs", "2", "--num-workers", "0", "--no-progress"]
    told = tmp_path / "told.json"
    command = ["train", "--data", str(shapes.root), "--out", str(out), "--preview", *arguments, "--json", str(told)]
    assert main(command) == 0
    assert (out / "last.pth").read_bytes() == b"a run" and not (out / "metrics.csv").exists()
    assert f"{out}/preview/stage1_1.jpg: stage 1, 2 images of 64 px" in capsys.readouterr().out
    assert '"stage": 2' in told.read_text()


def test_bad_input_is_one_sentence(shapes, tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path / "nowhere"), "--preview"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
