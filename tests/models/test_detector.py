"""RTMDet.predict: what it takes, and that boxes come back in pixels of the original image."""

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import Results, RTMDet, UserError
from rtmdet_fast.inference.detections import Detections


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RTMDet("nano", class_names=("a", "b")).eval()
    for conv in model.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    return model


@pytest.fixture
def image():
    return np.random.default_rng().integers(0, 255, (48, 80, 3), np.uint8)


def test_arrays_paths_and_pil_images_give_the_same(model, image, tmp_path):
    from PIL import Image

    cv2.imwrite(str(tmp_path / "x.png"), image)
    sources = [image, tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(image[..., ::-1])]
    results = model.predict(sources, score_threshold=0.0, image_size=64)
    assert all(isinstance(result, Results) for result in results) and len(results) == 4
    assert len(results[0]) > 0
    for result in results[1:]:
        torch.testing.assert_close(result.boxes, results[0].boxes)
        torch.testing.assert_close(result.scores, results[0].scores)
    assert [result.path for result in results] == [None, str(tmp_path / "x.png"), str(tmp_path / "x.png"), None]


def test_one_image_and_a_list(model, image):
    single = model.predict(image, score_threshold=0.0, image_size=64)
    assert isinstance(single, Results)
    assert single.names == ("a", "b") and single.shape == (48, 80)
    assert single.boxes.shape == (len(single), 4) and single.labels.dtype == torch.int64
    assert single.scores.diff().le(0).all()
    assert model.predict([], image_size=64) == []


def test_batches_do_not_change_the_answer(model):
    rng = np.random.default_rng()
    images = [rng.integers(0, 255, (rng.integers(20, 90), rng.integers(20, 90), 3), np.uint8) for _ in range(5)]
    together = model.predict(images, score_threshold=0.0, image_size=64, batch_size=5)
    for one, result in zip(images, together, strict=True):
        alone = model.predict(one, score_threshold=0.0, image_size=64)
        assert len(alone) == len(result)
        torch.testing.assert_close(alone.scores, result.scores, rtol=1e-4, atol=1e-5)


def test_boxes_are_pixels_of_the_original_image_and_stay_inside(model, monkeypatch):
    found = Detections(
        torch.tensor([[8.0, 4, 40, 20], [50, 20, 64, 64], [10, 40, 20, 60]]), torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([0, 1, 0]), torch.arange(3),
    )  # fmt: skip
    monkeypatch.setattr(model.bbox_head, "detect", lambda *args, **kwargs: [found])
    result = model.predict(np.zeros((60, 120, 3), np.uint8), image_size=64)
    # 120 x 60 goes to 64 x 32; the second box reaches into the padding, the third lies in it.
    scale = 120 / 64
    expected = torch.tensor([[8 * scale, 4 * scale, 40 * scale, 20 * scale], [50 * scale, 20 * scale, 120, 60]])
    torch.testing.assert_close(result.boxes, expected)
    assert result.labels.tolist() == [0, 1]


def test_a_model_in_training_stays_in_training(model, image):
    model.train()
    before = model.backbone.stem[0].bn.running_mean.clone()
    model.predict(image, image_size=64)
    assert model.training and torch.equal(before, model.backbone.stem[0].bn.running_mean)
    model.eval()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(score_threshold=1.5), "score_threshold"),
        (dict(iou_threshold=-0.1), "iou_threshold"),
        (dict(image_size=65), "multiple of 32"),
    ],
)
def test_bad_options(model, image, options, word):
    with pytest.raises(UserError, match=word):
        model.predict(image, **options)


@pytest.mark.parametrize(
    "source", ["missing.jpg", 7, np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.float32), None]
)
def test_bad_images(model, source):
    with pytest.raises(UserError):
        model.predict(source, image_size=64)


def test_the_high_score_of_a_nan_image_is_no_detection(model, image, monkeypatch):
    """Weights gone wrong give no detections, and no crash."""
    broken = RTMDet("nano", class_names=("a", "b")).eval()
    with torch.no_grad():
        broken.bbox_head.rtm_reg[0].weight.fill_(float("nan"))
    assert all(torch.isfinite(r.boxes).all() for r in [broken.predict(image, score_threshold=0.0, image_size=64)])


def test_rgb_arrays_are_said_to_be_so(model, image):
    from PIL import Image

    expected = model.predict(image, score_threshold=0.0, image_size=64)
    rgb = image[..., ::-1]
    alpha = np.concatenate([rgb, rgb[..., :1]], 2)
    for source in (rgb, alpha, rgb.astype(np.uint16) * 257, Image.fromarray(rgb)):
        found = model.predict(source, color="rgb", score_threshold=0.0, image_size=64)
        assert torch.equal(found.scores, expected.scores) and np.array_equal(found.image, image)
    assert np.array_equal(model.predict(rgb, image_size=64).image, rgb)
    grey = image[..., 0]
    assert np.array_equal(model.predict(grey, color="rgb", image_size=64).image, np.stack([grey] * 3, 2))
    with pytest.raises(UserError, match=r"^color 'RGB' is unknown; choose one of bgr, rgb$"):
        model.predict(image, color="RGB")


def test_rgb_files_stay_what_they_are(model, image, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), image)
    assert np.array_equal(model.predict(tmp_path / "x.png", color="rgb", image_size=64).image, image)


def test_predict_sees_every_write_to_the_weights(model, image):
    """Those too that PyTorch's version counters do not see."""
    weight = model.bbox_head.rtm_reg[0].bias
    writes = (
        lambda: weight.data.add_(0.5),
        lambda: np.add(weight.detach().numpy(), 0.5, out=weight.detach().numpy()),
        lambda: torch.nn.init.constant_(weight, 0.2),
    )
    seen = [model.predict(image, score_threshold=0.0, image_size=64).boxes]
    before = weight.detach().clone()
    try:
        for write in writes:
            write()
            seen.append(model.predict(image, score_threshold=0.0, image_size=64).boxes)
            assert seen[-1].shape != seen[-2].shape or not torch.allclose(seen[-1], seen[-2])
    finally:
        weight.data.copy_(before)


def test_on_a_cpu_the_network_runs_in_channels_last(model, image):
    """Whatever layout its weights have."""
    layouts = []
    handles = [
        module.register_forward_hook(
            lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    model.predict(image)
    for handle in handles:
        handle.remove()
    assert len(layouts) > 30 and all(layouts)
